"""The chapter in a real JupyterLab: headless Chromium, Run All, move the widget. Screenshots go to tests/artefacts/."""
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

HERE = Path(__file__).parent
CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab over a copy of the chapters (it saves what it runs): the address of its first page with a token."
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
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5); break
            except OSError: time.sleep(0.5)
        else: pytest.fail("JupyterLab did not start:\n"+(tmp_path/"lab.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.send_signal(signal.SIGINT)
        server.send_signal(signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()


@pytest.fixture
def page():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra [dev]")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which(CHROMIUM), args=FLAGS)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        yield page
        (HERE/"artefacts").mkdir(exist_ok=True)
        page.screenshot(path=HERE/"artefacts"/"lab-last.png")
        browser.close()


def run_all(page, timeout_s=180):
    "Menu Run, Run All Cells, and wait until the kernel is idle and each code cell has its number."
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
    page.get_by_text("(ipykernel) | Idle").wait_for(timeout=60_000)        # before that, Run All would ask for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="busy"]', timeout=30_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=timeout_s*1000)


PLAY = ".jp-CodeCell:has(.noUi-handle)"                    # the cell of the widget: sliders, a line of text, the figure
DRAWN = """() => { const e = document.querySelector('%s .js-plotly-plot'); return e && JSON.stringify([
    [...e.querySelectorAll('.scatterlayer path.point')].map(p => p.getAttribute('transform')),
    [...e.querySelectorAll('.scatterlayer text')].map(t => t.textContent)]) }""" % PLAY


def errors(page):
    "The text of each error output (JupyterLab gives tracebacks and stderr the same type)."
    mime = "application/vnd.jupyter.stderr"
    return page.eval_on_selector_all(f'[data-mime-type="{mime}"]', "found => found.map(e => e.innerText)")


def scroll_to(page, selector):
    page.wait_for_selector(selector, state="attached", timeout=30_000)
    page.eval_on_selector(selector, "e => e.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(700)


def test_riann_chapter_in_jupyterlab(lab, page):
    shots = HERE/"artefacts"
    shots.mkdir(exist_ok=True)
    strangers, faults = [], []
    page.on("request", lambda r: re.match(r"(https?|wss?)://(?!127\.0\.0\.1)", r.url) and strangers.append(r.url))
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(lab.format("07_riann.ipynb"))
    run_all(page)
    page.screenshot(path=shots/"riann-top.png")
    scroll_to(page, f"{PLAY} .js-plotly-plot")
    page.wait_for_selector(f"{PLAY} .scatterlayer path.point", timeout=30_000)
    page.screenshot(path=shots/"riann-play-default.png")

    before = page.evaluate(DRAWN)
    page.locator(f"{PLAY} .noUi-handle").first.focus()
    for _ in range(4): page.keyboard.press("ArrowRight")   # a reader moves the first slider
    changed = f"before => {{ const now = ({DRAWN})(); return now && now !== before && now }}"
    after = page.wait_for_function(changed, arg=before, timeout=20_000).json_value()
    assert after.count("translate") > before.count("translate")    # the new point joins the old ones
    page.wait_for_timeout(1000)
    page.screenshot(path=shots/"riann-play-moved.png")

    for i, plot in enumerate(page.locator(".jp-OutputArea .js-plotly-plot").all()):
        plot.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        plot.screenshot(path=shots/f"riann-figure-{i}.png")
    assert errors(page) == []
    assert faults == [] and strangers == []
