"""What the tests share: a home of their own, notebooks made on the spot, and the command `opml` as users type it."""
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import pytest

from opml_wb.core.kit.lazy import light_jsonschema

light_jsonschema()  # nearly two seconds less of each process, as in our own
import nbformat  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # as under nohup
for name in ("OPML_STORE", "OPML_ARTIFACTS"): os.environ.pop(name, None)  # the tests use stores of their own
# as users have it: compiled modules are kept, output into a pipe waits in a buffer
for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"): os.environ.pop(name, None)
BEGAN = dict(os.environ)    # libraries that tests use set variables (TORCHINDUCTOR_CACHE_DIR), which a run may have asked for


@pytest.fixture(scope="module", autouse=True)
def zygotes():
    "The zygotes that a file's tests start serve all of them."
    yield
    if engine := sys.modules.get("opml_wb.core.engine.zygote"): engine.close_all()


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A run store of this test's own."
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def chapters_home(tmp_path_factory):
    """The home in which chapters are executed once for all tests that need their results, in all of pytest's processes;
    `OPML_TEST_HOME` names one that has some already."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = Path(os.environ.get("OPML_TEST_HOME") or base / "chapters").absolute()
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def executed(chapters_home):
    """executed(chapter) -> Run at its defaults, or at its preset `quick` where it has one; from `chapters_home` if it was executed."""
    import fcntl

    from opml_wb.core.engine.run import run
    from opml_wb.core.engine.zygote import close_all
    from opml_wb.core.request.chapter import find

    def call(chapter):
        found = find(chapter)
        preset = "quick" if "quick" in found.meta.get("presets", {}) else None
        with pytest.MonkeyPatch.context() as patch, open(chapters_home / f".{found.name.replace('/', '-')}.lock", "w") as lock:
            for name in {*os.environ} - {*BEGAN}: patch.delenv(name)
            for name, value in {**BEGAN, "OPML_HOME": str(chapters_home)}.items(): patch.setenv(name, value)
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be executing it
            return run(found, preset=preset, timeout=600)
    yield call
    close_all()


@pytest.fixture(scope="module")
def browser():
    "A Chromium that finds nothing but this machine."
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra [dev]")
    import figures
    with sync_api.sync_playwright() as p:
        browser = figures.browser_of(p)
        yield browser
        browser.close()


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
def typed(capfd, monkeypatch):
    "typed(*args, env={}) -> what `opml` would end with, asked in this process: quicker where another one adds nothing."
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)     # `main` sets its own

    def call(*args, env={}):
        from opml_wb.core.cli.verbs import main
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            for name, value in env.items(): patch.setenv(name, value)
            capfd.readouterr()
            main([str(a) for a in args])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(args, end.value.code or 0, out, err)
    return call


@pytest.fixture
def answer(opml):
    "answer(*args) -> (exit code, the JSON object on stdout) of `opml run ... --json`."
    def call(*args, **options):
        done = opml("run", *args, "--json", **options)
        return done.returncode, json.loads(done.stdout)
    return call


class Server:
    """A PostgreSQL server of the tests' own on loopback, from the installed binaries; as user `postgres` when we are root,
    which the server refuses to be. It has a password, and its folder goes with it."""
    def __init__(self, bin, folder):
        self.bin, self.folder, self.password = bin, folder, f"pw-{secrets.token_hex(8)}"
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        if self.user: shutil.chown(folder, "postgres", "postgres")
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        (folder / "pw").write_text(self.password); (folder / "pw").chmod(0o644)
        self.call("initdb", "-D", "data", "-U", "tests", "-A", "scram-sha-256", "--pwfile=pw", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def call(self, command, *args):
        done = subprocess.run([self.bin / command, *args], cwd=self.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, **self.user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self.folder} -c fsync=off"
        subprocess.run([self.bin / "pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start"], cwd=self.folder, check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.user)

    def stop(self): self.call("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    @property
    def url(self): return f"postgresql://tests:{self.password}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="session")
def pg_server():
    "A Server, begun when first needed. Skips where there are no binaries, or no psycopg."
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'opml_wb[pg]'")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3])) or [Path(p) for p in [shutil.which("initdb")] if p]
    if not found: pytest.skip("no PostgreSQL here: apt-get install postgresql, or OPML_TEST_PG=postgresql://USER:PW@HOST/DB")
    folder = Path(tempfile.mkdtemp(prefix="opml-pg-"))
    try: server = Server(found[-1].parent, folder)
    except KeyError: pytest.skip("PostgreSQL refuses to run as root, and there is no user `postgres`")
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(request):
    "URL of an empty database of this test's own, on the server that `OPML_TEST_PG` names, else on one of the tests' own."
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg: pip install 'opml_wb[pg]'")
    base = os.environ.get("OPML_TEST_PG") or request.getfixturevalue("pg_server").url
    name = f"opml_test_{secrets.token_hex(6)}"
    with psycopg.connect(base, autocommit=True) as db: db.execute(f"create database {name}")
    head, _, _ = base.partition("?")[0].rpartition("/")
    yield f"{head}/{name}"
    with psycopg.connect(base, autocommit=True) as db: db.execute(f"drop database {name} with (force)")


INFLUX = """reporting-disabled = true
bind-address = "127.0.0.1:{rpc}"
[meta]
  dir = "{folder}/meta"
[data]
  dir = "{folder}/data"
  wal-dir = "{folder}/wal"
[monitor]
  store-enabled = false
[http]
  bind-address = "127.0.0.1:{http}"
  log-enabled = false
"""

def free_ports(n):
    "Ports on loopback that nobody listens on."
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


@pytest.fixture(scope="session")
def influx_server():
    "URL influx://127.0.0.1:PORT of an InfluxDB 1.x of the tests' own, begun when first needed. Skips where there is none."
    binary = shutil.which("influxd")
    if not binary: pytest.skip("no InfluxDB 1.x here: apt-get install influxdb")
    folder, (http, rpc) = tempfile.mkdtemp(prefix="opml-influx-"), free_ports(2)
    Path(folder, "conf").write_text(INFLUX.format(folder=folder, http=http, rpc=rpc))
    with open(Path(folder, "log"), "wb") as log:
        server = subprocess.Popen([binary, "-config", f"{folder}/conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "HOME": folder})
    def answers():
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", http)) == 0
    if not until(answers, 30): server.kill(); pytest.fail(Path(folder, "log").read_text()[-2000:])
    yield f"influx://127.0.0.1:{http}"
    server.terminate()
    server.wait(20)
    shutil.rmtree(folder, ignore_errors=True)


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
    config.addinivalue_line("markers", "only(index): of the tests of the store, one that is about this index")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (CI does)")


HEAVY = (  # files and notebooks that take longest, so that they begin first
    "test_docs", "test_lab", "test_sweep", "test_flexserve_server", "test_figures", "test_cache", "test_dlspec_starting", "test_everywhere",
    "test_diagnostics_machine", "test_dlspec_running", "test_flexserve_rows", "test_words", "test_riann_index", "bench/04_sweep",
    "test_fidelity", "test_provenance_capture", "test_flexserve_lab", "test_analyzer_truth", "test_riann_store", "test_riann_graph",
    "bench/31_service", "test_eligibility", "bench/09_pipesim_ledger", "test_flexserve_engine", "test_provenance_questions",
    "test_flexserve_chapter", "test_author", "test_cli", "bench/16_analyzer", "bench/30_live_faults", "test_lab_sweep", "test_store_shared",
    "test_eligibility_lab", "test_form", "test_faults", "bench/05_samplers", "test_pipesim_engine", "bench/32_dlspec", "chapters/08_flexserve",
    "test_flexserve_attack", "bench/29_loop", "test_moderation_judge", "test_analyzer_lab", "test_explain_study", "bench/13_flexserve")


def group(nodeid):
    "A file's tests share its servers, so they stay in one process; source notebooks and chapters go where there is room."
    file, _, test = nodeid.partition("::")
    alone = re.match(r"(?:test_source_notebook|test_chapters_run)\[(.+)\]", test)
    return alone[1] if alone else Path(file).stem


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Groups by a rule, not by marks: pytest-xdist 3.8 cannot write those into the node ids of pytest 9.2."
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid): return group(nodeid)
    return Groups(config, log)


def pytest_collection_modifyitems(config, items):
    weight = {name: i for i, name in enumerate(HEAVY)}
    items.sort(key=lambda item: weight.get(group(item.nodeid), len(weight)))
    if config.getoption("--slow") or os.environ.get("CI"): return
    skip = pytest.mark.skip(reason="slow: pytest --slow, or CI=true")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)
