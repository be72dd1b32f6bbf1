"""Eligibility against slow references on random logs, against real logs where they are, in parts, and against what users do wrong."""
import os
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from opml_wb.core import data
from opml_wb.eligibility import (AuditLog, expected_new, eligibility_matrix, load, masked, pairs, read_samples, rows_at, sample, scan, scan_parts, simulate,
                                 snapshot, useful, verdicts)

FIELDS = ["n", "at", "a", "b", "c", "empty", "closed"]


def random_log(seed):
    "A small wide log with nulls of all sorts, clears, ties in order, an all-null field, one-row cases, and dates; rows shuffled."
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, rng.integers(1, 12))
    n = sizes.sum()
    blank = np.array([None, np.nan, "?", "", "x", "y", "z"], object)
    df = pd.DataFrame({"case": np.repeat([f"k{i}" for i in range(len(sizes))], sizes), "n": np.concatenate([np.sort(rng.integers(0, 4, s)) for s in sizes]),
                       "a": rng.choice(blank, n), "b": rng.choice(np.array([1., 2., np.nan]), n), "c": rng.choice(["p", "q"], n), "empty": rng.choice(blank[:4], n)})
    start = rng.integers(0, 20, len(sizes))
    hours = np.repeat(start, sizes) + np.concatenate([np.cumsum(rng.integers(0, 3, s)) for s in sizes])
    df["at"] = (pd.Timestamp("2020-01-01") + pd.to_timedelta(hours, unit="h")).strftime("%d/%m/%Y %H:%M")
    df["closed"] = np.where(rng.random(n) < .3, "?", (pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 40, n), unit="h")).strftime("%d/%m/%Y %H:%M"))
    df["id"] = rng.permutation(n)                                # keeps rows from being equal
    return df.sample(frac=1, random_state=seed).reset_index(drop=True)


def read(df): return AuditLog.from_wide(df, case="case", order="n", time="at", dates={"at": "%d/%m/%Y %H:%M", "closed": "%d/%m/%Y %H:%M"})


def cases_of(df):
    "Each case's rows, in order, null where null: the reference's only view of the log."
    clean = df.astype(object).where(~df.isin(["?", ""]) & df.notna(), None)
    for _, rows in clean.groupby("case", sort=False): yield rows.sort_values("n", kind="stable").reset_index(drop=True)


def moment(text): return pd.to_datetime(text, format="%d/%m/%Y %H:%M")


def point(rows, at):
    "Row of the case at e, or None."
    if at == "start": return 0
    if isinstance(at, int): return at if at < len(rows) else None
    if isinstance(at, tuple): return next((i for i, v in enumerate(rows[at[0]]) if v == at[1]), None)
    times = [moment(t) for t in rows["at"]]
    if max(times) < times[0] + at: return None
    return max(i for i, t in enumerate(times) if t <= times[0] + at)


def reference(df, at):
    "null_rate, n_filled, change_rate, future_rate by field, one value at a time."
    out = {}
    kept = [(rows, e) for rows in cases_of(df) if (e := point(rows, at)) is not None]
    for f in [c for c in df if c != "case"]:
        null = filled = changed = dated = future = 0
        for rows, e in kept:
            values = list(rows[f])
            null += values[e] is None
            there = [v for v in values if v is not None]
            if there: filled, changed = filled + 1, changed + (values[-1] != there[0])
            if f in ("at", "closed"):
                later = [moment(v) > moment(t) for v, t in zip(values, rows["at"]) if v is not None]
                dated, future = dated + len(later), future + sum(later)
        div = lambda a, b: a / b if b else np.nan  # noqa: E731
        out[f] = (div(null, len(kept)), filled, div(changed, filled), div(future, dated))
    return pd.DataFrame.from_dict(out, orient="index", columns=["null_rate", "n_filled", "change_rate", "future_rate"])


@pytest.mark.parametrize("block", range(10))
def test_scan_equals_a_slow_reference(block):
    for seed in range(block * 20, block * 20 + 20):
        df = random_log(seed)
        log = read(df)
        assert log.issues["ties"] == df.duplicated(["case", "n"]).sum()
        for at in ("start", 1, 3, timedelta(hours=2), ("c", df.c[0])):
            got, want = scan(log, at).frame(), reference(df, at)
            pd.testing.assert_frame_equal(got, want.loc[got.index], check_names=False, check_exact=True, obj=f"seed {seed}, at {at}")


def test_pairs_equal_a_slow_reference():
    for seed in range(60):
        df = random_log(seed)
        got = pairs(read(df)).set_index(["feature", "label"])
        fill = {f: [next((i for i, v in enumerate(rows[f]) if v is not None), None) for rows in cases_of(df)] for f in FIELDS}
        for f in FIELDS:
            for l in FIELDS:
                if f == l: continue
                both = [(a, b) for a, b in zip(fill[f], fill[l]) if b is not None]
                row = got.loc[(f, l)]
                assert row.n == len(both)
                if not both: assert row.verdict == "undetermined"; continue
                first, tie = sum(a is not None and a < b for a, b in both), sum(a == b for a, b in both)
                assert (row["first"], row.tie) == (first / len(both), tie / len(both)), (seed, f, l)
                assert row["first"] + row.tie + row["last"] == pytest.approx(1)


def test_parts_add_up_exactly():
    for seed in range(40):
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
    duckdb.sql(f"COPY (SELECT *, hash(number) % 4 AS part FROM '{tmp_path}/log.parquet') TO '{tmp_path}/parts' (FORMAT parquet, PARTITION_BY (part))")
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
            blank = wide[f].isin([""]) | wide[f].isna()
            for case, rows in wide.groupby("case"):
                held = None
                for i in rows.index:
                    if not blank[i]: held = wide.at[i, f]
                    filled[f] = filled[f].astype(object)
                    filled.at[i, f] = None if held == "?" else held
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
    df = pd.DataFrame({"case": np.arange(n), "n": 0, "key": [f"id-{i}" for i in range(n)], "same": "x", "nothing": "?", "number": np.arange(n) * 1_000_003, "kind": np.arange(n) % 3})
    v = verdicts(AuditLog.from_wide(df, "case", "n"))
    assert v.verdict.to_dict() == {"n": "ineligible", "key": "ineligible", "same": "ineligible", "nothing": "ineligible", "number": "ok", "kind": "ok"}
    assert "identifier" in v.reason["key"] and "constant" in v.reason["same"] and "null" in v.reason["nothing"]


@pytest.mark.parametrize("change, says", [
    (lambda d: d.iloc[:0], "empty"), (lambda d: pd.concat([d, d[:1]]), "equal in every field"), (lambda d: d.assign(at="31/31/2020 00:00"), "'at': '31/31/2020 00:00'"),
    (lambda d: d.drop(columns="case"), "no column 'case'"), (lambda d: d.assign(case=None), "'case': row 0"), (lambda d: d.assign(a=[["list"]] * len(d)), "field 'a'"),
    (lambda d: d.assign(n=None), "'n'")], ids=["empty", "copies", "dates", "no case", "null case", "lists", "no order"])
def test_bad_logs_are_refused_by_name(change, says):
    df = random_log(0)
    with pytest.raises(ValueError, match=says.replace("(", r"\(")): read(change(df))


def servicenow(name="servicenow_part1"):
    if data.find(f"eligibility/{name}") is None: pytest.skip(f"eligibility/{name} isn't here: opml data fetch eligibility/{name}, or OPML_DATA")
    return load(name)


def test_the_real_log_proves_back_fill_in_two_dates_only():
    log = servicenow()
    bare = AuditLog(log.fields, log.codes, log.levels, log.starts, log.cases, log.time, log.dates)          # without by_time
    v = verdicts(bare)
    assert set(v.index[v.verdict == "backfill"]) == {"resolved_at", "closed_at"}
    assert v.future_rate["resolved_at"] == pytest.approx(43222 / 64266, abs=1e-3) and 0 < v.future_rate["opened_at"] < 1e-3 and v.verdict["opened_at"] == "ok"
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
    assert 11 < row.null_start < 14 and 8 < row.end_bias < 11 and row.ineligible <= row.null_start + row.end_bias and row.rows_read < .01 * len(log)


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


def test_a_real_xes_log():
    if data.find("eligibility/bpic2013") is None: pytest.skip("eligibility/bpic2013 isn't here: opml data fetch eligibility/bpic2013, or OPML_DATA")
    log = load("bpic2013")
    assert (len(log), log.n_cases) == (65_533, 7_554) and log.issues["no time"] == 0
    assert (pairs(log).verdict == "undetermined").all()            # every event writes every field
    assert verdicts(log).verdict["impact"] == "ok" and verdicts(log).verdict["org:group"] == "ineligible"


@pytest.mark.slow
def test_the_chapter_under_stock_papermill(tmp_path):
    pm = pytest.importorskip("papermill")
    from conftest import ROOT
    from opml_wb.core import log as record
    pm.execute_notebook(str(ROOT/"nbs"/"chapters"/"03_eligibility.ipynb"), str(tmp_path/"out.ipynb"), parameters=dict(cases=600, runs=3, label_seeds=1), progress_bar=False, cwd=str(tmp_path))
    kept = record.read(tmp_path/"out.ipynb")
    assert kept["metrics"]["production_loss"] > .1 and len(kept["claims"]) > 20
