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


LATE = """
import os, sys, pandas as pd
from opml_wb.provenance.features.clock import Clock
from opml_wb.provenance.features.store import FeatureStore
if sys.argv[2] == "killed": Clock.change = lambda *a: os.kill(os.getpid(), 9)
FeatureStore(sys.argv[1]).write("t", pd.DataFrame({"id": range(50_000), "t": pd.Timestamp("2020-01-01", tz="UTC"), "x": 1.}), "id", "t")
"""


def now(pd): return pd.Timestamp.now("UTC").floor("us")


def ask(fs, pd, t, key=5):
    "(time, answer as known at that time) of a read as of now, in one of three ways."
    k = now(pd)
    if key == 5: return k, lambda: fs.value("t", 5, "x", t, k)
    if key == 6: return k, lambda: fs.range("t", "x", t, t + pd.Timedelta(days=1), known_at=k).x.sum()
    return k, lambda: fs.training_set(pd.DataFrame({"id": [5], "t": [k]}), ["t.x"])["t.x"].tolist()


def test_no_answer_changes_while_another_process_writes_much(tmp_path, fs, t, pd):
    fs.write("t", pd.DataFrame({"id": range(10), "t": t, "x": 0.}), "id", "t")
    job, asked = subprocess.Popen([sys.executable, "-c", LATE, str(tmp_path), "done"]), []
    while job.poll() is None: asked += [(f, f()) for _, f in (ask(fs, pd, t, key) for key in (5, 6, 7))]
    assert job.returncode == 0 and fs.value("t", 5, "x", t) == 1. and len(asked) > 20
    assert [f() for f, _ in asked] == [was for _, was in asked]
    asked += [(f, f()) for _, f in (ask(fs, pd, t, key) for key in (5, 6, 7))]
    assert asked[-3][1] == 1.       # and what is written is known from then on


def test_an_answer_given_during_a_commit_stays_whoever_writes(fs, t, pd, monkeypatch):
    "Reads as of now at the worst moments: when the commit is about to be made, and when it is there without its time."
    from opml_wb.provenance.features.table import CommitLog
    other, asked, commit = FeatureStore(fs.root), [], CommitLog.write

    def read(): asked.extend((f, f()) for _, f in (ask(other, pd, t, key) for key in (5, 6, 7)))

    def slow(*args, **options):
        read()
        commit(*args, **options)
        read()
    for n in range(3):
        fs.write("t", pd.DataFrame({"id": range(10), "t": t, "x": float(n)}), "id", "t")
        if not n: monkeypatch.setattr(CommitLog, "write", slow)
    assert len(asked) == 12 and [f() for f, _ in asked] == [was for _, was in asked]


def test_a_clock_set_back_or_behind_changes_no_answer(fs, t, pd, monkeypatch):
    from opml_wb.provenance.features import clock, commit, table
    fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": 0.}), "id", "t")
    k, f = ask(fs, pd, t)
    assert f() == 0.
    for module in (clock, commit, table): monkeypatch.setattr(module, "micros_now", lambda: 1_700_000_000_000_000)     # in 2023
    with pytest.warns(UserWarning, match="had a clock that is ahead"): fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": 1.}), "id", "t")
    assert f() == 0. and fs.value("t", 5, "x", t) == 1. and fs.history("t").known_from.iloc[-1] > k
    with pytest.raises(ValueError, match="is in the future"): fs.value("t", 5, "x", t, k + pd.Timedelta(hours=1))
    monkeypatch.undo()
    assert f() == 0. and ask(fs, pd, t)[1]() == 1.


def test_a_write_whose_writer_was_killed_is_whole_and_known_once_seen(tmp_path, fs, t, pd):
    fs.write("t", pd.DataFrame({"id": range(10), "t": t, "x": 0.}), "id", "t")
    before, f = ask(fs, pd, t)
    assert f() == 0. and subprocess.run([sys.executable, "-c", LATE, str(tmp_path), "killed"]).returncode == -9
    k = now(pd)
    assert fs.value("t", 5, "x", t) == 1. and fs.history("t").known_from.iloc[-1] >= k and f() == 0.
    assert ask(fs, pd, t)[1]() == 1. and len(fs.history("t")) == 2


def test_history_loaded_later_never_changes_an_answer(fs, t, pd):
    row, day = pd.DataFrame({"id": [5], "t": t, "x": 0.}), lambda n: t + pd.Timedelta(days=n)
    for n in (1, 2, 2): fs.write("t", row.assign(x=float(n)), "id", "t", known_from=day(n))      # one publication in two parts
    assert [fs.value("t", 5, "x", t, day(k)) for k in (1, 2, 9)] == [1., 2., 2.]
    for n in (2, 9):
        with pytest.raises(ValueError, match="was read as known at 2020-01-10.*give a later time"): fs.write("t", row, "id", "t", known_from=day(n))
    assert len(fs.history("t")) == 3
    fs.write("t", row.assign(x=10.), "id", "t", known_from=day(10))
    assert fs.value("t", 5, "x", t, day(9)) == 2. and fs.value("t", 5, "x", t, day(10)) == 10.


def test_who_may_only_read_is_answered_and_told(fs, t, pd, monkeypatch):
    from opml_wb.provenance.features.place import Folder
    fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": 0.}), "id", "t")

    def denied(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Folder, "change", denied)
    reader = FeatureStore(fs.root)
    with pytest.warns(UserWarning, match="Permission denied.*whose clock is behind"): assert ask(reader, pd, t)[1]() == 0.
    assert reader.value("t", 5, "x", t) == 0. and reader.value("t", 5, "x", t, t) is None
    with pytest.warns(UserWarning, match="will be known when the table's folder can be written"):
        fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": 1.}), "id", "t")
    with pytest.warns(UserWarning, match="cannot be noted"): assert ask(reader, pd, t)[1]() == 0.        # it has no time yet
    assert reader.history("t").known_from.isna().tolist() == [False, True]
    monkeypatch.undo()
    assert fs.value("t", 5, "x", t) == 1. == ask(fs, pd, t)[1]() and fs.history("t").known_from.is_monotonic_increasing


def test_tables_written_before_times_came_with_commits_still_open(fs, t, pd):
    import pyarrow as pa
    from deltalake import CommitProperties, write_deltalake
    day = lambda n: t + pd.Timedelta(days=n)
    for n in range(2):
        rows = pa.table({"id": [5], "t": pa.array([t], pa.timestamp("us", "UTC")), "x": [float(n)], "_version": [n],
                         "_known_from": pa.array([day(n)], pa.timestamp("us", "UTC")), "_op": pa.array([1], pa.int8())})
        note = CommitProperties({"opml": json.dumps({"mode": "upsert", "known_from": day(n).isoformat(), "rows": 1, "run": None})})
        new = {} if n else {"description": json.dumps({"keys": ["id"], "event_time": "t"})}
        write_deltalake(str(fs.root / "t"), rows, mode="append" if n else "error", commit_properties=note, **new)
    assert [fs.value("t", 5, "x", t, day(n)) for n in (-1, 0, 1)] == [None, 0., 1.]
    for n in (2, 3): fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": float(n)}), "id", "t", known_from=day(n))
    assert [fs.value("t", 5, "x", t, day(n)) for n in range(4)] == [0., 1., 2., 3.] and fs.history("t").known_from.tolist() == [day(n) for n in range(4)]
    assert fs.vacuum("t", before=1) == 1 and [fs.value("t", 5, "x", t, day(n)) for n in (1, 2, 3)] == [1., 2., 3.]


def test_a_copy_of_a_version_reads_as_the_table_did(tmp_path, fs, t, pd):
    from opml_wb.provenance.ask.pipeline import table_files
    for n in range(3): fs.write("t", pd.DataFrame({"id": [5], "t": t, "x": float(n)}), "id", "t")
    known = fs.history("t").known_from
    for name, content in table_files(str(fs.root / "t"), "delta:1").items():
        to = tmp_path / "copy" / "t" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(content if isinstance(content, bytes) else open(content, "rb").read())
    copy = FeatureStore(tmp_path / "copy")
    assert copy.history("t").known_from.tolist() == known[:2].tolist() and copy.value("t", 5, "x", t, known[1]) == 1.


S3 = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))      # one request at a time
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def bucket(monkeypatch):
    "(root, storage options) of a bucket in a process of its own: Delta's client holds this one's interpreter while it waits."
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs"); pytest.importorskip("moto.server", reason="needs moto[server]")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.delenv(name, raising=False)
    server = subprocess.Popen([sys.executable, "-c", S3], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    options = {"key": "a", "secret": "b", "AWS_REGION": "us-east-1", "endpoint_url": f"http://127.0.0.1:{int(server.stdout.readline())}"}
    s3fs.S3FileSystem(key="a", secret="b", endpoint_url=options["endpoint_url"]).mkdir("bucket")
    yield "s3://bucket/features", options
    server.kill()
    server.wait()


def test_a_store_on_s3_keeps_its_answers(bucket, t, pd, monkeypatch):
    import pickle
    from opml_wb.provenance.features.table import CommitLog
    root, options = bucket
    fs, asked, commit = FeatureStore(root, storage_options=options), [], CommitLog.write
    other = pickle.loads(pickle.dumps(fs))

    def slow(*args, **options):
        asked.extend((f, f()) for _, f in (ask(other, pd, t, key) for key in (5, 7)))
        commit(*args, **options)
    for n in range(3):
        fs.write("t", pd.DataFrame({"id": range(10), "t": t, "x": float(n)}), "id", "t")
        if not n: monkeypatch.setattr(CommitLog, "write", slow)
    assert len(asked) == 4 and [f() for f, _ in asked] == [was for _, was in asked]
    known = fs.history("t").known_from
    assert known.is_monotonic_increasing and [fs.value("t", 5, "x", t, k) for k in known] == [0., 1., 2.] and other.tables() == ["t"]
    fs.pin("run-a", "t", 1)
    with pytest.raises(PinnedError, match="pinned by run run-a"): other.vacuum("t")
    other.unpin("run-a")
    assert fs.pins("t") == [] and fs.vacuum("t") == 20 and fs.range("t", "x", t, t + pd.Timedelta(days=1)).x.tolist() == [2.] * 10
    assert not os.path.exists("s3:")


def test_what_cannot_keep_its_answers_is_refused_by_name(bucket, t, pd, monkeypatch):
    from opml_wb.provenance.features.place import Bucket
    root, options = bucket
    for wrong, given, why in (("gs://b/x", None, "not made for gs://"), ("/tmp/x", options, "for s3://"), ("s3://", options, "s3://BUCKET"), ("s3://key:word@b/x", None, "keys go to storage_options"),
                              (root, {**options, "AWS_S3_ALLOW_UNSAFE_RENAME": "true"}, "one commit overwrite another")):
        with pytest.raises(ValueError, match=why): FeatureStore(wrong, given)
    put = Bucket._put
    monkeypatch.setattr(Bucket, "_put", lambda self, name, text, tag: put(self, name, text, self._get(name)[1]))      # conditions are ignored
    monkeypatch.setattr(Bucket, "checked", set())
    with pytest.raises(ValueError, match="ignores conditional writes"): FeatureStore(root, options).write("t", pd.DataFrame({"id": [5], "t": t, "x": 0.}), "id", "t")


# --- values that would change, or be taken for others ---

ALL = "2000-01-01T00:00Z", "2030-01-01T00:00Z"


def test_nothing_is_stored_as_another_value_than_it_was_given(fs, t, pd, np):
    ns, noon, day = np.array([1, 2], "datetime64[ns]"), pd.Timestamp("2020-01-01T12:00"), pd.Timestamp("2020-01-01")
    pairs = [([True], [2, 3], "2 would become True"), ([day.date()], [noon, day], "would become 2020-01-01"), (ns, None, "lose data"), (ns.astype("m8[ns]"), None, "no duration"),
             (np.float32([.5]), [1e-60, 1e-59], "would become 0"), (np.float32([.5]), [.1, .2], "0.1 would become"), (np.float32([.5]), [1e300, 1], "would become inf"),
             ([1], [t, t], "are no numbers"), ([t], [1700000000, 1], "numbers are no times"), ([t], [day, noon], "times without a time zone"), ([day], [t, t], "times with a time zone"),
             ([1], [1.5, 2], "1.5"), ([.5], [2**53 + 1, 1], "9007199254740993"), ([1], ["1", "2"], "texts are no numbers")]
    for n, (first, then, why) in enumerate(pairs):
        for column in ("id", "x"):
            def write(values): return fs.write(f"{column}{n}", pd.DataFrame({"id": 1 if column == "x" else values, "x": values, "t": pd.date_range(t, periods=len(values))}), "id", "t")
            if then is not None: write(first)
            before = fs.range(f"{column}{n}", None, *ALL).to_dict() if then is not None else None
            with pytest.raises(ValueError, match=why) as told: write(first if then is None else then)
            assert f"column '{column}'" in str(told.value)
            assert before is None and f"{column}{n}" not in fs.tables() or fs.range(f"{column}{n}", None, *ALL).to_dict() == before
    fs.write("fits", pd.DataFrame({"id": [1], "t": t, "x": [1], "y": [[1, 2]]}), "id", "t")
    for x in (2.0, True, np.uint64(3), __import__("decimal").Decimal("4.0"), None):
        fs.write("fits", pd.DataFrame({"id": np.int8([1]), "t": t, "x": [x], "y": [np.uint8([1, 200])]}), "id", "t")
    assert len(fs.changes("fits", 0, 5)) == 10 and fs.value("fits", 1, "y", t) == [1, 200]


def test_large_integers_are_read_as_they_are_and_keys_of_another_kind_refused(fs, t, pd, np):
    now, big = pd.Timestamp.now("UTC"), 2**53
    rows = pd.DataFrame({"id": [big, big + 1, big + 2], "t": t, "x": [10., 11., 12.], "n": pd.array([big + 1, None, 3], "Int64")})
    fs.write("k", rows, "id", "t")
    def read(ids, feature="k.x"): return fs.training_set(pd.DataFrame({"id": ids, "t": now}), feature, known=None)[feature]
    for ids, found in ((np.array([big, big + 1], np.uint64), [10, 11]), ([big, np.nan], [10, -1]), (pd.array([big + 1, None], "Int64"), [11, -1]), ([big + .0, 2.5], [10, -1]),
                       (np.array([big + 1, 2**64 - 1], np.uint64), [11, -1])):
        assert read(ids).fillna(-1).tolist() == found
    assert fs.range("k", "n", *ALL).n[0] == read([big, 7], "k.n")[0] == fs.value("k", big, "n", now) == big + 1
    fs.write("k", rows.assign(n=pd.array([big, None, 3], "Int64")), "id", "t")
    assert fs.changes("k", 0, 1).n.tolist() == [big + 1, big]
    for ids in (["1", "2"], [t, t]):
        with pytest.raises(ValueError, match="key 'id': .* are no numbers"): read(ids)
        with pytest.raises(ValueError, match="key 'id': .* are no numbers"): fs.value("k", ids[0], "x", now)
    assert [fs.value("k", k, "x", now) for k in (None, pd.NA, 2**70, 1.5, float(big))] == [None] * 4 + [10.0]


def test_what_delta_cannot_keep_is_refused_by_name(tmp_path, fs, t, pd):
    from datetime import datetime
    from zoneinfo import ZoneInfo
    row = pd.DataFrame({"id": [1], "t": t, "x": 1})
    fs.write("t", row, "id", "t")
    for frame, why in ((row.assign(X=2), "column 'x': names must be"), (row.rename(columns={"x": "X"}), "the table has 'x'"), (row.assign(_OP=1), "column '_OP'"), (row.assign(id=[[1]]), "key 'id'")):
        with pytest.raises(ValueError, match=why): fs.write("t" if why[0] == "t" else "new", frame, "id", "t")
    twice = [datetime(2024, 10, 27, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin")) for fold in (0, 1)]
    fs.write("fold", pd.DataFrame({"id": 1, "t": twice}), "id", "t")
    assert len(fs.range("fold", None, *ALL)) == 2
    next((tmp_path/"t/_delta_log").glob("*.json")).write_text("{nonsense")
    with pytest.raises(ValueError, match="/t: the log of this table.*restore"): FeatureStore(tmp_path).range("t", None, *ALL)


def test_vintages_of_ones_own_are_read_as_written_or_refused(tmp_path, fs, pd):
    file = tmp_path/"own.csv"
    def read(*rows, header="published,series,date,value"):
        file.write_text("\n".join([header, *rows]) + "\n")
        return vintages(str(file))
    good = "2024-02-01,a,2024-01-01,1"
    for rows, why in (((), "no rows"), ((",a,2024-01-01,1", good), "'published', row 0: ''"), ((good, "2024-02-01,,2024-01-01,1"), "'series', row 1"),
                      (("01/02/2024,a,2024-01-01,1",), "'published': '01/02/2024' may be"), (("2024-02-01,a,2020,1",), "'date', row 0: '2020' is no time"),
                      (("2024-02-01,a,13/02/2024,1", "2024-02-01,a,02/13/2024,1"), "'date', row 0: '13/02/2024' is no time"), ((good.replace(",1", ",many"),), "'many")):
        with pytest.raises(ValueError, match=why) as told: read(*rows)
        assert str(file) in str(told.value)
    with pytest.warns(UserWarning, match="'published' is read as .*month"): [(known, now)] = read("13/02/2024,007,2024-01-05,1", "13/02/2024,7,2024-01-05,", "13/02/2024,NA,2024-01-05,3")
    assert known == pd.Timestamp("2024-02-13", tz="UTC") and now.series.tolist() == ["007", "7", "NA"] and now.value.fillna(-1).tolist() == [1, -1, 3]
    assert read(good)[0][1].value.tolist() == [1] and load(fs, str(file)) == 1 and fs.value("series", "a", "value", "2024-01-02T00:00Z") == 1
    with pytest.raises(ValueError, match="'published', row 0: '1706745600' is no time; write it as"): read("1706745600,a,2024-01-01,1")
