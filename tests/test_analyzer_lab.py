"""Telemetry in a real JupyterLab (headless Chromium), under papermill and under `opml run`: what is kept, and what never is."""
import json
import os
import subprocess
import sys
import time

import nbformat
import pytest

from opml_wb.analyzer import Events
from figures import CHROMIUM
from test_lab import Lab, free_port, page, run_all  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow
SECRETS = "s3cret-environment", "s3cret-source", "s3cret-message", "s3cret-value"
CELLS = ["import ipywidgets as w, os; a = 1", "password = 's3cret-source'",
         "s = w.IntSlider(value=3, description='s3cret-value'); b = w.Button(description='go')\nw.VBox([s, b])",
         "raise KeyError('s3cret-message')"]


def notebook(path, cells=CELLS):
    "Write a notebook of code cells."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)
    return path


@pytest.fixture
def place(tmp_path):
    "A user's environment of its own, with telemetry on and a secret in it."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPML_", "JUPYTER_"))}
    env.update(OPML_HOME=str(tmp_path/"home"), IPYTHONDIR=str(tmp_path/"ipython"), TOKEN=SECRETS[0],
               JUPYTER_CONFIG_DIR=str(tmp_path/"config"), OPML_USER="Ada Lovelace",
               JUPYTERLAB_SETTINGS_DIR=str(tmp_path/"settings"), JUPYTERLAB_WORKSPACES_DIR=str(tmp_path/"workspaces"))
    opml(env, "telemetry", "on")
    return tmp_path, env


def opml(env, *args, code=0):
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *args], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def events(tmp_path): return Events(tmp_path/"home"/"telemetry.db").frame()


def wait_for(tmp_path, enough, limit=120):
    "Wait until the events are as expected; returns them."
    until = time.monotonic() + limit
    while True:
        found = events(tmp_path)
        if enough(found) or time.monotonic() > until: return found
        time.sleep(.5)


def nothing_leaked(tmp_path, env):
    "No secret, and no name, in any file of the home, nor in what the commands print or export."
    said = opml(env, "telemetry", "show", "-n", "1000") + opml(env, "telemetry", "status")
    opml(env, "telemetry", "export", str(tmp_path/"out.csv"))
    opml(env, "telemetry", "export", str(tmp_path/"out.parquet"))
    texts = {p: p.read_bytes() for p in [*(tmp_path/"home").glob("telemetry*"), tmp_path/"out.csv", tmp_path/"out.parquet"]}
    for secret in (*SECRETS, "Lovelace"):
        assert secret not in said
        assert not [p for p, text in texts.items() if secret.encode() in text]


def cells(frame): return frame[(frame.feature == "cell")]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_notebook_in_jupyterlab(place, page):  # noqa: F811
    "Four cells of which one fails, a slider moved by keys, a button: 4 cell events, 1 error name, a move each, 1 open, no echoes."
    tmp_path, env = place
    (tmp_path/"work").mkdir()
    notebook(tmp_path/"work"/"mine.ipynb")
    port, token = free_port(), "t" * 32
    quiet = tmp_path/"settings"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = open(tmp_path/"lab.log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path/'work'}"], env=env, stdout=log, stderr=log)
    lab = Lab(tmp_path, port, token)
    try:
        for _ in range(240):
            try: lab.ask("GET", "status"); break
            except OSError: time.sleep(.5)
        page.goto(lab.format("mine.ipynb"))
        run_all(page)
        handle = ".noUi-handle"
        page.wait_for_selector(handle)
        page.focus(handle)
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(1500)
        page.keyboard.press("ArrowRight")
        page.get_by_role("button", name="go", exact=True).click()
        found = wait_for(tmp_path, lambda f: len(cells(f)) >= 4 and set(f.name) >= {"set", "click"})
        found = wait_for(tmp_path, lambda f: (f.name == "set").sum() >= 2, 20)
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    assert len(cells(found)) == 4 and cells(found).name.tolist() == ["ok", "ok", "ok", "KeyError"]
    moves = found[found.source == "tap"].name
    assert set(moves) == {"set", "click"} and (moves == "click").sum() == 1 and 1 <= (moves == "set").sum() <= 2
    assert (found[found.feature == "notebook"].name == "open").sum() == 1
    assert found.user.nunique() == 1
    nothing_leaked(tmp_path, env)


@pytest.mark.parametrize("how", ["papermill", "opml run"])
@pytest.mark.parametrize("fails", [False, True])
def test_runs_without_a_front_end(place, how, fails):
    "Stock papermill and `opml run` leave the same events of cells, in success and failure."
    tmp_path, env = place
    path = notebook(tmp_path/"mine.ipynb", CELLS if fails else CELLS[:3])
    if how == "papermill":
        done = subprocess.run([sys.executable, "-m", "papermill", str(path), str(tmp_path/"out.ipynb")], env=env, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr[-2000:]
    else: opml(env, "run", str(path), code=1 if fails else 0)
    found = wait_for(tmp_path, lambda f: len(cells(f)) >= 3 + fails, 30)
    assert cells(found).name.tolist() == ["ok"] * 3 + ["KeyError"] * fails
    if how == "opml run":
        end = found[found.feature == "run"]
        assert end.name.tolist() == ["exception" if fails else "done"]
        command = found[found.feature == "opml"].iloc[-1]
        assert command["name"] == "run" and json.loads(command["data"])["exit"] == int(fails)
    nothing_leaked(tmp_path, env)


def test_off_again(place):
    "After `off` nothing is loaded and nothing is added."
    tmp_path, env = place
    opml(env, "telemetry", "off")
    assert not list((tmp_path/"ipython").rglob("*telemetry*")) and not (tmp_path/"config"/"jupyter_server_config.d"/"opml_wb.json").exists()
    before = len(events(tmp_path))
    opml(env, "run", str(notebook(tmp_path/"mine.ipynb", CELLS[:2])))
    assert len(events(tmp_path)) == before
