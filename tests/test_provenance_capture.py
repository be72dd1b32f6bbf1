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
from opml_wb.provenance.watch import coverage, outcomes, syscalls
from opml_wb.provenance.watch.session import JOURNAL
from opml_wb.provenance.watch.lineage_db import LineageReader

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
    "trace(*command) -> (CompletedProcess, the JSON object) of `opml trace --json`."
    def call(*command, **options):
        done = opml("trace", "--json", "--", *command, **{"cwd": here, **options})
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
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "opml_wb.core.cli", "trace", "--json", "--", "sh", "-c", "echo 1 > a; mv a b"]
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
    plain = opml("trace", "--", "sh", "-c", "read x; echo got $x", input="word\n", cwd=here)
    assert plain.returncode == 0 and plain.stdout == "got word\n" and "opml lineage" in plain.stderr
    assert opml("trace", "--json").returncode == 2


@told
def test_what_the_command_left_behind_works_on(trace, here):
    done, found = trace("sh", "-c", "(sleep 1; echo late > late.txt; cat late.txt > later.txt) > /dev/null 2>&1 & echo now > now.txt")
    assert names(found["events"]) == [("created", "now.txt")]
    until(lambda: (here / "later.txt").exists() and (here / "later.txt").read_text() == "late\n")


@told
def test_sigterm_reaches_the_command(here, opml):
    p = opml("trace", "--json", "--", *python("import time; open('began', 'w').write('1'); time.sleep(60)"), cwd=here, start=True)
    until(lambda: (here / "began").exists())
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=20)
    found = json.loads(out)
    assert p.returncode == found["exit"] == 143 and names(found["events"]) == [("created", "began")]


# who is killed

STEPS = "import time\nfor i in range(20): open(f'{i}.txt', 'w').write('x'); time.sleep(.05)\n"


@told
def test_the_watcher_is_killed(here, home, opml):
    p = opml("trace", "--json", "--", *python(STEPS), cwd=here, start=True)
    until(lambda: (here / "3.txt").exists())
    p.kill(); p.wait()
    until(lambda: (here / "19.txt").exists())                              # the command goes on, and ends
    until(lambda: LineageReader().runs.ls()[0]["status"] != "running")
    last = LineageReader().runs.ls()[0]
    reader = LineageReader()
    assert reader.stage(last["id"])["partial"] and last["error"]["kind"] == "lost" and len(reader.events(last["id"])) == 20


@told
def test_the_command_is_killed(here, home, opml):
    p = opml("trace", "--json", "--", *python(STEPS), cwd=here, start=True)
    until(lambda: (here / "3.txt").exists())
    psutil.Process(p.pid).children()[0].kill()
    found = json.loads(p.communicate(timeout=20)[0])
    assert found["exit"] == 137 and not found["partial"] and set(names(found["events"])) == {("created", f.name) for f in here.glob("*.txt")}


@told
def test_the_watcher_of_a_run_is_killed(here, notebook):
    from opml_wb.core.engine import zygote
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
                                                               ("created", f"{here}/real/b.csv")}
    assert {e["path"] for e in LineageReader().events(found["run"])} == {e["path"] for e in found["events"]}


@told
def test_folders_move(trace, here):
    "Written into a folder aside, which is then renamed: the files are made; a folder that was there is renamed."
    (here / "old").mkdir(); (here / "old" / "x").write_text("1")
    code = "import os\nos.mkdir('aside'); open('aside/model', 'w').write('1'); os.rename('aside', 'final'); os.rename('old', 'new')"
    _, found = trace(*python(code))
    assert [(e["op"], e["path"], e["to"]) for e in found["events"]] == [("created", f"{here}/final/model", None), ("renamed", f"{here}/old", f"{here}/new")]


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
    done, outer = trace("sh", "-c", f"echo 1 > a.txt; {sys.executable} -m opml_wb.core.cli trace --json -- sh -c 'cat a.txt > b.txt' > inner.json; echo 2 > c.txt")
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
        done = opml("trace", "--json", "--", "sh", "-c", "echo 1 > a.txt; exit 4", cwd=here, env={"OPML_HOME": place})
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
        done = opml("trace", "--json", "--", *python(code), cwd=here, env={"OPML_HOME": f"{small}/home"})
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
signal.signal(signal.SIGALRM, lambda *a: None); signal.setitimer(signal.ITIMER_REAL, .001, .001)
with multiprocessing.get_context('fork').Pool(3) as pool: pool.map(put, [f'p{i}' for i in range(30)])
threads = [threading.Thread(target=lambda k=k: [put(f't{k}-{i}') for i in range(20)]) for k in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    done, found = trace(*python(code))
    assert done.returncode == 0 and not found["partial"] and set(names(found["events"])) == {("created", p.name) for p in here.iterdir()} and len(found["events"]) == 190


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


@told
def test_without_the_filter(trace, here, notebook):
    (here / "in.txt").write_text("1")
    done, found = trace(*python("import os\nopen('in.txt').read(); open('a.tmp', 'w').write('1'); os.rename('a.tmp', 'a.txt'); os.system('cat in.txt > b.txt')"), preexec_fn=_forbid)
    assert done.returncode == 0 and found["capture"] == "inotify+audit"
    assert sorted(names(found["events"])) == [("created", "a.txt"), ("created", "b.txt"), ("read", "in.txt")]
    assert {Path(e["path"]).name for e in found["events"] if e["pid"]} >= {"a.txt", "in.txt"}
    os.rename(notebook("x = 1", "open('c.txt', 'w').write('1')", "import os; os.system('cat c.txt > d.txt')"), here / "nb.ipynb")
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "run", "nb.ipynb", "--json"], cwd=here, capture_output=True, text=True, preexec_fn=_forbid)
    ran = json.loads(done.stdout)
    reader = LineageReader()
    assert ran["status"] == "done" and reader.stage(ran["id"])["capture"] == "inotify+audit"
    assert [(e["op"], Path(e["path"]).name, e["cell"]) for e in reader.events(ran["id"])] == [("created", "c.txt", 1), ("created", "d.txt", 2)]


# the index

@told
def test_off_and_no_nonsense(here, opml, notebook, monkeypatch):
    done = opml("trace", "--json", "--", "sh", "-c", "echo x; exit 2", cwd=here, env={"OPML_CAPTURE": "off"})
    found = json.loads(done.stdout)
    assert done.returncode == found["exit"] == 2 and found["capture"] == "off" and found["run"] is None and done.stderr == "x\n" and not LineageReader().runs.ls()
    done = opml("trace", "--json", "--", "true", cwd=here, env={"OPML_CAPTURE": "perhaps"})
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
