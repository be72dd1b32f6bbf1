"""The trace store: killed writers, other processes, and InfluxDB."""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opml_wb.pipesim import StoreError, TraceStore
from conftest import free_ports, until

WRITER = """
import sys, numpy as np
from opml_wb.pipesim import Platform, Pool, Workload, simulate, TraceStore
n, where = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
work = Workload.from_arrays(np.sort(rng.random(n) * 1e6), rng.exponential(10, n), "cpu")
trace = simulate(work, Platform(Pool("cpu", 40)))
store = TraceStore(where)
print("ready", flush=True)
for i in range(10_000):
    store.write(trace, "same" if i % 2 else f"e{i}", replace=True)
    print(i, flush=True)
"""


def days(n=4000, seed=0, ties=True):
    "Two days of one-task pipelines on two pools, times with ties."
    from opml_wb.pipesim import Platform, Pool, Workload, simulate
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.random(n) * 2 * 86400)
    work = Workload.from_arrays(np.floor(arrival) if ties else arrival, rng.exponential(600, n), rng.choice(["cpu", "gpu"], n), kind=rng.choice(["train", "a b,c=d"], n),
                                read=rng.random(n) * 1e9, write=1e3)
    return simulate(work, Platform([Pool("cpu", 12), Pool("gpu", 13)]))


def store_at(where):
    from opml_wb.pipesim import TraceStore
    return TraceStore(where)


def killed_writer(n, where, ready):
    "A process that writes experiments of `n` pipelines, killed when `ready(its lines)` returns: `ready`, then the number of each write."
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(n), where], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    ready(writer.stdout)
    writer.kill()
    writer.communicate()


@pytest.mark.parametrize("scheme,moments", [("parquet", [(0, .02), (1, .01), (2, .03), (3, .06)]), ("duckdb", [(0, .1), (1, .1)])])
def test_sigkill_while_writing_lists_no_half_experiment(tmp_path, scheme, moments):
    "Writers killed at several moments (writes done, s into the next); every experiment that is listed has all its rows, and the store goes on."
    where, n, seen = f"{scheme}:{tmp_path}/store", 20_000, set()
    for writes, moment in moments:
        killed_writer(n, where, lambda lines: ([lines.readline() for _ in range(writes)], time.sleep(moment)))
        store = store_at(where)
        for name, about in store.experiments().items():
            seen.add(name)
            assert len(store.table("tasks", name)) == len(store.table("pipelines", name)) == n
            assert store.series("wait", name, 1e9).value[0] == pytest.approx(about["summary"]["wait_mean"], rel=1e-9, abs=1e-12)
    assert seen
    store.write(days(), "after")
    assert "after" in store.experiments()
    if scheme == "parquet": assert not [f for f in os.listdir(tmp_path / "store") if f.startswith(".")]


def test_writers_of_one_name_leave_one_whole_experiment(tmp_path):
    store, traces = store_at(tmp_path), [days(seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda t: [store.write(t, "x", replace=True) for _ in range(4)], traces))
    assert os.listdir(tmp_path) == ["x"] and len(store.table("tasks", "x")) == 4000
    assert store.experiments()["x"]["digest"] in {t.digest for t in traces}


def test_a_disk_without_room_leaves_nothing(tmp_path, monkeypatch):
    import pandas as pd
    store = store_at(tmp_path)
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(StoreError, match="'x' was not kept.*No space left"): store.write(days(), "x")
    assert os.listdir(tmp_path) == []


def test_duckdb_says_that_another_process_has_the_file(tmp_path):
    where = f"duckdb:{tmp_path}/t.duckdb"
    store_at(where).write(days(), "x")
    holder = subprocess.Popen([sys.executable, "-c", f"import duckdb, time; db = duckdb.connect('{tmp_path}/t.duckdb'); print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(StoreError, match="one process at a time"): store_at(where).experiments()
    finally: holder.kill(); holder.wait()


def test_influx_round_trip(influx_server, tmp_path):
    "Every metric comes back as the Parquet store has it, hourly mean wait to 1e-6, with ties and names that need escaping."
    from opml_wb.pipesim.stores.tables import METRICS
    trace = days()
    influx, parquet = store_at(f"{influx_server}/round"), store_at(tmp_path)
    influx.write(trace, "fifo", {"days": 2})
    parquet.write(trace, "fifo")
    for metric in METRICS:
        got, want = influx.series(metric, "fifo"), parquet.series(metric, "fifo")
        assert got.t.tolist() == want.t.tolist(), metric
        if "tag" in want: assert got.tag.tolist() == want.tag.tolist()
        if metric != "wait_p95": np.testing.assert_allclose(got.value, want.value, rtol=1e-9, err_msg=metric)
    by_hand = trace.pipelines.groupby(trace.workload.since // 3600).wait.mean()
    assert np.abs(influx.series("wait", "fifo").value - by_hand.to_numpy()).max() <= 1e-6
    assert influx.experiments()["fifo"]["digest"] == trace.digest and influx.experiments()["fifo"]["params"] == {"days": 2}
    with pytest.raises(StoreError, match="there is one already"): influx.write(trace, "fifo")
    influx.write(days(n=500, seed=1), "fifo", replace=True)
    assert influx.series("pipelines", "fifo").value.sum() == 500
    influx.write(trace, "b")
    influx.remove("fifo")
    assert list(influx.experiments()) == ["b"] and influx.series("pipelines", "b").value.sum() == 4000
    with pytest.raises(StoreError, match="experiment 'fifo': not in influx://127.0.0.1"): influx.series("wait", "fifo")


def test_influx_killed_writer_is_not_listed(influx_server):
    url = f"{influx_server}/killed"
    store = store_at(url)
    def half(lines): assert until(lambda: store.server.ask("show databases") and store.server.ask("select count(wait) from pipelines_arrival"), 120)
    killed_writer(200_000, url, half)
    assert store.experiments() == {}
    trace = days()
    store.write(trace, "e0")
    assert store.series("pipelines", "e0").value.sum() == 4000


def test_influx_down_keeps_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    from opml_wb.pipesim.stores.influx import InfluxStore
    trace, url = days(n=100), f"influx://127.0.0.1:{free_ports(1)[0]}/x"
    with pytest.raises(StoreError, match=f"{url}: cannot be reached: .*kept in parquet:{tmp_path}/home/traces/fifo"): InfluxStore(url, pause=.01).write(trace, "fifo")
    assert store_at(f"parquet:{tmp_path}/home/traces").experiments()["fifo"]["digest"] == trace.digest


def test_influx_refuses_with_its_own_words(influx_server, tmp_path):
    store = store_at(f"{influx_server}/words")
    store.server.ask('create database "words"')
    with pytest.raises(StoreError, match="answers 400: .*unable to parse"): store.server.send(["nonsense"])
    with pytest.raises(StoreError, match="answers 400|error parsing query"): store.server.ask("selekt")


def test_influx_bins_begin_where_the_workload_does(influx_server, tmp_path):
    "Epoch seconds: the same series as the Parquet store's, in bins from t0 on."
    from opml_wb.pipesim import Platform, Pool, Workload, simulate
    rng = np.random.default_rng(2)
    work = Workload.from_arrays(1.6e9 + 1234 + np.floor(np.sort(rng.random(900) * 86400)), rng.exponential(900, 900), "gpu", read=1e6)
    influx, parquet, trace = store_at(f"{influx_server}/clock"), store_at(tmp_path), simulate(work, Platform(Pool("gpu", 9)))
    for store in (influx, parquet): store.write(trace, "epoch")
    for metric in ("wait", "pipelines", "utilisation", "read"):
        got, want = influx.series(metric, "epoch"), parquet.series(metric, "epoch")
        assert got.t.tolist() == want.t.tolist() and got.t[0] == work.t0, metric
        np.testing.assert_allclose(got.value, want.value, rtol=1e-9, err_msg=metric)


@pytest.mark.parametrize("url", ["s3://bucket/traces", "S3://bucket/traces", "git+ssh://x/y", "DuckDB:x", "h2:x"])
def test_a_url_of_another_scheme_is_no_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected parquet:DIR"): TraceStore(url)
    assert not any(tmp_path.iterdir())
    for bare in ("./a:b", "C:x", "x/y"): assert type(TraceStore(bare)).__name__ == "ParquetStore"


def test_threads_write_one_name_and_numpy_parameters_are_kept(tmp_path):
    from opml_wb.pipesim import Platform, Pool, Workload, simulate
    t = simulate(Workload.from_arrays([0., 5], [9., 9], "gpu"), Platform(Pool("gpu", 1)))
    for url in (f"duckdb:{tmp_path}/a.duckdb", f"parquet:{tmp_path}/p"):
        store = TraceStore(url)
        with ThreadPoolExecutor(3) as pool: list(pool.map(lambda n: store.write(t, "same", {"n": np.int64(n)}, replace=True), range(6)))
        assert list(store.experiments()) == ["same"] and store.experiments()["same"]["params"]["n"] in range(6)
        with pytest.raises(ValueError, match=r"params\['f'\]: expected what JSON holds"): store.write(t, "b", {"f": print})
        assert list(store.experiments()) == ["same"]


def test_bad_input_is_named():
    from opml_wb.pipesim import Platform, Policy, Pool, Workload, simulate
    work = Workload.from_arrays([0.], [1.], "gpu")
    with pytest.raises(ValueError, match="keys of policy 'mine': expected numbers"): simulate(work, Platform(Pool("gpu", 1)), Policy(lambda tasks: tasks.kind.astype(str), "mine"))
    with pytest.raises(ValueError, match="pool, task 1: expected a name"): Workload.from_arrays([0., 1], [1., 1], np.array(["a", np.nan]))


def test_a_stream_says_what_can_be_done_with_what_is_there(tmp_path):
    from opml_wb.pipesim import Platform, Pool, Workload, simulate_stream
    platform, chunk = Platform(Pool("gpu", 1)), lambda t: Workload.from_arrays([t], [1.], "gpu")
    def broken(): yield chunk(0.); yield chunk(9.); yield chunk(20.); raise RuntimeError("killed")
    for resume, said in ((False, "can't be gone on with: take another folder"), (True, "resume=True goes on with the one")):
        out = tmp_path / str(resume)
        with pytest.raises(RuntimeError): simulate_stream(broken(), platform, out, resume=resume)
        with pytest.raises(ValueError, match=said): simulate_stream([chunk(0.)], platform, out)
    with pytest.raises(ValueError, match="take another folder"): simulate_stream([chunk(0.)], platform, tmp_path / "False", resume=True)
    simulate_stream([chunk(0.)], platform, tmp_path / "done")
    with pytest.raises(ValueError, match="Streamed.open reads"): simulate_stream([chunk(0.)], platform, tmp_path / "done", resume=True)
