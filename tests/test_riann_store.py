"""The store under fire: killed at every step, every byte flipped, cut at every offset, disk full, two writers."""
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from opml_wb.riann.disk import generation as G, wal as W
from opml_wb.riann.disk.store import Damaged, IndexStore, Locked, StoreError, verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and flock")
REST = {"LOCK", "MANIFEST.json"}


def payload(i, big=300):
    "Arrays of operation i, of a size that hangs on i."
    rng = np.random.default_rng(i)
    n = int(rng.integers(0, big))
    return dict(x=rng.standard_normal((n, 16), np.float32), ids=np.arange(i, i + n))


def put(log, i, big=300): return log.append("add", payload(i, big), {"i": i})


def keep(log, upto, big=300):
    "Save what stands for operations 1 .. upto."
    log.save(payload(upto, big) | {"seen": np.arange(1, upto + 1)}, {"upto": upto})


def contents(log, big=300):
    "How many operations a store stands for: all of 1 .. n, in order, each whole."
    n = 0
    if log.snapshot:
        arrays, meta = log.snapshot
        n = meta["upto"]
        assert arrays.pop("seen").tolist() == list(range(1, n + 1))
        same(arrays, payload(n, big))
    for op, arrays, meta in log.replay():
        n += 1
        assert (op, meta) == ("add", {"i": n})
        same(arrays, payload(n, big))
    assert log.seq == n
    return n


def same(got, want):
    assert list(got) == list(want)
    for name, a in want.items():
        assert got[name].dtype == a.dtype and got[name].shape == a.shape and got[name].tobytes() == a.tobytes()


def reopened(path, big=300, **options):
    with IndexStore.open(path, create=False, **options) as log: return contents(log, big)


def goes_on(path):
    "The folder is in order, takes another operation and gives it back; how many operations it stood for before."
    with IndexStore.open(path, create=False, fsync="none") as log:
        n = contents(log)
        generation = log.generation
        assert set(os.listdir(path)) == {"LOCK", f"wal-{generation}.log"} | ({"MANIFEST.json", f"gen-{generation}"} if generation else set())
        put(log, n + 1)
    assert reopened(path) == n + 1 and verify(path)["ok"]
    return n


def forked(action):
    "Run `action()` in a forked child; its wait status, 0 when it returned."
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    try: action(); os._exit(0)
    except BaseException: traceback.print_exc()
    os._exit(1)


CALLS = "open", "close", "writev", "pwrite", "fsync", "fdatasync", "replace", "mkdir", "unlink", "rmdir", "ftruncate"


@contextmanager
def at_each_call(hook):
    """`hook(name, call, args)` in place of each system call that changes files.

    Flushing is left out: a killed process leaves the system's memory as it is, and for power cuts there is a model."""
    real = {name: getattr(os, name) if "sync" not in name else lambda fd: None for name in CALLS if hasattr(os, name)}
    kept = {name: getattr(os, name) for name in real}
    def through(name):
        def call(*args, **options): return hook(name, lambda *a: real[name](*(a or args), **options), args)
        return call
    for name in real: setattr(os, name, through(name))
    try: yield
    finally:
        for name, f in kept.items(): setattr(os, name, f)


def count_calls(action):
    names = []
    def hook(name, call, args):
        names.append(name)
        return call()
    with at_each_call(hook): action()
    return names


def half(buffers):
    "The first half of what writev was to write."
    data = b"".join(buffers)
    return [data[:len(data) // 2]]


def die(): os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step, when, action):
    "Run `action` in a child that is killed before, after, or half-way through its call number `step`."
    seen = iter(range(1 << 30))
    def hook(name, call, args):
        if next(seen) != step: return call()
        if when == "half" and name == "writev": call(args[0], half(args[1]))
        elif when == "after": call()
        die()
    def child():
        with at_each_call(hook): action()
    status = forked(child)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"step {step} was not reached"


def every_kill(prepare, action, tmp_path):
    "For each call in `action(path)`, before and after it and in mid-write: yields (path, step, when) after the kill."
    prepare(tmp_path / "model")
    def fresh():
        path = tmp_path / "store"
        shutil.rmtree(path, ignore_errors=True)
        if (tmp_path / "model").exists(): shutil.copytree(tmp_path / "model", path)
        return path
    path = fresh()
    calls = count_calls(lambda: action(path))
    for step, name in enumerate(calls):
        for when in ("before", *["half"] * (name == "writev"), "after"):
            path = fresh()
            killed_at(step, when, lambda: action(path))
            yield path, f"{step} of {len(calls)} ({name}), {when}"


def filled(path, saves=(3,), upto=5):
    with IndexStore.open(path, fsync="none") as log:
        for i in range(1, upto + 1):
            put(log, i)
            if i in saves: keep(log, i)


@pytest.mark.slow
def test_killed_at_every_step_of_a_save(tmp_path):
    def save(path):
        with IndexStore.open(path) as log: keep(log, 5)
    seen = set()
    for path, where in every_kill(filled, save, tmp_path):
        with IndexStore.open(path, readonly=True) as log: assert contents(log) == 5, where
        with IndexStore.open(path) as log: seen.add(log.generation)
        assert goes_on(path) == 5, where
    assert seen == {1, 2}


@pytest.mark.slow
def test_killed_at_every_step_of_the_first_save(tmp_path):
    def save(path):
        with IndexStore.open(path) as log: keep(log, 5)
    for path, where in every_kill(lambda path: filled(path, ()), save, tmp_path): assert goes_on(path) == 5, where


def test_killed_at_every_step_of_the_creation(tmp_path):
    for path, where in every_kill(lambda path: None, lambda path: IndexStore.open(path / "deep").close(), tmp_path):
        IndexStore.open(path / "deep").close()
        assert goes_on(path / "deep") == 0, where


def test_killed_at_every_step_of_an_append(tmp_path):
    def add(path):
        with IndexStore.open(path) as log: put(log, 6)
    found = [goes_on(path) for path, where in every_kill(filled, add, tmp_path)]
    assert set(found) == {5, 6} and found == sorted(found)


def test_killed_at_every_step_of_a_recovery(tmp_path):
    "Opening a folder where a torn record, a half-made generation and the remains of an old one lie."
    def wreck(path):
        filled(path)
        with open(path / "wal-1.log", "ab") as f: f.write(b"".join(W.encode_record(6, "add", payload(6), "{}"))[:100])
        shutil.copytree(path / "gen-1", path / "gen-2")
        shutil.copytree(path / "gen-1", path / "gen-0")
        for name in ("wal-2.log", "wal-0.log", "wal-2.log.part", "MANIFEST.json.part"): (path / name).write_bytes(b"rest")
        (path / "MANIFEST.old.json").write_bytes(b"{}")
    for path, where in every_kill(wreck, lambda path: IndexStore.open(path).close(), tmp_path): assert goes_on(path) == 5, where


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("verb", ["append", "save"])
def test_every_call_fails_once(tmp_path, verb, code):
    "An error in any system call: nothing acknowledged is lost, and the store goes on, or says that it must be opened anew."
    def act(log): put(log, 6) if verb == "append" else keep(log, 5)
    filled(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "count")
    with IndexStore.open(tmp_path / "count") as log: calls = count_calls(lambda: act(log))
    outcomes = set()
    for step, name in enumerate(calls):
        path = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "model", path)
        log, seen = IndexStore.open(path), iter(range(1 << 30))
        def hook(name, call, args):
            if next(seen) != step: return call()
            if name == "writev": call(args[0], half(args[1]))
            if name == "close": call()   # a failing close closes
            raise OSError(code, os.strerror(code))
        try:
            with at_each_call(hook): act(log)
            outcomes.add("swept later")
        except OSError as e:
            assert e.errno == code
            if not log.closed:
                assert contents(log) == 5 and log.generation == 1, name
                act(log)
            outcomes.add("closed" if log.closed else "undone")
        if not log.closed: put(log, log.seq + 1)
        n = log.seq
        log.close()
        assert reopened(path) == n
        assert goes_on(path) == n
    assert outcomes == ({"undone"} if verb == "append" else {"undone", "closed", "swept later"})


@contextmanager
def power(path, states):
    """Record after each call what a power cut would leave at least: only names and bytes that were forced to the disk.

    `states` gets (folder as {name: bytes or {name: bytes}}, number of calls)."""
    disk, names = {}, {}   # inode -> bytes, folder -> {name: inode}
    def hook(name, call, args):
        if name in ("fsync", "fdatasync"):
            where = os.readlink(f"/proc/self/fd/{args[0]}")
            if os.path.isdir(where): names[where] = {f.name: (f.stat().st_ino, str(f)) for f in Path(where).iterdir()}
            else: disk[os.fstat(args[0]).st_ino] = Path(where).read_bytes()
        done = call()
        def seen(folder):
            return {n: seen(at) if os.path.isdir(at) or at in names else disk.get(i, b"") for n, (i, at) in names.get(folder, {}).items()}
        states.append(seen(str(path)))
        return done
    for folder in (path, *[f for f in path.rglob("*") if f.is_dir()]): names[str(folder)] = {f.name: (f.stat().st_ino, str(f)) for f in folder.iterdir()}
    disk.update({f.stat().st_ino: f.read_bytes() for f in path.rglob("*") if f.is_file()})
    with at_each_call(hook): yield


def lay_out(path, tree):
    path.mkdir()
    for name, what in tree.items():
        if isinstance(what, dict): lay_out(path / name, what)
        else: (path / name).write_bytes(what)


def test_power_cut_after_every_call(tmp_path):
    "Whatever was not forced to the disk is lost: acknowledged operations are not."
    path, states, acknowledged = tmp_path / "store", [], []
    filled(path, (), 2)
    n = 2
    with power(path, states), IndexStore.open(path) as log:
        for verb in "aasaassa":
            if verb == "a": put(log, n + 1)
            else: keep(log, n)
            n = log.seq
            acknowledged += [(len(states), n)]
    assert len(states) > 100
    for i, tree in enumerate(states):
        lay_out(tmp_path / f"{i}", tree)
        least = max((n for at, n in acknowledged if at <= i + 1), default=2)
        assert least <= goes_on(tmp_path / f"{i}") <= least + 1, i
        shutil.rmtree(tmp_path / f"{i}")


def test_power_cut_without_fsync_loses_something(tmp_path):
    "The model above can tell: under fsync='none' acknowledged operations vanish."
    path, states = tmp_path / "store", []
    filled(path, (), 2)
    with power(path, states), IndexStore.open(path, fsync="none") as log:
        put(log, 3)
        lay_out(tmp_path / "cut", states[-1])
    assert goes_on(tmp_path / "cut") == 2


def writer(path, pipe, seed):
    "Append and save for ever, telling what begins and what is done."
    rng = random.Random(seed)
    with IndexStore.open(path, fsync=rng.choice(["batch", "none"])) as log:
        n = log.seq
        while True:
            os.write(pipe, b"b%d\n" % (n + 1))
            if rng.random() < .2: keep(log, n, 30_000)
            else:
                put(log, n + 1, 30_000)
                n += 1
            os.write(pipe, b"d%d\n" % n)


@pytest.mark.slow
def test_killed_at_random_thirty_times(tmp_path):
    "One folder, thirty writers in turn, each killed at a random instant; operations of up to 2 MB."
    path, rng, generations = tmp_path / "store", random.Random(7), set()
    IndexStore.open(path).close()
    n = 0
    for turn in range(30):
        out, pipe = os.pipe()
        pid = os.fork()
        if not pid: writer(path, pipe, turn)
        os.close(pipe)
        told, least = b"", rng.randrange(8)
        while told.count(b"d") < least or b"\n" not in told: told += os.read(out, 1 << 16)
        time.sleep(rng.random() * .02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(out, 1 << 16): told += more
        os.close(out)
        lines = [line for line in told.decode().split("\n")[:-1]]
        done = max([n, *[int(line[1:]) for line in lines if line[0] == "d"]])
        begun = max(int(line[1:]) for line in lines if line[0] == "b")
        with IndexStore.open(path) as log:   # the lock went with the process
            generations.add(log.generation)
            n = contents(log, 30_000)
        assert done <= n <= max(begun, done), turn
    assert n > 30 and len(generations) > 5


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_the_log(tmp_path):
    "An error that names file and record; in the last record, whose acknowledgement nobody can know, a warning."
    path, small = tmp_path / "store", dict(x=np.arange(3, dtype=np.float32), ids=np.arange(3))
    with IndexStore.open(path) as log:
        log.save(small, {})
        starts = [W.START]
        for i in range(3): log.append("add", small, {"i": i}); starts.append(log.bytes)
    file = path / "wal-1.log"
    whole = file.read_bytes()
    assert len(whole) == starts[-1]
    for at in range(len(whole)):
        for bit in (1, 128):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
            record = next((s for s in reversed(starts) if s <= at), 0)
            if at < starts[2]:
                with pytest.raises(StoreError, match="wal-1.log") as e: IndexStore.open(path)
                if isinstance(e.value, Damaged): assert (e.value.file, e.value.offset) == (file, record)
                else: assert 8 <= at < 12   # a newer format?
            else:
                with pytest.warns(RuntimeWarning, match=f"byte {starts[2]}: .*dropped"), IndexStore.open(path, readonly=True) as log:
                    assert [meta["i"] for _, _, meta in log.replay()] == [0, 1] and log.torn.kind == "last"
    file.write_bytes(whole)
    assert verify(path)["ok"]


def test_unchecked_opening_finds_damage_when_it_is_read(tmp_path):
    "With check=False the data of all but the last operation waits for replay to be verified."
    path = tmp_path / "store"
    filled(path)
    with IndexStore.open(path) as log: first, last = W.read_records(log._log.fd, log._log.first)
    file, whole = path / "wal-1.log", (path / "wal-1.log").read_bytes()
    file.write_bytes(whole[:first.end - 1] + bytes([whole[first.end - 1] ^ 1]) + whole[first.end:])
    with pytest.raises(Damaged): IndexStore.open(path)
    with IndexStore.open(path, check=False) as log, pytest.raises(Damaged, match=f"wal-1.log, byte {first.offset}: record 4"): list(log.replay())
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match=f"byte {last.offset}"), IndexStore.open(path, check=False) as log: assert contents(log) == 4
    assert goes_on(path) == 4


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_manifest_and_snapshot(tmp_path):
    path = tmp_path / "store"
    with IndexStore.open(path) as log:
        log.save(dict(x=np.arange(3, dtype=np.float32), ids=np.arange(3), none=np.zeros((0, 4))), {"deg": 16, "name": "a"})
        log.append("add", {}, {})
    for file in [path / "MANIFEST.json", *sorted((path / "gen-1").iterdir())]:
        whole = file.read_bytes()
        for at in range(len(whole)):
            for bit in (1, 128):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
                with pytest.raises(StoreError, match=file.name): IndexStore.open(path, readonly=True)
                report = None
                try: report = verify(path)
                except StoreError as e: assert "newer" in str(e)
                assert report is None or (not report["ok"] and report["problems"][0]["file"] == str(file))
        for data in (b"", whole[:-1], whole + b"!"):
            file.write_bytes(data)
            with pytest.raises(Damaged, match=file.name): IndexStore.open(path)
        file.unlink()
        with pytest.raises(Damaged, match=file.name + ".*is missing"): IndexStore.open(path)
        file.write_bytes(whole)
    (path / "wal-1.log").unlink()
    with pytest.raises(Damaged, match="wal-1.log.*is missing"): IndexStore.open(path)


def test_a_log_cut_at_every_byte(tmp_path):
    path = tmp_path / "store"
    with IndexStore.open(path) as log:
        ends = [log.bytes]
        for i in range(3): log.append("add", dict(ids=np.arange(i)), {"i": i}); ends.append(log.bytes)
    file = path / "wal-0.log"
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        if size < W.START:
            with pytest.raises(Damaged, match="wal-0.log, byte 0"): IndexStore.open(path)
            continue
        n = sum(e <= size for e in ends) - 1
        with warnings.catch_warnings(), IndexStore.open(path) as log:
            warnings.simplefilter("error")
            assert [meta["i"] for _, _, meta in log.replay()] == list(range(n)) and log.seq == n
            assert (log.torn and log.torn[:3]) == (None if size in ends else (ends[n], size - ends[n], "cut"))
            log.append("add", dict(ids=np.arange(9)), {"i": n})
        with IndexStore.open(path) as log: assert [meta["i"] for _, _, meta in log.replay()] == list(range(n + 1)) and not log.torn


def test_salvage_keeps_what_precedes_the_damage(tmp_path):
    filled(tmp_path / "store", (2,), 6)
    file = tmp_path / "store" / "wal-1.log"
    with IndexStore.open(tmp_path / "store") as log: offsets = [r.offset for r in W.read_records(log._log.fd, log._log.first)]
    data = bytearray(file.read_bytes())
    data[offsets[2] + 8] ^= 1   # the length of operation 5
    file.write_bytes(data)
    with pytest.raises(Damaged, match="the 2 operations before it") as e: IndexStore.open(tmp_path / "store")
    assert e.value.offset == offsets[2]
    assert verify(tmp_path / "store")["problems"] == [dict(file=str(file), offset=offsets[2], problem="the head of a record fails its checksum")]
    with pytest.warns(RuntimeWarning, match=f"byte {offsets[2]}"), IndexStore.open(tmp_path / "store", salvage=True) as log: assert contents(log) == 4
    assert goes_on(tmp_path / "store") == 4


def published_but_not_swept(path):
    "A store killed just after generation 2 was published."
    filled(path)
    names = iter(range(1 << 30))
    def hook(name, call, args):
        done = call()
        if name == "replace" and Path(args[1]).name == "MANIFEST.json": die()
        return done
    def child():
        with IndexStore.open(path) as log, at_each_call(hook): keep(log, 5)
    assert os.WTERMSIG(forked(child)) == signal.SIGKILL
    assert {"gen-1", "gen-2", "MANIFEST.old.json"} <= set(os.listdir(path))


def test_half_a_manifest_gives_the_previous_generation(tmp_path):
    published_but_not_swept(tmp_path / "model")
    size = (tmp_path / "model" / "MANIFEST.json").stat().st_size
    for i, n in enumerate([0, 1, size // 2, size - 1]):
        path = tmp_path / f"{i}"
        shutil.copytree(tmp_path / "model", path)
        os.truncate(path / "MANIFEST.json", n)
        with IndexStore.open(path, readonly=True) as log: assert (log.generation, contents(log)) == (1, 5)
        assert goes_on(path) == 5
        with IndexStore.open(path) as log:
            assert log.generation == 1
            keep(log, log.seq)
        assert goes_on(path) == 6


def test_half_a_manifest_after_more_operations_is_an_error(tmp_path):
    "Going back would lose what was logged since."
    published_but_not_swept(tmp_path / "store")
    def child():
        def hook(name, call, args): return call() if name != "unlink" else None
        with at_each_call(hook), IndexStore.open(tmp_path / "store") as log: put(log, 6)
    assert forked(child) == 0
    assert "gen-1" in os.listdir(tmp_path / "store")
    os.truncate(tmp_path / "store" / "MANIFEST.json", 50)
    with pytest.raises(Damaged, match="MANIFEST.json: this is not a manifest"): IndexStore.open(tmp_path / "store")


def test_the_format_on_disk_is_what_it_was():
    "The bytes of a manifest, a log's header and a record, as the first release wrote them: folders of before open."
    doc = dict(format=1, generation=4, seq=17, meta={"dim": 64}, arrays={})
    arrays = dict(x=np.arange(6, dtype=np.float32).reshape(2, 3), ids=np.array([5, 7]))
    raw = G.encode(doc) + W.header(doc) + b"".join(map(bytes, W.encode_record(18, "add", arrays, '{"i": 1}')))
    assert hashlib.sha256(raw).hexdigest() == "05e2155c4f65c68651f9be65a93586ee3d240fa33eaf37c1008df59cd005e0d0"


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "store"
    filled(path)
    doc = G.decode(path / "MANIFEST.json")
    (path / "MANIFEST.json").write_bytes(G.encode({**doc, "format": 2}))
    for call in (lambda: IndexStore.open(path), lambda: IndexStore.open(path, readonly=True), lambda: verify(path)):
        with pytest.raises(StoreError, match="MANIFEST.json: format 2 is newer than 1.*update opml_wb"): call()
    before = sorted(os.listdir(path))
    assert before == sorted({*REST, "gen-1", "wal-1.log"})
    (path / "MANIFEST.json").write_bytes(G.encode(doc))
    raw = (path / "wal-1.log").read_bytes()
    (path / "wal-1.log").write_bytes(W.sealed(W.HEADER.pack(b"RIANNLOG", 3, 1, 3)) + raw[W.START:])
    with pytest.raises(StoreError, match="wal-1.log: format 3 is newer"): IndexStore.open(path)


def limited(size, action):
    "Run `action()` in a child whose files may not exceed `size` bytes."
    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()
    assert forked(child) == 0


def test_file_size_limit(tmp_path):
    "The system writes part of the record and refuses the rest: it is cut off again, smaller ones still fit."
    path = tmp_path / "store"
    def child():
        with IndexStore.open(path) as log:
            log.append("add", dict(x=np.zeros(10_000)), {})
            size = log.bytes
            for x in (np.zeros(20_000), np.zeros(50_000)):
                with pytest.raises(OSError, match="the operation is not in the log") as e: log.append("add", dict(x=x), {})
                assert e.value.errno == errno.EFBIG and (log.seq, log.bytes, (path / "wal-0.log").stat().st_size) == (1, size, size)
            with pytest.raises(OSError): log.save(dict(x=np.zeros(20_000)), {})
            assert sorted(os.listdir(path)) == ["LOCK", "wal-0.log"]
            assert log.append("add", dict(x=np.zeros(10)), {}) == 2
            log.save(dict(x=np.zeros(12_000)), {})
    limited(120_000, child)
    with IndexStore.open(path) as log: assert log.generation == 1 and len(log.snapshot[0]["x"]) == 12_000


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 2 MiB."
    at = tmp_path / "disk"
    at.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", at], capture_output=True).returncode: pytest.skip("needs the right to mount a tmpfs")
    yield at
    subprocess.run(["umount", "-l", at], check=True)


def test_disk_full(small_disk):
    path, block = small_disk / "store", dict(x=np.ones((100, 128), np.float32))
    log = IndexStore.open(path)
    with pytest.raises(OSError) as e:
        while True: log.append("add", block, {})
    assert e.value.errno == errno.ENOSPC and log.seq > 20
    n = log.seq
    with pytest.raises(OSError): log.save(block, {})
    assert [meta for _, _, meta in log.replay()] == [{}] * n
    with IndexStore.open(path, readonly=True) as reader: assert reader.seq == n and reader.torn is None
    log.close()
    log = IndexStore.open(path)   # also opens on a full disk
    assert log.append("add", {}, {}) == n + 1
    log.close()
    assert verify(path)["operations"] == n + 1


def test_a_save_without_room_and_then_with(small_disk):
    path, filler = small_disk / "store", small_disk / "filler"
    log = IndexStore.open(path)
    put(log, 1)
    filler.write_bytes(b"0" * 1_500_000)
    with pytest.raises(OSError) as e: log.save(dict(x=np.ones(200_000)), {})
    assert e.value.errno == errno.ENOSPC and log.generation == 0 and sorted(os.listdir(path)) == ["LOCK", "wal-0.log"]
    put(log, 2)
    filler.unlink()
    keep(log, 2)
    log.close()
    assert goes_on(path) == 2


def test_two_writers(tmp_path):
    path = tmp_path / "store"
    code = f"import time; from opml_wb.riann.disk.store import IndexStore; s = IndexStore.open({str(path)!r}); print('open', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(Locked, match=rf"process {other.pid} writes to this store"): IndexStore.open(path)
        with IndexStore.open(path, readonly=True) as reader: assert reader.seq == 0
        other.kill()
        other.wait()
        IndexStore.open(path).close()
    finally:
        other.kill()
        other.wait()


def test_many_open_at_once(tmp_path):
    "Of eight processes that create a store at the same moment, one gets it, the others an error, none half a store."
    gate, go = os.pipe()
    pids, (out, told) = [], os.pipe()
    for _ in range(8):
        pids.append(os.fork())
        if pids[-1]: continue
        try:
            os.close(go)
            os.read(gate, 1)
            log = IndexStore.open(tmp_path / "store")
            os.write(told, b"w" if not log.closed else b"?")
            time.sleep(60)
        except Locked: os.write(told, b"l")
        except BaseException: traceback.print_exc(); os.write(told, b"?")
        os._exit(0)
    os.close(go)
    answers = b"".join(os.read(out, 1) for _ in range(8))
    for pid in pids: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert sorted(answers) == sorted(b"w" + b"l" * 7)
    assert goes_on(tmp_path / "store") == 0


def test_a_fork_does_not_hold_the_lock(tmp_path):
    "The writer is killed, the child that it forked lives on: the store is free; and the child cannot write to it."
    out, told = os.pipe()
    def parent():
        log = IndexStore.open(tmp_path / "store")
        put(log, 1)
        child = os.fork()
        if child:
            os.write(told, b"%d\n" % child)
            signal.pause()
        try: put(log, 2)
        except StoreError as e: os.write(told, str(e).encode() + b"\n")
        else: os.write(told, b"it could write\n")
        signal.pause()
    pid = os.fork()
    if not pid: parent()
    said = b""
    while said.count(b"\n") < 2: said += os.read(out, 1000)
    child = next(int(line) for line in said.split() if line.isdigit())
    try:
        assert b"which forked this one: open it anew" in said
        with pytest.raises(Locked, match=f"process {pid} "): IndexStore.open(tmp_path / "store")   # the child didn't release it
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)   # dead, and its number not yet free
        assert goes_on(tmp_path / "store") == 1
    finally:
        for p in (child, pid): os.kill(p, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_forgotten_stores_let_go(tmp_path):
    log = IndexStore.open(tmp_path / "store")
    del log
    IndexStore.open(tmp_path / "store").close()


def test_readers_beside_a_writer(tmp_path):
    "While a process appends and saves without pause, every opening is consistent, and none goes back in time."
    path = tmp_path / "store"
    out, pipe = os.pipe()
    IndexStore.open(path).close()
    pid = os.fork()
    if not pid: writer(path, os.open(os.devnull, os.O_WRONLY), 3)
    try:
        last, opened, end = 0, 0, time.monotonic() + 300
        while (last < 30 or opened < 30) and time.monotonic() < end:
            with IndexStore.open(path, readonly=True, check=bool(opened % 2)) as log:
                seen = [meta["i"] for _, _, meta in log.replay()]
                start = log.snapshot[1]["upto"] if log.snapshot else 0
                assert seen == list(range(start + 1, start + 1 + len(seen))) and start + len(seen) >= max(last, log.seq)
                last = start + len(seen)
                if log.snapshot: assert log.snapshot[0]["seen"].tolist() == list(range(1, start + 1))
            assert verify(path)["ok"]
            opened += 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert opened > 5 and last > 5
    assert reopened(path, 30_000) >= last


def test_an_interrupt_in_mid_write(tmp_path):
    "Ctrl-C during an append: undone; the next one follows the last whole record."
    with IndexStore.open(tmp_path / "store") as log:
        put(log, 1)
        def hook(name, call, args):
            if name != "writev": return call()
            call(args[0], half(args[1]))
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt), at_each_call(hook): put(log, 2)
        put(log, 2)
        with pytest.raises(KeyboardInterrupt), at_each_call(hook): keep(log, 2)
        keep(log, 2)
    assert goes_on(tmp_path / "store") == 2


def test_an_undo_that_fails_is_made_up_for(tmp_path):
    "Neither the write nor the cut succeeds: the next append cuts first."
    with IndexStore.open(tmp_path / "store") as log:
        put(log, 1)
        def hook(name, call, args):
            if name not in ("writev", "ftruncate"): return call()
            if name == "writev": call(args[0], half(args[1]))
            raise OSError(errno.EIO, "broken")
        with pytest.raises(OSError, match="broken; the operation is not in the log"), at_each_call(hook): put(log, 2)
        assert (tmp_path / "store" / "wal-0.log").stat().st_size > log.bytes
        put(log, 2)
        assert contents(log) == 2
    assert goes_on(tmp_path / "store") == 2


def test_threads_append_at_once(tmp_path):
    def hook(name, call, args):
        if name == "writev": time.sleep(.001)   # the others' turn
        return call()
    with at_each_call(hook), IndexStore.open(tmp_path / "store", fsync="none") as log:
        numbers = []
        def work(t):
            for i in range(50): numbers.append(log.append("add", dict(ids=np.full(20, t)), {"t": t, "i": i}))
        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert sorted(numbers) == list(range(1, 201))
        found = [(meta["t"], meta["i"]) for _, arrays, meta in log.replay() if (arrays["ids"] == meta["t"]).all()]
        assert len(found) == 200
        for t in range(4): assert [i for s, i in found if s == t] == list(range(50))


def test_what_was_read_outlives_a_save_and_a_close(tmp_path):
    with IndexStore.open(tmp_path / "store") as log:
        put(log, 1)
        operations = log.replay()
        keep(log, 1)
        arrays, _ = log.snapshot
        put(log, 2)
        keep(log, 2)
        held = list(log.replay())
    assert not held and arrays["seen"].tolist() == [1]
    same({k: arrays[k] for k in ("x", "ids")}, payload(1))
    assert not arrays["x"].flags.writeable


def test_foreign_files_are_left_alone(tmp_path):
    path = tmp_path / "store"
    filled(path)
    for name in ("notes.txt", "gen-1.bak", "wal-9.log.old"): (path / name).write_text("mine")
    (path / "gen-1" / "more.txt").write_text("mine")
    with IndexStore.open(path) as log: keep(log, 5)
    assert {"notes.txt", "gen-1.bak", "wal-9.log.old"} <= set(os.listdir(path))


def test_a_manifest_gone_is_not_an_empty_store(tmp_path):
    filled(tmp_path / "store")
    (tmp_path / "store" / "MANIFEST.json").unlink()
    with pytest.raises(Damaged, match="MANIFEST.json: is missing"): IndexStore.open(tmp_path / "store")
    assert {"gen-1", "wal-1.log"} <= set(os.listdir(tmp_path / "store"))


DTYPES = (hnp.boolean_dtypes() | hnp.integer_dtypes(endianness="?") | hnp.floating_dtypes(endianness="?") | hnp.complex_number_dtypes(endianness="?")
          | hnp.datetime64_dtypes(endianness="?") | hnp.timedelta64_dtypes(endianness="?") | hnp.byte_string_dtypes(min_len=1) | hnp.unicode_string_dtypes(min_len=1))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
NAMES = st.from_regex(r"\A[a-z_][a-z0-9_.-]{0,12}\Z")
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.dictionaries(NAMES, hnp.arrays(DTYPES, SHAPES), max_size=4), st.dictionaries(st.text(), JSON, max_size=3), st.text(min_size=1), st.booleans())
def test_everything_comes_back(tmp_path_factory, arrays, meta, op, turned):
    path = tmp_path_factory.mktemp("any") / "store"
    if turned: arrays = {k: a.T for k, a in arrays.items()}
    with IndexStore.open(path, fsync="none") as log:
        log.append(op, arrays, meta)
        log.save(arrays, meta)
        log.append(op, arrays, meta)
        log.append(op, {}, {})
    with IndexStore.open(path, readonly=True) as log:
        first, second = log.replay()
        assert (first[0], first[2], second) == (op, meta, (op, {}, {})) and log.snapshot[1] == meta
        same(first[1], arrays)
        same(log.snapshot[0], arrays)
        assert all(a.flags.writeable and a.flags.aligned for a in first[1].values())
    report = verify(path)
    assert report["ok"] and report["operations"] == 2 and list(report["arrays"]) == list(arrays)
    json.dumps(report)
    shutil.rmtree(path)


def test_what_others_wrote_is_not_cut_off(tmp_path):
    "Two writers, as LOCK was put back by hand: the first to notice stops, and what the other was told is there stays."
    path = tmp_path / "store"
    with IndexStore.open(path) as log:
        put(log, 1)
        [file] = path.glob("wal-*.log")
        os.link(path / "LOCK", path / "LOCK.kept")      # the lock's file is there still: the size of the log tells
        os.unlink(path / "LOCK")
        with IndexStore.open(path) as other: put(other, 2)
        size = file.stat().st_size
        for call in (lambda: put(log, 2), lambda: keep(log, 1)):
            with pytest.raises(StoreError, match="somebody else wrote to this log"): call()
        assert file.stat().st_size == size
        os.unlink(file)
        with pytest.raises(StoreError, match="this log was removed"): put(log, 2)
