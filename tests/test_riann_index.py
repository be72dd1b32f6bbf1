"""Riann beyond its notebook: bad input, kill -9, threads, deadlines that cannot be kept, what a reopened index knows."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from test_riann_graph import near

from opml_wb.core.record.data import path
from opml_wb.riann.lab import bench
from opml_wb.riann.graph.exact import ground_truth, recall
from opml_wb.riann.graph.intake import take
from opml_wb.riann.index import Riann
from opml_wb.riann.graph.kernels import WAIT
from opml_wb.riann.disk.store import IndexStore
from opml_wb.riann.models.plan import Infeasible, Requirement
from opml_wb.riann.models.timemodel import TimeModel


def found(index, x, ids, ef=None):
    "Share of the vectors that come first to a query beside them; the very vector would be looked up in a table, whatever the graph is like."
    return (index.search(near(x), 1, ef)[0][:, 0] == ids).mean()


@pytest.fixture(scope="module")
def sift():
    "8,000 shuffled SIFT vectors and 200 queries, f32[., 128]."
    base, query = np.load(path("riann/sift_photos")), np.load(path("riann/sift_photos_query"))
    pick = np.random.default_rng(0).permutation(len(base))[:8000]
    return base[pick].astype(np.float32), query[:200].astype(np.float32)


def filled(x, n, **options):
    index = Riann(x.shape[1], **options)
    index.add(x[:n], np.arange(n))
    return index


def broken(x, row, value):
    x = x.copy()
    x[row, 3] = value
    return x


BAD = {
    "NaN": (lambda x: (broken(x[:50], 20, np.nan), np.arange(9000, 9050)), "row 20.*NaN"),
    "infinity": (lambda x: (broken(x[:50], 7, -np.inf), np.arange(9000, 9050)), "row 7.*infinity"),
    "beyond float32": (lambda x: (broken(x[:50], 9, 1e30), np.arange(9000, 9050)), "row 9.*too large"),
    "dim": (lambda x: (x[:50, :100], np.arange(9000, 9050)), r"shape \[n, 128\]"),
    "one row": (lambda x: (x[0], [9000]), "shape"),
    "ragged": (lambda x: ([[1.0], [1.0, 2.0]], [9000, 9001]), "unequal"),
    "dtype": (lambda x: (x[:50].astype(str), np.arange(9000, 9050)), "float32"),
    "empty": (lambda x: (x[:0], []), "empty"),
    "ids short": (lambda x: (x[:50], np.arange(9000, 9049)), "ids"),
    "ids twice": (lambda x: (x[:50], np.r_[np.arange(9000, 9049), 9000]), "row 49"),
    "ids known": (lambda x: (x[:50], np.r_[np.arange(9000, 9049), 5]), "row 49.*5 is in the index"),
    "ids negative": (lambda x: (x[:50], np.r_[-1, np.arange(9000, 9049)]), "row 0"),
    "ids float": (lambda x: (x[:50], np.linspace(0, 1, 50)), "integers"),
}


@pytest.mark.parametrize("flat", [10_000, 0])
@pytest.mark.parametrize("case", BAD)
def test_bad_batches_change_nothing(sift, tmp_path, case, flat):
    x, q = sift
    make, says = BAD[case]
    with filled(x, 600, flat_below=flat, path=tmp_path / "i") as index:
        before, seq = index.search(q, 5), index.store.seq
        with pytest.raises(ValueError, match=says): index.add(*make(x))
        assert index.store.seq == seq and len(index) == 600
        assert all((a == b).all() for a, b in zip(before, index.search(q, 5)))
        index.add(x[600:650], np.arange(600, 650))
        assert found(index, x[600:650], np.arange(600, 650)) > .97


def test_other_bad_arguments(sift):
    x, q = sift
    index = filled(x, 100)
    for bad in 0, -1, float("nan"), "soon": 
        with pytest.raises(ValueError, match="deadline_s"): index.add(x[100:110], range(100, 110), deadline_s=bad)
    for name, value in dict(dim=0, metric="L2", requirement=.97, flat_below=-1, seed=.5).items():
        with pytest.raises(ValueError, match=name): Riann(**{"dim": 4, name: value})
    for call, says in [(lambda: index.remove([5, 100]), "row 1"), (lambda: index.update(x[:2], [3, 200]), "row 1.*not in the index"),
                       (lambda: index.drain(0), "budget_s"), (lambda: index.plan(0), "n:"), (lambda: index.save(), "path"),
                       (lambda: index.search(q[:, :5], 3), "shape"), (lambda: index.search(q, 0), "k:")]:
        with pytest.raises(ValueError, match=says): call()
    cosine = Riann(3, "cosine")
    with pytest.raises(ValueError, match="row 1.*zero vector"): cosine.add([[1, 0, 0], [0, 0, 0]], [0, 1])
    assert len(cosine) == 0 and len(index) == 100


def test_an_empty_index_and_k_beyond_it(sift):
    x, q = sift
    index = Riann(128)
    ids, dist = index.search(q, 3)
    assert (ids == -1).all() and np.isinf(dist).all()
    index.add(x[:2], [7, 8])
    ids, dist = index.search(q, 5)
    assert (np.sort(ids[:, :2]) == [7, 8]).all() and (ids[:, 2:] == -1).all() and np.isinf(dist[:, 2:]).all()
    index.remove([7, 8])
    assert len(index) == 0 and (index.search(q, 1)[0] == -1).all()


def test_flat_then_graph(sift):
    x, q = sift
    index = Riann(128, flat_below=1000)
    for i in range(0, 3000, 250):
        report = index.add(x[i:i + 250], np.arange(i, i + 250))
        assert report.satisfied and report.deferred == 0 and index.graph.waiting == (i + 250 if i + 250 <= 1000 else 0)
        assert found(index, x[i:i + 250], np.arange(i, i + 250)) > .98
        if i + 250 <= 1000: assert (index.search(q, 10)[0] == ground_truth(x[:i + 250], q, 10)[0]).mean() > .999   # but for ties
    assert recall(index.search(q, 10)[0], ground_truth(x[:3000], q, 10)[0]) > .97


def test_without_a_deadline_equal_calls_give_equal_indexes(sift):
    x, q = sift
    found = []
    for size in 100, 1000:
        index = Riann(128, flat_below=0, seed=3)
        for i in range(0, 2000, size): index.add(x[i:i + size], np.arange(i, i + size))
        again = Riann(128, flat_below=0, seed=3)
        for i in range(0, 2000, size): again.add(x[i:i + size], np.arange(i, i + size))
        assert all((a == b).all() for a, b in zip(index.search(q, 10), again.search(q, 10)))


def test_what_cannot_be_kept_is_said(sift):
    x, _ = sift
    index = filled(x, 4000, flat_below=0)
    plan = index.plan(1000, deadline_s=.003)
    assert not plan.feasible and "deadline" in plan.reason and plan.t_index > .003
    with pytest.raises(Infeasible, match="deadline"): plan.check()
    report = index.add(x[4000:5000], np.arange(4000, 5000), deadline_s=.003)
    assert not report.feasible and "deadline" in report.reason and report.satisfied == (report.elapsed_s <= .003)
    assert report.deferred > 0 or not report.satisfied
    assert found(index, x[4000:5000], np.arange(4000, 5000)) > .99
    assert filled(x, 100, requirement=Requirement(recall=.9)).plan(100).check().feasible
    for need, says in (Requirement(recall=1.), "recall"), (Requirement(query_s=1e-9), "query_s"):
        plan = filled(x, 4000, requirement=need, flat_below=0).plan(10)
        assert not plan.feasible and says in plan.reason


def test_what_is_reported_is_told_from_the_clock_at_return(sift, monkeypatch):
    "A call that is held up after its last chunk has missed its deadline, and says so."
    import types
    x, _ = sift
    index = filled(x, 3000, flat_below=0)
    held = types.SimpleNamespace(isenabled=lambda: True, disable=lambda: None, enable=lambda: time.sleep(.6))
    monkeypatch.setattr("opml_wb.riann.index.gc", held)
    report = index.add(x[3000:3010], np.arange(3000, 3010), deadline_s=.5)
    assert report.elapsed_s > .6 and not report.satisfied


def test_the_tail_is_bounded_and_drained(sift):
    x, q = sift
    index, waiting, kept = Riann(128, flat_below=300), [], []
    for i in range(0, 6000, 100):
        report = index.add(x[i:i + 100], np.arange(i, i + 100), deadline_s=.0015)
        waiting.append(report.deferred)
        kept.append(report.satisfied)
        assert report.satisfied == (report.elapsed_s <= .0015)
    assert max(waiting) <= index.tail_limit + 100 and index.tail_limit < 1000
    assert recall(index.search(q, 10)[0], ground_truth(x[:6000], q, 10)[0]) > .8
    poor = recall(index.search(q, 10)[0], ground_truth(x[:6000], q, 10)[0])
    for _ in range(200):
        if not (index.drain(.2).chunks or index.graph.waiting) and "0 linked" in index.drain(.2).reason: break
    assert index.graph.waiting == 0
    assert recall(index.search(q, 10)[0], ground_truth(x[:6000], q, 10)[0]) >= max(poor - .002, .96)


def test_update_and_remove(sift, tmp_path):
    x, q = sift
    for flat in 0, 5000:
        folder = tmp_path / str(flat)
        index = filled(x, 2000, flat_below=flat, path=folder)
        index.update(x[3000:3500], np.arange(500))
        index.remove(np.arange(1500, 2000))
        now = np.concatenate([x[3000:3500], x[500:1500]])
        assert len(index) == 1500 and recall(index.search(q, 10)[0], ground_truth(now, q, 10)[0]) > .97
        assert found(index, x[3000:3500], np.arange(500)) > .98
        index.close()
        with pytest.raises(ValueError, match="closed"): index.add(x[:1], [9999])
        with Riann.open(folder) as again:
            assert len(again) == 1500 and recall(again.search(q, 10)[0], ground_truth(now, q, 10)[0]) > .97


def test_opening(sift, tmp_path):
    x, q = sift
    with pytest.raises(FileNotFoundError): Riann.open(tmp_path / "none")
    index = filled(x, 3000, path=tmp_path / "i", requirement=Requirement(deadline_s=5, recall=.97, k=7), flat_below=100, seed=5)
    index.save()
    index.add(x[3000:3100], np.arange(3000, 3100))
    with pytest.raises(Exception, match=str(os.getpid())): Riann.open(tmp_path / "i")     # one writer
    want = index.search(q, 10, 80)
    index.close()
    with pytest.raises(ValueError, match="holds an index"): Riann(128, path=tmp_path / "i")
    with Riann.open(tmp_path / "i") as again:
        assert again.requirement == Requirement(deadline_s=5, recall=.97, k=7) and again.flat_below == 100 and len(again) == 3100
        got = again.search(q, 10, 80)
        assert (got[0] == want[0]).mean() > .99
        again.add(x[3100:3200], np.arange(3100, 3200))
        assert found(again, x[:3200], np.arange(3200), 80) > .99


def test_no_xgboost_where_it_is_used(sift, tmp_path):
    filled(sift[0], 500, path=tmp_path / "i").close()
    code = ("import sys, numpy as np\nfrom opml_wb.riann.index import Riann\n"
            f"index = Riann.open({str(tmp_path / 'i')!r})\n"
            "index.add(np.random.default_rng(0).normal(size=(3000, 128)), np.arange(1000, 4000))\nindex.search(np.zeros((1, 128)), 3)\n"
            "print([m for m in ('xgboost', 'sklearn', 'torch', 'hnswlib', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def write_for_ever(folder, start, pipe):
    "Open the index and add, remove, save without pause; each operation is told in a line when it is done."
    x = np.random.default_rng(7).normal(size=(60_000, 16)).astype(np.float32)
    def tell(*what): os.write(pipe, json.dumps(what).encode() + b"\n")
    index = Riann.open(folder) if start else Riann(16, path=folder, flat_below=500)
    tell("ready")
    rng, i = np.random.default_rng(start), start
    while True:
        n = int(rng.integers(1, 60))
        index.add(x[i:i + n], range(i, i + n), deadline_s=.02)
        tell("add", i, n)
        i += n
        if rng.random() < .1:
            index.remove([i - 1])
            tell("remove", i - 1)
        if rng.random() < .05: index.save()


def test_killed_at_any_moment(tmp_path):
    "20 x kill -9: every acknowledged batch is there, whole; the one in flight is there wholly or not at all."
    x = np.random.default_rng(7).normal(size=(60_000, 16)).astype(np.float32)
    rng, known, start = np.random.default_rng(1), set(), 0
    Riann(16)                                                 # models and kernels are ready before the fork
    for turn in range(20):
        out, pipe = os.pipe()
        kid = os.fork()
        if not kid:
            try: write_for_ever(tmp_path / "i", start, pipe)
            finally: os._exit(1)
        os.close(pipe)
        told = os.read(out, 1 << 16)
        assert told.startswith(b'["ready"')
        time.sleep(rng.uniform(.01, .3))
        os.kill(kid, signal.SIGKILL)
        assert os.waitpid(kid, 0)[1] == signal.SIGKILL
        while more := os.read(out, 1 << 16): told += more
        os.close(out)
        lines = [json.loads(line) for line in told.splitlines(True) if line.endswith(b"\n")]
        last = start
        for op, *a in lines[1:]:
            if op == "add":
                known |= set(range(a[0], a[0] + a[1]))
                last = sum(a)
            else: known -= {a[0]}
        with Riann.open(tmp_path / "i") as index:
            have = set(index.graph.memory.directory.items()[0].tolist())
            lost, more = known - have, have - known
            assert len(lost) <= 1 and lost <= {last - 1}, lost                # a removal may have been written and not yet said
            assert not more or more == set(range(last, last + len(more))) and len(more) < 60, more
            every = np.array(sorted(have))
            assert (index.search(x[every], 1, 100)[0][:, 0] == every).all()                                  # they are all there,
            assert (index.search(x[every] + np.float32(1e-3), 1, 100)[0][:, 0] == every).mean() > .98       # and the graph leads to them
        known, start = have, max([last, *[i + 1 for i in more]])
    assert len(known) > 200


def test_a_search_thread_during_ten_thousand_inserts(sift):
    x, q = sift
    more = np.concatenate([x, x + np.random.default_rng(0).integers(1, 4, x.shape)]).astype(np.float32)
    index, stop, wrong, rounds = filled(more, 2000, flat_below=500), threading.Event(), [], []

    def read():
        try:
            while not stop.is_set():
                ids, dist = index.search(q[:40], 5)
                true = ((q[:40, None] - more[ids]) ** 2).sum(-1)
                if (ids < 0).any() or not np.allclose(dist, true, rtol=1e-4) or any(len(set(r)) < 5 for r in ids.tolist()): wrong.append(ids)
                rounds.append(1)
        except BaseException as e: wrong.append(e)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        for i in range(2000, 12_000, 250): index.add(more[i:i + 250], np.arange(i, i + 250), deadline_s=.05)
    finally:
        stop.set()
        thread.join(60)
    assert not wrong and len(rounds) > 10


def test_a_flipped_byte_is_reported_with_its_place(sift, tmp_path):
    index = filled(sift[0], 300, path=tmp_path / "i")
    for i in range(300, 400, 20): index.add(sift[0][i:i + 20], np.arange(i, i + 20))
    index.close()
    [log] = (tmp_path / "i").glob("wal-*.log")
    data = bytearray(log.read_bytes())
    whole = bytes(data)
    log.write_bytes(whole[:-7])                                          # torn while it was written: the last batch was not acknowledged
    with Riann.open(tmp_path / "i") as again: assert len(again) == 380
    log.write_bytes(whole)
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    with pytest.raises(RuntimeError, match=rf"{log.name}, byte \d+"): Riann.open(tmp_path / "i")


def test_values_of_numpy_and_models_that_are_none(sift, tmp_path):
    need = Requirement(deadline_s=np.float32(.5), recall=np.float64(.9), k=np.int64(10), query_s=np.float32(1))
    with Riann(4, requirement=need, seed=np.int64(5), path=tmp_path / "i") as index: index.add(np.eye(4), np.arange(4, dtype=np.uint64))
    with Riann.open(tmp_path / "i") as again: assert again.requirement == need and len(again) == 4
    assert again.search(np.eye(4), 1)[0][:, 0].tolist() == [0, 1, 2, 3]            # closed: no writes, but searches
    for name in "time_model", "recall_model":
        with pytest.raises(ValueError, match=name): Riann(4, **{name: "x"})
    with pytest.raises(ValueError, match="fitted"): Riann(4, time_model=TimeModel(1e-7, 10, lambda deg: 1e-6 * deg))


def test_a_store_without_an_index(tmp_path):
    IndexStore.open(tmp_path / "killed at birth").close()
    with pytest.raises(FileNotFoundError, match="no index"): Riann.open(tmp_path / "killed at birth")
    Riann(4, path=tmp_path / "killed at birth").close()
    with IndexStore.open(tmp_path / "other") as store: store.save(dict(a=np.ones(3)), {})
    with pytest.raises(FileNotFoundError, match="no index"): Riann.open(tmp_path / "other")


def test_no_ladder_is_made_after_construction(sift, monkeypatch):
    x, q = sift
    index = Riann(128, flat_below=0)
    monkeypatch.setattr("opml_wb.riann.models.plan.ladder", None)
    for i in range(0, 5000, 500):
        index.add(x[i:i + 500], np.arange(i, i + 500), deadline_s=.01)
        index.search(q[:3]), index.plan(20_000)


def test_a_plan_foresees_the_graph_that_grows(sift):
    x, _ = sift
    index = Riann(128, flat_below=0, closed_loop=False)
    plan = index.plan(6000)
    index.add(x[:6000], np.arange(6000))
    costs = index.planner.costs(6000, index.graph.layers())
    rung = [r.deg for r in index.planner.rungs(6000)].index(plan.deg)
    assert .4 * costs[rung] * 6000 < plan.t_index < 2 * costs[rung] * 6000
    assert .5 < plan.t_query / index.plan(1).t_query < 2


def test_first_chunks_are_no_larger_than_the_graph_that_they_were_predicted_for(sift):
    x, _ = sift
    index = filled(x, 1500, flat_below=1500)
    report, linked = index.add(x[1500:1600], np.arange(1500, 1600), deadline_s=.05), 0
    for _, _, n in report.chunks:
        assert n <= max(64, linked)
        linked += n
    assert linked + report.deferred == 1600


def test_an_update_is_planned_as_one(sift):
    x, _ = sift
    index = filled(x, 100, flat_below=100)
    report = index.update(x[200:250], np.arange(50))
    assert report.reason.startswith("so few") and not report.chunks and (report.deferred, index.graph.waiting) == (0, 100)
    index = filled(x, 3000, flat_below=0)
    before = index.forecast.entry.batch_s, index.plan(10).t_index
    for _ in range(3): index.update(x[3000:5000], np.arange(2000))                 # removal is no part of an addition
    assert index.forecast.entry.batch_s == before[0] and index.forecast.entry.removal_s > 0


def test_a_small_index_takes_whatever_is_like_vectors_and_ids(sift):
    import pandas as pd
    x, q = sift
    ways = [(np.ascontiguousarray, np.asarray), (np.asfortranarray, list), (np.ndarray.tolist, tuple), (lambda v: v.astype(float), np.array), (lambda v: v.astype(np.float16), lambda i: np.array(i, np.uint64)),
            (lambda v: v.astype(">f4"), lambda i: np.asarray(i).astype(">i8")), (lambda v: np.repeat(v, 2, 0)[::2], lambda i: np.repeat(i, 2)[::2]),
            (pd.DataFrame, pd.Series), (np.ma.array, np.array), (lambda v: v.astype(np.uint8), lambda i: np.array(i, np.int32))]
    index, plain = Riann(128), Riann(128)
    for step, (vectors, numbers) in enumerate(ways):
        at = range(20 * step, 20 * step + 20)
        report = index.add(vectors(x[at.start:at.stop]), numbers(at))
        assert (report.satisfied, report.feasible, report.deferred, report.chunks) == (True, True, 0, []) and len(index) == at.stop
        plain.add(x[at.start:at.stop], np.array(at))
    assert all((a == b).all() for a, b in zip(index.search(q), plain.search(q)))
    frozen = x[200:220].copy()
    frozen.flags.writeable = False
    index.add(frozen, np.arange(200, 220))
    for bad, ids, says in [(x[:2], object(), "ids"), (object(), [900, 901], "x"), (x[:2], [900, 7], "row 1: id 7"), (x[:2], [900], "ids"), (x[:0], np.zeros(0, int), "x: empty"),
                           (x[:2, :64].copy(), np.array([900, 901]), "x: expected"), (x[:2].astype(object), [900, 901], "x"), (x[:2] * np.float32(1e20), np.array([900, 901]), "row 0"),
                           (x[:2], np.array([900, 900]), "row 1"), (x[:2], np.array([-1, 900]), "row 0"), (x[:2], pd.Series(["a", "b"]), "ids")]:
        with pytest.raises(ValueError, match=says): index.add(bad, ids)
    assert len(index) == 220 and len(take.nopython_signatures) == 1                # and nothing was compiled for any of it
    index.remove([3, 4])                                                            # their slots are free: another way in
    index.add(x[[3, 4]], [4, 3])
    assert index.search(x[[3, 4]], 1)[0].ravel().tolist() == [4, 3]
    assert not Riann(128, requirement=Requirement(query_s=1e-9)).add(x[:5], range(5)).feasible


def test_waiting_for_another_writer_is_no_cost_of_a_batch(sift):
    x, _ = sift
    index, held = Riann(128), threading.Event()

    def hold():
        with index._lock:
            held.set()
            time.sleep(1)
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    report = index.add(x[:10], range(10), deadline_s=.01)
    thread.join()
    assert not report.satisfied and index.forecast.entry.batch_s < .1


def test_a_machine_that_slept(sift):
    x, _ = sift
    index = filled(x, 2000, flat_below=0)
    index.pace.see(.001, .001, 3600)
    for i in range(2000, 2250, 5):
        if not index.add(x[i:i + 5], np.arange(i, i + 5), deadline_s=.05).deferred: break
    assert not index.graph.waiting


def interrupted(f, at):
    "Call `f` with a Ctrl-C at its `at`-th line in the package; whether it has so many."
    seen, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal seen
        if "riann" not in frame.f_code.co_filename or frame.f_code.co_filename == __file__: return None
        if event == "line" and (seen := seen + 1) == at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try: f()
    except KeyboardInterrupt: pass
    finally: sys.settrace(before)
    return seen >= at


@pytest.mark.parametrize("flat", [10_000, 0])
def test_an_interrupt_at_any_line_leaves_all_or_nothing(flat):
    x, n = np.random.default_rng(0).normal(size=(8000, 8)).astype(np.float32), 1000
    index, at, known = filled(x, n, flat_below=flat), 1, {}
    known.update(zip(range(n), range(n)))                                          # id: row of x

    def settle(ids, rows):
        "What an operation did: all of it or nothing."
        now = {i: r for i, r in zip(ids, rows) if r is not None}
        for state in {**known, **now} if None not in rows else {i: r for i, r in known.items() if i not in ids}, known:
            if len(index) == len(state) and all(i in index for i in state):
                every = np.array(list(state))
                if (index.search(x[list(state.values())], 1, 100)[0][:, 0] == every).all(): return dict(state)
        raise AssertionError(f"half done, line {at}")
    more = True
    while more:
        new, some = [n, n + 1, n + 2], list(known)[:3]
        more = interrupted(lambda: index.add(x[new], new), at)
        known = settle(new, new)
        rows = [r + 3 for r in new]
        more |= interrupted(lambda: index.update(x[rows], some), at)
        known = settle(some, rows)
        more |= interrupted(lambda: index.remove(some), at)
        known = settle(some, [None] * 3)
        n, at = n + 6, at + (1 if at < 60 else 11)
        assert set(index.graph.memory.arrays.level[index.graph.memory.pending].tolist()) <= {WAIT}
    assert at > 60


def test_idle_time_frees_what_was_removed(sift):
    index = filled(sift[0], 3000, flat_below=0)
    index.remove(range(0, 200))
    assert index.graph.memory.dead > 0
    for _ in range(50): report = index.drain(.2)
    assert index.graph.memory.dead == 0 and report.predicted == .2


def test_the_optimums_grid_reaches_to_the_beams_that_riann_asks_with():
    planner = Riann(128).planner
    assert max(bench.GRID["ef"]) >= max(planner.rungs(2**size)[0].cand_q for size in range(10, 16))


def test_odd_arguments_of_the_protocols(sift):
    x, q = sift
    for call, says in [(lambda: bench.protocol_a((x, q), batches=()), "batches"), (lambda: bench.protocol_a((x, q), n_batches=0), "sizes"),
                       (lambda: bench.protocol_b((x, q), deadlines=()), "deadlines"), (lambda: bench.protocol_b((x, q), deadlines=[.5, np.nan]), "deadlines"),
                       (lambda: bench.protocol_b((x, q), default_s=-1.), "default_s"), (lambda: bench.protocol_b((x, q), sizes=[9000]), "sizes"),
                       (lambda: bench.stream(x, q, [5], [bench.DEFAULT], deadline_s=-1), "deadline_s"), (lambda: bench.stream(x, q[:0], [5], [bench.DEFAULT]), "query"),
                       (lambda: bench.oracle_grid((x, q), [9000]), "sizes"), (lambda: bench.oracle_grid((x, q), []), "sizes"),
                       (lambda: bench.oracle_grid((x, q), [100], dict(deg=(), cand=(10,), ef=(30,))), "grid")]:
        with pytest.raises(ValueError, match=says): call()
    with pytest.raises(ValueError, match="of: expected RIANN, default or both"): bench.protocol_b((x, q), of=["hnswlib"])
    df = bench.protocol_b((x, q), deadlines=(.5,), sizes=[40])
    assert len(df) == 4 and len(bench.kept(df)) == 4 and df.deadline_s.nunique() == 2
    for option in dict(usual="another"), dict(skip=5):
        with pytest.raises(ValueError, match=list(option)[0]): bench.kept(df, **option)


def gauss(n, dim=64):
    x = np.random.default_rng(5).normal(size=(n, dim)).astype(np.float32)
    return x[:-600], x[-600:], "l2"


def topics(n, dim=64):
    "Like embeddings of texts: a few topics have most of them, each text is of two."
    rng = np.random.default_rng(6)
    c, often, other = rng.normal(size=(200, dim)), rng.zipf(1.3, n) % 200, rng.integers(0, 200, n)
    x = (c[often] + .7 * c[other] + .9 * rng.normal(size=(n, dim))).astype(np.float32)
    return x[:-600], x[-600:], "cosine"


def shuffled(n):
    x = np.load(path("riann/sift_photos"))
    x = x[np.random.default_rng(7).permutation(len(x))[:n]].astype(np.float32)
    return x[:-600], x[-600:], "l2"


@pytest.mark.parametrize("data", [gauss, topics, shuffled])
@pytest.mark.parametrize("need", [.8, .97, .999])
def test_what_is_called_feasible_is_reached(data, need):
    "On data that the models know and don't: where a plan promises, queries never seen find so much; what was measured holds the truth."
    x, q, metric = data(8600)
    index = Riann(x.shape[1], metric, Requirement(recall=need), flat_below=0)
    report = index.add(x, np.arange(len(x)))
    plan, true = index.plan(10), recall(index.search(q, 10)[0], ground_truth(x, q, 10, metric)[0])
    m = plan.measured
    assert m.low - .015 <= true <= m.high + .015 and m.n == len(x) == report.measured.n and report.measured.queries == 64 and m.beam <= index.linker.query_beam == plan.cand_q
    assert not plan.feasible or true >= need - .003
    assert not report.feasible or true >= need - .02      # a first look, at few queries
    assert plan.feasible or "measured" in plan.reason or f"recall {need:g}" in plan.reason
    if data is gauss: assert "intrinsic dimension" in plan.reason or not plan.feasible
    if data is shuffled and need < .99: assert plan.feasible


def test_different_demands_get_different_properties(sift):
    x, q = sift
    plans, found = [], []
    for need in .8, .97, .999:
        index = filled(x, 6000, requirement=Requirement(recall=need), flat_below=0)
        plans.append(index.plan(100))
        found.append(recall(index.search(q, 10)[0], ground_truth(x[:6000], q, 10)[0]))
    assert all(p.feasible for p in plans[:2]) and found[2] > .998 and found[0] >= .8 and found[1] >= .97
    assert plans[0].cand_q < plans[1].cand_q and plans[1].deg * plans[1].cand < plans[2].deg * plans[2].cand
    assert plans[2].recall >= .999 and plans[0].t_query < plans[1].t_query


def test_the_measured_interval_holds_the_truth():
    "Coverage: by vectors held back, over many samples, properties and beams, of what queries that the graph never saw find."
    from opml_wb.riann.graph.hnsw import DynamicHNSW
    from opml_wb.riann.models.measure import Sample, held_back, interval, like_new
    held, above, closed = [], [], []
    for x, q, metric in (gauss(6600, 24), topics(6600, 24), shuffled(3600)):
        truth = ground_truth(x, q, 10, metric)[0]
        for deg, cand in (8, 20), (16, 200):
            graph = DynamicHNSW(x.shape[1], metric)
            graph.insert(x, range(len(x)), deg, cand)
            true = {ef: recall(graph.search(q, 10, ef)[0], truth) for ef in (12, 40)}
            for seed in range(10):
                slots = held_back(graph, 128, seed)
                before = graph.memory.arrays.L0.copy()
                sample = Sample(graph, graph.memory.arrays.X[slots, :x.shape[1]].copy(), slots, 10)
                for ef, t in true.items():
                    _, low, high = sample.recall(ef)
                    held.append(low <= t <= high)
                    above.append(t > high)
                    closed.append(t > interval(sample.found(ef))[2])
                assert (graph.memory.arrays.L0 == before).all()      # the bridges are built in a copy
    assert np.mean(held) >= .9 and np.mean(above) <= .06 < np.mean(closed), (np.mean(held), np.mean(above), np.mean(closed))
    assert like_new(np.ones(9), np.ones(9)).mean() == 1


def test_a_graph_is_measured_while_it_changes():
    "Looks at held-back vectors, bridged and not, beside a thread that removes and inserts: both come to an end."
    from opml_wb.riann.graph.hnsw import DynamicHNSW
    from opml_wb.riann.models.measure import held_back, searched
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    graph, looked, bad = DynamicHNSW(16), threading.Event(), []
    graph.insert(x, range(3000), 8, 20)
    slots = held_back(graph, 50, 0)
    slots = slots[slots >= 100]
    def change():
        while not looked.is_set():
            graph.remove(range(100))
            graph.insert(x[:100], range(100), 8, 20)
    def look():
        for i in range(30):
            found = searched(graph, x[slots], slots, 5, 20, bridged=bool(i % 2))
            bad.append((found == slots[:, None]).any() or (found < 0).any())
        looked.set()
    threads = [threading.Thread(target=f, daemon=True) for f in (change, look)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert not any(t.is_alive() for t in threads) and len(bad) == 30 and not any(bad)
    plain = searched(graph, x[slots], np.full(len(slots), -1), 1, 50, bridged=True)
    assert (plain[:, 0] == slots).mean() > .95      # nothing is held back


def test_queries_that_were_seen_stand_for_those_to_come():
    "Queries unlike the vectors: held-back vectors say too much, the queries seen say what is."
    x, _, metric = topics(5000, 32)
    rng = np.random.default_rng(0)
    far = rng.normal(size=(800, 32)).astype(np.float32)
    index = Riann(32, metric, flat_below=0)
    index.add(x, np.arange(len(x)))
    kept = index.plan(10).measured
    assert kept.source == "held-back vectors"
    for i in range(0, 400): index.search(far[i:i + 1])
    m = index.plan(10).measured
    assert m.source == "queries seen" and len(index.meter.asked.rows) == 400
    true = recall(index.search(far[400:], 10)[0], ground_truth(x, far[400:], 10, metric)[0])
    assert m.low - .015 <= true <= m.high + .015


def test_small_batches_promise_no_recall_that_nobody_measured():
    "Their reports say neither that it will be reached nor that it won't, until something is measured."
    x, _, metric = gauss(2600)
    index = Riann(x.shape[1], metric, Requirement(recall=.97), flat_below=0)
    reports = [index.add(x[i:i + 100], np.arange(i, i + 100)) for i in range(0, 2000, 100)]
    assert {r.feasible for r in reports} == {None} and "not measured yet" in reports[-1].reason
    plan = index.plan(100)
    assert plan.measured and plan.feasible in (True, False)


def test_what_was_never_measured_is_not_promised(sift):
    x, _ = sift
    plan = Riann(128).plan(380_000)
    assert not plan.feasible and "is a guess, of 380,000 vectors (trained on 32,768)" in plan.reason and plan.measured is None
    index = filled(x, 3000, flat_below=0)
    report = index.add(x[3000:3100], np.arange(3000, 3100), deadline_s=5)
    assert report.measured is None and index.measure() == index.measured == index.plan(1).measured     # nothing under a deadline
    assert index.add(x[3100:3200], np.arange(3100, 3200), deadline_s=5).measured == index.measured
    index.require(Requirement(recall=.9))
    assert index.measured is None and index.plan(1).measured is not None and Riann(128).measure() is None


def is_true(index, x, q, ids=None):
    "Recall of the graph's searches with the index's beam, which are not taken for queries seen."
    found = index.graph.search(q, 10, max(10, index.linker.query_beam))[0]
    return recall(found, (np.arange(len(x)) if ids is None else ids)[ground_truth(x, q, 10, index.metric)[0]])


def test_a_measurement_stands_for_what_was_measured():
    "Old vectors replaced, grown over, linked later, asked otherwise: it is measured anew, or nobody knows; never an old promise."
    rng, n = np.random.default_rng(1), 2000
    across = rng.normal(size=(4, 128))
    easy, like = ((rng.normal(size=(m, 4)) @ across).astype(np.float32) for m in (n, 200))
    hard, q = (rng.normal(size=(m, 128)).astype(np.float32) for m in (2 * n, 200))
    def measured():
        index = Riann(128, requirement=Requirement(recall=.9), flat_below=0)
        index.add(easy, np.arange(n))
        assert index.measure().recall >= .9 and index.plan(1).feasible
        return index
    def broken(said, *where):
        "A promise without a measurement that holds."
        return said.feasible and not said.measured.low - .03 <= is_true(*where)
    window, updated, grown, held, asked = (measured() for _ in range(5))
    for i in range(0, n, 250):
        window.remove(np.arange(i, i + 250))
        report = window.add(hard[i:i + 250], np.arange(n + i, n + i + 250))
        here = np.concatenate([easy[i + 250:], hard[:i + 250]])
        old = np.concatenate([like[(i + 250) // 10:], q[:(i + 250) // 10]])
        assert not broken(report, window, here, old, np.arange(i + 250, n + i + 250)), i
    for index, at in (window, np.arange(n, 2 * n)), (updated, np.arange(n)):
        if index is updated: report = [updated.update(hard[h:h + 1000], at[h:h + 1000]) for h in (0, 1000)][1]
        assert not broken(report, index, hard[:n], q, at)
        assert not broken(index.plan(1), index, hard[:n], q, at)
    for i in range(0, n, 250):     # where the deadline leaves time to measure, and where not
        report = grown.add(hard[i:i + 250], np.arange(n + i, n + i + 250), deadline_s=60)
        assert len(grown) - report.measured.n <= .1 * len(grown)
        hasty = held.add(hard[i:i + 250], np.arange(n + i, n + i + 250), deadline_s=.004)
        assert i == 0 or not hasty.feasible
    while held.drain(1).deferred: pass
    held.measure()
    held.graph.place(hard[n:n + 1000], np.arange(9000, 10_000))     # compared with: found whatever comes
    waits = held.measure()
    held.drain(5)
    assert held.graph.waiting == 0 and held.forecast.outdated() and held.plan(1).measured.n == waits.n
    for _ in range(3): asked.search(easy[:100])
    easily = asked.plan(1).measured
    asked.search(hard)
    assert easily.source == "queries seen" and asked.add(easy[:1] + 1, [n]).feasible is None
    assert asked.plan(1).measured.recall < easily.recall
    asked.remove(np.arange(1900))
    assert asked.measure() is None and asked.measured is None and asked.add(easy[:1] + 2, [n + 1]).feasible is None   # too few


def test_copies_are_measured_without_each_other():
    "Vectors of which each is there twice, but for some; too few different ones say nothing."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 16)).astype(np.float32)
    for single in 0, 1, 3, 70:
        index = Riann(16, flat_below=0)
        report = index.add(np.concatenate([np.repeat(x[:1000], 5, 0)[:4200], x[1000:1000 + single]]), np.arange(4200 + single))
        m = report.measured
        assert m.queries >= 64 and m.low > .9 and index.plan(1).measured.queries >= 64
    few = Riann(16, flat_below=0)
    report = few.add(np.repeat(x[:100], 50, 0), np.arange(5000))
    assert report.feasible is None and few.measure() is few.plan(1).feasible is None


def test_measuring_compares_exactly_and_with_a_fair_sample():
    from opml_wb.riann.graph.hnsw import DynamicHNSW
    from opml_wb.riann.models.measure import Asked, Sample
    rng = np.random.default_rng(0)
    for far, near in (1e4, 1), (1000, .01), (0, 1e-3):             # clusters that lie far apart, and none
        lie = rng.integers(0, 20, 3000)
        x = (rng.normal(size=(20, 16))[lie] * far + rng.normal(size=(3000, 16)) * near).astype(np.float32)
        for metric in "l2", "ip":
            graph = DynamicHNSW(16, metric)
            graph.insert(x[100:], range(2900), 8, 12)
            sample = Sample(graph, x[:100], np.full(100, -1), 10)
            truth, dist = ground_truth(x[100:], x[:100], 10, metric)
            assert np.allclose(sample.reach, dist[:, 9] - (metric == "ip"), rtol=1e-9)
            found = graph.search(x[:100], 10, 12)[0]
            assert abs(sample.found(12).mean() - recall(found, truth)) < .01
    for batch in 1, 100, 10_000:
        asked = Asked(seed=0)
        for i in range(0, 10_000, batch): asked.see(np.arange(i, i + batch)[:, None])
        early = np.mean(np.ravel(asked.rows) < 600)
        assert asked.n == 10_000 and len(asked.rows) == 512 and abs(early - .06) < .04
    x, q, _ = gauss(2000)
    index = Riann(64, requirement=Requirement(recall=.99, query_s=1e-4), flat_below=0)
    index.add(x, np.arange(len(x)))
    for _ in range(200): index.search(x[:1])
    assert index.measure().source == "held-back vectors"           # one query, however often, is one
    for row in q[:300]: index.search(row[None])
    m = index.measure()
    assert m.source == "queries seen" and m.low - .015 <= is_true(index, x, q) <= m.high + .015
    seen = []
    for scale in 1, 1e20, 1e-25:
        index = Riann(64, "cosine", flat_below=0)
        index.add(x, np.arange(len(x)))
        index.search(q[:100] * np.float32(scale))
        seen.append(index.measure()[:3])
    assert np.allclose(seen[0], seen, atol=.01)


def test_what_is_no_vector_or_no_model_is_refused_by_name(sift):
    from opml_wb.riann.models.annealing import ladder
    from opml_wb.riann.models.recall import RecallModel
    x, _ = sift
    model, times, index = RecallModel.load(), TimeModel.load(), Riann(4)
    veiled = np.ma.array(np.eye(4), mask=np.arange(16).reshape(4, 4) == 5)
    for call, says in [(lambda: index.add(veiled, range(4)), "x: row 1: masked"), (lambda: index.search(veiled), "q: row 1: masked"),
                       (lambda: index.add(np.eye(4), np.ma.array(range(4), mask=[0, 0, 1, 0])), "ids: row 2: masked"),
                       (lambda: ground_truth(np.eye(4), veiled), "query: row 1: masked"), (lambda: ground_truth(np.eye(2), np.eye(2), 1.5), "k: expected"),
                       (lambda: ground_truth([[np.nan, 1]], np.eye(2)), "base: row 0: NaN"), (lambda: ground_truth(np.eye(2), [[1, 1], [0, 0]], 1, "cosine"), "query: row 1: the zero"),
                       (lambda: filled(x, 50).profile(np.repeat(x[:20], 40, 0), .5), "sample: expected 512 different rows, got 20"),
                       (lambda: TimeModel.from_dict(times.facts | dict(prune=[float("nan")] * 10)), "prune is not finite"),
                       (lambda: model.predict(16, 100, 50, 0), "n: expected"), (lambda: model.predict(-3, 100, 50, 8192), "deg: expected"),
                       (lambda: ladder(model, times, 1000, recall=2), "recall: expected")]:
        with pytest.raises(ValueError, match=says): call()
    assert len(index) == 0 and "k = 500" in model.unknown(8192, 500) and not model.unknown(8192)
    index.planner.need = Requirement(k=60)
    assert "k = 60" in index.planner.unknown(1000)
    assert ground_truth(np.ones((50, 4)), np.ones((1, 4)), 5)[0].tolist() == [[0, 1, 2, 3, 4]]
    assert ground_truth(1.7e9 + np.arange(1000.)[:, None], [[1.7e9 + 500.2]], 3)[0].tolist() == [[500, 501, 499]]


def test_what_is_asked_and_fitted_is_kept(sift, tmp_path):
    x, _ = sift
    with filled(x, 300, path=tmp_path / "i") as index:
        index.require(Requirement(recall=.9))
        times = index.profile(x[:600], .5)
        index.add(x[300:310], np.arange(300, 310))
        index.require(Requirement(recall=.8, deadline_s=.5))
    with Riann.open(tmp_path / "i") as again:     # from the log, then from the snapshot
        assert again.requirement == Requirement(recall=.8, deadline_s=.5) and again.planner.times.facts == times.facts and len(again) == 310
        again.save()
    again.require(Requirement(recall=.9))         # closed: of searches only
    with Riann.open(tmp_path / "i") as again: assert again.requirement.recall == .8 and again.planner.times.facts == times.facts


def test_what_cannot_be_kept_is_not_acknowledged(sift, tmp_path):
    "The folder is removed, or LOCK, beside a writer: its next batch is refused, and another's stays."
    import shutil
    from opml_wb.core.record.database import StoreError
    x, _ = sift
    gone, index = filled(x, 20, path=tmp_path / "gone"), filled(x, 20, path=tmp_path / "i")
    with pytest.raises(StoreError, match=r"IndexStore\.open\(path, readonly=True\)"): Riann.open(tmp_path / "i")
    shutil.rmtree(tmp_path / "gone")
    os.unlink(tmp_path / "i" / "LOCK")
    with Riann.open(tmp_path / "i") as second: second.add(x[500:505], np.arange(500, 505))
    for one in gone, index:
        for call in (lambda: one.add(x[20:30], np.arange(20, 30)), lambda: one.update(x[:1], [0]), lambda: one.remove([0]), one.save):
            with pytest.raises(StoreError, match="removed"): call()
        assert len(one) == 20 and one.search(x[:1], 1)[0][0, 0] == 0
        one.close()
    with Riann.open(tmp_path / "i") as again: assert len(again) == 25 and 502 in again
