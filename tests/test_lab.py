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
    shutil.copytree(HERE.parent/"nbs"/"chapters", tmp_path/"chapters", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    port, token = free_port(), secrets.token_hex(16)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPML_RUN", "JUPYTER_"))}
    env.update(JUPYTER_CONFIG_DIR=str(tmp_path/"config"), JUPYTERLAB_SETTINGS_DIR=str(tmp_path/"settings"),
               JUPYTERLAB_WORKSPACES_DIR=str(tmp_path/"workspaces"), OPML_HOME=str(tmp_path/"home"))
    log = open(tmp_path/"lab.log", "w")
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
           f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path/'chapters'}", "--LabApp.news_url=None"]
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
        yield browser.new_page(viewport=dict(width=1280, height=1000))
        browser.close()


def run_all(page, timeout_s=180):
    "Menu Run, Run All Cells, and wait until the kernel is idle and each code cell has its number."
    page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=60_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="busy"]', timeout=30_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=timeout_s*1000)


def drawn(page):
    "The points of the live figure as the page shows them: each marker's place and the text beside it."
    return page.eval_on_selector(".jupyter-widgets .js-plotly-plot", """e => JSON.stringify([
        [...e.querySelectorAll('.scatterlayer path.point')].map(p => p.getAttribute('transform')),
        [...e.querySelectorAll('text')].map(t => t.textContent)])""")


def scroll_to(page, selector):
    page.eval_on_selector(selector, "e => e.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(500)


def test_riann_chapter_in_jupyterlab(lab, page):
    shots = HERE/"artefacts"
    shots.mkdir(exist_ok=True)
    strangers, faults = [], []
    page.on("request", lambda r: re.match(r"(https?|wss?)://(?!127\.0\.0\.1)", r.url) and strangers.append(r.url))
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(lab.format("07_riann.ipynb"))
    run_all(page)
    page.screenshot(path=shots/"riann-top.png")
    scroll_to(page, ".jupyter-widgets .js-plotly-plot")
    page.wait_for_selector(".jupyter-widgets .js-plotly-plot .scatterlayer path.point", timeout=30_000)
    page.screenshot(path=shots/"riann-play-default.png")

    before = drawn(page)
    for _ in range(3):                                     # a reader moves the first slider
        page.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
    page.wait_for_function("""before => JSON.stringify([
        [...document.querySelectorAll('.jupyter-widgets .js-plotly-plot .scatterlayer path.point')].map(p => p.getAttribute('transform')),
        [...document.querySelectorAll('.jupyter-widgets .js-plotly-plot text')].map(t => t.textContent)]) !== before""",
                           arg=before, timeout=20_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=30_000)
    assert drawn(page) != before
    page.screenshot(path=shots/"riann-play-moved.png")

    errors = page.eval_on_selector_all('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]', "es => es.map(e => e.innerText)")
    assert errors == []
    assert faults == [] and strangers == []
