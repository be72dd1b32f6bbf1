"""A server whose model store breaks: it answers on, says so, follows again once the store is whole, and never acknowledges what isn't done."""
import errno
import sqlite3
import subprocess
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest
from conftest import until

from opml_wb.core.record.models import ModelStore
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
    "The store's folder went away; whoever looks for it makes no new one."
    away = store.root.rename(store.root.with_name("away"))
    try: yield
    finally:
        assert not store.root.exists()
        away.rename(store.root)


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
    assert client.batch([PICTURE])["version"] == 2 and store.info("net", 2)["stable"]
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
