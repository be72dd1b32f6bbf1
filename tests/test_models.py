"""The model store under many writers and kill -9: no version is ever partial, none is lost that was acknowledged, the history only grows."""
import multiprocessing as mp
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opml_wb.core.record.content_addressed import digest
from opml_wb.core.record.models import ModelError, ModelStore

WRITER = """
import random, sys, tempfile
from pathlib import Path
from opml_wb.core.record.models import ModelStore, ModelError
root, log, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
store, rng, place = ModelStore(root), random.Random(seed), Path(tempfile.mkdtemp())
print("up", flush=True)
with open(log, "a", buffering=1) as f:
    for i in range(10_000):
        d = place/str(i)
        d.mkdir()
        body = rng.randbytes(200_000)
        for k in range(3): (d/f"part{k}").write_bytes(body)
        v = store.publish("m", d, metrics={"seed": seed})
        f.write(f"publish {v}\\n")
        try:
            if rng.random() < .6: store.mark_stable("m", v); f.write(f"mark_stable {v}\\n")
            if rng.random() < .6: store.promote("m", v); f.write(f"promote {v}\\n")
            if rng.random() < .2: f.write(f"rollback {store.rollback('m')}\\n")
            if rng.random() < .2: store.pin("m", v); store.unpin("m")
            if v > 6 and rng.random() < .4: store.remove("m", rng.randrange(1, v))
        except ModelError: pass
"""


def whole(path):
    "Three equal parts: what the writer meant."
    return len({(path/f"part{k}").read_bytes() for k in range(3)}) == 1 and sorted(os.listdir(path)) == ["part0", "part1", "part2"]


@pytest.mark.slow
def test_killed_writers_leave_nothing_partial_and_lose_nothing(tmp_path):
    "100 x kill -9 of writers in the middle of their work, a reader beside them."
    from conftest import until                                   # not in the processes that `spawn` starts
    store, log, rng, served = ModelStore(tmp_path/"store"), tmp_path/"log", random.Random(0), 0
    def start(seed): return subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path/"store"), str(log), str(seed)], stdout=subprocess.PIPE)
    def done(): return log.stat().st_size if log.exists() else 0
    spawned, alive = 3, [start(i) for i in range(3)]
    for p in alive: p.stdout.readline()
    for kill in range(100):
        before = done()
        if kill % 2: assert until(lambda: done() > before, 60)   # they get somewhere, however busy the machine is
        time.sleep(rng.uniform(.005, .05))
        victim = alive.pop(rng.randrange(len(alive)))
        victim.kill(); victim.wait()
        alive.append(start(spawned)); spawned += 1
        if kill % 3 == 0: alive[-1].stdout.readline()
        try: path = store.resolve("m")
        except ModelError: continue
        try: assert whole(path); served += 1
        except FileNotFoundError: assert not path.exists()       # removed since: never half of it
    for p in alive: p.kill(); p.wait()
    said = [line.split() for line in log.read_text().splitlines() if line.count(" ") == 1]
    history = store.history("m")
    happened = set(zip(history.op, history.version.astype(str)))
    assert served > 20 and len(said) > 50
    assert all((op, v) in happened for op, v in said)            # all that was acknowledged
    assert history.seq.is_monotonic_increasing
    published = history[history.op == "publish"].version.tolist()
    assert published == list(range(1, len(published) + 1))
    for v in store.versions("m").index: assert whole(store.resolve("m", version=v)) and store.verify("m", v)
    store.publish("m", Path(__file__))
    assert not list(store.objects.glob(".*"))                    # what the killed left is swept away


def _publish_many(root, folder, n, out):
    store = ModelStore(root)
    out.put([store.publish("m", folder/str(i % 4)) for i in range(n)])


def test_eight_processes_publish_at_once(tmp_path):
    "Every version has its own number, equal content is kept once."
    for i in range(4): (tmp_path/str(i)).mkdir(); (tmp_path/str(i)/"w").write_bytes(bytes([i]) * 50_000)
    ctx, n = mp.get_context("spawn"), 12
    out = ctx.Queue()
    team = [ctx.Process(target=_publish_many, args=(tmp_path/"store", tmp_path, n, out)) for _ in range(8)]
    for p in team: p.start()
    numbers = sorted(v for _ in team for v in out.get(timeout=120))
    for p in team: p.join()
    store = ModelStore(tmp_path/"store")
    assert numbers == list(range(1, 8 * n + 1))
    assert len(list(store.objects.iterdir())) == 4
    assert set(store.versions("m").digest) == {digest(tmp_path/str(i)) for i in range(4)}


def test_two_operators_at_once(tmp_path):
    "Both decisions are in the history, the later one holds."
    for i in (1, 2): (tmp_path/f"{i}").write_text(str(i)); ModelStore(tmp_path/"s").publish("m", tmp_path/f"{i}")
    code = "import sys; from opml_wb.core.record.models import ModelStore; s = ModelStore(sys.argv[1]); [s.pin('m', int(sys.argv[2])) for _ in range(20)]"
    team = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"s"), str(v)]) for v in (1, 2)]
    assert [p.wait() for p in team] == [0, 0]
    store = ModelStore(tmp_path/"s")
    history = store.history("m")
    assert (history.op == "pin").sum() == 40
    assert store.current("m") == history.version.iloc[-1]


def test_unstable_versions_are_never_rolled_back_to(tmp_path):
    store = ModelStore(tmp_path/"s")
    for i in range(1, 6):
        (tmp_path/"w").write_text(str(i))
        store.publish("m", tmp_path/"w")
        store.promote("m", i)
        if i in (2, 3): store.mark_stable("m", i)
    assert [store.rollback("m"), store.rollback("m")] == [3, 2]
    with pytest.raises(ModelError, match="no version before 2"): store.rollback("m")
    assert store.current("m") == 2


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    "The copy fails half-way: no version, no leftovers."
    from opml_wb.core.record import content_addressed as content
    store = ModelStore(tmp_path/"s")
    (tmp_path/"d").mkdir(); (tmp_path/"d"/"a").write_text("a"); (tmp_path/"d"/"b").write_text("b")
    real = os.fsync
    def full(fd, n=[0]):
        n[0] += 1
        if n[0] == 2: raise OSError(28, "No space left on device")
        return real(fd)
    monkeypatch.setattr(content.os, "fsync", full)
    with pytest.raises(OSError, match="No space"): store.publish("m", tmp_path/"d")
    monkeypatch.undo()
    assert store.names() == [] and not list(store.objects.iterdir())
    assert store.publish("m", tmp_path/"d") == 1


@pytest.mark.parametrize("options", [dict(key="mine.pem"), dict(trusted=["mine.pub"])])
def test_signatures_say_what_they_need(tmp_path, monkeypatch, options):
    "Without the package `cryptography` a store that signs or trusts is refused before any work; any other works."
    for name in ("cryptography", "cryptography.hazmat.primitives.serialization"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"signatures need the package cryptography.*pip install 'opml_wb\[sign\]'"): ModelStore(tmp_path/"s", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path/"w").write_text("1")
    assert ModelStore(tmp_path/"s").publish("m", tmp_path/"w") == 1


def test_importing_the_store_is_light():
    code = "import opml_wb.core.record.models, sys; heavy = {'pandas', 'numpy', 'torch', 'cryptography'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
