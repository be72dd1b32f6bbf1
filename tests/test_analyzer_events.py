"""The event repository under stress: many writers, kills, faults of the disk, odd clocks, foreign logs; and what a collector may cost."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opml_wb.analyzer import Counter, Event, Events, Segments, evaluate, flow, funnel, heart, import_log, signals, simulate
from opml_wb.analyzer.watch.collect import CellHook, Recorder
from opml_wb.analyzer.logs.events import EventError
from opml_wb.analyzer.foreign import open_log
from opml_wb.analyzer.report import feature_cards, write_report


def event(i=0, **other):
    return Event(**{**dict(ts=1.6e9 + i, user=f"u{i % 7}", session="s", stage="data", feature="f", kind="action", name="run"), **other})


WRITER = """
import sys
from opml_wb.analyzer import Event, Events
log, who, n, batch = Events(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for i in range(0, n, batch):
    some = [Event(ts=1.6e9 + j, user=who, session="s", stage="data", feature="f", kind="action", name="run") for j in range(i, i + batch)]
    log.add(some)
    print(i + batch, flush=True)
    if i % (20 * batch) == 0: log.add(some)     # sent twice
"""


def writer(path, who, n=20_000, batch=500):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), who, str(n), str(batch)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_four_processes_lose_and_double_nothing(tmp_path):
    "4 x 20,000 events into one file, parts of them sent twice: 80,000, each once."
    writers = [writer(tmp_path/"e.db", f"w{k}") for k in range(4)]
    for w in writers: assert w.wait(600) == 0 or w.stdout.read()
    log = Events(tmp_path/"e.db")
    assert len(log) == 80_000
    assert log.frame().groupby("user").ts.nunique().tolist() == [20_000] * 4


def test_a_killed_writer_keeps_what_was_acknowledged(tmp_path):
    "kill -9 between two batches: the file is readable, all acknowledged events are there, and others go on writing."
    w = writer(tmp_path/"e.db", "w", 1_000_000, 200)
    acknowledged = 0
    for line in w.stdout:
        acknowledged = int(line)
        if acknowledged >= 4000: break
    w.send_signal(signal.SIGKILL)
    w.wait()
    log = Events(tmp_path/"e.db")
    assert log.db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert len(log) >= acknowledged and log.add([event(user="other")]) == 1


def shell_and_hook(recorder):
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell()
    return shell, CellHook(shell, recorder, dict(user="u", session="s", stage="data", feature="cell")).register()


@pytest.mark.parametrize("fault", ["locked", "read-only", "full", "a folder"])
def test_the_cell_runs_on(tmp_path, fault):
    "A file that is locked, can't be made, is on a full disk, or is a folder: cells run, nothing is raised."
    path, holder = tmp_path/"home"/"e.db", None
    path.parent.mkdir()
    if fault == "locked":
        holder = Events(path)
        holder.db.execute("begin immediate")
    if fault == "read-only": path = Path("/proc/nowhere/e.db")
    if fault == "full": path = Path("/dev/full/e.db")
    if fault == "a folder": path.mkdir()
    recorder = Recorder(path, most=50)
    shell, hook = shell_and_hook(recorder)
    for i in range(100): assert shell.run_cell(f"x = {i}", store_history=True).success
    hook.unregister()
    assert shell.user_ns["x"] == 99
    assert not recorder.flush(.05) and recorder.lost >= 40          # bounded, and counted
    if holder:
        holder.db.execute("rollback")
        assert recorder.flush(30) and len(holder) >= 50             # what waited is written


FULL = """
import resource, signal, sys
from IPython.core.interactiveshell import InteractiveShell
from opml_wb.analyzer.watch.collect import CellHook, Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(sys.argv[1], most=300)
shell = InteractiveShell()
hook = CellHook(shell, recorder, dict(user="u" * 100, session="s", stage="data", feature="cell")).register()
shell.run_cell("x = 0", store_history=True)
assert recorder.flush(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, resource.RLIM_INFINITY))   # nothing may grow beyond: as a full disk
for i in range(1, 2000): assert shell.run_cell(f"x = {i}", store_history=True).success
assert shell.user_ns["x"] == 1999 and recorder.waiting > 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert recorder.flush(60)
shell.run_cell("x = 0", store_history=True)
assert recorder.flush(60) and not recorder.lost
"""


def test_a_disk_that_fills_while_cells_run(tmp_path):
    "Cells run on; once there is room again, what waited is written, and what was dropped is counted among the dead letters."
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path/"e.db")], env={**os.environ, "IPYTHONDIR": str(tmp_path/"ipython")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    log = Events(tmp_path/"e.db")
    assert log.db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert len(log.dead) == 1 and log.dead.n[0] > 0 and len(log) + log.dead.n[0] == 2001


def test_dead_letters_hold_no_values():
    log = Events()
    log.add([{"ts": "no time s3cret", "user": "u"}, dict(vars(event()), stage="s3cret"), dict(vars(event()), data={"env": "s3cret"}),
             dict(vars(event()), name="s3cret\n" * 9), {"s3cret": 1}])
    assert len(log) == 1 and log.dead.n.sum() == 4
    dump = "\n".join(log.db.iterdump())
    assert dump.count("s3cret") <= 1, dump       # the name of an unknown field may be told, no value


def test_forgetting_leaves_nothing(tmp_path):
    log = Events(tmp_path/"e.db")
    log.add([event(i, user="Grace Hopper" if i % 2 else "other", name="n" * 100) for i in range(2000)])
    assert log.forget("Grace Hopper") == 1000
    assert not [p for p in tmp_path.iterdir() if b"Grace" in p.read_bytes()]


def test_order_and_duplicates_change_nothing():
    "Counting in ten random parts, some sent twice to the store, gives the signals of counting once."
    frame = simulate(seed=5)[0].head(8000).assign(session="s")
    log, counter = Events(), Counter()
    order = np.random.default_rng(0).permutation(len(frame))
    kept = frame.drop_duplicates(["ts", "user", "stage", "feature", "kind", "name", "seconds"])
    for part in np.array_split(order, 10):
        rows = [Event(**r) for r in frame.iloc[part].to_dict("records")]
        log.add(rows + rows[:50])
        counter.update(log)
    def table(s): return s.sort_values(list(s.columns[:6])).reset_index(drop=True)
    a, b = table(counter.signals()), table(signals(kept))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


@pytest.mark.parametrize("iso, week, month", [
    ("2021-01-03T23:59:59Z", "2020-W53", "2021-01"), ("2021-01-04T00:00:00Z", "2021-W01", "2021-01"),
    ("2021-03-28T03:30:00+02:00", "2021-W12", "2021-03"), ("2020-02-29T12:00:00Z", "2020-W09", "2020-02")])
def test_windows_are_utc(iso, week, month):
    s = signals([event(ts=pd.Timestamp(iso).timestamp(), kind="error", name="E")])
    assert set(s.window) == {"all", week, month}


@pytest.mark.parametrize("bad, said", [(dict(stage="trainig"), "training"), (dict(kind="eror"), "error"), (dict(ts=1.6e12), "1971 and 2200")])
def test_what_is_no_event_is_named(bad, said):
    log = Events()
    assert log.add([vars(event()) | bad]) == 0 and said in log.dead.reason[0]
    if "ts" not in bad:
        with pytest.raises(EventError, match="row 1"): signals(pd.DataFrame([vars(event()) | bad]))


MAPPING = {"user": "who", "ts": "at", "feature": "what", "name": "did", "kind": {"column": "ok", "values": {"true": "action", "false": "error"}}}


@pytest.mark.parametrize("at", ["2020-01-06T08:00:00Z", "2020-01-06 08:00:00", "2020-01-06T10:00:00+02:00", "1578297600", "1578297600000", "1578297600000000"])
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_a_strangers_csv(tmp_path, at, sep):
    "Texts with and without a zone, the epoch in s, ms and us; other separators; a mark at the beginning; a row twice; numbers as users, `NA` as a name."
    rows = ["who,at,what,did,ok", f"12,{at},NA,null,true", f"12,{at},NA,null,true", f"13,{at},fit,run,false"]
    (tmp_path/"log.csv").write_text("\ufeff" + "\n".join(rows).replace(",", sep), encoding="utf-8")
    found = import_log(tmp_path/"log.csv", MAPPING)
    assert found.ts.tolist() == [1578297600.0] * 2 and found.user.tolist() == ["12", "13"] and found.attrs["duplicates"] == 1
    assert found["name"].tolist() == ["null", "run"] and found.kind.tolist() == ["action", "error"]


def test_a_strangers_json(tmp_path):
    "Nested fields, truth values, whole numbers as users, rows below one key."
    rows = [{"who": {"id": 7}, "at": 1578297600123, "what": "fit", "did": "run", "ok": True}, {"who": {"id": 8}, "at": "2020-01-06T08:00:00Z", "what": "fit", "did": "run", "ok": False}]
    how = {**MAPPING, "user": "who.id"}
    for name, text in (("a.json", json.dumps(rows)), ("b.json", json.dumps({"events": rows})), ("c.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path/name).write_text(text)
        found = import_log(tmp_path/name, how)
        assert found.user.tolist() == ["7", "8"] and found.ts.tolist() == [1578297600.123, 1578297600.0] and found.kind.tolist() == ["action", "error"]
    with pytest.raises(EventError, match="who.id"): import_log(tmp_path/"a.json", {**how, "user": "who"})


def test_local_time(tmp_path):
    "Winter and summer time, the hour that comes twice, the hour that never comes."
    times = ["2020-01-06 09:00", "2020-07-06 10:00", "2020-10-25 02:30", "2020-03-29 02:30"]
    (tmp_path/"log.csv").write_text("who,at,what,did,ok\n" + "".join(f"a,{t},f,run,true\n" for t in times))
    found = import_log(tmp_path/"log.csv", {**MAPPING, "read": {"zone": "Europe/Berlin"}})
    assert pd.to_datetime(found.ts, unit="s").dt.strftime("%m-%d %H:%M").tolist() == ["01-06 08:00", "07-06 08:00", "10-25 00:30", "03-29 01:00"]


@pytest.mark.parametrize("row, said", [("a,06.01.2020,f,run,true", "row 2, column 'at'"), ("a,,f,run,true", "row 2, column 'at'"), (",1578297600,f,run,true", "row 2, column 'who'"),
                                       ("a,1578297600,f,run,perhaps", "row 2, column 'ok'"), ("a,12,f,run,true", "row 2, column 'at'"), ("a,1578297600,f,,true", "row 2, column 'did'")])
def test_a_malformed_row_is_named(tmp_path, row, said):
    (tmp_path/"log.csv").write_text(f"who,at,what,did,ok\na,1578297600,f,run,true\n{row}\n")
    with pytest.raises(EventError, match=said): import_log(tmp_path/"log.csv", MAPPING)


def test_tables_of_other_makes(tmp_path):
    "A frame with times as texts or datetimes, Parquet with timestamps and `action` for `name`: the same signals; milliseconds and other columns are refused."
    frame = pd.DataFrame([vars(event(i)) for i in range(300)])[["ts", "user", "stage", "feature", "kind", "name", "seconds"]].astype({"seconds": float})
    at = pd.to_datetime(frame.ts, unit="s", utc=True)
    def table(s): return s.sort_values(list(s.columns[:6])).reset_index(drop=True)
    want = table(signals(frame))
    frame.assign(ts=at.dt.as_unit("us")).rename(columns={"name": "action"}).to_parquet(tmp_path/"e.parquet")
    for other in (frame.assign(ts=at), frame.assign(ts=at.astype(str)), tmp_path/"e.parquet"):
        pd.testing.assert_frame_equal(table(signals(other)), want, check_dtype=False)
    with pytest.raises(EventError, match="milliseconds"): signals(frame.assign(ts=frame.ts * 1000))
    frame.assign(ts=frame.ts * 1000).to_parquet(tmp_path/"ms.parquet")
    with pytest.raises(EventError, match="UTC seconds"): signals(tmp_path/"ms.parquet")
    frame.drop(columns="user").to_parquet(tmp_path/"no.parquet")
    with pytest.raises(EventError, match="columns missing: user"): signals(tmp_path/"no.parquet")
    with pytest.raises(EventError, match="row 1: ts 'soon'"): signals(frame.assign(ts="soon"))


def test_parquet_says_what_a_frame_says(tmp_path):
    "Groups in which only some events have seconds, `NaN` for none, no such column; a log from a date on; cards of features."
    rng, n = np.random.default_rng(0), 3000
    frame = pd.DataFrame({"ts": 1.58e9 + rng.uniform(0, 9e6, n), "user": rng.choice(list("abcdefgh"), n), "stage": "data", "feature": rng.choice(["x", "y"], n),
                          "kind": rng.choice(["action", "error"], n), "name": rng.choice(["p", "q"], n), "seconds": np.where(rng.random(n) < .5, np.nan, rng.random(n) * 10)})
    frame.loc[::7, "seconds"] = 0.
    frame.to_parquet(tmp_path/"null.parquet")
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).set_column(6, "seconds", pa.array(frame.seconds.to_numpy(), from_pandas=False)), tmp_path/"nan.parquet")
    def table(s): return s.sort_values(list(s.columns[:6])).reset_index(drop=True)
    for since in (None, 1.584e9):
        want = table(signals(frame, since=since))
        for name in ("null", "nan"): pd.testing.assert_frame_equal(table(signals(tmp_path/f"{name}.parquet", since=since)), want, check_dtype=False)
    cards, kept = feature_cards(frame), feature_cards(tmp_path/"nan.parquet")
    pd.testing.assert_frame_equal(cards.drop(columns="seconds"), kept.loc[cards.index].drop(columns="seconds"), check_dtype=False)
    assert np.allclose(cards.seconds, kept.seconds[cards.index], rtol=.1)
    frame.drop(columns="seconds").to_parquet(tmp_path/"none.parquet")
    assert not (signals(tmp_path/"none.parquet").cls == "time").any() and feature_cards(tmp_path/"none.parquet").seconds.isna().all()


def test_an_own_csv_keeps_its_users_and_names_what_is_empty(tmp_path):
    "A user called NA is one, `NA` seconds are none; an empty user is named by its row, milliseconds by their value."
    frame = pd.DataFrame([vars(event(i)) for i in range(40)])[["ts", "user", "stage", "feature", "kind", "name"]].assign(seconds="NA")
    frame.replace({"user": {"u0": "NA"}, "name": {"run": "null"}}).to_csv(tmp_path/"own.csv", index=False)
    s = signals(open_log(str(tmp_path/"own.csv")).events)
    assert set(s.user) == {"NA", *(f"u{i}" for i in range(1, 7))} and not (s.cls == "time").any()
    frame.replace({"user": {"u0": ""}}).to_csv(tmp_path/"own.csv", index=False)
    with pytest.raises(EventError, match="row 1: user is empty"): open_log(str(tmp_path/"own.csv"))
    frame.assign(seconds=1.).replace({"user": {"u0": None}}).to_parquet(tmp_path/"own.parquet")
    with pytest.raises(EventError, match="user: empty"): signals(tmp_path/"own.parquet")
    with pytest.raises(EventError, match="row 1: ts '1600000000000"): signals(frame.assign(ts=frame.ts * 1000, seconds=1.))


def test_a_report_by_the_command(tmp_path):
    "A log without durations, in CSV and Parquet, is judged and says by what; repeated rows are told; what is no log is named, and not touched."
    from click.testing import CliRunner

    from opml_wb.analyzer.commands import analyzer
    def told(*args): return CliRunner().invoke(analyzer, ["report", *map(str, args)])
    events, *_ = simulate(seed=1)
    rows = pd.DataFrame({"who": events.user, "at": pd.to_datetime(events.ts, unit="s").astype(str), "what": events.feature, "did": events.name, "stage": events.stage,
                         "kind": events.kind})
    rows = pd.concat([rows, rows.head(100)])
    (tmp_path/"map.toml").write_text('user = "who"\nts = "at"\nfeature = "what"\nname = "did"\nstage = "stage"\nkind = "kind"\n')
    rows.to_csv(tmp_path/"usage.csv", index=False)
    rows.to_parquet(tmp_path/"usage.parquet")
    for name in ("usage.csv", "usage.parquet"):
        r = told("--log", tmp_path/name, "--mapping", tmp_path/"map.toml")
        assert r.exit_code == 0 and "(by actions and errors)" in r.output and "rows that repeat another" in r.output, r.output
    with sqlite3.connect(tmp_path/"mlflow.db") as db: db.execute("create table runs(id int)")
    db.close()
    before = (tmp_path/"mlflow.db").read_bytes()
    (tmp_path/"junk.db").write_bytes(b"junk " * 1000)
    (tmp_path/"usage.txt").write_text("who at")
    for name in ("mlflow.db", "junk.db", "usage.txt"):
        r = told("--log", tmp_path/name)
        assert r.exit_code == 1 and name in r.output and "Traceback" not in r.output, r.output
    assert (tmp_path/"mlflow.db").read_bytes() == before and len(list(tmp_path.glob("mlflow*"))) == 1


def test_one_counter_reads_two_stores(tmp_path):
    count = Counter()
    for name in "ab":
        log = Events(tmp_path/f"{name}.db")
        log.add([event(i, user=name) for i in range(10)])
        for _ in range(2): count.update(log)
    assert count.signals().query("window == 'all'").value.sum() == 20


def test_empty_and_lonely_logs():
    "No event, one user, one week: a reason or an empty table from each view, no traceback."
    none = pd.DataFrame(columns=["ts", "user", "stage", "feature", "kind", "name", "seconds"])
    lonely = pd.DataFrame([vars(event(i, user="a")) for i in range(40)])
    for log in (none, lonely):
        assert Segments.fit(signals(log)).refused and not len(evaluate(signals(log), Segments.fit(signals(log))))
        assert "no segments" in write_report(log) and len(heart(log)) == int(log is lonely)
        assert not flow(log).share.notna().any() and not funnel(log, ["run", "gone"]).share.notna().any()


def test_odd_logs_are_refused_or_judged():
    "One user, equal users, zero seconds, users with errors only: a reason, or finite numbers."
    one = signals([event(i) for i in range(5)])
    assert "at least" in Segments.fit(one).refused
    many = pd.DataFrame([vars(event(i, user=f"u{i % 100}", seconds=0.)) for i in range(3000)])
    assert "alike" in Segments.fit(signals(many)).refused
    errors = many.assign(kind="error", name="E")
    assert Segments.fit(signals(errors)).refused and not len(evaluate(signals(errors), Segments.fit(signals(errors))))


def test_eighty_thousand_events_in_seconds_of_cpu():
    "From events to verdicts, in a process of its own with one thread: about 1 s of CPU on an idle core, and twice the bar on a busy one."
    code = """
        import time
        from opml_wb.analyzer import signals, Segments, evaluate
        from opml_wb.analyzer.foreign import open_log
        events = open_log("planted").events
        evaluate(signals(events.head(2000)), signals(events.head(2000)).drop_duplicates("user").set_index("user").stage.map(lambda s: "Expert"))
        Segments.fit(signals(events.head(9000)))
        began = time.process_time()
        s = signals(events)
        assert evaluate(s, Segments.fit(s)).challenge.notna().sum() == 23
        print(time.process_time() - began)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    cpu = float(subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=True).stdout)
    assert cpu < 4, cpu


@pytest.mark.slow
def test_ten_million_events_in_bounded_memory(tmp_path):
    "A folder of Parquet files, counted by DuckDB with a limit of 512 MB; the process stays below 1.5 GB."
    write = """
        import sys
        from pathlib import Path
        from opml_wb.analyzer import simulate
        folder = Path(sys.argv[1]); base = simulate(seed=1)[0]; n = 0; k = 0
        while n < 10_000_000:
            part = base.assign(ts=base.ts + k)
            part.to_parquet(folder/f"{k:03}.parquet"); n += len(part); k += 1
        print(n)"""
    count = """
        import sys
        from pathlib import Path
        from opml_wb.analyzer.counting import counted_parquet
        assert counted_parquet(Path(sys.argv[1]), memory="512MB").n.sum() == int(sys.argv[2])
        # of this program alone: ru_maxrss may be what the process had that started it
        print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)"""
    def ran(code, *args): return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True)
    written = ran(write, str(tmp_path))
    assert written.returncode == 0, written.stderr[-2000:]
    done = ran(count, str(tmp_path), written.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 1500


def test_a_database_of_a_broken_process_is_read(tmp_path):
    "A reader sees a consistent state while a writer is in the middle of a transaction."
    log = Events(tmp_path/"e.db")
    log.add([event()])
    other = sqlite3.connect(tmp_path/"e.db")
    other.execute("begin immediate")
    other.execute("insert into event select null, randomblob(12), ts, user, session, stage, feature, kind, name, seconds, source, data from event")
    assert len(Events(tmp_path/"e.db").frame()) == 1
    other.rollback()


def test_nothing_is_made_while_off(tmp_path):
    "A run and a command with telemetry off leave no file of it."
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("OPML_")}, "OPML_HOME": str(tmp_path/"home"), "IPYTHONDIR": str(tmp_path/"ipython")}
    assert subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "ls"], env=env, capture_output=True).returncode == 0
    assert not list(tmp_path.rglob("*telemetry*"))
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "telemetry", "show"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "opml telemetry on" in done.stderr


def test_the_hook_costs_little():
    "The hook itself takes less than an empty cell does, both in the same process (a bench gives the ratio)."
    shell, hook = shell_and_hook(Recorder(Events()))
    hook.unregister()
    def each(n=60):
        took = []
        for _ in range(n):
            t = time.perf_counter()
            shell.run_cell("pass", store_history=True)
            took.append(time.perf_counter() - t)
        return np.median(took)
    each()
    info = type("R", (), {"info": type("I", (), {"silent": False, "store_history": True})(), "error_in_exec": None, "error_before_exec": None})()
    cell, t = each(), time.perf_counter()
    for _ in range(200): hook.before(None); hook.after(info)
    own = (time.perf_counter() - t) / 200
    assert own < cell, (own, cell)
