"""The run store under several processes, kills, damage and odd values: nothing acknowledged is lost."""
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from opml_wb.core.record import store as s
from opml_wb.core.engine.run import Run, run
from opml_wb.core.record.store import CHILDREN, Store, StoreError

@pytest.fixture(params=["sqlite", "postgres"], autouse=True)
def index(request, home, monkeypatch):
    "Each test on both indexes, but those marked `only`."
    mark = request.node.get_closest_marker("only")
    if mark and request.param not in mark.args: pytest.skip(f"says something about {mark.args[0]} only")
    if request.param == "postgres": monkeypatch.setenv("OPML_STORE", request.getfixturevalue("postgres"))
    return request.param


sqlite = pytest.mark.only("sqlite")
PARAMS = {f"p{i}": v for i, v in enumerate([1, 2.5, "é \"q\"\n", None, True, [1, 2], {"k": 1}, -0.0, "", 2**40])}

WRITER = '''
import os, sys, time
from pathlib import Path
from opml_wb.core.record import log, store
root, start, runs, points, name = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
while start and not Path(root, "go").exists(): time.sleep(.001)
home = store.Store(root)
for i in range(runs):
    folder, run_id = home.begin({"key": f"{name}-{i}", "chapter": "demo", "preset": None, "given": {}, "params": PARAMS})
    os.environ["OPML_RUN_DIR"] = str(folder)
    for step in range(points): log.metric("loss", step / 2, step=step)
    store.finish(folder, status="done", error=None, seconds=.1, cpu=.1, rss=1)
    home.index(folder)
    print(run_id, flush=True)
'''.replace("PARAMS", repr(PARAMS))


def writer(root, runs=20, points=20, name="w", start=0):
    "A process that writes `runs` runs and prints the id of each when it is indexed."
    return subprocess.Popen([sys.executable, "-c", WRITER, str(root), str(start), str(runs), str(points), name],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    "The ids that a writer acknowledged."
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.split()


def record(home, key="k", status="done", lines=(), **request):
    "One ended run, whose log holds the bytes `lines`."
    folder, run_id = home.begin({"key": key, "chapter": "demo", "params": PARAMS, "given": {}, "preset": None, **request})
    (folder / s.LOG).write_bytes(b"".join(lines))
    s.finish(folder, status=status, error=None, seconds=1, cpu=1, rss=1)
    home.index(folder)
    return folder


def point(name="loss", value=1.0, step=None):
    return json.dumps(s.plain({"kind": "metric", "name": name, "value": value, "step": step, "t": 0})).encode() + b"\n"


def rows(root):
    "All rows of the index."
    with closing(Store(root).db) as db: return {table: sorted(map(repr, db.execute(f"select * from {table}").fetchall())) for table in ("run", *CHILDREN)}


def whole(root):
    if os.environ.get("OPML_STORE"): return True
    with closing(sqlite3.connect(root / "opml.db")) as db:
        return db.execute("pragma integrity_check").fetchone() == ("ok",)


def test_four_processes_writing_at_once_lose_nothing(tmp_path):
    kids = [writer(tmp_path, name=f"w{i}", start=1) for i in range(4)]
    time.sleep(.3)
    (tmp_path / "go").touch()      # all four open the store that isn't there yet in the same moment
    ids = [i for kid in kids for i in ended(kid)]
    assert len(set(ids)) == 80
    docs = {d["id"]: d for d in Store(tmp_path).ls()}
    assert set(docs) == set(ids)
    for d in docs.values():
        assert d["status"] == "done" and d["params"] == PARAMS and d["metrics"] == {"loss": 9.5} and d["points"] == {"loss": 20}
        assert len(s.read_lines(f"{d['dir']}/{s.LOG}")) == 20
    index = rows(tmp_path)
    assert len(index["param"]) == 800 and len(index["metric"]) == 80 and whole(tmp_path)
    assert Store(tmp_path).reindex() == (80, []) and rows(tmp_path) == index


@pytest.mark.parametrize("attempt", range(5))
def test_a_new_store_is_opened_by_many_at_once(tmp_path, attempt):
    ready = [os.pipe() for _ in range(6)]
    go_r, go_w = os.pipe()
    pids = []
    for _, tell in ready:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.write(tell, b"x")
                os.read(go_r, 1)
                Store(tmp_path).begin({"key": "k", "chapter": "demo", "params": {}})
                code = 0
            finally: os._exit(code)
        pids.append(pid)
    for listen, _ in ready: os.read(listen, 1)
    os.write(go_w, b"x" * 6)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0] * 6
    assert Store(tmp_path).count() == 6
    for fd in (go_r, go_w, *(fd for pair in ready for fd in pair)): os.close(fd)


def test_reindexing_and_listing_while_others_write(tmp_path):
    home, kids = Store(tmp_path), [writer(tmp_path, runs=60, points=2, name=f"w{i}") for i in range(2)]
    times = 0
    while any(k.poll() is None for k in kids):
        home.reindex(); home.ls(5); times += 1
        time.sleep(.005)           # SQLite's lock is not fair
    ids = [i for kid in kids for i in ended(kid)]
    assert times > 5 and {d["id"] for d in home.ls()} == set(ids) and len(ids) == 120
    assert {d["status"] for d in home.ls()} == {"done"}


def test_reindex_gives_the_same_rows(tmp_path):
    home = Store(tmp_path)
    record(home, "a", lines=[point("x", math.nan), point("été \"'", 3), point("x", 2**70), point("z", -math.inf)])
    record(home, "b", "failed")
    folder = record(home, "c", lines=[b'{"kind": "artifact", "name": "m.bin", "path": "artifacts/m.bin", "bytes": 3, "sha256": "ab", "t": 0}\n',
                                      b'{"kind": "input", "path": "/x", "sha256": "cd", "t": 0}\n'])
    home.begin({"key": "open", "chapter": "demo", "params": {}})
    before, listed = rows(tmp_path), home.ls()
    assert [d["status"] for d in listed] == ["running", "done", "failed", "done"] and len(before["artifact"]) == len(before["input"]) == 1
    assert home.reindex() == (4, []) and rows(tmp_path) == before and home.ls() == listed
    if home.db.shared: home.db.execute("drop schema opml cascade")
    for name in ("opml.db", "opml.db-wal", "opml.db-shm"): (tmp_path / name).unlink(missing_ok=True)
    assert Store(tmp_path).ls() == listed and rows(tmp_path) == before      # a lost index comes back by itself
    assert folder.exists()


def test_what_is_no_run_is_named_and_kept(tmp_path):
    home = Store(tmp_path)
    good, bad, copied = record(home, "good"), record(home, "bad"), tmp_path / "runs" / "my-copy"
    shutil.copytree(good, copied)
    (bad / s.RUN).write_text('{"id": ')
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    assert home.reindex() == (2, sorted(["empty", "my-copy", "notes.txt"]))
    assert {d["key"]: d["status"] for d in home.ls()} == {"good": "done", "bad": "damaged"} and copied.exists() and bad.exists()


def test_gc_never_takes_runs_that_only_the_index_has_forgotten(tmp_path):
    home = Store(tmp_path)
    kept, empty = record(home), tmp_path / "runs" / "empty"
    empty.mkdir()
    home.db.execute("delete from run")
    for folder in (kept, empty): os.utime(folder, (1, 1))
    assert home.garbage() == [("empty", "a folder that holds no run")]


@pytest.mark.parametrize("command", [["ls"], ["reindex"], ["claims"], ["gc"], ["rm", "k"], ["run", "NB"]])
def test_a_newer_schema_is_refused_and_left_alone(typed, home, notebook, command):
    store = Store(home)
    record(store)
    store.db.set_version(7)
    def state(): return sorted(home.glob("runs/*")), store.db.execute("select * from run").fetchall(), store.db.version()
    before = state()
    done = typed(*(notebook("n = 1") if w == "NB" else w for w in command))
    assert done.returncode == 2 and "schema 7" in done.stderr and "upgrade" in done.stderr and "Traceback" not in done.stderr
    assert state() == before and not list(home.glob("*.broken*"))


def smash(path, how):
    data = bytearray(path.read_bytes())
    if how == "no database": data = b"not a database, " * 400
    elif how == "cut": data = data[:len(data) // 2]
    else: data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


@sqlite
@pytest.mark.parametrize("how", ["no database", "cut", "pages"])
def test_a_damaged_index_is_said_and_repaired(typed, home, how):
    store = Store(home)
    for i in range(30): record(store, f"key{i}", lines=[point()])
    before, listed = rows(home), store.ls()
    store.db.close()
    assert not (home / "opml.db-wal").exists()
    smash(home / "opml.db", how)
    for command in (["ls"], ["show", "key3"], ["claims"]):
        done = typed(*command)
        assert done.returncode == 2 and "opml reindex" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""
    refused = typed("ls", "--json")
    assert refused.returncode == 2 and json.loads(refused.stdout)["status"] == "refused"
    with pytest.raises(StoreError, match="opml reindex"): Store(home).ls()
    done = typed("reindex")
    assert done.returncode == 0 and "30 runs indexed" in done.stdout, done.stderr
    assert rows(home) == before and Store(home).ls() == listed and whole(home)
    assert len(list(home.glob("opml.db.broken-*"))) == 1


@sqlite
def test_a_busy_index_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    record(Store(tmp_path))
    busy = sqlite3.connect(tmp_path / "opml.db", isolation_level=None)
    busy.execute("begin immediate")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": .1}))
    with pytest.raises(StoreError, match="locked") as e: Store.rebuilt(tmp_path)
    assert "reindex" not in str(e.value) and not list(tmp_path.glob("*.broken*"))
    busy.execute("rollback")
    assert Store.rebuilt(tmp_path) == (1, [])


def test_sigkill_at_any_moment_loses_nothing_acknowledged(tmp_path):
    rng, known = random.Random(1), []
    for turn in range(5):
        kid = writer(tmp_path, runs=10_000, points=3, name=f"t{turn}")
        told = [kid.stdout.readline() for _ in range(rng.randrange(2, 8))]
        time.sleep(rng.uniform(0, .02))                 # anywhere in a run
        kid.kill()
        out, err = kid.communicate()
        known += "".join([*told, out]).split()
        assert kid.returncode == -signal.SIGKILL, err
    for part in tmp_path.glob("runs/*/*"): os.utime(part, (1, 1))     # nobody is left who could still speak
    home = Store(tmp_path)
    docs = {d["id"]: d for d in home.ls()}
    assert len(known) > 10 and set(known) <= set(docs) and whole(tmp_path)
    assert all(docs[i]["status"] == "done" and docs[i]["metrics"] == {"loss": 1.0} for i in known)
    for i in set(docs) - set(known):
        assert docs[i]["status"] in ("done", "killed")
        if docs[i]["status"] == "killed": assert docs[i]["error"]["kind"] == "lost" and docs[i]["seconds"] == 0
    n, strange = home.reindex()
    assert n >= len(docs) and set(docs) <= {d["id"] for d in home.ls()} and len(strange) <= 5     # folders that were not yet runs
    for name in strange: os.utime(tmp_path / "runs" / name, (1, 1))
    assert {i for i, why in home.garbage() if "no run" in why} == set(strange)


def test_sigkill_in_the_middle_of_a_log_line(tmp_path):
    code = ("import os, sys\nfrom opml_wb.core import store\nhome = store.Store(sys.argv[1])\n"
            "folder, _ = home.begin({'key': 'k', 'chapter': 'demo', 'params': {}})\n"
            "for i in range(3): store.append(folder/store.LOG, {'kind': 'metric', 'name': 'x', 'value': i, 'step': i, 't': i})\n"
            "with open(folder/store.LOG, 'ab', 0) as f: f.write(b'{\"kind\": \"metric\", \"name\": \"x\", \"val')\n"
            "os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    home = Store(tmp_path)
    [doc] = home.ls()
    assert doc["status"] == "running"                   # its supervisor might still speak
    for part in tmp_path.glob("runs/*/*"): os.utime(part, (1, 1))
    [doc] = home.ls()
    assert doc["status"] == "killed" and doc["metrics"] == {"x": 2} and doc["points"] == {"x": 3}
    assert list(Run(doc).series("x")["value"]) == [0, 1, 2]
    assert home.reindex() == (1, []) and home.ls() == [doc]


def test_a_torn_line_inside_a_log_costs_only_itself(tmp_path):
    torn = b'{"kind": "metric", "na\n'                  # a disk that was full for a moment
    home = Store(tmp_path)
    folder = record(home, lines=[point("a", 1), torn, b"\xff\xfe\n", point("b", 2)])
    [doc] = home.ls()
    assert doc["metrics"] == {"a": 1, "b": 2} and len(s.read_lines(folder / s.LOG)) == 2


def test_a_long_series_is_kept_and_is_no_matter_to_ls(home, notebook):
    r = run(notebook("n = 100_000", "from opml_wb import log\nfor i in range(n): log.metric('x', i / 2, step=i)"))
    assert r.status == "done" and r.metrics == {"x": 49999.5}
    series = r.series("x")
    assert len(series) == 100_000 and (series["value"] == series["step"] / 2).all() and series["t"].is_monotonic_increasing
    (r.dir / s.LOG).rename(r.dir / "elsewhere")         # `ls` never opens it
    [doc] = Store(home).ls()
    assert doc["metrics"] == {"x": 49999.5} and doc["points"] == {"x": 100_000} and len(json.dumps(doc)) < 10_000
    assert rows(home)["metric"] == [repr((doc["id"], "x", 49999.5, 100_000))]


def test_odd_numbers_come_back(typed, home, notebook):
    r = run(notebook("n = 1", "from opml_wb import log\nimport numpy as np\n"
                              "log.metric('nan', float('nan')); log.metric('inf', np.float32('inf')); log.metric('low', -np.inf)\n"
                              "log.metric('big', 2**70); log.metric('int', np.int64(3)); log.metric('x', 1.0); log.metric('x', np.nan)"))
    assert r.status == "done"
    for m in (r.metrics, Run(Store(home).ls()[0]).metrics):
        assert math.isnan(m["nan"]) and m["inf"] == math.inf and m["low"] == -math.inf and math.isnan(m["x"])
        assert m["big"] == 2**70 and m["int"] == 3 and type(m["int"]) is int
    [value] = r.series("x")["value"][1:]
    assert math.isnan(value)

    def strict(name): raise AssertionError(f"{name} is not JSON")
    [doc] = json.loads(typed("ls", "--json").stdout, parse_constant=strict)
    assert doc["metrics"] == {"nan": "NaN", "inf": "Infinity", "low": "-Infinity", "big": 2**70, "int": 3, "x": "NaN"}
    shown = json.loads(typed("show", r.key, "--json").stdout, parse_constant=strict)
    assert shown["metrics"] == doc["metrics"]
    assert Store(home).reindex() == (1, [])


def test_removing_while_listing(tmp_path):
    home = Store(tmp_path)
    ids = [record(home, f"k{i}").name for i in range(150)]
    pid = os.fork()
    if pid == 0:
        code = 1
        try: Store(tmp_path).rm(ids[:100]); code = 0
        finally: os._exit(code)
    counts = []
    while True:
        counts.append(len(home.ls()))
        for d in home.done("k99"): assert d["id"] == ids[99]
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone: break
    assert status == 0 and counts == sorted(counts, reverse=True) and {d["id"] for d in home.ls()} == set(ids[100:])
    assert {p.name for p in home.runs.iterdir()} == set(ids[100:])
    index = rows(tmp_path)
    assert len(index["run"]) == 50 and len(index["param"]) == 500


def test_a_run_that_is_running_is_not_removed(typed, home, notebook):
    store = Store(home)
    folder, run_id = store.begin({"key": "busy", "chapter": "demo", "params": {}, "given": {}, "preset": None})
    with pytest.raises(StoreError, match=f"still running: {run_id}"): store.rm([run_id])
    done = typed("rm", "busy")
    assert done.returncode == 2 and "still running" in done.stderr and folder.exists()
    s.finish(folder, status="done", error=None, seconds=0, cpu=0, rss=0)
    store.index(folder)
    assert typed("rm", "busy").returncode == 0 and not folder.exists() and store.count() == 0


def test_a_lost_folder_is_said_and_no_answer(typed, home, notebook):
    nb = notebook("n = 1")
    first = run(nb)
    shutil.rmtree(first.dir)
    assert Store(home).ls()[0]["lost"] and "lost" in typed("ls").stdout
    assert run(nb).status == "done"
    assert "its folder is gone" in typed("gc").stdout and Store(home).count() == 1


@pytest.mark.parametrize("whole", [b"", b"{\"id\": \"2026", b"\x00\xff\x01" * 9, b"null", b"[1]", b"{}", None])
def test_a_damaged_record_is_shown_as_damaged(index, home, typed, whole):
    store = Store(home)
    found = {"code": "", "files": {}, "env": {}, "data": {}}
    folder, other = record(store, **found), record(store, "other", **found)
    if whole is None: (folder / s.RUN).unlink()
    else: (folder / s.RUN).write_bytes(whole)
    for again in range(2 if whole is not None else 1):      # before and after the index is made anew
        listed = {d["id"]: d for d in json.loads(typed("ls", "--json").stdout)}
        assert listed[folder.name]["status"] == "damaged" and listed[other.name]["status"] == "done"
        assert "run.json" in listed[folder.name]["error"]["evalue"]
        assert store.done("k") == [] and len(store.done("other")) == 1      # it is no answer
        for args in (["ls"], ["show", folder.name], ["compare", folder.name, other.name]):
            done = typed(*args)
            well = done.returncode in (0, 1, 3) if args[0] == "compare" else done.returncode == 0 and "damaged" in done.stdout
            assert well and "Traceback" not in done.stderr, done.stderr     # `compare` says by its code whether they differ
        assert store.reindex() == (2, [])
    if whole is not None: assert "removed 1" in typed("rm", folder.name).stdout


def test_a_record_without_its_request_is_damaged_too(home):
    folder = record(Store(home))
    for name in (s.RUN, s.REQUEST): (folder / name).write_text("{")
    assert Store(home).reindex() == (1, [])
    [doc] = Store(home).ls()
    assert (doc["status"], doc["id"], doc["chapter"]) == ("damaged", folder.name, "?")


def powerless():
    "Take from a root process what lets it pass permissions: capabilities 1 to 3, at its next exec."
    import ctypes
    for capability in (1, 2, 3):
        if os.getuid() == 0 and ctypes.CDLL(None).prctl(24, capability, 0, 0, 0): os._exit(99)


@sqlite
@pytest.mark.parametrize("log", ["beside", "without its index", "none"])
def test_a_read_only_home_can_be_read(home, opml, notebook, log):
    nb = notebook("n = 1")
    first = run(nb, n=2)
    writer = Store(home)
    second = record(writer, "k2", lines=[point()], code="", files={}, env={}, data={})      # in the write-ahead log, while `writer` is open
    if log == "none": writer.db.execute("pragma wal_checkpoint(truncate)")
    for end in {"none": ("-wal", "-shm"), "without its index": ("-shm",)}.get(log, ()): (home / f"opml.db{end}").unlink()
    paths = [home, *home.rglob("*")]
    before = {p: (p.stat().st_mode, p.stat().st_mtime_ns) for p in paths}
    for p in paths: p.chmod(p.stat().st_mode & ~0o222)
    try:
        done = opml("ls", "--json", preexec_fn=powerless)
        if done.returncode == 99: pytest.skip("root here cannot be made to respect permissions")
        assert {d["id"] for d in json.loads(done.stdout)} == {first.doc["id"], second.name}, done.stderr
        if log != "beside": return
        for args, said in ((["show", "k2"], "loss"), (["claims"], "no claims"), (["compare", first.key, "k2"], "loss"), (["run", nb, "n=2"], "cached")):
            done = opml(*args, preexec_fn=powerless)
            assert done.returncode in ((0, 1, 3) if args[0] == "compare" else (0,)) and said in done.stdout + done.stderr, done.stderr
        for args in (["run", nb, "n=3"], ["rm", "k2"], ["gc"], ["reindex"], ["sweep", nb, "n=2,3"]):
            done = opml(*args, preexec_fn=powerless)
            assert done.returncode == 2 and "is read-only" in done.stderr and str(home) in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
    finally:
        for p, (mode, _) in before.items(): p.chmod(mode)
    assert {p: p.stat().st_mtime_ns for p in paths} == {p: t for p, (_, t) in before.items()}
