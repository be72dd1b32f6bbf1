"""Moderation's queue in SQLite and in Redis: the same promises, workers and broker killed, poison, full disks, clocks that jump."""
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opml_wb.moderation.flow.queue import LeaseLost, QueueFull
from opml_wb.moderation.flow.broker import Queue
from opml_wb.moderation.flow.queue import SqliteQueue

needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server")
BOTH = ["sqlite", pytest.param("redis", marks=needs_redis)]
KILLS, ITEMS = int(os.environ.get("OPML_QUEUE_KILLS", 24)), int(os.environ.get("OPML_QUEUE_ITEMS", 4000))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from opml_wb.moderation.flow.broker import RedisServer
    with RedisServer(tmp_path_factory.mktemp("redis")) as running: yield running


@pytest.fixture
def make(request, tmp_path):
    "make(kind, name, **options) -> a queue; queues of one test share a file or a server."
    made = []
    def queue(kind, name="queue", **options):
        if kind == "sqlite": made.append(SqliteQueue(tmp_path / "q.db", name, **options))
        else:
            from opml_wb.moderation.flow.broker import RedisQueue
            url = request.getfixturevalue("server").url
            made.append(RedisQueue(url, f"{request.node.name}-{name}", **options))
        return made[-1]
    yield queue
    for q in made: q.close()


@pytest.mark.parametrize("kind", BOTH)
def test_what_was_put_comes_once_the_important_first(make, kind):
    queue = make(kind)
    assert queue.put_many([(f"k{i}", b"%d" % i) for i in range(5)]) == 5
    assert queue.put("urgent", b"!", priority=9) and not queue.put("k1", b"again")
    leases = queue.claim(3)
    assert [x.key for x in leases] == ["urgent", "k0", "k1"] and leases[2].body == b"1" and queue.depth == 6
    queue.ack(leases)
    assert queue.depth == 3 and not queue.put("urgent", b"once more") and [x.key for x in queue.claim(9)] == ["k2", "k3", "k4"]
    assert queue.claim(9) == []


@pytest.mark.parametrize("kind", BOTH)
def test_a_stale_lease_is_refused_and_a_poison_item_dies_alone(make, kind):
    clock = [1000.]
    queue = make(kind, most_tries=3, now=lambda: clock[0])
    queue.put_many([("poison", b""), ("mate1", b""), ("mate2", b"")])
    old = queue.claim(3, lease_s=10)
    finished = []
    for _ in range(12):
        clock[0] += 11
        for x in queue.claim(3, lease_s=10):
            if x.key != "poison": queue.ack(x); finished.append((x.key, x.tries))
    assert sorted(finished) == [("mate1", 2), ("mate2", 2)]         # one claim lost with the poison, no more
    dead = queue.dead()
    assert dead.key.tolist() == ["poison"] and dead.tries.tolist() == [3] and queue.depth == 0
    for x in old:
        with pytest.raises(LeaseLost): queue.ack(x)
        with pytest.raises(LeaseLost): queue.nack(x)


@pytest.mark.parametrize("kind", BOTH)
def test_a_jump_of_the_clock_loses_nothing(make, kind):
    clock = [1000.]
    queue = make(kind, now=lambda: clock[0])
    queue.put("a", b"")
    x, = queue.claim(1, lease_s=10)
    clock[0] -= 500                                   # back: the lease holds
    assert queue.claim(1) == []
    clock[0] += 100_000                               # ahead: another worker gets it, the first one is fenced
    y, = queue.claim(1, lease_s=10)
    with pytest.raises(LeaseLost): queue.ack(x)
    queue.ack(y)
    assert queue.depth == 0


@pytest.mark.parametrize("kind", BOTH)
def test_an_effect_in_a_second_queue_is_with_its_acknowledgement(make, kind):
    first, second = make(kind, "first"), make(kind, "second", most=2)
    first.put_many([("a", b""), ("b", b""), ("c", b"")])
    a, b, c = first.claim(3)
    assert first.forward([a, b], second, [("ra", b"1"), ("rb", b"2")]) == 2 and (first.depth, second.depth) == (1, 2)
    with pytest.raises(LeaseLost): first.forward(a, second, [("rc", b"")])
    with pytest.raises(QueueFull): first.forward(c, second, [("rc", b"")])
    assert (first.depth, second.depth) == (1, 2)      # nothing half: c is still to be done
    second.ack(second.claim(2))
    assert first.forward(c, second, [("rc", b"")]) == 1 and (first.depth, second.depth) == (0, 1)


@pytest.mark.parametrize("kind", BOTH)
def test_back_pressure_delays_and_releases(make, kind):
    clock = [1000.]
    queue = make(kind, most=3, now=lambda: clock[0], most_tries=2)
    queue.put_many([("a", b""), ("b", b"")])
    with pytest.raises(QueueFull): queue.put_many([("c", b""), ("d", b"")])
    assert queue.depth == 2 and queue.put_many([("c", b""), ("a", b"")]) == 1
    x, y = queue.claim(2)
    queue.release([y])
    queue.nack(x, delay_s=60, why="not now")
    assert sorted((z.key, z.tries) for z in queue.claim(5)) == [("b", 1), ("c", 1)]
    clock[0] += 61
    again = [z for z in queue.claim(5) if z.key == "a"]
    assert [z.tries for z in again] == [2]
    queue.nack(again[0], why="really not")
    assert queue.dead()[["key", "why"]].values.tolist() == [["a", "really not"]]


WORKER = """
import os, sys, sqlite3, random
from opml_wb.moderation.flow.broker import Queue
where, name, effects = sys.argv[1:4]
work, out = (Queue(where, name, most_tries=4), Queue(where, name + "-out"))
while True:
    leases = work.claim(8, lease_s=2)
    if not leases:
        if work.depth == 0: break
        import time; time.sleep(.05); continue
    for x in leases:
        if x.key.startswith("poison"): os.kill(os.getpid(), 9)
    work.forward(leases, out, [(x.key, x.body) for x in leases])
"""


@pytest.mark.parametrize("kind", BOTH)
def test_kill_9_of_workers_loses_nothing_and_does_nothing_twice(make, kind, request, tmp_path):
    "Four workers move items into a second queue; they are killed at random, and by poison."
    import random
    rng = random.Random(0)
    work, out = make(kind, "work", most_tries=4), make(kind, "work-out")
    where = str(tmp_path / "q.db") if kind == "sqlite" else request.getfixturevalue("server").url
    items = [(f"i{i}", str(i).encode()) for i in range(ITEMS)]
    items[::ITEMS // 3] = [(f"poison{i}", b"") for i in range(len(items[::ITEMS // 3]))]
    poison = sum(k.startswith("poison") for k, _ in items)
    for i in range(0, ITEMS, 500): work.put_many(items[i:i + 500])
    def start(): return subprocess.Popen([sys.executable, "-c", WORKER, where, work.name, "x"], stderr=subprocess.DEVNULL)
    workers, killed = [start() for _ in range(4)], 0
    until = time.monotonic() + 540
    while work.depth and time.monotonic() < until:
        time.sleep(rng.uniform(.02, .25))
        if killed < KILLS and out.depth:
            victim = rng.choice(workers)
            if victim.poll() is None: victim.kill(); victim.wait(); killed += 1
        for i, w in enumerate(workers):
            if w.poll() is not None and work.depth: workers[i] = start()
    for w in workers: w.kill(); w.wait()
    print(f"\n{killed} of {KILLS} kills before {ITEMS:,} items were through")
    assert work.depth == 0 and killed
    assert sorted(work.dead().key) == sorted(k for k, _ in items if k.startswith("poison")) and len(work.dead()) == poison
    got = []
    while leases := out.claim(1000): got += [x.key for x in leases]; out.ack(leases)
    assert sorted(got) == sorted(k for k, _ in items if not k.startswith("poison"))     # each once, none lost


# --- what only one of them can show

def test_every_connection_waits_for_the_disk(tmp_path):
    for _ in range(3):
        assert SqliteQueue(tmp_path / "q.db").db.execute("pragma synchronous").fetchone()[0] == 2


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_a_cycle_of_32_waits_for_the_disk_three_times(tmp_path):
    code = f"""
from opml_wb.moderation.flow.broker import Queue
q = Queue({str(tmp_path / 'q.db')!r})
q.put('warm', b''); q.ack(q.claim(1))
import os; os.write(2, b'BEGIN\\n')
for c in range(10):
    q.put_many([(f'{{c}}-{{i}}', b'x' * 600) for i in range(32)]); q.ack(q.claim(32))
os.write(2, b'END\\n')
"""
    done = subprocess.run(["strace", "-f", "-e", "trace=fdatasync,fsync,write", sys.executable, "-c", code], capture_output=True, text=True)
    if "BEGIN" not in done.stderr: pytest.skip("strace can't trace here")
    part = done.stderr.split("BEGIN")[-1] if done.stderr.count("BEGIN") == 1 else done.stderr.split('"BEGIN', 1)[1]
    syncs = len(re.findall(r"fdatasync\(|fsync\(", part.rsplit("END", 1)[0]))
    assert 10 <= syncs <= 30, syncs


def test_a_full_disk_raises_and_leaves_nothing_half(tmp_path):
    queue = SqliteQueue(tmp_path / "q.db")
    queue.put_many([(f"k{i}", b"x" * 500) for i in range(40)])
    lease = queue.claim(1)
    size = queue.db.execute("pragma page_count").fetchone()[0]
    queue.db.execute(f"pragma max_page_count={size}")
    with pytest.raises(sqlite3.OperationalError, match="full"): queue.put_many([(f"n{i}", b"x" * 5000) for i in range(50)])
    assert queue.depth == 40 and not queue.db.in_transaction
    queue.db.execute("pragma max_page_count=1073741823")
    queue.ack(lease)
    assert queue.depth == 39 and queue.db.execute("pragma integrity_check").fetchone()[0] == "ok"


def test_a_disk_that_refuses_writes_makes_put_claim_and_ack_raise(tmp_path):
    "RLIMIT_FSIZE in a process of its own: what was acknowledged before is whole afterwards."
    code = f"""
import resource, signal, sqlite3, os
from opml_wb.moderation.flow.broker import Queue
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
q = Queue({str(tmp_path / 'q.db')!r})
q.put_many([(f'k{{i}}', b'x' * 500) for i in range(40)])
lease = q.claim(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize({str(tmp_path / 'q.db-wal')!r}),) * 2)
said = []
for act in (lambda: q.put('new', b'x'), lambda: q.claim(3), lambda: q.ack(lease)):
    try: act(); said.append('fine')
    except sqlite3.OperationalError: said.append('raised')
print(said, q.db.in_transaction)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['raised', 'raised', 'raised'] False", done.stdout + done.stderr
    queue = SqliteQueue(tmp_path / "q.db")
    assert queue.depth == 40 and queue.db.execute("pragma integrity_check").fetchone()[0] == "ok"


def test_leases_of_an_earlier_start_of_the_machine_are_void(tmp_path):
    queue = SqliteQueue(tmp_path / "q.db")
    queue.put("a", b"")
    queue.claim(1, lease_s=1e9)
    queue.db.execute("update about set value='another start' where name='boot'")
    assert [x.tries for x in SqliteQueue(tmp_path / "q.db").claim(1)] == [2]


def test_a_back_off_of_an_earlier_start_of_the_machine_is_over(tmp_path):
    "A minute's delay, noted on a clock that stood at a month, isn't a month on the clock that begins anew."
    queue = SqliteQueue(tmp_path / "q.db", now=lambda: 2_600_000.)
    queue.put_many([("a", b""), ("dead", b"")])
    first, second = queue.claim(2)
    queue.nack(first, delay_s=60)
    queue.nack(second, final=True)
    queue.db.execute("update about set value='another start' where name='boot'")
    again = SqliteQueue(tmp_path / "q.db", now=lambda: 30.)
    assert [x.key for x in again.claim(2)] == ["a"] and again.dead().key.tolist() == ["dead"]


@needs_redis
def test_kill_9_of_the_broker_loses_no_acknowledged_put(tmp_path):
    from redis.exceptions import RedisError

    from opml_wb.moderation.flow.broker import RedisQueue, RedisServer
    server, kept = RedisServer(tmp_path / "redis"), []
    try:
        for round in range(6):
            queue = RedisQueue(server.url)
            killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep({.1 + .05 * round}); os.kill({server.process.pid}, 9)"])
            with pytest.raises(RedisError):
                for i in range(10 ** 6):
                    batch = [(f"{round}-{i}-{j}", b"x" * 50) for j in range(8)]
                    queue.put_many(batch)
                    kept += [k for k, _ in batch]
            killer.wait(); server.process.wait(); server.start()
        queue, found = RedisQueue(server.url), set()
        while leases := queue.claim(2000): found |= {x.key for x in leases}; queue.ack(leases)
        assert len(kept) > 50 and not set(kept) - found
        assert len(found - set(kept)) <= 8 * 6              # batches that were not answered: whole or absent
    finally: server.kill()


@needs_redis
def test_a_broker_that_may_forget_is_refused(tmp_path):
    from opml_wb.moderation.flow.broker import RedisQueue, RedisServer
    with RedisServer(tmp_path / "redis") as server:
        queue = RedisQueue(server.url)
        queue.db.config_set("appendfsync", "everysec")
        with pytest.raises(OSError, match="appendfsync everysec"): Queue(server.url)
        assert RedisQueue(server.url, durable=False).depth == 0
