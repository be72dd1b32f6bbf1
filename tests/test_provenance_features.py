"""The feature store on real, revised data and under several writers: against the vintages themselves, brute force and a serial oracle."""
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest

from opml_wb.core.record import data
from opml_wb.provenance.features.store import FeatureStore, HistoryError, PinnedError
from opml_wb.provenance.features.vintages import load, vintages

REAL = [pytest.param("frbny", id="frbny"),
        pytest.param("covid", id="covid", marks=pytest.mark.skipif(data.find("provenance/covid_vintages") is None, reason="needs `opml data fetch provenance/covid_vintages` or OPML_DATA"))]


@pytest.fixture(scope="module")
def pd():
    import pandas
    return pandas


@pytest.fixture(scope="module")
def np():
    import numpy
    return numpy


@pytest.fixture
def fs(tmp_path): return FeatureStore(tmp_path)


@pytest.fixture
def t(pd): return pd.Timestamp("2020-01-01", tz="UTC")


def known(frames, key, at, known_at):
    "The last vintage known at `known_at`, read by hand: the value of the latest date that has a row for `key`."
    rows = next((rows for k, rows in reversed(frames) if k <= known_at), {}).get(key, ())
    return max((row for row in rows if row[0] <= at), default=(None, None), key=lambda r: r[0])[1]


def same(a, b): return (a is None or a != a) and (b is None or b != b) or a == b


@pytest.fixture(scope="module", params=REAL)
def store(request, tmp_path_factory):
    "(the store, its vintages as [(time, {series: [(date, value)]})]) of a real data set."
    fs, frames = FeatureStore(tmp_path_factory.mktemp("lake")), vintages(request.param)
    with mock.patch("opml_wb.provenance.features.vintages.vintages", lambda name: frames): load(fs, request.param)
    by_series = lambda f: {key: list(zip(g.date, g.value)) for key, g in f.groupby("series")}
    return fs, [(k, by_series(f)) for k, f in frames]


def series_and_days(frames):
    newest = frames[-1][1]
    return sorted(newest), sorted({t for rows in newest.values() for t, _ in rows})


def test_two_clock_reads_equal_the_vintage_known_then(store, np):
    fs, frames = store
    rng, (series, days) = np.random.default_rng(1), series_and_days(frames)
    first, last, unknown = frames[0][0], frames[-1][0], 0
    for _ in range(1000):
        key, at = series[rng.integers(len(series))], days[rng.integers(len(days))]
        known_at = first + (last - first) * rng.uniform(-.2, 1.1)
        got, want = fs.value("series", key, "value", at, known_at), known(frames, key, at, known_at)
        assert same(got, want), (key, at, known_at, got, want)
        unknown += known_at < first
        if known_at < first: assert got is None
    assert unknown > 50


def test_training_set_equals_a_double_loop_and_event_time_only_leaks(store, pd, np):
    fs, frames = store
    rng, (series, days) = np.random.default_rng(2), series_and_days(frames)
    since = frames[0][0] - pd.Timedelta(days=90)
    recent = [t for t in days if t >= since]
    dates = [recent[i] + pd.Timedelta(days=int(d)) for i, d in zip(rng.integers(0, len(recent), 400), rng.integers(0, 40, 400))]
    labels = pd.DataFrame({"series": rng.choice(series, 400), "date": dates, "y": 1})
    honest, leaky = fs.training_set(labels, ["series.value"]), fs.training_set(labels, ["series.value"], known=None)
    loop = [known(frames, k, t, t) for k, t in zip(labels.series, labels.date)]
    now = [known(frames, k, t, frames[-1][0]) for k, t in zip(labels.series, labels.date)]
    assert all(map(same, honest["series.value"], loop)) and all(map(same, leaky["series.value"], now))
    assert sum(not same(a, b) for a, b in zip(honest["series.value"], leaky["series.value"])) > 20


def test_each_vintage_can_be_read_back_whole(store, pd):
    fs, frames = store
    lo, hi = pd.Timestamp("1900-01-01", tz="UTC"), pd.Timestamp("2100-01-01", tz="UTC")
    for known_at, rows in frames:
        got = fs.range("series", "value", lo, hi, known_at)
        assert {(k, t): v for k, t, v in got.itertuples(index=False)} == {(k, t): v for k, found in rows.items() for t, v in found}


WRITER = """
import sys, json, numpy as np, pandas as pd
from opml_wb.provenance.features.store import FeatureStore
root, who = sys.argv[1], int(sys.argv[2])
fs, rng, done = FeatureStore(root), np.random.default_rng(who), []
for n in range(25):
    keys = rng.choice(8, 5, replace=False)
    df = pd.DataFrame({"id": keys, "t": pd.Timestamp("2020-01-01", tz="UTC"), "x": [who * 1000. + n] * 5})
    done.append((fs.write("t", df, "id", "t"), keys.tolist(), who * 1000. + n))
print(json.dumps(done))
"""


def test_four_writers_on_the_same_keys_equal_a_serial_oracle(tmp_path, fs, pd):
    jobs = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(4)]
    outs = [j.communicate(timeout=200) for j in jobs]
    assert [j.returncode for j in jobs] == [0] * 4, [err for _, err in outs]
    commits = sorted(c for out, _ in outs for c in json.loads(out))
    assert [v for v, _, _ in commits] == list(range(100))
    def state(n): return {key: x for _, keys, x in commits[:n] for key in keys}
    history = fs.history("t")
    assert len(history) == 100 and history.known_from.is_monotonic_increasing and history.known_from.is_unique
    span = pd.Timestamp("2019-01-01", tz="UTC"), pd.Timestamp("2021-01-01", tz="UTC")
    for n, known_at in ((100, None), (50, history.known_from[49])):
        assert dict(fs.range("t", "x", *span, known_at=known_at)[["id", "x"]].itertuples(index=False)) == state(n)


def test_threads_share_a_store_and_a_fork_is_refused(fs, t, pd):
    def write(i): return [fs.write("t", pd.DataFrame({"id": [i], "t": t, "x": [float(n)]}), "id", "t") for n in range(5)]
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for job in threads: job.start()
    for job in threads: job.join()
    assert fs.history("t").version.tolist() == list(range(20))
    assert fs.range("t", "x", t, t + pd.Timedelta(days=1)).x.tolist() == [4.0] * 4
    pid = os.fork()
    if pid == 0:
        try: fs.value("t", 1, "x", t)
        except RuntimeError as e: os._exit(0 if "before this process was forked" in str(e) else 2)
        except BaseException: os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_writer_and_vacuum_at_once_lose_nothing(tmp_path, fs, t, pd):
    fs.write("t", pd.DataFrame({"id": range(8), "t": t, "x": 0.}), "id", "t")
    job = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while job.poll() is None: fs.vacuum("t")
    out, err = job.communicate()
    assert job.returncode == 0, err
    oracle = dict.fromkeys(range(8), 0.)
    for _, keys, x in sorted(json.loads(out)): oracle.update(dict.fromkeys(keys, x))
    assert dict(FeatureStore(tmp_path).range("t", "x", t, t + pd.Timedelta(days=1))[["id", "x"]].itertuples(index=False)) == oracle


def test_a_failed_write_leaves_nothing(fs, t, pd, monkeypatch):
    rows = pd.DataFrame({"id": [1], "t": t, "x": 0.})
    fs.write("t", rows, "id", "t")
    from opml_wb.provenance.features import commit
    def full(*args, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr("deltalake.write_deltalake", full)
    with pytest.raises(OSError, match="No space"): fs.write("t", rows.assign(x=1.), "id", "t")
    monkeypatch.undo()
    assert fs.value("t", 1, "x", t) == 0. and len(fs.history("t")) == 1
    assert commit.PATIENCE >= 30


def test_a_pin_holds_vacuum_back_and_history_is_never_a_neighbours(fs, t, pd):
    for n in range(4): fs.write("t", pd.DataFrame({"id": [1], "t": t, "x": float(n)}), "id", "t", known_from=t + pd.Timedelta(days=n))
    fs.pin("run-a", "t", 1)
    with pytest.raises(PinnedError, match="version 1 of 't' is pinned by run run-a"): fs.vacuum("t")
    assert [fs.value("t", 1, "x", t, t + pd.Timedelta(days=n)) for n in range(4)] == [0., 1., 2., 3.]
    assert fs.vacuum("t", before=1) == 1
    assert [fs.value("t", 1, "x", t, t + pd.Timedelta(days=n)) for n in range(1, 4)] == [1., 2., 3.]
    with pytest.raises(HistoryError, match="vacuumed"): fs.value("t", 1, "x", t, t)
    assert fs.value("t", 1, "x", t, t - pd.Timedelta(days=1)) is None          # nothing was known, that is certain
    fs.unpin("run-a")
    assert fs.vacuum("t") == 2
    with pytest.raises(HistoryError): fs.value("t", 1, "x", t, t + pd.Timedelta(days=2))
    assert fs.value("t", 1, "x", t) == 3.


def test_other_tools_read_the_table(tmp_path, fs, t, pd):
    fs.write("t", pd.DataFrame({"id": [1, 2], "t": t, "x": [1., 2.]}), "id", "t")
    pl = pytest.importorskip("polars")
    assert pl.read_delta(str(tmp_path / "t")).sort("id")["x"].to_list() == [1., 2.]


def test_reads_at_times_finer_than_a_microsecond_are_exact(fs, pd):
    t = pd.Timestamp("1969-07-20T20:17:40.000002", tz="UTC")
    before, after = (t.as_unit("ns") + pd.Timedelta(ns, "ns") for ns in (-1, 1))
    row = pd.DataFrame({"k": ["a"], "t": [t], "x": [1.0]})
    fs.write("f", row, "k", "t", known_from=t)
    assert [fs.value("f", "a", "x", at, known) for at, known in ((before, t), (t, before), (after, after), (t, t))] == [None, None, 1, 1]
    assert [len(fs.range("f", "x", a, b)) for a, b in ((before, after), (t, after), (after, t + pd.Timedelta(days=1)), (before, t), (after, after))] == [1, 1, 0, 0, 0]
    times = pd.Series([before, t, after])
    for column in (times, times.astype(object)):
        assert fs.training_set(pd.DataFrame({"k": "a", "t": column}), ["f.x"])["f.x"].isna().tolist() == [True, False, False]
        with pytest.raises(ValueError, match="finer than a microsecond"):
            fs.write("f", pd.DataFrame({"k": list("abc"), "t": column, "x": 1.0}), "k", "t")
    assert len(fs.history("f")) == 1
