"""What the tests share: a home of their own, notebooks made on the spot, and the command `opml` as users type it."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A run store of this test's own; its zygotes are closed afterwards."
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    from opml_wb.core.zygote import close_all
    close_all()


@pytest.fixture
def notebook(tmp_path):
    "notebook(*sources, name=, params=) -> path; the first cell is tagged `parameters` unless `params` is False."
    def make(*sources, name="nb", params=True, **metadata):
        cells = [nbformat.v4.new_code_cell(s) for s in sources]
        if params: cells[0].metadata["tags"] = ["parameters"]
        metadata.setdefault("kernelspec", {"name": "python3", "language": "python", "display_name": "Python 3"})
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
        return path
    return make


@pytest.fixture
def opml(home):
    "opml(*args) -> CompletedProcess of the command, in this test's home; `start=True` gives the Popen instead."
    def call(*args, start=False, **options):
        command = [sys.executable, "-m", "opml_wb.core.cli", *map(str, args)]
        env = {**os.environ, "OPML_HOME": str(home), **options.pop("env", {})}
        options = {"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, **options) if start else subprocess.run(command, timeout=120, **options)
    return call


@pytest.fixture
def answer(opml):
    "answer(*args) -> (exit code, the JSON object on stdout) of `opml run ... --json`."
    def call(*args, **options):
        done = opml("run", *args, "--json", **options)
        return done.returncode, json.loads(done.stdout)
    return call


def processes(marker):
    "Living processes whose environment or command line holds `marker`."
    out = []
    for p in psutil.process_iter(["pid"]):
        try:
            if p.status() != psutil.STATUS_ZOMBIE and (marker in " ".join(p.cmdline()) or marker in str(p.environ())): out.append(p)
        except psutil.Error: continue
    return out


def until(true, seconds=10.0):
    "Wait until `true()`; False when it did not become so in time."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true(): return True
        time.sleep(.05)
    return False


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs in CI and with --slow")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (CI does)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or os.environ.get("CI"): return
    skip = pytest.mark.skip(reason="slow: pytest --slow, or CI=true")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)
