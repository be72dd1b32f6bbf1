"""PipeSim's answers: intervals that hold the truth, none where nothing varied, waits within responses."""
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

import opml_wb.pipesim as ps  # its names are imported when a test uses them
from opml_wb.pipesim.answers.intervals import Design, ci, ci_of_times, estimate, paired_diff

ONE = ps.Platform(ps.Pool("gpu", 8))


def bursty(rate=2.):
    model = ps.PipelineModel.default().arrivals
    return model.scaled(rate / model.profile.mean())


def replication(arrivals, days, rho, rng, rate=2.):
    at = arrivals.sample(days * 86_400, rng)
    return ps.Workload.from_arrays(at, rng.lognormal(-.5, 1, len(at)) * rho * 8 * 3600 / rate, "gpu", t0=0, end=days * 86_400)


def enough(hits, n, least=.9):
    "Not so few that a true share of `least` would have a chance of 1 %."
    return hits >= binom.ppf(.01, n, least)


@pytest.mark.parametrize("days, rho", [(7., .95), (28.1, .8)])
def test_intervals_hold_the_truth(days, rho):
    "200 intervals of five and 50 of twenty replications, the truth the mean of all; the whole table is `bench/pipesim_coverage`."
    arrivals = bursty()
    waits = np.array([ps.simulate(replication(arrivals, days, rho, ps.stats.rng_of(11, r)), ONE).wait.mean() for r in range(1000)])
    for n in (5, 20):
        held = [waits.mean() in ci_of_times(x) for x in waits.reshape(-1, n)]
        assert enough(sum(held), len(held)) and (n == 20 or np.mean(held) <= .99), (n, np.mean(held))


def test_intervals_of_differences_hold_the_truth():
    "100 paired intervals of five replications: shortest first against first come."
    arrivals = bursty()
    def differ(rng): return np.subtract(*(ps.simulate(work, ONE, p).wait.mean() for work in [replication(arrivals, 14., .8, rng)] for p in ("sjf", "fifo")))
    waits = ps.stats.replicate(differ, 500, seed=5)
    held = [waits.mean() in paired_diff(x, np.zeros(5)) for x in waits.reshape(-1, 5)]
    assert enough(sum(held), 100), np.mean(held)


def test_replications_vary_alike_on_both_sides_of_four_weeks():
    arrivals = bursty()
    spread = [np.std([len(arrivals.sample(days * 86_400, seed)) for seed in range(150)]) / days for days in (27.9, 28.1)]
    assert .75 < spread[1] / spread[0] < 1.33
    year = [len(arrivals.sample(365 * 86_400, seed)) for seed in range(40)]
    assert .01 < np.std(year) / np.mean(year) < .06


def test_mirrored_pairs_cut_the_variance_and_keep_the_mean():
    arrivals, days = bursty(), 28.
    a, b = (np.array([len(arrivals.sample(days * 86_400, seed, draw=d)) for seed in range(150)]) for d in ("plain", "mirrored"))
    assert np.corrcoef(a, b)[0, 1] < -.3 and abs(b.mean() / a.mean() - 1) < .04
    model = ps.PipelineModel.default()
    e = ps.Experiment(model, ps.Platform([ps.Pool("gpu", 320), ps.Pool("cpu", 60)]), replications=4, days=2., users=.3, mirrored=True)
    got = e.run()
    assert got.design == Design("pairs") and got.interval().n == 2 and len({*got.frame.digest48}) == 4
    with pytest.raises(ValueError, match="mirrored"): e.varied(replications=5)
    with pytest.raises(ValueError, match="mirrored"): e.varied(source=e.workload())


def trace_of(weeks, seed=0, rho=.8):
    return replication(bursty(), 7. * weeks, rho, np.random.default_rng(seed))


def test_nothing_that_was_fixed_has_an_interval():
    short = trace_of(1)
    same = [ps.Experiment(short, ONE).run(), ps.Experiment(short, ONE, replications=20).run(), ps.Experiment(lambda users, rng: short, ONE).run()]
    for r in same:
        assert "no interval" in repr(r) and "+-" not in repr(r) and math.isnan(r.interval("util_gpu").half) and r.interval().mean == ps.simulate(short, ONE).wait.mean()
    other = ps.Experiment(short, ONE, policy="sjf").run()
    assert not other.minus(same[0]).sure and "no interval" in repr(other.minus(same[0]))
    assert "no interval" in repr(ps.stats.steady([ps.simulate(short, ONE)] * 5)["interval"])
    idle = ps.Experiment(lambda users, rng: replication(bursty(), 7., .01, rng), ONE).run()
    assert "+-" not in repr(idle.interval("wait_p50")) and idle.interval("wait_p50").mean == 0


def test_a_trace_of_weeks_is_drawn_anew():
    work = trace_of(8)
    fifo, sjf = (ps.Experiment(work, ONE, policy=p, replications=12).run() for p in ("fifo", "sjf"))
    assert fifo.design.weeks == 8 and fifo.interval().mean == ps.simulate(work, ONE).wait.mean()
    assert fifo.interval().low < fifo.interval().mean < fifo.interval().high and "weeks drawn anew" in repr(fifo)
    assert sjf.minus(fifo).mean < 0 and sjf.minus(fifo).half < fifo.interval().half
    assert fifo.digest == ps.Experiment(work, ONE, replications=12).run(jobs=3).digest


def test_intervals_of_one_trace_hold_the_truth():
    "40 traces of eight weeks, the truth the mean of all their waits."
    traces = [trace_of(8, seed) for seed in range(40)]
    truth = np.mean([ps.simulate(w, ONE).wait.mean() for w in traces])
    held = [truth in ps.Experiment(w, ONE, replications=8).run().interval() for w in traces]
    assert enough(sum(held), 40, .85), np.mean(held)


def test_plans_have_two_ends():
    arrivals = bursty()
    plan = ps.capacity_plan(lambda users, rng: replication(arrivals.scaled(users), 7., .7, rng), ONE, growth=[1, 1.4], replications=6, slo=7200.)
    for c in ("rho", "wait_p50", "wait_p95", "exec_p50", "exec_p95", "gain", "stable"):
        assert (plan[f"{c}_low"] <= plan[c]).all() and (plan[c] <= plan[f"{c}_high"]).all(), c
    assert (plan.min_capacity_low <= plan.min_capacity).all() and not (plan.min_capacity_high < plan.min_capacity).any()
    assert set(plan.stable * 6) <= set(range(7)) and plan.bottleneck_share.between(0, 1).all() and not plan.note.any()
    fixed = ps.capacity_plan(trace_of(1), ONE, growth=[1, 1.4], replications=3)
    assert fixed.filter(regex="_low|_high").isna().all().all() and fixed.note.str.contains("one trace").all()
    weeks = ps.capacity_plan(trace_of(6), ONE, growth=[1], replications=5)
    assert (weeks.wait_p95_low < weeks.wait_p95_high).all() and "drawn anew" in weeks.note[0]


def fans(n=300, seed=0):
    "Pipelines whose middle tasks run side by side, more of them than there is room for."
    rng = np.random.default_rng(seed)
    wide = rng.integers(2, 9, n)
    first = np.cumsum(wide + 2) - wide - 2
    edges = [e for f, k in zip(first, wide) for i in range(1, k + 1) for e in ((f, f + i), (f + i, f + k + 1))]
    T = int((wide + 2).sum())
    return ps.Workload.from_arrays(rng.exponential(60, n).cumsum(), rng.exponential(30, T), "gpu", pipeline=np.repeat(np.arange(n), wide + 2), edges=edges)


@pytest.mark.parametrize("policy", ["fifo", "sjf", "easy"])
def test_waits_are_part_of_responses(policy):
    work = fans()
    trace = ps.simulate(work, ps.Platform(ps.Pool("gpu", 4)), policy)
    said = trace.summary()
    assert np.all(trace.wait <= trace.response + 1e-9) and np.all(trace.wait >= 0) and np.all(trace.slowdown >= 1)
    assert all(said[f"wait_{f}"] <= said[f"response_{f}"] for f in ("mean", "p50", "p95", "max"))
    by_hand = np.zeros(len(work))
    parents = [work.edges[work.edges[:, 1] == i, 0] for i in range(work.n_tasks)]
    for p in range(len(work)):
        i = max(np.flatnonzero(work.pipeline == p), key=lambda i: trace.finish[i])
        while True:
            by_hand[p] += trace.start[i] - trace.ready[i]
            if not len(parents[i]): break
            i = max(parents[i], key=lambda j: trace.finish[j])
    np.testing.assert_allclose(trace.wait, by_hand, atol=1e-6)
    if policy == "fifo": assert np.bincount(work.pipeline, trace.start - trace.ready).mean() > trace.response.mean()       # the sum of all waits isn't
    cut = ps.simulate(work, ps.Platform(ps.Pool("gpu", 4)), policy, until=trace.end / 2).summary()
    assert cut["wait_mean"] <= cut["response_mean"] and cut["unfinished"] > 0


def test_a_share_of_replications_is_stable():
    rng = np.random.default_rng(0)
    result = ps.Experiment(lambda users, rng: replication(bursty(), 7., 1., rng), ONE, replications=10).run()
    assert 0 < result.stable < 1 and f"stable in {round(result.stable * 10)} of 10" in repr(result)


def test_skew_and_even_values():
    with pytest.raises(ValueError, match="finite"): ci_of_times([1., math.nan])
    for x in ([1., 2, 3], [5.] * 4, [0., 0, 7], [-1., 2, 5]):
        got = ci_of_times(x)
        assert got.low <= got.mean <= got.high and got.mean == np.mean(x)
    assert estimate([3.], design=Design("weeks", 5)).mean == 3 and math.isnan(paired_diff([1., 2], [0., 0], design=Design("fixed", why="x")).half)
    assert ci([4., 4]).half == 0 and "+-" not in repr(ci([4., 4]))


def test_whether_a_load_is_borne_is_told_by_what_is_to_be_expected():
    "Half a month's load scatters widely; the model's own decides, and lies near the mean of many months."
    model = ps.PipelineModel.default()
    users = 24.07 / model.arrivals.profile.mean()
    pools = ps.Platform([ps.Pool("gpu", 320), ps.Pool("cpu", 60)])
    plan = ps.capacity_plan(model, pools, [users, 1.2 * users], replications=2, horizon=14 * 86400)
    gpu = plan[plan.pool == "gpu"]
    assert gpu.borne.tolist() == ["yes", "no"] and gpu.rho_long.iloc[1] == pytest.approx(1.2 * gpu.rho_long.iloc[0])
    months = [ps.stats.load(model.sample(28 * 86400, r, users), pools).rho[0] for r in range(12)]
    error = np.std(months, ddof=1) / np.sqrt(12)
    assert abs(np.mean(months) - gpu.rho_long.iloc[0]) < 4 * error and max(months) - min(months) > .2
    few = ps.capacity_plan(model.over(14 * 86400), pools, [users], replications=2)     # a function doesn't know
    assert few.rho_long.isna().all() and few.borne[0] == "unknown"


def test_the_jobs_of_a_csv_file_are_a_model(tmp_path):
    from opml_wb.pipesim.synth.public_traces import model_of
    rng = np.random.default_rng(0)
    at = np.sort(rng.uniform(0, 21 * 86400, 3000))
    pd.DataFrame(dict(timestamp=pd.Timestamp("2026-03-02") + pd.to_timedelta(at, "s"), duration=rng.lognormal(6, 1, 3000),
                      num_gpus=rng.choice([1, 4], 3000))).to_csv(tmp_path / "jobs.csv", index=False)
    model = model_of(tmp_path / "jobs.csv")
    work = model.sample(14 * 86400, 1)
    train = work.tasks[work.tasks.kind == "train"]
    assert abs(len(work) / 2000 - 1) < .15 and set(train.units) == {1, 4}
    assert train.dur.median() == pytest.approx(np.exp(6), rel=.15)


def weeks_log(levels, seed=0, rate=8 / 3600 * .75):
    "Poisson arrivals, the weeks of these levels; run times of an hour on average."
    rng, week = np.random.default_rng(seed), 604_800
    at = np.sort(np.concatenate([week * k + rng.uniform(0, week, rng.poisson(rate * week * x)) for k, x in enumerate(levels)]))
    return ps.Workload.from_arrays(at, rng.exponential(3600, len(at)), "gpu", t0=0, end=week * len(levels))


def test_the_note_on_weeks_says_what_they_show():
    "A trend, levels that wander, too few weeks to see either, weeks that are alike."
    levels = np.exp(.3 * np.random.default_rng(1).normal(size=8))
    for some, said in ((np.linspace(.5, 1.25, 8), "rises by 12% of the mean a week, the last week has 1.4 times"), (np.linspace(1.25, .5, 8), "falls by"), (levels, "intervals are too short"),
                       (np.ones(4), "too few to see .* if weeks are alike"), (np.ones(8), "no trend .* if weeks are alike and independent, such 95 % intervals hold the truth in 85 to 90")):
        plan = ps.capacity_plan(weeks_log(some), ONE, [1.], 6)
        assert re.search(said, plan.note[0]), plan.note[0]
        if "rises" in said: assert plan.borne[0] == "unknown" and plan.rho_high[0] < 1          # the mean is borne, today's load isn't known to be


def test_a_load_near_one_fitted_on_a_short_log_is_not_known_to_be_borne():
    told = []
    for seed in range(5):                                # 670 jobs, the true rho is 1.087
        rng, model = np.random.default_rng(seed), ps.PipelineModel.default()
        assert model.given                               # a platform of its own: its load is known
        model.arrivals = ps.ArrivalModel().fit(np.sort(rng.uniform(0, 28 * 86400, 670)))
        model.train = ps.DurationModel(by=()).fit(pd.DataFrame({"dur": rng.lognormal(0, 1.5, 670) * 1.087 * 8 * 28 * 86400 / 670 / np.exp(1.125)}))
        model.structures, model.units, model.given = {"job": 1.}, {"1": 1.}, False
        plan = ps.capacity_plan(model, ps.Platform(ps.Pool("gpu", 8)), [1., .2], 2, horizon=3 * 86400)
        assert plan.rho_long_low[0] < plan.rho_long[0] < plan.rho_long_high[0] and plan.borne[1] == "yes" and "given the model" in plan.note[0]
        told.append(plan.borne[0])
    assert told.count("yes") <= 1 and "unknown" in told, told
    assert "error of its fit" in repr(ps.Experiment(model, ps.Platform(ps.Pool("gpu", 8)), replications=2, days=3.).run())


def test_steady_figures_hold_the_truth_or_say_that_runs_are_short():
    "M/M/1: one cut for all replications holds it (each with its own lost a sixth of the cases); near one the runs are said to be short."
    def run(rho, n, seed):
        rng = np.random.default_rng([seed, n])
        return ps.simulate(ps.Workload.from_arrays(np.cumsum(rng.exponential(1 / rho, n)), rng.exponential(1, n), "gpu"), ps.Platform(ps.Pool("gpu", 1)))
    got = [ps.stats.steady([run(.9, 2500, 10 * k + j) for j in range(10)]) for k in range(20)]
    assert enough(sum(9. in g["interval"] for g in got), 20, .93)
    assert all(len(set(g["cut"])) == 1 for g in got)
    near = ps.stats.steady([run(.97, 3000, j) for j in range(10)])
    assert near["stable"] and "runs of" in near["note"] and "short" in near["interval"].note
