"""Synthesizers against traces: of this file's own making, written from definitions, and real ones where they lie."""
import gzip
import json

import numpy as np
import pytest

from opml_wb.core.record import data
import opml_wb.pipesim as ps  # its names are imported when a test uses them

WEEK, MONDAY = 168, 345_600
HOURS = np.arange(WEEK)
OFFICE = (1 + .8 * np.sin(2 * np.pi * (HOURS % 24 - 6) / 24)) * np.where(HOURS < 120, 1, .4)


def trace(weeks, rate, s2=0., phi=0., seed=0, batch=1, grow=0., night=1., law="lognormal", grain=0):
    "Doubly stochastic Poisson arrivals in epoch seconds: office hours, an AR(1) (or gamma) rate, batches, growth, silent nights, a coarse clock."
    rng, n = np.random.default_rng(seed), weeks * WEEK
    lam = np.tile(rate * OFFICE * np.where((HOURS % 24 >= 7) & (HOURS % 24 < 20), 1, night), weeks) * (1 + grow * np.arange(n) / n)
    x = np.zeros(n)
    for i in range(n): x[i] = (phi * x[i - 1] if i else 0) + rng.normal(0, np.sqrt(s2 * (1 - phi ** 2 if i else 1)))
    m = np.exp(x - s2 / 2) if law == "lognormal" else rng.gamma(1 / s2, s2, n)
    hour = np.repeat(np.arange(n), rng.poisson(lam * m / batch))
    t = np.repeat(np.sort(MONDAY + 3600 * (hour + rng.random(len(hour)))), batch)
    return np.floor(t / grain) * grain if grain else t


TRACES = {
    "mild": dict(weeks=10, rate=30, s2=.3, phi=.5), "wild": dict(weeks=8, rate=60, s2=1.2, phi=.8), "long memory": dict(weeks=12, rate=20, s2=.6, phi=.95), "sparse": dict(weeks=12, rate=3, s2=.5, phi=.6),
    "grows": dict(weeks=10, rate=20, s2=.3, phi=.6, grow=2.), "silent nights": dict(weeks=8, rate=30, s2=.4, phi=.6, night=0.), "batches": dict(weeks=8, rate=40, s2=.3, phi=.5, batch=5),
    "gamma": dict(weeks=8, rate=30, s2=1., law="gamma"), "minutes": dict(weeks=6, rate=30, s2=.5, phi=.6, grain=60), "few weeks": dict(weeks=3, rate=40, s2=.5, phi=.7)}


def figures(model, times, weeks=120, seed=1):
    "The four ratios, computed here and not by the model's own gof."
    import pandas as pd
    counts = np.bincount(((times - times[0] // 3600 * 3600) // 3600).astype(int)).astype(float)
    cell = (int(times[0] // 3600) - MONDAY // 3600 + np.arange(len(counts))) % WEEK
    made = np.histogram(model.sample(weeks * 7 * 86400, np.random.default_rng(seed), draw="matched"), 3600 * np.arange(weeks * WEEK + 1))[0].reshape(weeks, WEEK)
    frame = pd.Series(counts).groupby(cell)
    mean, sd = frame.mean().reindex(HOURS).fillna(0).to_numpy(), frame.std().reindex(HOURS).to_numpy()
    busy = mean > 0
    return {"rate": made.mean() / mean.mean(), "mape": np.abs(made.mean(0)[busy] / mean[busy] - 1).mean(), "sd": made.std(0, ddof=1)[busy].mean() / np.nanmean(sd[busy]),
            "dispersion": (made.var() / made.mean()) / (counts.var() / counts.mean())}


@pytest.mark.parametrize("name", TRACES)
def test_arrivals_of_traces_that_the_model_does_not_know(name):
    times = trace(seed=7, **TRACES[name])
    got = figures(ps.ArrivalModel("ar1").fit(times), times)
    assert abs(got["rate"] - 1) <= .02 and got["mape"] <= .15, got
    assert .75 <= got["sd"] <= 1.4 and .75 <= got["dispersion"] <= 1.35, got


def test_the_renewal_model_fails_dispersion_and_says_so():
    times = trace(10, 40, .8, .7)
    model = ps.ArrivalModel().fit(times)
    assert figures(model, times)["dispersion"] < .75
    assert "dispersion" in model.gof(times).failed
    assert ps.ArrivalModel("ar1").fit(times).gof(times).ok


def test_gaps_are_recovered_and_rates_are_unbiased():
    "A renewal trace of exponentiated Weibull gaps in a flat week: its shapes come back, and sequential bias does not come in."
    from opml_wb.pipesim.synth.interarrival import exponweib_ppf
    rng = np.random.default_rng(0)
    t = MONDAY + np.cumsum(90 * exponweib_ppf(rng.random(60_000), 4., .5))
    model = ps.ArrivalModel().fit(t)
    assert model.gap == pytest.approx((4., .5), rel=.25)
    counts = [len(model.sample(86400, np.random.default_rng(i))) for i in range(200)]
    assert np.mean(counts) == pytest.approx(960, rel=.03)


def test_time_zones_and_clock_changes():
    "The same local rhythm over a change of clocks: cells are local, and the change is put back when sampling over one."
    import pandas as pd
    local = pd.date_range("2024-02-05", periods=16 * 7, freq="D", tz="Europe/Berlin")
    times = np.concatenate([[d.replace(hour=9).timestamp() + 30 * k for k in range(60)] for d in local])
    model = ps.ArrivalModel("ar1").fit(times, tz="Europe/Berlin")
    assert set(np.flatnonzero(model.profile > 0) % 24) == {9}
    assert set(np.flatnonzero(ps.ArrivalModel().fit(times).profile > 0) % 24) == {7, 8}
    start = pd.Timestamp("2024-10-21", tz="Europe/Berlin").timestamp()
    at = pd.to_datetime(start + model.sample(14 * 86400, 0, start), unit="s", utc=True).tz_convert("Europe/Berlin")
    assert set(at.hour) == {9}


@pytest.mark.parametrize("times", [[0, 1], [5, 5, 5], np.arange(50.), np.arange(0, 9e5, 7200), [0, 1e9], np.repeat(1e9, 400)], ids=["two", "ties", "a minute", "regular", "30 years", "one moment"])
def test_odd_traces_are_fitted_and_sampled(times):
    for burst in (None, "ar1"):
        model = ps.ArrivalModel(burst).fit(times)
        t = model.sample(3 * 86400, 0)
        assert np.isfinite(model.profile).all() and (np.diff(t) >= 0).all() and (t < 3 * 86400).all()
        assert ps.ArrivalModel.from_json(model.to_json()).sample(1e5, 3).tolist() == model.sample(1e5, 3).tolist()


def test_duration_intervals_cover_over_twenty_halves():
    import pandas as pd
    rng = np.random.default_rng(1)
    n = 1500
    size, f = np.exp(rng.normal(12, 2, n)), rng.choice(["a", "b", "rare"], n, p=[.6, .38, .02])
    dur = np.exp(.4 * np.log(size) + np.where(f == "b", rng.standard_t(3, n), .3 * rng.standard_normal(n)) + .02 * (np.log(size) - 12) ** 2)
    df = pd.DataFrame({"framework": f, "size": size, "dur": np.round(dur)})
    inside = []
    for s in range(20):
        half = np.random.default_rng(s).random(n) < .5
        model, held = ps.DurationModel(by="framework").fit(df[half]), df[~half]
        inside.append([np.mean((lo <= held.dur) & (held.dur <= hi)) for p in (.5, .9) for lo, hi in [model.interval(held, p)]])
    assert .43 <= np.mean(inside, 0)[0] <= .57 and .84 <= np.mean(inside, 0)[1] <= .95
    assert np.min(inside, 0)[0] > .41 and np.max(inside, 0)[1] < .96


def test_assets_keep_margins_atoms_and_dependence():
    import pandas as pd
    rng = np.random.default_rng(2)
    rows = np.where(rng.random(2000) < .15, 1000, np.exp(rng.normal(8, 2, 2000)).astype(int) + 1)
    df = pd.DataFrame({"rows": rows, "cols": np.where(rng.random(2000) < .1, 10, 2 + rng.poisson(np.log(rows)))})
    made = ps.AssetModel().fit(df).sample(20_000, 0)
    for c in df:
        at = np.unique(np.concatenate([df[c], made[c]]))
        d = np.abs(np.searchsorted(np.sort(df[c]), at, "right") / len(df) - np.searchsorted(np.sort(made[c]), at, "right") / len(made)).max()
        assert d <= .05, (c, d)
    assert (made.rows == 1000).mean() == pytest.approx((rows == 1000).mean(), abs=.02)
    assert abs(made.corr("spearman").iloc[0, 1] - df.corr("spearman").iloc[0, 1]) < .05


def real(name):
    path = data.find(name)
    if not path: pytest.skip(f"needs {name}: opml data fetch {name}, or OPML_DATA")
    return path


def test_strata_and_bins_that_scatter_less_than_the_whole():
    "Between-group scatter isn't taken for scatter within: 9 small strata apart by factors, and a curve that size nearly determines."
    import pandas as pd
    rng, n = np.random.default_rng(4), 450
    kind = np.repeat(np.arange(9), 50)
    strata = pd.DataFrame({"kind": kind, "dur": np.exp(kind + rng.normal(0, .2, n))})
    size = np.exp(rng.uniform(0, 6, n))
    curve = pd.DataFrame({"size": size, "dur": np.exp(np.log(size) ** 2 / 6 + rng.normal(0, .1, n))})
    for df, by in ((strata, "kind"), (curve, ())):
        cover = []
        for seed in range(20):
            held = np.random.default_rng([seed, 7]).random(n) < .5
            g = ps.DurationModel(by=by).fit(df[~held]).gof(df[held])
            cover.append((g.cover50, g.cover90))
        c50, c90 = np.mean(cover, 0)
        assert .43 <= c50 <= .57 and .84 <= c90 <= .95, (by, c50, c90)


def test_assets_whose_numbers_are_rounded_keep_their_values():
    import pandas as pd
    rng = np.random.default_rng(5)
    df = pd.DataFrame({"share": rng.choice([.1, .25, .5, 2.5], 300, p=[.4, .3, .2, .1]), "width": np.round(rng.normal(1.2, .7, 300), 1)})
    model = ps.AssetModel().fit(df)
    assert all(g.ks < .05 for g in model.gof(df).values())
    assert set(model.sample(500, 1).share) <= {.1, .25, .5, 2.5}


def test_one_week_tells_working_days_from_weekends_and_dates_are_refused():
    t = trace(weeks=1, rate=30)
    assert ps.ArrivalModel().fit(t).gof(t).cell_mape < .25
    with pytest.raises(ValueError, match="times_s: expected numbers, got datetime64"): ps.ArrivalModel().fit(t.astype("M8[s]"))


def test_philly_and_pmlb():
    from opml_wb.pipesim.synth.public_traces import philly, pmlb
    real("pipesim/philly"), real("pipesim/pmlb")
    jobs, assets = philly(), pmlb()
    got = figures(ps.ArrivalModel("ar1").fit(jobs.time), jobs.time.to_numpy())
    assert abs(got["rate"] - 1) <= .02 and got["mape"] <= .15 and .75 <= got["sd"] <= 1.4 and .75 <= got["dispersion"] <= 1.35, got
    assert all(g.ks <= .1 for g in ps.AssetModel().fit(assets).gof(assets).values())
    for by in ("units", ("units", "cluster")):
        half = np.random.default_rng(0).random(len(jobs)) < .5
        assert ps.DurationModel(by=by, size=False).fit(jobs[half]).gof(jobs[~half]).ok


def test_a_batch_log_and_its_clock():
    with gzip.open(real("pipesim/hpc2n"), "rt") as f: rows = [line.split() for line in f if line.strip() and not line.startswith(";")]
    times = np.array([float(r[1]) for r in rows])
    got = ps.ArrivalModel("ar1").fit(times).gof(times)
    assert abs(got.mean_rate - 1) <= .02 and .75 <= got.cell_sd <= 1.4 and .75 <= got.dispersion <= 1.35, got


def test_the_shipped_model_makes_a_year_of_the_papers_size():
    model = ps.PipelineModel.default()
    users = 210_824 / 8760 / model.arrivals.profile.mean()
    work = model.sample(365 * 86400, 0, users)
    assert len(work) == pytest.approx(210_824, rel=.08)       # 2 % from year to year
    assert set(work.kinds) == {"preprocess", "train", "validate", "compress", "deploy"}
    month, again = (model.sample(30 * 86400, rng, users) for rng in (0, np.random.default_rng(0)))
    assert month.digest == again.digest
    assert model.about["gof"]["arrivals"]["failed"] == []


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_digest(home):
    from opml_wb.pipesim.answers.experiment import swept
    model = ps.PipelineModel.default()
    e = ps.Experiment(model, ps.Platform([ps.Pool("gpu", 64), ps.Pool("cpu", 16)], ps.Link(1e9)), "easy", replications=3, days=2., users=.3)
    here = [e.run(jobs=j).digest for j in (1, 3)]
    through = swept(e, jobs=2)
    assert here[0] == here[1] == through.digest
    assert through.frame.wait_mean.tolist() == e.run().frame.wait_mean.tolist()


def test_the_run_ledger_is_a_workload(home, notebook):
    from opml_wb.core.engine.run import run
    path = notebook("wait: float = .01", "import time; time.sleep(wait)")
    for w in (.01, .02, .03): run(path, wait=w)
    run(notebook("x: int = 1", "1 / 0", name="bad"))
    work = ps.Workload.from_runs()
    assert work.counts == {"rows": 4, "used": 4, "failed": 1, "unfinished": 0} and work.arrival[0] == 0 and (work.dur > 0).all()
    assert ps.simulate(work, ps.Platform(ps.Pool("worker", 1))).unfinished == 0


def own_log(folder, **more):
    "A stranger's log of jobs, as a CSV file: Poisson arrivals over four weeks, lognormal run times, gangs."
    import pandas as pd
    rng, T = np.random.default_rng(0), 28 * 86400
    n = rng.poisson(T / 220)
    df = pd.DataFrame({"submitted": pd.Timestamp("2026-06-01") + pd.to_timedelta(np.sort(rng.uniform(0, T, n)), "s"), "seconds": rng.lognormal(8, 1, n), "gpus": rng.choice([1, 2, 4], n)})
    df.assign(**more).to_csv(folder / "own.csv", index=False)
    return folder / "own.csv"


def test_the_model_of_a_log_of_jobs_asks_for_what_the_log_asks_for(tmp_path):
    from opml_wb.pipesim.answers.plan import long_run_load
    from opml_wb.pipesim.synth.public_traces import model_of, read_jobs
    file, platform = own_log(tmp_path), ps.Platform(ps.Pool("gpu", 64))
    jobs, model = read_jobs(file), model_of(file)
    model = ps.PipelineModel.from_json(model.to_json())
    rho = (jobs.dur * jobs.units).sum() / 64 / (28 * 86400)
    assert long_run_load(model, platform)["gpu"] == pytest.approx(rho, rel=.02) and rho == pytest.approx(.804, rel=.01)
    works = [model.sample(28 * 86400., k) for k in range(4)]
    assert {w.kinds for w in works} == {("train",)} and all(len(w) == w.n_tasks and not w.read.any() for w in works)
    assert np.mean([len(w) for w in works]) == pytest.approx(len(jobs), rel=.05)
    assert np.mean([ps.simulate(w, platform).wait.mean() for w in works]) < 3600          # the log's own: 350 s
    assert set(model.about["gof"]) == {"arrivals", "train"} and not model.about["gof"]["train"]["failed"]


@pytest.mark.parametrize("share", [.001, .01, .018, .3])
def test_rare_long_jobs_keep_the_mean_and_gof_looks_at_it(share):
    "Most of the load may hang on one job in a hundred: the mean of what is drawn is the log's."
    import pandas as pd
    rng, n = np.random.default_rng(1), 20_000
    dur = np.where(np.arange(n) < share * n, rng.normal(86400, 3600, n), rng.exponential(300, n))
    jobs = pd.DataFrame({"dur": dur, "units": rng.choice([1, 2, 8], n, p=[.9, .09, .01])})
    for by in ((), "units"):
        model = ps.DurationModel(by=by).fit(jobs)
        drawn = model.sample(jobs.sample(100_000, replace=True, random_state=0), 0)
        assert drawn.mean() == pytest.approx(dur.mean(), rel=.05)
        assert model.gof(jobs).ok and model.gof(jobs).mean == pytest.approx(1, abs=.02)
        if share > .005: assert "mean" in model.gof(jobs.assign(dur=np.where(dur > 40_000, 3 * dur, dur))).failed
    kept = json.loads(model.to_json())
    for group in kept["groups"].values(): del group["bend"]              # a model of before
    old = ps.DurationModel.from_json(kept)
    assert np.isfinite(old.sample(jobs, 0)).all() and old.quantile(jobs[:1], .5) == pytest.approx(model.quantile(jobs[:1], .5), rel=.1)


def test_batches_within_the_hour_are_no_good_fit():
    "A timer's jobs in the first minute of each hour, all on the hour, in fives: hourly counts may fit, the hour's inside doesn't."
    rng, hours = np.random.default_rng(0), MONDAY + 3600. * np.arange(4 * WEEK)
    timer = np.sort(np.concatenate([np.repeat(hours, 24) + rng.uniform(0, 60, 24 * len(hours)), (hours[:, None] + rng.uniform(0, 3600, (len(hours), 6))).ravel()]))
    for times in (timer, np.repeat(hours, 20), trace(seed=7, **TRACES["batches"])):
        assert "minutes" in ps.ArrivalModel("ar1").fit(times).gof(times, weeks=20).failed
    for name in ("mild", "minutes"):
        times = trace(seed=7, **TRACES[name])
        assert ps.ArrivalModel("ar1").fit(times).gof(times, weeks=40).minutes == pytest.approx(1, abs=.1)
