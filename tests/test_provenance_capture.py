"""Capture from below: every real operation, attributed to process and cell; whoever is killed, the user's work isn't harmed."""
import ctypes
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from conftest import until

from opml_wb.core.kit.files import read_lines
from opml_wb.core.engine.run import run
from opml_wb.provenance.accesses import syscalls
from opml_wb.provenance.ask.differences import check
from opml_wb.provenance.ask.questions import impact, latest_using
from opml_wb.provenance.journal import outcomes
from opml_wb.provenance.watch import coverage
from opml_wb.provenance.journal.session import JOURNAL
from opml_wb.provenance.journal.lineage_db import LineageReader

told = pytest.mark.skipif(not (sys.platform == "linux" and syscalls.supported()), reason="this system doesn't allow seccomp user notification")


@pytest.fixture
def here(tmp_path, home, monkeypatch):
    "A folder for the work, beside the home, as the working directory."
    folder = tmp_path.resolve() / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trace(here, opml):
    "trace(*command) -> (CompletedProcess, the JSON object) of `opml provenance trace --json`."
    def call(*command, **options):
        done = opml("provenance", "trace", "--json", "--", *command, **{"cwd": here, **options})
        return done, json.loads(done.stdout)
    return call


def python(code): return sys.executable, "-c", code


def names(events): return [(e["op"], Path(e["path"]).name) for e in events]


# every operation

@told
@pytest.mark.slow
def test_every_operation_in_an_unmodified_script(trace, here):
    rows = coverage.available()
    coverage.prepare(here, rows)
    (here / "script.py").write_text(coverage.script(rows))
    done, found = trace(sys.executable, "script.py")
    wanted = coverage.expected(rows, str(here))
    n, wrong, extra = coverage.compare(found["events"], wanted, str(here))
    assert done.returncode == found["exit"] == 0 and found["capture"] == "seccomp" and not found["partial"]
    assert (n, wrong, extra) == (len(wanted), [], ["script.py: read"])
    assert all(e["version"] for e in found["events"] if e["op"] != "renamed" and e["path"] in wanted)
    digest = hashlib.sha256((here / "in.csv").read_bytes()).hexdigest()
    assert [e["version"] for e in found["events"] if e["path"] == str(here / "in.csv")] == [digest]
    assert len({e["pid"] for e in found["events"] if e["path"] in wanted}) >= 4      # the script, a copy, a shell's, a fork


@told
@pytest.mark.slow
def test_every_operation_on_its_cell(here, notebook):
    rows = coverage.available()
    coverage.prepare(here, rows)
    nb = notebook("n = 1", coverage.preamble(rows), *(row[2] for row in rows))
    os.rename(nb, here / "nb.ipynb")
    done = run(here / "nb.ipynb", n=2)          # a parameters cell is injected; the cells keep the author's numbers
    assert done.ok, done.error
    found, wanted = LineageReader().events(done), coverage.expected(rows, str(here))
    n, wrong, extra = coverage.compare(found, wanted, str(here))
    assert (n, wrong, extra) == (len(wanted), [], [])
    cells = {str(here / name): i for i, row in enumerate(rows, 2) for name in row[3]}
    assert {e["path"]: e["cell"] for e in found if e["path"] in cells} == cells


@told
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_as_nobody(here, tmp_path):
    "Without any right: what is needed is that the kernel allows it, not root."
    allowed = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", "import opml_wb"], capture_output=True)
    if allowed.returncode: pytest.skip(f"nobody cannot start {sys.executable}")
    os.chmod(here, 0o777)
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()): break
        os.chmod(folder, 0o755)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "opml_wb.core.cli", "provenance", "trace", "--json", "--", "sh", "-c", "echo 1 > a; mv a b"]
    done = subprocess.run(command, cwd=here, env={**os.environ, "HOME": str(here), "OPML_HOME": str(here / "home")}, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["capture"] == "seccomp" and names(found["events"]) == [("created", "b")]


# the command is as it was

def test_exit_codes_signals_and_streams(trace, opml, here):
    done, found = trace("sh", "-c", "echo out; echo err >&2; exit 7")
    assert done.returncode == found["exit"] == 7 and sorted(done.stderr.split()) == ["err", "out"]
    done, found = trace("sh", "-c", "kill -9 $$")
    assert done.returncode == found["exit"] == 137
    done, found = trace("no-such-command-here")
    assert done.returncode == found["exit"] == 127 and "command not found" in done.stderr
    plain = opml("provenance", "trace", "--", "sh", "-c", "read x; echo got $x", input="word\n", cwd=here)
    assert plain.returncode == 0 and plain.stdout == "got word\n" and "opml provenance lineage" in plain.stderr
    assert opml("provenance", "trace", "--json").returncode == 2


@told
def test_what_the_command_left_behind_works_on(trace, here):
    done, found = trace("sh", "-c", "(until [ -e go ]; do sleep .1; done; echo late > late.txt; cat late.txt > later.txt) > /dev/null 2>&1 & echo now > now.txt")
    assert names(found["events"]) == [("created", "now.txt")]
    assert found["partial"] and [line.partition(" ")[0] for line in found["why"]] == ["outlived:"] and check(found["run"])["verdict"] == "cannot tell"
    (here / "go").touch()
    until(lambda: (here / "later.txt").exists() and (here / "later.txt").read_text() == "late\n")
    fork = "import os, time\nif os.fork() == 0: os.closerange(0, 3); time.sleep(3)"                 # was never heard
    assert [trace(*python(code))[1]["partial"] for code in (fork, "import subprocess; subprocess.Popen(['sleep', '.01'])")] == [True, False]


@told
def test_sigterm_reaches_the_command(here, opml):
    p = opml("provenance", "trace", "--json", "--", *python("import time; open('began', 'w').write('1'); time.sleep(60)"), cwd=here, start=True)
    until(lambda: (here / "began").exists())
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=20)
    found = json.loads(out)
    assert p.returncode == found["exit"] == 143 and names(found["events"]) == [("created", "began")]


# who is killed

STEPS = "import time\nfor i in range(20): open(f'{i}.txt', 'w').write('x'); time.sleep(.05)\n"


@told
def test_the_watcher_is_killed(here, home, opml):
    p = opml("provenance", "trace", "--json", "--", *python(STEPS), cwd=here, start=True)
    until(lambda: (here / "3.txt").exists())
    p.kill(); p.wait()
    until(lambda: (here / "19.txt").exists())                              # the command goes on, and ends
    until(lambda: LineageReader().runs.ls()[0]["status"] != "running")
    last = LineageReader().runs.ls()[0]
    reader = LineageReader()
    assert reader.stage(last["id"])["partial"] and last["error"]["kind"] == "lost" and len(reader.events(last["id"])) == 20


@told
def test_the_command_is_killed(here, home, opml):
    p = opml("provenance", "trace", "--json", "--", *python(STEPS), cwd=here, start=True)
    until(lambda: (here / "3.txt").exists())
    psutil.Process(p.pid).children()[0].kill()
    found = json.loads(p.communicate(timeout=20)[0])
    assert found["exit"] == 137 and not found["partial"] and set(names(found["events"])) == {("created", f.name) for f in here.glob("*.txt")}


@told
def test_the_watcher_of_a_run_is_killed(here, notebook):
    from opml_wb.core.engine import zygote
    zygote.close_all()                                                      # the next one serves this run
    nb = notebook("import time, os", "for i in range(20): open(f'{i}.txt', 'w').write('x'); time.sleep(.05)")
    os.rename(nb, here / "nb.ipynb")
    result = []
    thread = threading.Thread(target=lambda: result.append(run(here / "nb.ipynb")))
    thread.start()
    until(lambda: (here / "3.txt").exists())
    helpers = sorted(psutil.Process(next(iter(zygote._pool.values())).process.pid).children(), key=lambda p: p.create_time())[:2]
    helpers[1].kill()
    thread.join(30)
    stage = LineageReader().stage(result[0])
    assert result[0].ok and stage["partial"] and stage["capture"] == "seccomp" and len(list(here.glob("*.txt"))) == 20
    made = {Path(e["path"]).name for e in LineageReader().events(result[0]) if e["op"] == "created"}
    assert {f"{i}.txt" for i in range(3)} <= made and "19.txt" in made      # the deputy takes notes, too


@told
def test_a_run_is_killed(here, notebook):
    nb = notebook("import os, signal", "open('a.txt', 'w').write('x')", "os.kill(os.getpid(), signal.SIGKILL)")
    os.rename(nb, here / "nb.ipynb")
    done = run(here / "nb.ipynb")
    assert done.status == "killed" and [(e["op"], Path(e["path"]).name, e["cell"]) for e in LineageReader().events(done)] == [("created", "a.txt", 1)]


# versions

@told
def test_an_overwritten_intermediate_is_another_version(trace, here):
    "The edge from b to c is the version that b made, not the path."
    (here / "raw.csv").write_text("1\n")
    sh = lambda code: trace("sh", "-c", code)[1]["events"]
    a = sh("cat raw.csv > mid.csv")
    b = sh("cat mid.csv > out1.csv")
    again = sh("echo other > mid.csv")
    c = sh("cat mid.csv > out2.csv")
    version = lambda events, op, name: next(e["version"] for e in events if (e["op"], Path(e["path"]).name) == (op, name))
    assert version(a, "created", "mid.csv") == version(b, "read", "mid.csv") != version(again, "modified", "mid.csv") == version(c, "read", "mid.csv")
    sh("cat mid.csv > /dev/null; echo third > mid.csv; rm raw.csv")
    events = {Path(e["path"]).name: e for e in LineageReader().events(LineageReader().runs.ls()[0]["id"])}
    assert events["mid.csv"]["was"] == version(c, "read", "mid.csv") and events["raw.csv"]["op"] == "deleted" and events["raw.csv"]["version"]


# odd places

@told
def test_odd_paths_and_links(trace, here):
    (here / "real").mkdir()
    os.symlink("real", here / "link")
    bad = os.fsdecode(b"bad\xff.csv")
    done, found = trace(*python("import os\nopen('link/a.csv', 'w').write('1')\nopen('link/../link/a.csv').read()\n"
                                "open(b'bad\\xff.csv', 'w').write('1')\nos.symlink('real/a.csv', 'to.csv'); open('to.csv').read()\n"
                                "os.chdir('real'); fd = os.open('.', os.O_RDONLY); os.close(os.open('b.csv', os.O_CREAT | os.O_WRONLY, dir_fd=fd))"))
    assert {(e["op"], e["path"]) for e in found["events"]} == {("created", f"{here}/real/a.csv"), ("created", f"{here}/{bad}"), ("created", f"{here}/to.csv"),
                                                               ("created", f"{here}/real/b.csv"), ("read", f"{here}/link")}
    assert {e["path"] for e in LineageReader().events(found["run"])} == {e["path"] for e in found["events"]}


@told
def test_folders_move(trace, here):
    "Written into a folder aside, which is then renamed: the files are made; a folder that was there is renamed."
    (here / "old").mkdir(); (here / "old" / "x").write_text("1")
    code = "import os\nos.mkdir('aside'); open('aside/model', 'w').write('1'); os.rename('aside', 'final'); os.rename('old', 'new')"
    _, found = trace(*python(code))
    assert [(e["op"], e["path"], e["to"]) for e in found["events"]] == [("created", f"{here}/final/model", None), ("renamed", f"{here}/old/x", f"{here}/new/x"),
                                                                             ("renamed", f"{here}/old", f"{here}/new")]


@told
def test_failed_calls_leave_no_event(trace, here):
    (here / "there").write_text("1")
    (here / "kept").write_text("1")
    code = ("import os\ndef t(f, *a):\n try: f(*a)\n except OSError: pass\n"
            "t(open, 'missing'); t(open, 'no/such', 'w'); t(open, 'there', 'x'); t(os.rename, 'missing', 'there'); t(os.unlink, 'missing'); t(open, '.')\n"
            "open('kept', 'a').close(); t(os.link, 'there', 'kept'); os.listdir('.'); os.stat('there')")
    assert trace(*python(code))[1]["events"] == []


@told
def test_a_table_is_one_artifact(trace, here):
    pytest.importorskip("deltalake")
    code = "import deltalake, pyarrow as pa\nfor n in range(3): deltalake.write_deltalake('t', pa.table({'x': [n]}), mode='append')\n"
    _, made = trace(*python(code))
    _, read = trace(*python("import deltalake; deltalake.DeltaTable('t', version=1).to_pyarrow_table()"))
    assert [(e["op"], e["version"]) for e in LineageReader().events(made["run"])] == [("created", "delta:2")]
    assert [(e["op"], e["version"]) for e in LineageReader().events(read["run"])] == [("read", "delta:1")]
    assert any(e["path"].endswith("00000000000000000002.json") and e["op"] == "created" for e in made["events"])


@told
def test_nested_captures(trace, here, notebook):
    "A trace in a trace, and a run in a trace: each stage has its own."
    done, outer = trace("sh", "-c", f"echo 1 > a.txt; {sys.executable} -m opml_wb.core.cli provenance trace --json -- sh -c 'cat a.txt > b.txt' > inner.json; echo 2 > c.txt")
    inner = json.loads((here / "inner.json").read_text())
    assert inner["capture"] == "seccomp" and not inner["partial"] and sorted(names(inner["events"])) == [("created", "b.txt"), ("read", "a.txt")]
    assert {("created", n) for n in ("a.txt", "b.txt", "c.txt")} <= set(names(outer["events"])) and done.returncode == 0
    os.rename(notebook("x = 1", "open('d.txt', 'w').write('1')"), here / "nb.ipynb")
    _, outer = trace(sys.executable, "-m", "opml_wb.core.cli", "run", "nb.ipynb", "--quiet")
    ran = next(d for d in LineageReader().runs.ls() if d["chapter"] == "nb")
    assert ("created", "d.txt") in names(outer["events"]) and [(e["op"], e["cell"]) for e in LineageReader().events(ran["id"])] == [("created", 1)]
    assert LineageReader().stage(ran["id"])["capture"] == "seccomp" and not LineageReader().stage(ran["id"])["partial"]


@told
def test_a_home_that_cannot_be_written(here, opml):
    for place in ("/proc/nowhere", "/dev/null/home"):
        done = opml("provenance", "trace", "--json", "--", "sh", "-c", "echo 1 > a.txt; exit 4", cwd=here, env={"OPML_HOME": place})
        found = json.loads(done.stdout)
        assert done.returncode == found["exit"] == 4 and found["run"] is None and "cannot be used" in done.stderr and (here / "a.txt").exists()


@told
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk(here, opml):
    small = here.parent / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", small], capture_output=True).returncode: pytest.skip("no disk can be mounted here")
    try:
        code = f"open('{small}/fill', 'wb').write(b'x' * 10)\ntry: open('{small}/fill', 'ab').write(b'x' * (1 << 20))\nexcept OSError: pass\nfor i in range(50): open(f'f{{i}}', 'w').write('1')\n"
        done = opml("provenance", "trace", "--json", "--", *python(code), cwd=here, env={"OPML_HOME": f"{small}/home"})
        assert done.returncode == 0 and len(list(here.glob("f*"))) == 50      # the work is done, whatever could be written of it
        found = json.loads(done.stdout)
        assert found["partial"] or len(found["events"]) >= 50
    finally: subprocess.run(["umount", small], check=True)


@told
def test_two_kernels_at_once(here, home, tmp_path, monkeypatch):
    from jupyter_client.manager import KernelManager
    from opml_wb.provenance.watch.traced_kernel import SPEC
    monkeypatch.setenv("OPML_HOME", str(home))
    managers = []
    for name in ("one", "two"):
        monkeypatch.setenv("JPY_SESSION_NAME", str(here / f"{name}.ipynb"))
        manager = KernelManager(kernel_name="python3")
        manager.kernel_spec.argv = SPEC["argv"]
        manager.start_kernel(cwd=str(here))
        client = manager.client()
        client.start_channels(); client.wait_for_ready(timeout=60)
        managers.append((name, manager, client))
    for step in ("open(f'{name}-1.txt', 'w').write('1')", "import os; os.system(f'cat {name}-1.txt > {name}-2.txt')"):
        for name, _, client in managers: client.execute_interactive(f"name = {name!r}\n{step}", timeout=60)
    for _, manager, client in managers: client.shutdown(); client.stop_channels()
    for _, manager, _ in managers: until(lambda m=manager: not m.is_alive()); manager.cleanup_resources()
    until(lambda: len([d for d in LineageReader().runs.ls() if d["status"] != "running"]) == 2, 20)
    for name in ("one", "two"):
        doc = next(d for d in LineageReader().runs.ls() if d["chapter"] == name)
        found = [(e["op"], Path(e["path"]).name, e["cell"]) for e in LineageReader().events(doc["id"]) if e["path"].startswith(str(here))]
        assert found == [("created", f"{name}-1.txt", 1), ("created", f"{name}-2.txt", 2)] and not LineageReader().stage(doc["id"])["partial"]


@told
def test_workers_threads_and_signals(trace, here):
    "Forked workers, many threads and a timer that interrupts each call: everything is told once, nothing fails."
    code = """
import multiprocessing, os, signal, threading
def put(name): open(name, 'w').write('1')
signal.signal(signal.SIGALRM, lambda *a: None)
signal.siginterrupt(signal.SIGALRM, False)          # else a call that waits to be received may fail with EINTR
signal.setitimer(signal.ITIMER_REAL, .001, .001)
with multiprocessing.get_context('fork').Pool(3) as pool: pool.map(put, [f'p{i}' for i in range(30)])
threads = [threading.Thread(target=lambda k=k: [put(f't{k}-{i}') for i in range(20)]) for k in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    done, found = trace(*python(code))
    assert done.returncode == 0 and not found["partial"] and set(names(found["events"])) == {("created", p.name) for p in here.iterdir()} and len(found["events"]) == 190


# nothing the watcher does makes a call wait

def _within(opml, limit, *command, **options):
    "The JSON object of a trace that must end within `limit` seconds; what it started is killed otherwise."
    p = opml("provenance", "trace", "--json", "--", *command, start=True, start_new_session=True, **options)
    try: return json.loads(p.communicate(timeout=limit)[0])
    except subprocess.TimeoutExpired:
        for child in psutil.Process(p.pid).children(recursive=True): child.kill()
        p.kill()
        pytest.fail(f"{command} was still running after {limit} s")


ODD = """
import os, socket
os.mkfifo('p'); os.rename('p', 'q'); os.link('q', 'r'); os.unlink('q'); os.unlink('r')
socket.socket(socket.AF_UNIX).bind('s'); os.rename('s', 't'); os.unlink('t')
open('file', 'w').write('1'); os.mkfifo('f'); os.rename('f', 'file'); os.unlink('file')
os.mkfifo('g'); os.close(os.open('g', os.O_RDWR)); os.unlink('g')
"""


@told
def test_what_is_no_file_is_never_opened(here, opml, notebook):
    assert _within(opml, 60, "sh", "-c", "mkfifo p; rm p; mkfifo q; mv q r; rm r", cwd=here)["events"] == []
    found = _within(opml, 60, *python(ODD), cwd=here)
    assert not found["partial"] and found["events"] == []
    os.rename(notebook("x = 1", "import os; os.mkfifo('p'); os.unlink('p'); open('a.txt', 'w').write('1')"), here / "nb.ipynb")
    p = opml("run", "nb.ipynb", "--json", cwd=here, start=True)
    try: ran = json.loads(p.communicate(timeout=90)[0])
    except subprocess.TimeoutExpired: p.kill(); pytest.fail("the run hangs")
    assert [(e["op"], Path(e["path"]).name) for e in LineageReader().events(ran["id"])] == [("created", "a.txt")]


@told
def test_a_file_that_turns_into_a_fifo(here, opml):
    "Between any two steps of the watcher the name may mean something else."
    code = """
import os, threading
def tried(call, *args):
    try: return call(*args)
    except OSError: pass
def swap():
    for _ in range(300):
        tried(os.unlink, 'd'); tried(os.mkfifo, 'd'); tried(os.unlink, 'd')
        if (fd := tried(os.open, 'd', os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK)): os.write(fd, b'x'); os.close(fd)
other = threading.Thread(target=swap); other.start()
while other.is_alive():
    for flags in (os.O_RDONLY, os.O_RDWR):
        if (fd := tried(os.open, 'd', flags | os.O_NONBLOCK)): os.close(fd)
    tried(os.rename, 'd', 'e')
"""
    assert _within(opml, 100, *python(code), cwd=here)["exit"] == 0


@pytest.fixture
def stalled(here):
    "A folder on a file system whose server never answers."
    if os.getuid() or not os.path.exists("/dev/fuse"): pytest.skip("needs root and /dev/fuse")
    folder, server, libc = here.parent / "far", os.open("/dev/fuse", os.O_RDWR), ctypes.CDLL(None)
    folder.mkdir()
    if libc.mount(b"far", os.fsencode(folder), b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server):
        os.close(server); pytest.skip("FUSE cannot be mounted here")
    yield folder
    os.close(server)                    # whoever waits gets an error
    libc.umount2(os.fsencode(folder), 2)


@told
def test_a_file_system_that_does_not_answer_stops_nobody_else(here, opml, stalled):
    os.symlink(stalled, here / "link")
    code = f"(timeout -s KILL 20 cat link/x &) ; sleep .2; echo 1 > a; cat a > b; mv b c; (timeout -s KILL 1 cat {stalled}/y &); echo 2 > d; pkill -9 -P $$; exit 0"
    found = _within(opml, 90, "sh", "-c", code, cwd=here)
    assert {("created", n) for n in "acd"} <= set(names(found["events"]))
    assert found["partial"] and any("does not answer" in line and "link/x" in line for line in found["why"]), found["why"]
    assert LineageReader().facts(found["run"])["partial"][0]["why"] == "stalled"


@told
def test_a_content_is_known_although_it_goes_at_once(trace, here):
    "Read and then overwritten, added to, removed or replaced, without a pause: the version is that of what was read."
    data = {name: os.urandom(2_000_000) for name in ("over", "added", "gone", "replaced", "changed")}
    for name, content in data.items(): (here / name).write_bytes(content)
    code = """
import os
for name in ('over', 'gone', 'replaced'): open(name, 'rb').read(10)
open('over', 'wb').write(b'new'); os.unlink('gone'); open('tmp', 'wb').write(b'1'); os.replace('tmp', 'replaced')
open('added', 'ab').write(b'more'); open('changed', 'r+b').write(b'Z')
"""
    done, found = trace(*python(code))
    events = {Path(e["path"]).name: e for e in LineageReader().events(found["run"])}
    known = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    assert {n: e["was"] for n, e in events.items()} == known and not LineageReader().facts(found["run"])["unknown"]
    assert events["added"]["version"] == hashlib.sha256(data["added"] + b"more").hexdigest()


@told
def test_a_content_that_is_too_large_to_wait_for_is_told(trace, here, monkeypatch):
    with open(here / "huge", "wb") as f: f.truncate(1 << 30)
    done, found = trace(*python("open('huge', 'rb').read(1); open('huge', 'wb').write(b'1')"))
    [event] = LineageReader().events(found["run"])
    unknown = LineageReader().facts(found["run"])["unknown"]
    assert event["op"] == "modified" and (event["was"] is not None or [u["path"] for u in unknown] == [str(here / "huge")])


@told
def test_a_lease_is_not_broken(trace, here):
    code = """
import fcntl, os, signal, time
broken = []
signal.signal(signal.SIGIO, lambda *a: broken.append(1))
open('mine', 'w').write('1')
f = open('mine', 'r+'); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)
time.sleep(.2); os.rename('mine', 'still'); time.sleep(.2)
open('n', 'w').write(str(len(broken)))
"""
    trace(*python(code))
    assert (here / "n").read_text() == "0"


# streams

@told
def test_files_that_the_shell_opened(here, home, opml):
    (here / "in").write_text("1\n"); (here / "log").write_text("0\n")
    def shell(line):
        line = line.replace("TRACE", f"{sys.executable} -m opml_wb.core.cli provenance trace --")
        done = subprocess.run(["sh", "-c", line], cwd=here, env={**os.environ, "OPML_HOME": str(home)}, capture_output=True, text=True, timeout=90)
        run = done.stderr.strip().split("opml provenance lineage ")[-1].split()[0]
        reader = LineageReader()
        return {Path(e["path"]).name: (e["op"], e["version"], e["was"]) for e in reader.events(run)}, {s["fd"]: s for s in reader.facts(run)["streams"]}
    sha = lambda text: hashlib.sha256(text.encode()).hexdigest()
    events, streams = shell("TRACE cat < in > out")
    assert events == {"in": ("read", sha("1\n"), None), "out": ("created", sha("1\n"), None)}
    assert (streams[0]["kind"], streams[0]["version"], streams[1]["path"]) == ("file", sha("1\n"), str(here / "out"))
    events, _ = shell("TRACE cat in >> log")
    assert events["log"] == ("modified", sha("0\n1\n"), sha("0\n"))                    # it depends on what was there
    events, streams = shell("echo 5 | TRACE sh -c 'cat - <&3 > out2' 3< in")
    assert events["in"][0] == "read" and events["out2"][0] == "created" and (streams[0]["kind"], streams[3]["kind"]) == ("pipe", "file")
    _, streams = shell("exec < in; rm in; TRACE cat")
    assert (streams[0]["kind"], streams[0]["version"]) == ("deleted", sha("1\n"))


# names and contents

@told
def test_links_names_and_folders_lead_to_what_they_led_to(trace, here, opml, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    def verdict(found): return check(found["run"])["verdict"], [os.path.basename(d["name"]) for d in check(found["run"])["differences"]]
    def turn(link, to): os.unlink(link); os.symlink(to, link)
    for n in "12": (here / f"d{n}").mkdir(); (here / f"{n}.csv").write_text(n); (here / f"d{n}" / "f").write_text(n); (here / f"m{n}.py").write_text(f"x = {n}")
    links = {"latest.csv": ("1.csv", "2.csv"), "latest": ("d1", "d2"), "s.py": ("m1.py", "m2.py"), "mod.py": ("m1.py", "m2.py"), "dangles": ("none", "no")}
    for link, (to, _) in links.items(): os.symlink(to, here / link)
    _, found = trace("sh", "-c", f"cp latest.csv out; cat latest/f dangles > out2; {sys.executable} s.py; {sys.executable} -c 'import mod'")
    assert verdict(found) == ("same", [])
    for link, (to, other) in links.items():
        turn(here / link, other)
        assert verdict(found) == ("differs", [link])
        turn(here / link, to)
    (here / "none").touch()
    assert verdict(found) == ("differs", ["none"])
    os.unlink(here / "none"); turn(here / "latest.csv", "2.csv")
    assert opml("provenance", "lineage", here / "latest.csv").stdout.count("\n") == 2 and latest_using(here / "latest.csv")["run"] == found["run"]
    _, found = trace("ln", "1.csv", "hard")
    assert {(e["op"], Path(e["path"]).name) for e in found["events"]} == {("read", "1.csv"), ("created", "hard")}
    (here / "1.csv").unlink(); (here / "1.csv").write_text("3")
    assert verdict(found) == ("differs", ["1.csv"])


@told
def test_a_chain_goes_on_over_links_and_renamed_folders(trace, here, monkeypatch):
    steps = "mkdir t; echo x > t/f", "mv t final", "cat final/f > o", "ln -s o soft; ln o hard", "cat soft hard > last"
    runs = [trace("sh", "-c", line)[1]["run"] for line in steps]
    assert list(dict.fromkeys(impact(runs[0], transitive=True).run)) == runs[1:]
    assert set(impact(runs[3]).run) == {runs[4]}
    for n in range(1002): (here / "final" / f"{n:04}").touch()
    _, found = trace("mv", "final", "end")
    assert len(found["events"]) == 1001 and found["partial"] and found["why"][0].startswith(f"folder: {here}/final, with more than 1000 files")


# what isn't seen is told

BY_32 = r"""
import ctypes, mmap, os, sys
text = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)      # MAP_32BIT
at = ctypes.addressof(ctypes.c_char.from_buffer(text))
word = lambda n: n.to_bytes(4, 'little')
text[:64] = (b'\x53\xb8' + word(5) + b'\xbb' + word(at + 64) + b'\xb9' + word(os.O_CREAT | os.O_WRONLY) + b'\xba' + word(0o644) + b'\xcd\x80\x5b\xc3').ljust(64, b'\0')
text[64:73] = b'by32.txt\0'
sys.exit(ctypes.CFUNCTYPE(ctypes.c_int)(at)() < 0)
"""
SYSCALL = "import ctypes, os; call = ctypes.CDLL(None).syscall; "
UNSEEN = {"io_uring": SYSCALL + "call(425, 1, ctypes.create_string_buffer(120))",
          "handle": SYSCALL + "call(304, os.open('.', 0), ctypes.create_string_buffer(136), 0)",
          "pidfd": SYSCALL + "call(438, 0, 0, 0)",
          "namespace": SYSCALL + "call(272, 0x20000)",
          "memory": "import os; fd = os.memfd_create('x', 0); os.write(fd, open('/bin/true', 'rb').read()); os.execve(fd, ['true'], {})"}


@told
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize("why", UNSEEN)
def test_what_is_not_seen_is_told(trace, opml, here, why):
    done, found = trace(*python(UNSEEN[why]))
    assert found["partial"] and [line.partition(":")[0] for line in found["why"]] == [why]
    assert [r["why"] for r in LineageReader().facts(found["run"])["partial"]] == [why]
    assert f"not seen: {why}" in opml("provenance", "lineage", found["run"]).stdout and LineageReader().stage(found["run"])["why"] == found["why"]


@told
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_calls_of_32_bits(trace, here):
    done, found = trace(*python(BY_32))
    if done.returncode: pytest.skip("this system has no 32-bit calls")
    assert names(found["events"]) == [("created", "by32.txt")] and not found["partial"]


@told
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to change the root directory")
def test_another_root_directory(trace, here):
    (here / "jail" / "data").mkdir(parents=True)
    (here / "jail" / "data" / "x").write_text("1"); os.symlink("/data/x", here / "jail" / "link")
    code = "import os; os.chroot('jail'); os.chdir('/'); open('/link').read(); open('/made', 'w').write('1'); open('near', 'w').write('1')"
    done, found = trace(*python(code))
    assert {(e["op"], e["path"]) for e in found["events"]} == {("read", f"{here}/jail/data/x"), ("created", f"{here}/jail/made"), ("created", f"{here}/jail/near")}
    assert [line.partition(":")[0] for line in found["why"]] == ["chroot"]


@told
def test_paths_that_mean_something_else_in_each_process(trace, here):
    code = ("import os; open('/proc/self/cwd/a', 'w').write('1'); fd = os.open('.', os.O_TMPFILE | os.O_RDWR); os.write(fd, b'2')\n"
            "os.link(f'/proc/self/fd/{fd}', 'b', dst_dir_fd=os.open('.', 0), follow_symlinks=True)")
    try: fd = os.open(here, os.O_TMPFILE | os.O_RDWR)
    except OSError: pytest.skip("files without a name aren't possible here")
    os.close(fd)
    assert names(trace(*python(code))[1]["events"]) == [("created", "a"), ("created", "b")]


@told
def test_what_else_the_outcome_depends_on(trace, here, monkeypatch):
    (here / "folder").mkdir(); (here / "folder" / "x").write_text("1")
    monkeypatch.setenv("COLOUR", "blue"); monkeypatch.setenv("GITHUB_TOKEN", "hidden-1")
    code = ("import os, socket; os.listdir('folder'); os.path.exists('absent'); s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
            "socket.create_connection(s.getsockname())\ntry: open('none/config')\nexcept OSError: open('made', 'w').write('1')")
    done, found = trace("sh", "-c", f"[ -f settings ]; {sys.executable} -c \"$0\"", code)
    facts = LineageReader().facts(found["run"])
    assert {str(here / n) for n in ("settings", "absent", "none/config")} <= set(facts["missing"]) and str(here / "made") not in facts["missing"]
    [listed] = [f for f in facts["listed"] if f["path"] == str(here / "folder")]
    assert (listed["names"], listed["n"], listed["version"]) == (["x"], 1, hashlib.sha256(b'["x"]').hexdigest())
    assert any(n["address"].startswith("127.0.0.1:") for n in facts["network"]) and "listens" in [n["address"] for n in facts["network"]]
    assert (facts["env"]["COLOUR"], facts["env"]["GITHUB_TOKEN"]) == ("blue", "***")
    [row] = LineageReader().db.execute("select facts from prov_fact where run=?", (found["run"],)).fetchall()
    assert "absent" in row[0] and "COLOUR" not in row[0]


# secrets

def test_names_that_sound_secret():
    from opml_wb.provenance.journal.privacy import masked_variables
    secret = "OPENAI_KEY STRIPE_KEYS KEY CREDS DB_CRED AZURE_SAS GH_PAT API_KEYS".split()
    plain = "SORT_KEY PRIMARY_KEY KEYBOARD PUBLIC_KEY KEY_ID sort_key key monkey MAX_TOKENS".split()
    assert {n for n, v in masked_variables({n: "abc" for n in secret + plain}).items() if v == "***"} == {*secret}


@told
def test_secrets_are_written_down_nowhere_and_records_are_private(here, home, opml, monkeypatch):
    import shutil
    shutil.rmtree(home, ignore_errors=True)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-1"); monkeypatch.setenv("PIP_INDEX_URL", "https://me:s3cr3t-2@host/simple")
    words = ["--password=s3cr3t-3", "--token", "s3cr3t-4", "postgresql://ann:s3cr3t-5@db/x", "-H", "Authorization: Bearer s3cr3t-6", "--epochs", "3"]
    before = os.umask(0)
    try:
        done = opml("provenance", "trace", "--json", "--", "sh", "-c", "echo $1 > out.txt; TOKEN=s3cr3t-7 true", "sh", *words, cwd=here)
    finally: os.umask(before)
    found = json.loads(done.stdout)
    assert (here / "out.txt").read_text() == "--password=s3cr3t-3\n" and (here / "out.txt").stat().st_mode & 0o777 == 0o666   # the command is as it was
    opml("provenance", "lineage", found["run"]); opml("ls")
    for path in home.rglob("*"):
        if path.is_file(): assert b"s3cr3t" not in path.read_bytes(), path
        assert not path.stat().st_mode & 0o077, path
    for words in (("provenance", "lineage", found["run"]), ("provenance", "lineage", found["run"], "--json"), ("show", found["run"], "--json"), ("ls", "--json")):
        assert "s3cr3t" not in opml(*words).stdout, words
    stage = LineageReader().stage(found["run"])
    assert stage["command"][-3:] == ["Authorization: ***", "--epochs", "3"] and not home.stat().st_mode & 0o077


# where the kernel tells nothing

def _forbid():
    "In a child, before it starts: the system refuses the filter, as some containers do."
    libc = ctypes.CDLL(None, use_errno=True)
    audit, number, _ = syscalls.table()
    steps = [(0x20, 0, 0, 4), (0x15, 0, 2, audit), (0x20, 0, 0, 0), (0x15, 1, 0, number), (0x06, 0, 0, 0x7fff0000), (0x06, 0, 0, 0x00050001)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *s) for s in steps), 8 * len(steps))
    program = syscalls.Program(len(steps), ctypes.addressof(code))
    libc.prctl(38, 1, 0, 0, 0)
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0): os._exit(99)


SEEN = f"""import os, time, pathlib
os.system('cat c.txt > d.txt')
journal = pathlib.Path(os.environ['OPML_RUN_DIR'], {JOURNAL!r})
for _ in range(3000):
    if b'd.txt' in journal.read_bytes(): break
    time.sleep(.02)"""  # another process's file has its cell only if it is seen before the cell ends


@told
def test_without_the_filter(trace, here, notebook):
    (here / "in.txt").write_text("1")
    done, found = trace(*python("import os\nopen('in.txt').read(); open('a.tmp', 'w').write('1'); os.rename('a.tmp', 'a.txt'); os.system('cat in.txt > b.txt')"), preexec_fn=_forbid)
    assert done.returncode == 0 and found["capture"] == "inotify+audit"
    assert found["partial"] and found["why"][0].startswith("inotify+audit: ")        # it has blind spots
    assert sorted(names(found["events"])) == [("created", "a.txt"), ("created", "b.txt"), ("read", "in.txt")]
    assert {Path(e["path"]).name for e in found["events"] if e["pid"]} >= {"a.txt", "in.txt"}
    os.rename(notebook("x = 1", "open('c.txt', 'w').write('1')", SEEN), here / "nb.ipynb")
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "run", "nb.ipynb", "--json"], cwd=here, capture_output=True, text=True, preexec_fn=_forbid)
    ran = json.loads(done.stdout)
    reader = LineageReader()
    assert ran["status"] == "done" and reader.stage(ran["id"])["capture"] == "inotify+audit"
    assert [(e["op"], Path(e["path"]).name, e["cell"]) for e in reader.events(ran["id"])] == [("created", "c.txt", 1), ("created", "d.txt", 2)]


# the index

@told
def test_off_and_no_nonsense(here, opml, notebook, monkeypatch):
    done = opml("provenance", "trace", "--json", "--", "sh", "-c", "echo x; exit 2", cwd=here, env={"OPML_CAPTURE": "off"})
    found = json.loads(done.stdout)
    assert done.returncode == found["exit"] == 2 and found["capture"] == "off" and found["run"] is None and done.stderr == "x\n" and not LineageReader().runs.ls()
    done = opml("provenance", "trace", "--json", "--", "true", cwd=here, env={"OPML_CAPTURE": "perhaps"})
    assert done.returncode == 2 and "expected auto or off" in done.stdout + done.stderr


@told
def test_reindexed_and_removed(here, notebook):
    os.rename(notebook("x = 1", "open('c.txt', 'w').write('1')"), here / "nb.ipynb")
    done = run(here / "nb.ipynb")
    first = LineageReader().events(done)
    for end in ("", "-wal", "-shm"): (done.dir.parents[1] / f"opml.db{end}").unlink(missing_ok=True)
    assert first and LineageReader().events(done) == first                          # the folders are the truth
    LineageReader().runs.rm([done.doc["id"]])
    assert LineageReader().db.execute("select count(*) from prov_event").fetchone()[0] == 0


def test_in_postgresql(here, notebook, postgres, monkeypatch):
    monkeypatch.setenv("OPML_STORE", postgres)
    os.rename(notebook("x = 1", "open('c.txt', 'w').write('1')"), here / "nb.ipynb")
    done = run(here / "nb.ipynb")
    reader = LineageReader()
    assert done.ok and reader.stage(done)["who"] and ("created", "c.txt") in names(reader.events(done)) and reader.packages(done)["opml-wb"]
    assert reader.db.execute("select count(*) from prov_event where run=?", (done.doc["id"],)).fetchone()[0] >= 1


def test_a_broken_journal_is_read_as_far_as_it_goes(here, tmp_path):
    (here / "a.txt").write_text("1")
    lines = [{"o": "w", "p": str(here / "a.txt"), "t": 0}, {"o": "nobody knows", "p": 1}, {"o": "w", "p": str(here / "never"), "t": 1}]
    (here / JOURNAL).write_text("\n".join(map(json.dumps, lines)) + '\n{"o": "w", "p": "/cut')
    assert names(outcomes.events(read_lines(here / JOURNAL))) == [("created", "a.txt")]


FAULTS = {"the index is locked": "lineage._upgrade = fails", "the document fails": "trace.conclude = fails", "the watcher fails": "trace.watching.end = fails"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_the_end_of_a_trace_loses_no_answer(tmp_path, fault):
    "The command's exit code and one JSON object with `run` come, whatever fails after it ended; a stage that was recorded has its run."
    code = f"""
import sqlite3, sys
from opml_wb.provenance.journal import lineage_db as lineage
from opml_wb.provenance.watch import trace
def fails(*args, **more): raise sqlite3.OperationalError("database is locked")
{FAULTS[fault]}
from opml_wb.core.cli import main
main(["provenance", "trace", "--json", "--", sys.executable, "-c", "print(1); raise SystemExit(3)"])"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OPML_HOME": str(tmp_path)}, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == told["exit"] == 3 and "Traceback" not in done.stderr, done.stderr
    assert ("database is locked" in done.stderr) == (fault != "the watcher fails")
    assert bool(told["run"]) == (fault != "the document fails")
