"""A server whose model store breaks: it answers on, says so, follows again once the store is whole, and never acknowledges what isn't done."""
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import closing, contextmanager, suppress

import numpy as np
import psutil
import pytest
from conftest import until

from opml_wb.core.record.models import ModelError, ModelStore
from opml_wb.flexserve import Bundle, Client
from opml_wb.flexserve.serve import Server, ServerError, encoded

PICTURE = encoded(np.full((24, 24, 3), 99, np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home on a small disk of its own, if one may be mounted here: (folder, whether it is)."
    folder = tmp_path_factory.mktemp("small")
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode
    yield folder, mounted
    if mounted: subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def served(home, tmp_path_factory):
    "(server, its store) with versions 1 and 2, and 3 that no server may load."
    import torch
    from opml_wb.flexserve.model import zoo
    place, store = tmp_path_factory.mktemp("bundles"), ModelStore(home[0] / "models")
    (place / "my_arch.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(1728, 2))\n")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(place))
    import my_arch
    for n in (1, 2, 3):
        torch.manual_seed(n)
        net = {"name": "mlp", "arch": "opml_wb.flexserve.model.zoo:mlp", "weights": zoo.mlp().state_dict(), "classes": ["no", "yes"]}
        if n == 3: net |= {"arch": "my_arch:net", "weights": my_arch.net().state_dict()}
        store.publish("net", Bundle.create(place / str(n), [net], golden=[PICTURE], allow=["my_arch"]).dir)
    store.promote("net", 1)
    with Server("net", home=home[0], engine="torch", workers=1) as server: yield server, store
    patch.undo()


def state(client): return client.call("GET", "/health/ready")


@contextmanager
def full(store):
    "The disk is full."
    filler = store.root / "filler"
    try:
        with open(filler, "wb", buffering=0) as f:
            try:
                for size in (1 << 16, 1 << 12, 1):
                    while f.write(b"x" * size) == size: pass
            except OSError as e: assert e.errno == errno.ENOSPC
        yield
    finally: filler.unlink()


@contextmanager
def damaged(store):
    "The database's first page is overwritten."
    file = store.root / "models.db"
    with closing(sqlite3.connect(file)) as db: db.execute("pragma wal_checkpoint(truncate)")
    whole = file.read_bytes()
    file.write_bytes(b"\0" * 4096 + whole[4096:])
    try: yield
    finally: file.write_bytes(whole)


@contextmanager
def gone(store):
    "The store's folder went away; whoever looks for it, or had begun to write, makes no new one."
    away = store.root.rename(store.root.with_name("away"))
    try: yield
    finally:
        made = list(store.root.rglob("*")) if store.root.exists() else None
        if made is not None: shutil.rmtree(store.root)
        away.rename(store.root)
        assert made is None, made


@contextmanager
def no_file(store):
    "A folder stands where the database was."
    file = store.root / "models.db"
    away = file.rename(file.with_name("away.db"))
    file.mkdir()
    try: yield
    finally:
        file.rmdir()
        away.rename(file)


@pytest.mark.parametrize("fault", [full, damaged, gone, no_file], ids=lambda f: f.__name__)
def test_the_server_follows_again_after_any_fault(served, home, fault):
    "While the store is broken: requests are answered, ready is 200 and tells, a pin is an error. After it: the next pin is served."
    if fault is full and not home[1]: pytest.skip("no disk of its own can be mounted here")
    server, store = served
    client = Client(server.url)
    assert client.pin(1) == {"version": 1, "serving": 1} and state(client)["error"] is None
    with fault(store):
        for change in (lambda: client.pin(2), client.rollback):
            with pytest.raises(ServerError) as e: change()
            assert e.value.status == 503 and "store" in str(e.value), e.value.body
        assert until(lambda: not state(client)["following"]["ok"], 60)
        told = state(client)
        assert told["ready"] and told["error"] and told["version"] == 1
        assert "flexserve_following 0.0" in client.metrics()
        assert client.batch([PICTURE])["version"] == 1
    assert until(lambda: state(client)["following"]["ok"], 60) and state(client)["error"] is None
    assert store.current("net") == 1  # nothing was half done
    assert client.pin(2) == {"version": 2, "serving": 2}
    assert client.batch([PICTURE])["version"] == 2 and until(lambda: store.info("net", 2)["stable"], 60)
    assert client.rollback() == {"version": 1, "serving": 1}


def test_a_locked_store_holds_up_nobody(served):
    "Somebody keeps the database to himself: pictures are answered meanwhile; the pin waits, and is done when the lock is gone."
    server, store = served
    client, done = Client(server.url), []
    client.pin(1)
    with closing(sqlite3.connect(store.root / "models.db", isolation_level=None)) as db:
        db.execute("pragma locking_mode=exclusive"); db.execute("begin exclusive"); db.execute("select * from event").fetchall()
        pin = threading.Thread(target=lambda: done.append(Client(server.url).pin(2)))
        pin.start()
        for _ in range(20): assert client.batch([PICTURE])["version"] == 1 and client.call("GET", "/health/live")["live"]
        assert not done
        db.execute("rollback")
    pin.join()
    assert done == [{"version": 2, "serving": 2}]


def test_a_version_that_cannot_be_served_is_no_success(served):
    "The pin of a version that the server may not load is an error with its reason; the one before answers on; another pin puts it right."
    server, _ = served
    client = Client(server.url)
    client.pin(1)
    with pytest.raises(ServerError) as e: client.pin(3)
    assert e.value.status == 503 and "version 3" in str(e.value) and "my_arch" in str(e.value) and "version 1 answers" in str(e.value)
    assert "my_arch" in state(client)["error"] and client.batch([PICTURE])["version"] == 1
    assert client.pin(2) == {"version": 2, "serving": 2} and state(client)["error"] is None


def told(tree, what):
    "Each process of `tree` is told `what`; those of the version before may be gone by then."
    for p in tree:
        with suppress(psutil.NoSuchProcess): getattr(p, what)()


def test_a_version_whose_files_come_back_is_served(served):
    "Its files were not whole while they were read, so it could not be loaded: once they are, it is served, and nobody has to ask."
    server, store = served
    client = Client(server.url)
    for v in (2, 1): settled(store, client, v)
    file = min(p for p in store.resolve("net", version=2).rglob("*") if p.suffix in (".safetensors", ".pt"))
    whole, mode, tree = file.read_bytes(), file.stat().st_mode, server.tree()
    told(tree, "suspend")            # the store looks at the files before it takes the pin: they change behind its back
    try:
        store.pin("net", 2)
        file.chmod(mode | 0o200)
        file.write_bytes(whole[:-8] + bytes(8))
        told(tree, "resume")
        assert until(lambda: state(client)["error"], 60) and state(client)["version"] == 1
    finally:
        file.write_bytes(whole)
        file.chmod(mode)
        told(tree, "resume")
    assert until(lambda: state(client)["version"] == 2, 60) and state(client)["error"] is None
    assert client.batch([PICTURE])["version"] == 2


# ------------------------------------------------------------------ fifty faults

@contextmanager
def locked(store):
    "Somebody keeps the database to himself."
    with closing(sqlite3.connect(store.root / "models.db", isolation_level=None)) as db:
        db.execute("pragma locking_mode=exclusive"); db.execute("begin exclusive"); db.execute("select * from event").fetchall()
        yield
        db.execute("rollback")


@contextmanager
def one_page(store):
    "One page in the middle of the database is overwritten; its first page is whole."
    file = store.root / "models.db"
    with closing(sqlite3.connect(file)) as db: db.execute("pragma wal_checkpoint(truncate)")
    whole = file.read_bytes()
    with closing(sqlite3.connect(file)) as db: root, = db.execute("select rootpage from sqlite_master where name='event'").fetchone()
    at = (root - 1) * 4096
    file.write_bytes(whole[:at] + os.urandom(4096) + whole[at + 4096:])
    try: yield
    finally: file.write_bytes(whole)


@contextmanager
def read_only(store):
    "Nothing may be written: the disk is mounted read-only."
    def remount(): return not subprocess.run(["mount", "-o", "remount,ro", store.root.parent], capture_output=True).returncode
    assert until(remount, 60)     # not while somebody writes
    try: yield
    finally: subprocess.run(["mount", "-o", "remount,rw", store.root.parent], check=True)


@contextmanager
def no_objects(store):
    "The folder of the versions' files went away; the database is there."
    away = store.objects.rename(store.objects.with_name("objects.away"))
    try: yield
    finally: away.rename(store.objects)


@contextmanager
def cut(store):
    "The second half of the database is missing."
    file = store.root / "models.db"
    with closing(sqlite3.connect(file)) as db: db.execute("pragma wal_checkpoint(truncate)")
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2 // 4096 * 4096)
    try: yield
    finally: file.write_bytes(whole)


@contextmanager
def empty(store):
    "The database is a file of nothing; whoever finds it makes no new store of it."
    file = store.root / "models.db"
    with closing(sqlite3.connect(file)) as db: db.execute("pragma wal_checkpoint(truncate)")
    whole = file.read_bytes()
    file.write_bytes(b"")
    try: yield
    finally:
        found = file.stat().st_size
        for more in ("-wal", "-shm"): file.with_name(file.name + more).unlink(missing_ok=True)
        file.write_bytes(whole)
        assert not found


RESTORED = damaged, one_page, cut, empty     # whose end puts the file back as it was when they came: what was written meanwhile is lost
FAULTS = full, locked, damaged, one_page, cut, empty, read_only, gone, no_file, no_objects
MOMENTS = "before", "pin", "follow", "stable", "rollback"   # what is about to happen when the fault comes


class Told(threading.Thread):
    "What /health/ready says, all the while: [(s, state)]."
    def __init__(self, url):
        super().__init__(daemon=True)
        self.client, self.said, self.end = Client(url), [], threading.Event()
        self.start()

    def run(self):
        while not self.end.is_set():
            self.said.append((time.monotonic(), state(self.client)))
            self.end.wait(.05)

    def __enter__(self): return self
    def __exit__(self, *exc): self.end.set(); self.join(60)


def attempt(change):
    "What an operator is told: the answer, or the error's status."
    try: return change()
    except ServerError as e: return e.status
    except (ModelError, OSError, sqlite3.Error) as e: return type(e).__name__


def settled(store, client, version):
    assert client.pin(version) == {"version": version, "serving": version}
    assert client.batch([PICTURE])["version"] == version
    assert until(lambda: store.info("net", version)["stable"], 60)


def begun(moment, store, client, heard):
    "Bring about the moment at which the fault comes, what is answered goes to `heard`: [what runs in the background]."
    changes = {"pin": lambda: client.pin(2), "follow": lambda: store.pin("net", 2), "rollback": client.rollback,
               "stable": lambda: (client.pin(2), client.batch([PICTURE]))}
    if moment not in changes: return []
    job = threading.Thread(target=lambda: heard.append(attempt(changes[moment])))
    job.start()
    return [job]


def kept(store, events):
    "The decisions that the history has beyond its first `events`: {(op, version)}."
    history = store.history("net")[events:]
    return set(zip(history.op, history.version))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("moment", MOMENTS)
def test_fifty_faults(served, home, fault, moment):
    """Whatever breaks, at whatever moment: no success that changed nothing, health that tells the truth throughout, and within seconds of
    the recovery what the store says is served."""
    if not home[1]: pytest.skip("no disk of its own can be mounted here")
    server, store = served
    client = Client(server.url)
    for v in (2, 1): settled(store, client, v)
    with Told(server.url) as told:
        before, events = [], len(store.history("net"))
        jobs, heard, holds = [], [], threading.Thread(target=lambda: heard.append(attempt(lambda: client.pin(2))))
        try:
            jobs = begun(moment, store, client, before)
            with fault(store):
                time.sleep(.3)
                holds.start()
                holds.join(2)
                assert client.batch([PICTURE])["version"] in (1, 2)
        finally:
            for job in [*jobs, *[holds] * bool(holds.ident)]: job.join(120)
        healed = time.monotonic()
        assert until(lambda: store.follows("net") == state(client)["version"] and state(client)["following"]["ok"], 60)
        took = time.monotonic() - healed
    for answer in heard:   # a success is one that was followed; else it was an error
        assert answer == {"version": 2, "serving": 2} or answer in (404, 409, 503), answer
        if isinstance(answer, dict): assert ("pin", 2) in kept(store, events)
    if moment == "follow" and before == [None] and fault not in RESTORED: assert ("pin", 2) in kept(store, events)
    assert all(s["ready"] and all(t["ok"] for t in s["tasks"].values()) for _, s in told.said)
    settled(store, client, 2)
    with open(os.environ.get("OPML_FAULTS", os.devnull), "a") as f: f.write(json.dumps([fault.__name__, moment, took, str(heard)]) + "\n")


def test_a_task_that_fails_is_restarted_and_told(served):
    "The states of the background tasks stand in /health/ready and /metrics."
    client = Client(served[0].url)
    assert set(state(client)["tasks"]) >= {"follower", "watchdog", "batcher"}
    assert 'flexserve_task_up{task="follower"} 1.0' in client.metrics()


def test_a_full_disk_is_said_in_one_line(served, home):
    "`publish` and `add` on a full disk: one line, exit code 2, no traceback, and the store is as it was; then they succeed."
    import os
    import sys

    import torch
    if not home[1]: pytest.skip("no disk of its own can be mounted here")
    _, store = served
    before = len(store.history("net"))
    torch.jit.trace(torch.nn.Linear(200, 2000), torch.zeros(1, 200)).save(home[0].parent / "wide.pt")
    add = [sys.executable, "-m", "opml_wb.core.cli", "flexserve", "add", "wide", home[0].parent / "wide.pt", "--columns", ",".join(f"c{i}" for i in range(200))]
    def run(): return subprocess.run(add, env={**os.environ, "OPML_HOME": str(home[0])}, capture_output=True, text=True)
    with full(store):
        done = run()
        assert done.returncode == 2 and "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert len(store.history("net")) == before and "wide" not in store.names() and not store.collect()
    assert run().returncode == 0 and store.current("wide") == 1
