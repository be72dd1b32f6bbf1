"""Eligibility against slow references on random logs, against real logs where they are, in parts, and against what users do wrong."""
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache

import pytest

FIELDS = ["n", "at", "a", "b", "c", "empty", "closed"]


@pytest.fixture(scope="module", autouse=True)
def imports():
    "Import numpy, pandas and the package's exports as names of this module when the first test runs, not when it is collected."
    import numpy
    import pandas

    from opml_wb import eligibility
    from opml_wb.core.record import data
    from opml_wb.eligibility.sampling import deal
    globals().update({n: getattr(eligibility, n) for n in eligibility.__all__}, np=numpy, pd=pandas, data=data, deal=deal)


def wide(df, time=None, **options): return AuditLog.from_wide(df, "case", "n", time, **options)


def random_log(seed):
    "A small wide log with nulls of all sorts, clears, ties in order, an all-null field, one-row cases, and dates; rows shuffled."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, rng.integers(1, 12))
    n = sizes.sum()
    blank = np.array([None, np.nan, "?", "", "x", "y", "z"], object)
    df = pd.DataFrame({"case": np.repeat([f"k{i}" for i in range(len(sizes))], sizes),
                       "n": np.concatenate([np.sort(rng.integers(0, 4, s)) for s in sizes]),
                       "a": rng.choice(blank, n), "b": rng.choice(np.array([1., 2., np.nan]), n), "c": rng.choice(["p", "q"], n),
                       "empty": rng.choice(blank[:4], n)})
    start = rng.integers(0, 20, len(sizes))
    hours = np.repeat(start, sizes) + np.concatenate([np.cumsum(rng.integers(0, 3, s)) for s in sizes])
    df["at"] = (pd.Timestamp("2020-01-01") + pd.to_timedelta(hours, unit="h")).strftime("%d/%m/%Y %H:%M")
    closed = (pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 40, n), unit="h")).strftime("%d/%m/%Y %H:%M")
    df["closed"] = np.where(rng.random(n) < .3, "?", closed)
    df["id"] = rng.permutation(n)                                # keeps rows from being equal
    return df.sample(frac=1, random_state=seed).reset_index(drop=True)


def read(df): return wide(df, "at", dates=dict.fromkeys(("at", "closed"), "%d/%m/%Y %H:%M"))


def cases_of(df):
    "Each case's rows, in order, null where null: the reference's only view of the log."
    out = {}
    for row in df.to_dict("records"):
        out.setdefault(row["case"], []).append({k: None if v in ("?", "") or pd.isna(v) else v for k, v in row.items()})
    ordered = (sorted(rows, key=lambda row: row["n"]) for rows in out.values())
    return [{f: [row[f] for row in rows] for f in df} for rows in ordered]


@cache
def moment(text): return datetime.strptime(text, "%d/%m/%Y %H:%M")


def point(rows, at):
    "Row of the case at e, or None."
    if at == "start": return 0
    if isinstance(at, int): return at if at < len(rows["n"]) else None
    if isinstance(at, tuple): return next((i for i, v in enumerate(rows[at[0]]) if v == at[1]), None)
    times = [moment(t) for t in rows["at"]]
    if max(times) < times[0] + at: return None
    return max(i for i, t in enumerate(times) if t <= times[0] + at)


def reference(cases, at):
    "null_rate, n_filled, change_rate, future_rate by field, one value at a time."
    out = {}
    kept = [(rows, e) for rows in cases if (e := point(rows, at)) is not None]
    for f in [c for c in cases[0] if c != "case"]:
        null = filled = changed = dated = future = 0
        for rows, e in kept:
            values = rows[f]
            null += values[e] is None
            there = [v for v in values if v is not None]
            if there: filled, changed = filled + 1, changed + (values[-1] != there[0])
            if f in ("at", "closed"):
                if values[e] is not None: dated, future = dated + 1, future + (moment(values[e]) > moment(rows["at"][e]))
        div = lambda a, b: a / b if b else np.nan  # noqa: E731
        out[f] = (div(null, len(kept)), filled, div(changed, filled), div(future, dated))
    return pd.DataFrame.from_dict(out, orient="index", columns=["null_rate", "n_filled", "change_rate", "future_rate"])


@pytest.mark.parametrize("block", range(10))
def test_scan_equals_a_slow_reference(block):
    for seed in range(block * 20, block * 20 + 20):
        df = random_log(seed)
        log, cases = read(df), cases_of(df)
        assert log.issues["ties"] == df.duplicated(["case", "n"]).sum()
        for at in ("start", 1, 3, timedelta(hours=2), ("c", df.c[0])):
            got, want = scan(log, at).frame(), reference(cases, at)
            pd.testing.assert_frame_equal(got, want.loc[got.index], check_names=False, check_exact=True, obj=f"seed {seed}, at {at}")


def test_pairs_equal_a_slow_reference():
    for seed in range(60):
        df = random_log(seed)
        got, cases = {(row.feature, row.label): row for row in pairs(read(df)).itertuples()}, cases_of(df)
        fill = {f: [next((i for i, v in enumerate(rows[f]) if v is not None), None) for rows in cases] for f in FIELDS}
        for f in FIELDS:
            for l in FIELDS:
                if f == l: continue
                both = [(a, b) for a, b in zip(fill[f], fill[l]) if b is not None]
                row = got[f, l]
                assert row.n == len(both)
                if not both: assert row.verdict == "undetermined"; continue
                first, tie = sum(a is not None and a < b for a, b in both), sum(a == b for a, b in both)
                assert (row.first, row.tie) == (first / len(both), tie / len(both)), (seed, f, l)
                assert row.first + row.tie + row.last == pytest.approx(1)


def test_parts_add_up_exactly():
    for seed in range(12):
        df = random_log(seed)
        names = df.case.unique()
        parts = [df[df.case.isin(p)] for p in np.array_split(np.random.default_rng(seed).permutation(names), min(3, len(names)))]
        for at in ("start", 1, timedelta(hours=1)):
            whole, merged = scan(read(df), at), scan_parts(parts, read, at)
            for name in ("days", "cases", "left_out", "counts"): assert (getattr(whole, name) == getattr(merged, name)).all(), name
            pd.testing.assert_frame_equal(verdicts(whole)[["verdict", "lo", "hi"]], verdicts(merged)[["verdict", "lo", "hi"]])


def read_part(path): return AuditLog.from_parquet(path, "number", **{k: v for k, v in simulate(1).options.items() if k != "case"})


def test_duckdb_cuts_and_other_processes_scan(tmp_path):
    "A log on disk, cut by a hash of the case, its parts scanned by Dask's workers, the sums equal."
    duckdb = pytest.importorskip("duckdb", reason="needs the extra [peers]")
    distributed = pytest.importorskip("distributed")
    process = simulate(300)
    process.df.to_parquet(tmp_path/"log.parquet")
    query = f"SELECT *, hash(number) % 4 AS part FROM '{tmp_path}/log.parquet'"
    duckdb.sql(f"COPY ({query}) TO '{tmp_path}/parts' (FORMAT parquet, PARTITION_BY (part))")
    parts = sorted(map(str, (tmp_path/"parts").rglob("*.parquet")))
    assert len(parts) == 4
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        got = scan_parts(parts, read_part, map=lambda f, xs: client.gather(client.map(f, xs, pure=False)))
    pd.testing.assert_frame_equal(got.frame(), scan(process.log).frame())


def test_a_delta_log_equals_a_hand_forward_fill():
    for seed in range(50):
        wide = random_log(seed).sort_values(["case", "n"], kind="stable").drop(columns=["closed", "id"])
        wide["at"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(len(wide)), unit="h")
        wide["n"] = np.arange(len(wide))
        filled = wide.copy()
        for f in ("a", "b", "c", "empty"):
            held, out = {}, []
            for case, v in zip(wide["case"], wide[f]):
                if not (pd.isna(v) or v == ""): held[case] = v
                out.append(None if held.get(case) == "?" else held.get(case))
            filled[f] = pd.Series(out, filled.index, object)
        got, want = AuditLog.from_delta(wide, case="case", time="at"), AuditLog.from_wide(filled, case="case", order="n", time="at")
        pd.testing.assert_frame_equal(scan(got).frame(), scan(want).frame())
        pd.testing.assert_frame_equal(scan(got, 2).frame(), scan(want, 2).frame())


def test_what_is_planted_is_found_at_other_points_too():
    process = simulate(1500, seed=5)
    log = process.log
    assert (verdicts(log).verdict == process.verdicts[log.fields]).all()
    active = verdicts(scan(log, ("state", "Active"))).verdict
    assert active["assigned_to"] == active["assignment_group"] == "ok"            # filled by then, and rarely changed after
    assert active["resolved_at"] == active["close_code"] == "backfill" and active["workaround"] == "ineligible"
    assert scan(log, ("state", "Closed")).frame().null_rate["duration_h"] == 0
    matrix = eligibility_matrix(log, ("state", "Active"))
    assert matrix.loc["assignment_group", "assigned_to"] == "ok" and matrix.loc["assigned_to", "assignment_group"] == "inverse"


def test_back_fill_is_told_from_a_plan_and_from_a_clock_that_differs():
    process = simulate(800, seed=2)
    v = verdicts(AuditLog.from_wide(process.df, **{**process.options, "planned": (), "by_time": {}}))
    assert set(v.index[v.verdict == "backfill"]) == {"due_at", "resolved_at"}          # undeclared, a plan looks like the future
    wrong = process.df.copy()
    some = wrong.sample(frac=.01, random_state=0).index
    wrong.loc[some, "opened_at"] = "2031-01-01"
    v = verdicts(AuditLog.from_wide(wrong, **process.options))
    assert 0 < v.future_rate["opened_at"] < .02 and v.verdict["opened_at"] != "backfill"


def test_littles_law_against_a_simulated_queue():
    simpy = pytest.importorskip("simpy")
    rng, env, there, seen, waits = np.random.default_rng(1), None, 0, [], []
    env = simpy.Environment()

    def case():
        nonlocal there
        there += 1
        waits.append(wait := rng.lognormal(1, 1))
        yield env.timeout(wait)
        there -= 1

    def arrivals():
        while True:
            yield env.timeout(rng.exponential(1 / 8))
            env.process(case())

    def watch():
        yield env.timeout(100)
        while True:
            seen.append(there)
            yield env.timeout(1)
    env.process(arrivals()), env.process(watch())
    env.run(2000)
    n, lo, hi = expected_new(8, waits)
    assert n == pytest.approx(np.mean(seen), rel=.1)
    assert np.mean([lo <= s <= hi for s in seen]) > .88


def test_a_heavy_tail_is_warned_of():
    with pytest.warns(UserWarning, match="heavy tail"): expected_new(1, np.random.default_rng(0).pareto(1.05, 2000))


def test_big_and_odd_columns(tmp_path):
    "An identifier of 100,000 levels, a constant, one column of `?`, numbers with gaps."
    n = 100_000
    df = pd.DataFrame({"case": np.arange(n), "n": 0, "key": [f"id-{i}" for i in range(n)], "same": "x", "nothing": "?",
                       "number": np.arange(n) * 1_000_003, "kind": np.arange(n) % 3})
    v = verdicts(wide(df))
    assert v.verdict.to_dict() == {"n": "ineligible", "key": "ineligible", "same": "ineligible", "nothing": "ineligible",
                                   "number": "ineligible", "kind": "ok"}
    assert "identifier" in v.reason["key"] and "identifier" in v.reason["number"] and "constant" in v.reason["same"] and "null" in v.reason["nothing"]


@pytest.mark.parametrize("change, says", [
    (lambda d: d.iloc[:0], "empty"), (lambda d: pd.concat([d, d[:1]]), "equal in every field"),
    (lambda d: d.assign(at="31/31/2020 00:00"), "'at': '31/31/2020 00:00'"),
    (lambda d: d.drop(columns="case"), "no column 'case'"), (lambda d: d.assign(case=None), "'case': row 0"),
    (lambda d: d.assign(a=[["list"]] * len(d)), "field 'a'"),
    (lambda d: d.assign(n=None), "'n'")], ids=["empty", "copies", "dates", "no case", "null case", "lists", "no order"])
def test_bad_logs_are_refused_by_name(change, says):
    df = random_log(0)
    with pytest.raises(ValueError, match=says.replace("(", r"\(")): read(change(df))


@cache
def real(name):
    "A published log, read once; the test is skipped where it is not at hand."
    if data.find(f"eligibility/{name}") is None:
        pytest.skip(f"eligibility/{name} isn't here: opml data fetch eligibility/{name}, or OPML_DATA")
    return load(name)


def servicenow(): return real("servicenow_part1")


def test_the_real_log_proves_back_fill_in_two_dates_only():
    log = servicenow()
    bare = AuditLog(log.fields, log.codes, log.levels, log.starts, log.cases, log.time, log.dates)          # without by_time
    v = verdicts(bare)
    assert set(v.index[v.verdict == "backfill"]) == {"resolved_at", "closed_at"}
    first = log.starts[:-1]                                        # judged where it is asked: in the first rows
    when, there = log.dates["resolved_at"][log.codes[log.at("resolved_at"), first]], log.codes[log.at("resolved_at"), first] > 0
    assert v.future_rate["resolved_at"] == pytest.approx((when > log.time[first])[there].mean()) and v.future_rate["resolved_at"] > .97
    assert 0 < v.future_rate["opened_at"] < 1e-3 and v.verdict["opened_at"] == "ok"
    named = verdicts(log).verdict
    assert set(named.index[named == "backfill"]) == {"resolved_at", "closed_at", "resolved_by", "closed_code"}
    assert not (verdicts(masked(log)).verdict == "backfill").any()
    for half in (log.take(np.arange(log.n_cases // 2)), log.take(np.arange(log.n_cases // 2, log.n_cases))):
        w = verdicts(half).verdict
        assert set(w.index[w == "backfill"]) == set(named.index[named == "backfill"])


def test_the_real_logs_group_comes_before_the_person():
    found = pairs(servicenow()).set_index(["feature", "label"])
    before, after = found.loc[("assignment_group", "assigned_to")], found.loc[("assigned_to", "assignment_group")]
    assert before["first"] > .15 and before["last"] < .05 and .7 < before.tie < .8
    assert before.verdict == "ok" and after.verdict == "inverse"


def test_few_records_of_the_real_log_tell_what_all_of_it_does():
    log = masked(servicenow())
    f = scan(log).frame()
    full = np.where((f.null_rate.fillna(0) > .2) | (f.change_rate.fillna(0) > .2), "ineligible", "ok")
    agree, read = [], []
    for seed in range(20):
        cases, found = read_samples(log, seed=seed, budget=600)
        agree.append((found.verdict == full).mean())
        read.append(len(cases) / log.n_cases)
    assert np.mean(agree) >= .95 and np.mean(read) <= .01
    row = sample(log, runs=10)
    assert 11 < row.null_start < 14 and 8 < row.end_bias < 11
    assert row.ineligible <= row.null_start + row.end_bias and row.rows_read < .01 * len(log)


def test_the_real_log_in_snapshots():
    log = servicenow()
    middle = "2016-03-18 12:00"
    young = snapshot(log, middle)
    assert 0 < len(young) < len(snapshot(log, middle, delay=timedelta(minutes=5))) < len(snapshot(log, middle, delay=10_000))
    assert (young.sys_updated_at == log.frame(log.starts[:-1]).loc[young.index].sys_updated_at).all()


@pytest.mark.slow
def test_the_real_logs_snapshot_model_collapses_in_production():
    found = useful(servicenow(), "closed_code", seeds=5)
    assert found.attrs["loss"][1] > 0 and set(found.arm) >= {"snapshot", "production", "eligible", "majority"}
    assert found.attrs["answer"] == "no useful label"
    from opml_wb.eligibility.plots import REAL                     # what the chapter shows as stored
    scores = summary(found).score
    assert {arm: scores[arm] for arm in ("snapshot", "production", "eligible", "majority")} == pytest.approx(
        {arm: REAL[arm] for arm in ("snapshot", "production", "eligible", "majority")}, abs=.02)
    assert found.attrs["loss"] == pytest.approx(REAL["loss"], abs=.03) and found.attrs["gain"] == pytest.approx(REAL["gain"], abs=.03)


def test_a_real_xes_log():
    log = real("bpic2013")
    assert (len(log), log.n_cases) == (65_533, 7_554) and log.issues["no time"] == 0
    assert (pairs(log).verdict == "undetermined").all()            # every event writes every field
    assert verdicts(log).verdict["impact"] == "ok" and verdicts(log).verdict["org:group"] == "ineligible"


@pytest.mark.slow
def test_the_chapter_under_stock_papermill(tmp_path):
    pm = pytest.importorskip("papermill")
    from conftest import ROOT
    from opml_wb.core.record import log as record
    pm.execute_notebook(str(ROOT/"nbs"/"chapters"/"03_eligibility.ipynb"), str(tmp_path/"out.ipynb"),
                        parameters=dict(cases=600, runs=3, label_seeds=1), progress_bar=False, cwd=str(tmp_path))
    kept = record.read(tmp_path/"out.ipynb")
    assert kept["metrics"]["production_loss"] > .1 and len(kept["claims"]) > 20


def small(**columns):
    "Three cases of two, two and one rows, with what is to be tried."
    return pd.DataFrame({"case": ["a", "a", "b", "b", "c"], "n": [0, 1, 0, 1, 0], "at": pd.date_range("2020-01-01", periods=5),
                         "x": ["p", "q", "p", None, "?"]} | columns)


def test_columns_of_every_dtype_are_read_alike():
    df = small(flag=[True, False, True, True, False], rate=[1.5, 2.5, 1.5, 1.5, 2.5], big=[1, 10**9, 5, 5, 1])
    want = scan(wide(df, "at")).frame()
    for other in (df.convert_dtypes(), df.convert_dtypes(dtype_backend="pyarrow"),
                  df.astype({"big": pd.SparseDtype(int), "flag": "category"}),
                  df.set_index(pd.Index([9, 9, 3, 3, 1]))):
        pd.testing.assert_frame_equal(scan(wide(other, "at")).frame(), want)


def test_names_need_not_be_texts():
    df = small().set_axis(range(4), axis=1)
    log = AuditLog.from_wide(df, 0, 1, 2, by_time={3: 2}, planned=2)
    assert (log.by_time, log.planned) == ({3: 2}, (2,)) and scan(log, (3, "q")).n == 1
    assert log.join(pd.DataFrame({0: ["p", "q"], 1: [1, 2]}), on=3, key=0).fields[-1] == "3.1"
    with pytest.raises(ValueError, match="no column 7"): AuditLog.from_wide(df, 0, 7)


def test_ordered_categories_order_rows():
    stage = pd.Categorical(["open", "done", "done", "open", "open"], ["open", "done"], ordered=True)
    log = AuditLog.from_wide(small(stage=stage), "case", "stage")
    assert log.values("stage").tolist() == ["open", "done"] * 2 + ["open"] and "order 'stage' is text" not in log.issues


def test_one_null_value_is_no_list_of_letters():
    log = wide(small(x=["NA", "N", "A", "NA", "p"]), null="NA")
    assert log.values("x").isna().tolist() == [True, False, False, True, False]
    never = pd.Timestamp("2020-01-05")
    assert scan(wide(small(), null=("?", never))).frame().null_rate["at"] == pytest.approx(1 / 3)


def test_a_row_without_time_does_not_run_backwards():
    df = small()
    df.loc[2, "at"] = pd.NaT
    assert wide(df, "at", ended=True).issues == {"ties": 0, "time runs backwards": 0, "no time": 1}
    df.loc[1, "at"] = pd.Timestamp("2019-01-01")
    assert wide(df, "at").issues["time runs backwards"] == 1


def test_cases_without_a_key_and_a_present_table_with_copies_are_refused_in_delta_logs():
    df = pd.DataFrame({"case": ["a", ""], "at": pd.date_range("2020", periods=2), "f": "s", "new": ["1", "2"]})
    for more in ({}, dict(field="f", new="new")):
        with pytest.raises(ValueError, match="case 'case': row 1"): AuditLog.from_delta(df, "case", "at", **more)
    with pytest.raises(ValueError, match="'a' is there twice"):
        AuditLog.from_delta(df[:1], "case", "at", field="f", new="new", current=pd.DataFrame({"case": ["a", "a"], "s": "1"}))
    with pytest.raises(ValueError, match="row 1 names none"):
        AuditLog.from_delta(df.assign(case="a", f=["s", ""]), "case", "at", field="f", new="new")
    assert AuditLog.from_delta(df.assign(case="a", f=["NA", "s"]), "case", "at", null="NA").values("f").isna().tolist() == [True, False]


def test_part_of_a_log_is_judged_as_if_read_alone():
    n = 300
    df = pd.DataFrame({"case": np.repeat(np.arange(n), 2), "n": np.tile([0, 1], n),
                       "kind": np.repeat([f"k{i % 150}" if i >= 150 else f"x{i}" for i in range(n)], 2),
                       "site": np.repeat(np.where(np.arange(n) < 150, "A", [f"s{i % 3}" for i in range(n)]), 2),
                       "text": np.repeat([f"t{i % 120 if i < 240 else i}" for i in range(n)], 2)})
    whole = wide(df)
    for some in (np.arange(150), np.arange(140, n), np.arange(240)):
        pd.testing.assert_frame_equal(verdicts(whole.take(some)), verdicts(wide(df[df.case.isin(some)])))
    assert verdicts(whole.take(np.arange(150))).reason["site"].startswith("constant")
    assert verdicts(whole.take(np.arange(240))).verdict["text"] == "ok"


def test_one_late_value_proves_no_back_fill():
    at = pd.date_range("2020-01-01", periods=15)
    df = pd.DataFrame({"case": range(15), "n": 0, "at": at, "seen": at.where(np.arange(15) > 0, at + pd.Timedelta(days=30))})
    v = verdicts(wide(df, "at"))
    assert v.verdict["seen"] == "undetermined" and v.lo["seen"] < .05 < v.hi["seen"]
    assert verdicts(wide(df.assign(seen=at + pd.Timedelta(days=30)), "at")).verdict["seen"] == "backfill"


def test_dates_of_a_linked_table_are_compared_with_the_rows_time():
    log = wide(small(u=["v", "v", "w", "w", "v"]), "at")
    table = pd.DataFrame({"u": ["v", "w"], "last_seen": pd.to_datetime(["2021-01-01", "2021-02-01"]),
                          "ends": pd.to_datetime(["2030-01-01", "2030-01-01"])})
    v = verdicts(log.join(table, "u", planned="ends"))
    assert v.verdict["u.last_seen"] == "backfill" and v.future_rate["u.ends"] == 1 and v.verdict["u.ends"] != "backfill"


def test_a_process_is_asked_at_points_it_never_comes_to():
    log = wide(small(), "at")
    assert scan(log, 10**30).n == 0 and (verdicts(log, at=10**30).verdict == "undetermined").all()
    with pytest.raises(ValueError, match="'x' never is"): scan(log, ("x", ["p"]))
    for bad in (timedelta(minutes=-5), 5.5):
        with pytest.raises(ValueError, match="delay="): snapshot(log, "2021", delay=bad)
    with pytest.raises(ValueError, match="when='soon'"): snapshot(log, "soon")


@pytest.mark.parametrize("bad", [dict(splits=()), dict(splits=.6), dict(splits=(1.5,)), dict(cases=0), dict(classes=0)], ids=str)
def test_useful_names_a_bad_parameter(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="): useful(simulate(60).log, "priority", **bad)


def test_xes_keeps_traces_apart_and_lists_whole(tmp_path):
    event = '<event><date key="time:timestamp" value="2020-01-01T00:00:00Z"/>{}</event>'
    trace = '<trace><string key="concept:name" value="{}"/>{}</trace>'
    listed = '<list key="tags"><values><string key="first" value="red"/></values></list>'
    (tmp_path/"log.xes").write_text("<log>" + trace.format("a", event.format('<string key="case" value="z"/>' + listed) + event.format(""))
                                    + trace.format("a", event.format("")) + trace.format("a#2", event.format("")) + "</log>")
    log = AuditLog.from_xes(tmp_path/"log.xes")
    assert list(log.cases) == ["a", "a#2", "a#2#2"] and np.diff(log.starts).tolist() == [2, 1, 1] and log.issues["repeated names"] == 2
    assert log.values("event:case")[0] == "z" and log.values("tags.first")[0] == "red"


def test_parquet_columns_are_checked(tmp_path):
    small(**{"a.b": 1}).to_parquet(tmp_path/"log.parquet")
    assert AuditLog.from_parquet(tmp_path/"log.parquet", "case", "n", time="at").values("a.b").tolist() == [1] * 5
    with pytest.raises(ValueError, match="no column 'xx'"):
        AuditLog.from_parquet(tmp_path/"log.parquet", "case", "n", columns=["case", "n", "xx"])


def test_parts_tell_an_identifier_as_the_whole_does():
    "Values that are unique in each part but come again in another; and parts too small to tell."
    n = 400
    df = pd.DataFrame({"case": range(n), "n": 0, "key": [f"i{i}" for i in range(n)], "again": [f"r{i % 200}" for i in range(n)],
                       "late": [None] * 200 + [f"l{i}" for i in range(200)]})
    def read(part): return wide(df[part])
    for cuts in (2, 8):
        parts = [slice(i * n // cuts, (i + 1) * n // cuts) for i in range(cuts)]
        whole, merged = scan(read(slice(None))), scan_parts(parts, read)
        assert whole.ids.tolist() == merged.ids.tolist() == [False, True, False, True]
        pd.testing.assert_frame_equal(verdicts(whole), verdicts(merged))
        assert scan_parts(parts, read, 1).ids.tolist() == scan(read(slice(None)), 1).ids.tolist()


def test_cases_are_taken_by_mask_by_number_or_not_at_all():
    log = wide(small(), "at")
    assert log.take(np.array([True, False, True])).cases.tolist() == log.take([0, -1]).cases.tolist() == ["a", "c"]
    none = log.take([])
    assert (len(none), scan(none).n, len(snapshot(none, "2021"))) == (0, 0, 0) and (verdicts(none).verdict == "undetermined").all()
    with pytest.raises(IndexError): log.take([3])


def test_a_frame_is_no_log_and_one_masked_field_is_one_name():
    with pytest.raises(TypeError, match="AuditLog.from_wide"): verdicts(small())
    log = simulate(60).log
    assert (masked(log, "resolved_at").codes == masked(log, ["resolved_at"]).codes).all()


def backfilled_log(seed):
    "Cases whose resolution and code are written into their rows from the future; some without a date, some rows without time; a plan."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 25)
    n, case = sizes.sum(), np.repeat(np.arange(25), sizes)
    start = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.repeat(rng.integers(0, 400, 25), sizes) + np.arange(n) % 7, unit="h")
    end = pd.Series(start).groupby(case).transform("max") + pd.to_timedelta(np.repeat(rng.integers(-6, 9, 25), sizes), unit="h")
    df = pd.DataFrame({"case": case, "n": np.arange(n), "at": pd.Series(start).where(rng.random(n) > .1),
                       "done_at": end.where(rng.random(n) > .2),
                       "code": np.repeat(rng.choice(["x", "y"], 25), sizes), "state": rng.choice(["Open", "Work"], n),
                       "due": end + pd.Timedelta(days=9)})
    df.loc[rng.random(n) < .2, "code"] = None
    return df, wide(df, "at", by_time={"code": "done_at"}, planned="due")


def reaches(rows, name, value, date):
    "First row, by hand, that shows the value and can know it: dated values from their date on, undated ones when the case ends; or None."
    for i, row in enumerate(rows.itertuples(index=False)):
        if getattr(row, name) != value: continue
        when, now = getattr(row, date) if date else pd.NaT, next((t for t in rows["at"][i:] if t is not pd.NaT), pd.NaT)
        if not date or i == len(rows) - 1 and when is pd.NaT or when is not pd.NaT and (now is pd.NaT or when <= now): return i


def test_a_state_is_reached_when_it_can_be_known():
    "At a back-filled state scan, pairs, matrix and labels ask the same cases in the same rows, those of a reading by hand."
    for seed in range(10):
        df, log = backfilled_log(seed)
        cases = [rows for _, rows in df.groupby("case", sort=False)]
        for name, value, date in [("code", "x", "done_at"), ("code", "y", "done_at"), ("state", "Work", None),
                                  ("done_at", df.done_at.dropna().iloc[0], "done_at"), ("due", df.due[3], None)]:
            found = [reaches(rows, name, value, date) for rows in cases]
            want = np.array([-1 if i is None else log.starts[c] + i for c, i in enumerate(found)])
            if name == "done_at" and not (want >= 0).any(): continue
            at = (name, value)
            assert (rows_at(log, at) == want).all() and (rows_at(masked(log), at) == want).all(), (seed, at)
            s, p = counted(log, at)
            reached = [rows for rows, r in zip(cases, want) if r >= 0]
            assert s.n == len(reached)
            for f in ("state", "due"): assert p.n[log.at(f)] == sum(rows[f].notna().any() for rows in reached)
            if s.n:
                state, ends = log.codes[log.at("state")], log.last()[want >= 0]
                assert labels(log, at).open_rate["state"] == pytest.approx((state[ends] != state[want[want >= 0]]).mean())


def test_a_back_filled_state_is_no_start():
    process = simulate(400)
    rows = rows_at(process.log, ("close_code", "solved"))
    assert "close_code" in backfilled(process.log) and (rows[rows >= 0] > process.log.starts[:-1][rows >= 0]).all()
    young = snapshot(process.log, "2020-03-01", delay=("close_code", "solved"))
    assert (young.state.isin(["Resolved", "Closed"])).all() and len(young) > 0


def test_a_state_that_some_parts_never_have():
    df = small()
    def read(cases): return wide(df[df.case.isin(list(cases))], "at")
    whole, merged = scan(read("abc"), ("x", "q")), scan_parts(["a", "bc"], read, ("x", "q"))
    assert (merged.n, merged.left_out.sum()) == (whole.n, whole.left_out.sum()) == (1, 2)
    pd.testing.assert_frame_equal(merged.frame(), whole.frame())
    with pytest.raises(ValueError, match="no part 'x' ever is 'lost'"): scan_parts(["a", "bc"], read, ("x", "lost"))


def test_parts_that_share_a_case_are_refused():
    df = small()
    with pytest.raises(ValueError, match="parts 0 and 2 .* share 1 case"):
        scan_parts([[0], [4], [1, 2]], lambda rows: wide(df.iloc[rows]))


def test_identifiers_whatever_the_parts_hold():
    "An identifier by all of the log, though one part repeats its value; and none, though each part alone looks like one."
    rng = np.random.default_rng(0)
    for seed in range(30):
        n, same = 600, rng.integers(0, 60)
        key = np.array([f"k{i}" for i in range(n)], object)
        key[:same] = "k0"
        df = pd.DataFrame({"case": range(n), "n": 0, "key": key, "again": [f"r{i % 570}" for i in range(n)]})
        def read(part): return wide(df.iloc[part])
        parts = np.split(np.arange(n), np.sort(rng.choice(np.arange(1, n), 5, replace=False)))
        pd.testing.assert_frame_equal(verdicts(read(np.arange(n))), verdicts(scan_parts(parts, read)))


def bursts(seed=0):
    "Three days of 300 cases, a tenth of which change, and sixty of five, most of which do: 30 % of all."
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(63), [300] * 3 + [5] * 60)
    changes = rng.random(1200) < np.where(day < 3, .1, .9)
    at = pd.Timestamp("2020-01-01") + pd.to_timedelta(np.repeat(day, 2) * 24 + np.tile([0, 1], 1200), unit="h")
    return wide(pd.DataFrame({"case": np.repeat(range(1200), 2), "n": np.tile([0, 1], 1200), "at": at,
                                            "x": np.where(np.tile([0, 1], 1200) & np.repeat(changes, 2), "b", "a")}), "at")


def test_samples_weigh_cases_and_not_days():
    log = bursts()
    whole = scan(log).frame().change_rate["x"]
    read = [read_samples(log, seed=s)[1].change_rate["x"] for s in range(100)]
    assert np.mean(read) == pytest.approx(whole, abs=.03) and abs(np.mean(read) - .85) > .4
    times = np.zeros(log.n_cases)
    for seed in range(400):
        for group, _ in zip(deal(log, rng=seed), range(10)): times[group] += 1
    day = log.days() - log.days().min()
    assert times[day < 3].mean() == pytest.approx(times[day >= 3].mean(), rel=.1)          # each case is as likely as any other
    everything = np.concatenate(list(deal(log, rng=0)))
    assert len(set(everything)) == len(everything) == log.n_cases


def test_ten_samples_are_of_ten_days_in_all_months():
    log = simulate(1500, seed=8).log
    for seed in range(20):
        groups = [g for g, _ in zip(deal(log, rng=seed), range(10))]
        days = [set(log.days()[g]) for g in groups]
        assert len(set().union(*days)) >= 10 and all(a.isdisjoint(b) for i, a in enumerate(days) for b in days[:i])
        assert len({str(np.datetime64(int(min(d)), "D"))[:7] for d in days}) >= 4


def test_days_before_1970_and_sparse_days_are_read_too():
    at = pd.Timestamp("1969-12-20") + pd.to_timedelta(np.arange(60), unit="D")             # a case a day
    log = wide(pd.DataFrame({"case": range(60), "n": 0, "at": at, "x": "a"}), "at")
    assert sorted(np.concatenate(list(deal(log, 5, 0)))) == list(range(60))


def test_a_budget_bounds_rows_and_cases():
    log = bursts()
    for budget, most in ((24, 12), (.02, 24), (100, 50), (int(.03 * len(log)), 36)):
        for seed in range(10):
            cases, _ = read_samples(log, seed=seed, budget=budget)
            assert 0 < len(cases) <= most and len(log.take(cases)) <= (budget if budget > 1 else budget * len(log))


def test_what_independent_cases_attain_is_their_expected_agreement():
    log = bursts()
    f, rng, hit = scan(log).frame(), np.random.default_rng(0), []
    full = (f.null_rate > .2) | (f.change_rate > .2)
    for _ in range(400):
        got = scan(log.take(rng.integers(0, log.n_cases, 50))).frame()
        hit.append((((got.null_rate > .2) | (got.change_rate > .2)) == full).mean())
    assert attainable(log, 50) == pytest.approx(np.mean(hit), abs=.01)
    assert agreement(log, 10, decided=True, samples=20).mean() >= agreement(log, 10, samples=20).mean() - 1e-9


def test_keys_of_another_kind_are_told():
    log = wide(small(site=[7, 7, 8, 8, 7]), "at")
    with pytest.raises(ValueError, match="join on 'site': numbers like 7 on one side, texts like '7'"):
        log.join(pd.DataFrame({"site": ["7", "8"], "town": ["Rome", "Bari"]}), "site")
    assert log.join(pd.DataFrame({"site": [7., 9.5], "town": ["Rome", "Bari"]}),
                    "site").issues["site: no linked row"] == 2        # 7 is 7.0; 8 is only missing
    with pytest.raises(ValueError, match="current: 'case'"):
        wide(small(), current=pd.DataFrame({"case": [1, 2], "owner": "Ann"}))
    delta = pd.DataFrame({"case": [1, 2], "at": pd.date_range("2020", periods=2), "f": "s", "new": ["1", "2"]})
    with pytest.raises(ValueError, match="current: 'case'"):
        AuditLog.from_delta(delta, "case", "at", field="f", new="new", current=pd.DataFrame({"case": ["1", "2"], "s": "1"}))


def test_numbers_given_as_texts_are_refused_by_name():
    log = simulate(60).log
    for call, bad in [(verdicts, dict(th=".2")), (pairs, dict(th=".2")), (labels, dict(th=None)), (sample, dict(budget="600")),
                      (sample, dict(size="5")), (sample, dict(th="x")), (sample, dict(runs=True)),
                      (read_samples, dict(samples="10")), (agreement, dict(runs="3")), (scan, dict(jobs="2"))]:
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}="): call(log, **bad)
    with pytest.raises(ValueError, match="^seeds='5'"): useful(log, "priority", seeds="5")
    with pytest.raises(ValueError, match="^change='.3'"): simulate(60, change=".3")


def test_a_frame_is_refused_wherever_a_log_is_wanted():
    df = small()
    for call in (sample, read_samples, agreement, lambda d: snapshot(d, "2020"), lambda d: useful(d, "x"), pairs, eligibility_matrix,
                 labels, masked):
        with pytest.raises(TypeError, match="expected an AuditLog, got DataFrame"): call(df)


def test_empty_numbers_of_a_xes_log_are_null(tmp_path):
    event = ('<event><date key="time:timestamp" value="2020-01-01T00:00:0{}Z"/>'
             '<float key="cost" value="{}"/><int key="n" value="{}"/></event>')
    (tmp_path/"log.xes").write_text("<log><trace>" + event.format(0, "", "") + event.format(1, "2.5", "3") + "</trace></log>")
    log = AuditLog.from_xes(tmp_path/"log.xes")
    assert log.values("cost").isna().tolist() == log.values("n").isna().tolist() == [True, False] and log.values("cost")[1] == 2.5


def test_parquet_takes_its_arguments_as_its_siblings_do(tmp_path):
    small().to_parquet(tmp_path/"log.parquet")
    assert (AuditLog.from_parquet(tmp_path/"log.parquet", "case", "n", "at").time == wide(small(), "at").time).all()


def odd_columns(n, rng):
    "Columns of every kind of value and type that a frame can hold, with nulls."
    def pick(*values): return pd.Series([values[i] for i in rng.integers(0, len(values), n)], dtype=object)
    return {"Größe 状态 😀": pick("ä", "a\u0308", None), "": pick("x", "?", ""),
            "category": pick("a", None, "?").astype(pd.CategoricalDtype(["z", "a", "?"], ordered=True)),
            "Int64": pick(1, 2**53, 2**53 + 1, None).astype("Int64"), "UInt64": pick(2**64 - 1, 2**64 - 2, None).astype("UInt64"),
            "boolean": pick(True, None).astype("boolean"),
            "huge": pick(10**30, 10**30 + 1, None), "decimal": pick(Decimal("1.10"), Decimal("1.1"), Decimal("NaN")),
            "mixed": pick(1, "1", None), "tuple": pick((1, 2), (1, 3), None),
            "bytes": pick(b"", b"x"), "float16": pick(1.5, np.nan).astype("float16"),
            "inf": pick(np.inf, -np.inf, 0., -0., np.nan).astype(float), "nothing": pick(None),
            "NaT": pd.Series(pd.NaT, range(n)), "zoned": pick("2020-01-01", "2020-01-02",
                                                              None).astype("datetime64[us]").dt.tz_localize("Europe/Rome"),
            "span": pd.to_timedelta(pick(1, 2), unit="h"), "period": pd.Series(pd.PeriodIndex(pick("2020-01", "2020-02"), freq="M")),
            "null_rate": pick("a", None)}


def is_null(v): return v is None or v is pd.NaT or v is pd.NA or v != v or isinstance(v, str) and v in ("?", "")


def test_values_of_every_kind_against_a_reading_by_hand():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        case = np.repeat(range(12), rng.integers(1, 5, 12))
        df = pd.DataFrame({"case": case, "n": 2**60 + rng.permutation(len(case)), **odd_columns(len(case), rng)}).sample(frac=1,
                                                                                                                         random_state=seed)
        got, rows = scan(wide(df.set_index(pd.Index([0] * len(df))))).frame(), df.sort_values(["case", "n"])
        for f in df.columns[1:]:
            values = [[None if is_null(v) else v for v in g] for _, g in rows.groupby("case")[f]]
            filled = [[x for x in v if x is not None] for v in values]
            ever = sum(map(bool, filled))
            changed = sum(bool(t) and (v[-1] is None or v[-1] != t[0]) for v, t in zip(values, filled))
            want = np.mean([v[0] is None for v in values]), ever, changed / ever if ever else np.nan
            np.testing.assert_array_equal(got.loc[f, ["null_rate", "n_filled", "change_rate"]].to_numpy(float), want,
                                          err_msg=f"{f!r}, seed {seed}")


def test_snapshots_equal_a_reading_by_hand():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        case = np.repeat(range(15), rng.integers(1, 6, 15))
        t = pd.Series(pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 90, len(case)),
                                                                   unit="h")).where(rng.random(len(case)) > .15)
        df = pd.DataFrame({"case": case, "n": range(len(case)), "t": t, "x": rng.choice(["a", "b"], len(case))})
        log, when = wide(df, "t"), pd.Timestamp("2020-01-03")
        for delay in (None, 1, timedelta(0), timedelta(hours=5), ("x", "a")):
            want = {}
            for key, rows in df.groupby("case"):
                ts, xs = list(rows.t), list(rows.x)
                if ts[0] is pd.NaT or ts[0] > when: continue
                i = max(i for i, at in enumerate(ts) if at is not pd.NaT and at <= when)
                if delay is None: young = i == 0
                elif isinstance(delay, int): young = i <= delay
                elif isinstance(delay, tuple): young = xs[i] == "a"
                else: young = i == 0 or ts[i] - ts[0] < delay
                if young: want[key] = xs[i]
            assert snapshot(log, when, delay).x.to_dict() == want, (seed, delay)


def test_audit_rows_equal_states_written_by_hand():
    for seed in range(10):
        rng, state = np.random.default_rng(seed), {}
        df = pd.DataFrame({"case": rng.integers(0, 8, 50), "t": pd.Timestamp("2020") + pd.to_timedelta(rng.integers(0, 20, 50), unit="h"),
                           "f": rng.choice(["p", "q"], 50)}).sort_values(["case", "t"], kind="stable")
        df["new"] = rng.choice(["a", "b", ""], 50)
        old = []
        for k, v in zip(zip(df.case, df.f), df.new):
            old.append(state.get(k, rng.choice(["", "0"])))
            state[k] = v
        df["old"] = old
        begin = {(c, f): rows.old.iloc[0] or None for (c, f), rows in df.groupby(["case", "f"])}
        want = {f: [] for f in "pq"}
        for c, rows in df.groupby("case"):
            now = {f: begin.get((c, f)) for f in "pq"}
            states = [dict(now)] * any(now.values())
            for _, update in rows.groupby("t"):
                now |= {f: v or None for f, v in zip(update.f, update.new)}
                states.append(dict(now))
            for f in "pq": want[f].append([s[f] for s in states])
        got = scan(AuditLog.from_delta(df, "case", "t", "f", "old", "new")).frame()
        for f, values in want.items():
            filled = [[x for x in v if x is not None] for v in values]
            assert got.null_rate[f] == np.mean([v[0] is None for v in values]) and got.n_filled[f] == sum(map(bool, filled))
            assert got.change_rate[f] == pytest.approx(np.mean([v[-1] != t[0] for v, t in zip(values, filled) if t]))


@pytest.mark.parametrize("call, says", [
    (lambda d: wide(d, by_time={"at": ["y"]}), "no field 'y'"),
    (lambda d: wide(d.assign(d="02/29/2016 01:23 AM"), dates={"d": "%d/%m/%Y %H:%M"}), "'%m/%d/%Y %I:%M %p'"),
    (lambda d: wide(d.assign(month=pd.period_range("2020-01", periods=5, freq="M")), dates={"month": None}), "'month'.*to_timestamp"),
    (lambda d: wide(d.assign(at=["2020-01-01T00:00Z"] + ["2020-01-01T00:00"] * 4), "at"),
     "'at': '2020-01-01T00:00Z' has a zone"),
    (lambda d: wide(d.assign(x=[[1]] * 5)), "field 'x'.*make them texts"),
    (lambda d: wide(d, dates=["at"]), "^dates="),
    (lambda d: wide(d, by_time="at"), "^by_time="),
    (lambda d: AuditLog.from_wide(d.set_axis(pd.MultiIndex.from_product([["k"], d]), axis=1), ("k", "case"), ("k", "n")), "2 levels"),
    (lambda d: snapshot(wide(d, "at"), 5), "^when=5"), (lambda d: expected_new("1", [1]), "^lam='1'"),
    (lambda d: expected_new(1, ["a"]), "^waits=")], ids=range(11))
def test_other_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says): call(small())


def test_ten_thousand_fields_and_one():
    values = np.repeat([[1.], [2.], [np.nan]], 10_000, 1)
    df = pd.concat([pd.DataFrame({"case": [1, 1, 2], "n": [0, 1, 0]}), pd.DataFrame(values).add_prefix("f")], axis=1)
    v = verdicts(wide(df))
    assert len(v) == 10_001 and (v.null_rate[1:] == .5).all() and (v.change_rate[1:] == 1).all()
    assert eligibility_matrix(wide(df[["case", "n"]])).shape == (1, 1)


def test_stock_papermill_reads_the_chapters_parameters(caplog):
    pm = pytest.importorskip("papermill")
    from conftest import ROOT
    found = pm.inspect_notebook(str(ROOT/"nbs"/"chapters"/"03_eligibility.ipynb"))
    assert found["state"]["default"] == '"state,Active"' and "Unable to parse" not in caplog.text


@pytest.mark.slow
def test_the_chapter_runs_on_a_file_of_ones_own(tmp_path):
    "Key and order of rows are named, the rest is guessed; a column that isn't there is refused by its name before anything is trained."
    import os
    import subprocess
    import sys
    simulate(600, seed=4).df.to_csv(tmp_path/"tickets.csv", index=False)
    names = ["case=number", "order=updated_at", "label=close_code", "state=state,Active", "pair=assigned_to,priority", "runs=2"]
    def run(*words):
        return subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "run", "eligibility", f"dataset={tmp_path/'tickets.csv'}", *words], capture_output=True, text=True,
                              env=os.environ | {"OPML_HOME": str(tmp_path/"home")})
    done = run(*names)
    assert done.returncode == 0 and "eligible_accuracy" in done.stdout, done.stdout + done.stderr
    wrong = run("case=numbr", *names[1:])
    assert wrong.returncode and "did you mean 'number'" in wrong.stdout + wrong.stderr
