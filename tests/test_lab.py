"""The chapter in a real JupyterLab: headless Chromium, Run All, move the widget. Screenshots go to tests/artefacts/."""
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from figures import CHROMIUM, strangers

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    "A JupyterLab over `folder`/chapters, whose runs go to `folder`/home."
    def __init__(self, folder, port, token): self.folder, self.port, self.token = folder, port, token

    def format(self, notebook): return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={self.token}&reset"

    def ask(self, method, path):
        "The JSON that its API answers."
        url = f"http://127.0.0.1:{self.port}/api/{path}?token={self.token}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer: return json.loads(answer.read() or "null")

    def close_kernels(self):
        for kernel in self.ask("GET", "kernels"): self.ask("DELETE", f"kernels/{kernel['id']}")


@pytest.fixture(scope="module")
def lab_server(tmp_path_factory):
    "A Lab over a copy of the chapters (it saves what it runs), one for all tests of a file."
    tmp_path = tmp_path_factory.mktemp("lab")
    shutil.copytree(HERE.parent/"nbs"/"chapters", tmp_path/"chapters", ignore=shutil.ignore_patterns(".ipynb*"))
    port, token = free_port(), secrets.token_hex(16)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPML_RUN", "JUPYTER_"))}
    env.update(JUPYTER_CONFIG_DIR=str(tmp_path/"config"), JUPYTERLAB_SETTINGS_DIR=str(tmp_path/"settings"),
               JUPYTERLAB_WORKSPACES_DIR=str(tmp_path/"workspaces"), OPML_HOME=str(tmp_path/"home"))
    quiet = tmp_path/"settings"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = open(tmp_path/"lab.log", "w")
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
           f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path/'chapters'}"]
    server = subprocess.Popen(cmd, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5); break
            except OSError: time.sleep(0.5)
        else: pytest.fail("JupyterLab did not start:\n"+(tmp_path/"lab.log").read_text()[-2000:])
        yield Lab(tmp_path, port, token)
    finally:
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()


@pytest.fixture
def lab(lab_server):
    "The Lab of this file; the kernels of a test end with it."
    yield lab_server
    lab_server.close_kernels()


@pytest.fixture
def page(browser):
    "A page whose waits are generous: a busy machine is no fault."
    context = browser.new_context(viewport=dict(width=1280, height=1000))
    page = context.new_page()
    page.set_default_timeout(300_000)
    yield page
    (HERE/"artefacts").mkdir(exist_ok=True)
    page.screenshot(path=HERE/"artefacts"/"lab-last.png")
    context.close()


def run_all(page, timeout_s=600):
    "Menu Run, Run All Cells, and wait until the kernel is idle and each code cell has its number."
    page.wait_for_selector(".jp-NotebookPanel-toolbar")
    page.get_by_text("(ipykernel) | Idle").wait_for()        # before that, Run All would ask for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="busy"]')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=timeout_s*1000)


CONTROL = ":is(.noUi-handle, .widget-dropdown select)"      # a slider or a menu
PLAY = f".jp-CodeCell:has({CONTROL})"                       # the cell of the widget: its controls, a line of text, the figure
DRAWN = """() => { const e = document.querySelector('%s .jp-OutputArea'); return e && JSON.stringify([
    [...e.querySelectorAll('.main-svg path, .main-svg rect, .main-svg image')].map(p => [p.getAttribute('transform'), p.getAttribute('d')]),
    [...e.querySelectorAll('.main-svg text, .widget-html-content')].map(t => t.textContent)]) }""" % PLAY

# texts of tables, widgets and outputs that can hardly be read on what lies behind them: [contrast, text]
CONTRAST = """() => {
  const rgba = s => { const n = (s.match(/[\\d.]+/g) ?? []).map(Number)
    return s.startsWith('color(') ? [...n.slice(0, 3).map(x => x * 255), n[3] ?? 1] : n }
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => { const v = c[i] / 255
    return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4) }, 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor)
    if (c.length < 4 ? c.length : c[3] > .5) return c } return [255, 255, 255] }
  const words = '.opml td, .opml th, .dataframe td, .dataframe th, .widget-label, .widget-readout, pre'
  return [...document.querySelectorAll(words)]
    .filter(e => e.innerText.trim() && e.offsetParent).map(e => {
      const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x)
      return [(a + .05) / (b + .05), e.innerText.slice(0, 40)] }).filter(([ratio]) => ratio < 3) }"""


def errors(page):
    """The text of each error output (JupyterLab gives tracebacks and stderr the same type), but for progress that has
    ended, which leaves an empty one, and what compiles once per machine and says so."""
    mime = "application/vnd.jupyter.stderr"
    texts = page.eval_on_selector_all(f'[data-mime-type="{mime}"]', "found => found.map(e => e.innerText)")
    return [t for t in texts if t.strip() and not re.fullmatch(r"\s*compiling .+, once per machine, about \d+ s \.\.\.\s+(done in [\d.]+ s)?\s*", t)]


def scroll_to(page, selector):
    page.locator(selector).first.evaluate("e => e.scrollIntoView({block: 'center'})")   # waits for one, should it be drawn anew
    page.wait_for_timeout(700)


@pytest.mark.parametrize("chapter", sorted(p.name for p in (HERE.parent/"nbs"/"chapters").glob("*.ipynb")))
def test_a_chapter_in_jupyterlab(lab, page, chapter):
    "Run All, then a reader moves the first slider, or takes another entry of the first menu: what the widget shows changes. Nothing fails, nothing is asked of elsewhere."
    shots, name = HERE/"artefacts", chapter.removesuffix(".ipynb")
    shots.mkdir(exist_ok=True)
    outside, faults = strangers(page), []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(lab.format(chapter))
    run_all(page)
    page.screenshot(path=shots/f"lab-{name}-top.png")
    scroll_to(page, f"{PLAY} {CONTROL}")
    page.wait_for_selector(f"{PLAY} .js-plotly-plot .main-svg")
    page.wait_for_timeout(500)
    page.screenshot(path=shots/f"lab-{name}-play-default.png")

    before, slider, menu = page.evaluate(DRAWN), page.locator(f"{PLAY} .noUi-handle"), page.locator(f"{PLAY} select")
    if slider.count():
        slider.first.focus()
        for _ in range(4): page.keyboard.press("ArrowRight")
    else: menu.first.select_option(index=1)
    began = time.monotonic()
    page.wait_for_function(f"before => {{ const now = ({DRAWN})(); return now && now !== before }}", arg=before)
    (shots/f"lab-{name}-answer.txt").write_text(f"{time.monotonic() - began:.2f} s from the last key to a changed widget\n")
    page.wait_for_timeout(1000)
    page.screenshot(path=shots/f"lab-{name}-play-moved.png")

    for i, plot in enumerate(page.locator(".jp-OutputArea .js-plotly-plot").all()):
        plot.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        plot.screenshot(path=shots/f"lab-{name}-figure-{i}.png")
    assert errors(page) == []
    assert faults == [] and outside == []
