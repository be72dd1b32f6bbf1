"""PipeSim's clocks: whatever zero times count from, in whatever form they come, the answers are the same."""
import math
import warnings

import numpy as np
import pandas as pd
import pytest

import opml_wb.pipesim as ps  # its names are imported when a test uses them

ZEROS = [1.6e9, 1.6e9 + .3, 5e6, 12_345.6, -86_400., 2.0**31]     # the base begins at 0
CLOSE = dict(rtol=1e-9, atol=0)


def chains(n=400, seed=0):
    "Pipelines of two tasks over three days, times with one decimal; the first arrives at 0."
    rng = np.random.default_rng(seed)
    arrival = np.round(np.sort(rng.uniform(0, 3 * 86_400, n)), 1)
    dur, edges = np.round(rng.exponential(1500, 2 * n), 1) + .1, np.arange(2 * n).reshape(-1, 2)
    return dict(arrival=arrival - arrival[0], dur=dur, pool=np.tile(["cpu", "gpu"], n), pipeline=np.repeat(np.arange(n), 2), edges=edges,
                units=rng.choice([1, 2], 2 * n), read=rng.choice([0., 1e5], 2 * n), model=np.arange(n) % 5, perf=np.full(n, .9))


def at(zero, **more):
    "(workload, platform) on a clock that is `zero` seconds later: work, window, capacity steps."
    part = chains()
    work = ps.Workload.from_arrays(**{**part, "arrival": part["arrival"] + zero, **more})
    steps = [(t + zero if t else 0, c) for t, c in [(0, 4), (90_000.5, 3), (150_000.5, 5)]]
    return work, ps.Platform([ps.Pool("cpu", 5), ps.Pool("gpu", [(0, 4), *steps[1:]] if zero >= 0 else 4)], ps.Link(1e4))


def answers(work, platform, zero, **how):
    "All that a trace says, as numbers; times less `zero`."
    trace = ps.simulate(work, platform, **how)
    use = trace.utilisation(7200.)
    out = {**trace.summary(), "end": trace.end - zero, "use": use.share.to_numpy(), "t": use.t.to_numpy() - zero, "wait": trace.wait, "response": trace.response,
           "capacity": trace.capacity.capacity.to_numpy(float), "when": np.maximum(trace.capacity.t.to_numpy() - zero, 0)}
    if trace.models is not None: out |= {"lost": trace.models.lost.to_numpy(), "deployed": trace.models.deployed.to_numpy() - zero, "n": len(trace.workload)}
    return out


def same(got, want):
    assert set(got) == set(want)
    for k in want: np.testing.assert_allclose(got[k], want[k], rtol=1e-9, atol=1e-6 if k in ("t", "when", "deployed", "end", "start") else 0, err_msg=k)


@pytest.mark.parametrize("zero", ZEROS)
def test_any_zero_gives_the_same_answers(zero):
    for policy, engine in (("fifo", "numba"), ("sjf", "python"), ("easy", "simpy")):
        (base, platform), (work, moved) = at(0.), at(zero)
        if zero < 0: platform = moved
        how = dict(policy=policy, engine=engine)
        same(answers(work, moved, zero, **how), answers(base, platform, 0., **how))
    drift = dict(drift=ps.Drift(decay_per_day=2.), allocator=ps.Allocator(3600., most=6), until=200_000.)
    same(answers(work, moved, zero, **{**drift, "until": 200_000. + zero}), answers(base, platform, 0., **drift))
    for users in (.5, 1.2, 2.5):
        grown, want = work.scale(users, seed=3), base.scale(users, seed=3)
        np.testing.assert_allclose(grown.since, want.since, rtol=0, atol=1e-6)
        assert grown.t0 == work.t0 and grown.end == work.end and grown.arrival.min() >= work.t0 and grown.arrival.max() <= work.end
    pd.testing.assert_frame_equal(ps.stats.load(work, moved), ps.stats.load(base, platform), **CLOSE)


@pytest.mark.parametrize("zero", ZEROS)
def test_any_zero_gives_the_same_plan_and_series(zero, tmp_path):
    (base, platform), (work, moved) = at(0.), at(zero)
    if zero < 0: platform = moved
    plans = [ps.capacity_plan(w, p, growth=[1, 1.3], replications=2, slo=5e4) for w, p in ((base, platform), (work, moved))]
    pd.testing.assert_frame_equal(*plans, check_exact=False, **CLOSE)
    for scheme in ("parquet", "duckdb"):
        store = ps.TraceStore(f"{scheme}:{tmp_path}/{scheme}")
        for name, w, p in (("base", base, platform), ("moved", work, moved)): store.write(ps.simulate(w, p), name)
        for metric in ("wait", "arrivals", "utilisation", "read", "pipelines"):
            a, b = (store.series(metric, n, 7200.) for n in ("base", "moved"))
            np.testing.assert_allclose(b.t - zero, a.t, rtol=0, atol=1e-6, err_msg=metric)
            np.testing.assert_allclose(b.value, a.value, err_msg=metric, **CLOSE)


def test_a_stream_and_a_file_keep_the_clock(tmp_path):
    work, platform = at(1.6e9)
    whole = ps.simulate(work, platform)
    for k, bounds in enumerate(([0, 400], [0, 1, 70, 71, 390, 400])):
        for how in ("take", "anew"):
            cut = [work.take(np.arange(a, b)) for a, b in zip(bounds, bounds[1:])]
            if how == "anew": cut = [ps.Workload.from_arrays(c.arrival, c.dur, np.array(c.pools)[c.pool], units=c.units, pipeline=c.pipeline, edges=c.edges, read=c.read) for c in cut]
            got = ps.simulate_stream(cut, platform, tmp_path / f"{how}{k}")
            assert got.digest == whole.digest and np.array_equal(got.read().wait, whole.wait) and np.array_equal(got.read().arrival, work.arrival)
    back = ps.Workload.read_parquet(work.to_parquet(tmp_path / "w.parquet"))
    assert (back.digest, back.t0, back.end) == (work.digest, work.t0, work.end) and ps.simulate(back, platform).digest == whole.digest


def test_dates_are_the_same_as_seconds():
    (base, platform), day = at(0.), pd.Timestamp("2024-03-30 22:00")
    want = answers(base, platform, 0.)
    dates = day + pd.to_timedelta(chains()["arrival"], unit="s").round("100ms")
    zero = day.timestamp() if day.tz else (day - pd.Timestamp(0)).total_seconds()
    _, moved = at(zero)
    forms = [dates, pd.Series(dates), dates.to_numpy(), list(dates.to_pydatetime()), dates.tz_localize("UTC"), pd.Series(dates.tz_localize("UTC").tz_convert("Europe/Berlin")),
             [d.isoformat() for d in dates], pd.Series([str(d) for d in dates])]
    for form in forms: same(answers(at(zero, arrival=form)[0], moved, zero), want)
    for bad in (["30.3.2024"], ["2024-03-30", None], [day, day.tz_localize("UTC")], [day, pd.NaT]):
        with pytest.raises(ValueError, match="arrival"): ps.Workload.from_arrays(bad, [1.] * len(bad), "cpu")


def philly_file(folder, shift):
    part = chains()
    when = pd.Timestamp("2017-10-03 09:00") + pd.to_timedelta(part["arrival"] + shift, unit="s").round("100ms")
    pd.DataFrame(dict(timestamp=when, duration=part["dur"][::2], num_gpus=part["units"][::2])).to_csv(folder / "philly.csv", index=False)
    return ps.Workload.from_philly(folder / "philly.csv")

def swf_file(folder, shift):
    part = chains()
    rows = [f"{i} {int(a) + int(shift)} 5 {d:.1f} {u} {d:.1f} -1 {u} 9000 -1 1 1 1 1 1 1 -1 -1" for i, (a, d, u) in enumerate(zip(part["arrival"], part["dur"][::2], part["units"][::2]))]
    (folder / "a.swf").write_text("\n".join(rows) + "\n")
    return ps.Workload.from_swf(folder / "a.swf")

def openb_file(folder, shift):
    part = chains()
    t = np.floor(part["arrival"]) + int(shift)
    pd.DataFrame(dict(cpu_milli=1000, num_gpu=part["units"][::2], gpu_milli=1000, pod_phase="Succeeded", creation_time=t, scheduled_time=t + 2,
                      deletion_time=t + 2 + np.floor(part["dur"][::2]))).to_csv(folder / "openb.csv", index=False)
    return ps.Workload.from_openb(folder / "openb.csv")

def gentd26_files(folder, shift):
    part = chains()
    for name, share in (("pipeline_inference_data", 1.), ("basemodel_update_latency", .2), ("lora_update_latency", .1), ("controlnet_latency_data", .1)):
        pd.DataFrame(dict(timestamp_anon=np.floor(part["arrival"]) + int(shift), value=1000 * share * part["dur"][::2], container_ip=[f"c{i}" for i in range(400)])).to_csv(folder / f"{name}.csv", index=False)
    return ps.Workload.from_gentd26(folder, pool="gpu")

def ledger(folder, shift):
    part = chains()
    t = part["arrival"] + shift
    return ps.Workload.from_runs(df=pd.DataFrame(dict(chapter="x", status="done", started=t, ended=np.round(t + part["dur"][::2], 1))))

def frame(folder, shift):
    part = chains()
    pd.DataFrame(dict(arrival=part["arrival"] + shift, dur=part["dur"][::2], pool="gpu", units=part["units"][::2])).to_csv(folder / "own.csv", index=False, float_format="%.4f")
    df = pd.read_csv(folder / "own.csv")
    return ps.Workload.from_arrays(df.arrival, df.dur, df.pool, units=df.units)

@pytest.mark.parametrize("reader", [philly_file, swf_file, openb_file, gentd26_files, ledger, frame])
def test_readers_do_not_depend_on_when_the_trace_began(reader, tmp_path):
    pool = {ledger: "worker", swf_file: "cpu"}.get(reader, "gpu")
    platform = ps.Platform(ps.Pool(pool, 5))
    def said(shift):
        work = reader(tmp_path, shift)
        trace = ps.simulate(work, platform, "sjf")
        return {**trace.summary(), "rho": ps.stats.load(work, platform).rho.to_numpy(), "wait": trace.wait, "grown": ps.simulate(work.scale(1.4), platform).wait, "span": work.span}
    want = said(0)
    assert want["wait_mean"] > 0
    for shift in (86_400 * 400, 1.5e9):
        got = said(shift)
        for k in want: np.testing.assert_allclose(got[k], want[k], rtol=1e-9, atol=2e-6 if reader is ledger else 0, err_msg=k)


def test_epoch_seconds_have_their_load_and_stay_in_their_year():
    "Load 1.25 of one unit, told as such, with users that grow where the trace is."
    rng = np.random.default_rng(0)
    since = np.sort(rng.uniform(0, 7 * 86_400, 2000))
    work, one = ps.Workload.from_arrays(1.6e9 + since, np.full(2000, 1.25 * np.ptp(since) / 2000), "gpu"), ps.Platform(ps.Pool("gpu", 1))
    load = ps.stats.load(work, one)
    assert load.rho[0] == pytest.approx(1.25) and not load.stable[0]
    assert work.scale(1.2).arrival.min() >= 1.6e9 and ps.simulate(work, one).start.min() >= 1.6e9
    result = ps.Experiment(work, one).run()
    assert result.stable == 0 and "NOT stable" in repr(result)
    assert ps.capacity_plan(work, one, growth=[1]).rho[0] == pytest.approx(1.25)


def test_the_window_is_what_was_watched():
    "Quiet hours before the first and after the last arrival count; utilisation leaves out what runs on after the window."
    work = ps.Workload.from_arrays([100., 200.], [50., 50.], "gpu", t0=0, end=400)
    assert ps.stats.load(work, ps.Platform(ps.Pool("gpu", 1))).rho[0] == 100 / 400
    late = ps.simulate(ps.Workload.from_arrays([0., 100.], [100., 900.], "gpu"), ps.Platform(ps.Pool("gpu", 2)))
    assert late.summary()["util_gpu"] == .5 and late.utilisation(np.inf, whole=True).share[0] == 1000 / 2000
    with pytest.raises(ValueError, match="t0"): ps.Workload.from_arrays([5.], [1.], "gpu", t0=6)
    with pytest.raises(ValueError, match="end"): ps.Workload.from_arrays([5.], [1.], "gpu", end=4)
    with pytest.raises(ValueError, match="until"): ps.simulate(ps.Workload.from_arrays([1.6e9], [1.], "gpu"), ps.Platform(ps.Pool("gpu", 1)), until=3600)
    with pytest.warns(UserWarning, match="capacity steps lie before"): ps.simulate(ps.Workload.from_arrays([1.6e9], [1.], "gpu"), ps.Platform(ps.Pool("gpu", [(0, 1), (3600, 2)])))
    at_once = ps.Workload.from_arrays([7., 7.], [1., 1.], "gpu")
    assert math.isnan(ps.stats.load(at_once, ps.Platform(ps.Pool("gpu", 1))).rho[0]) and "can't be told" in repr(ps.Experiment(at_once, ps.Platform(ps.Pool("gpu", 1))).run())
    sampled = ps.PipelineModel.default().sample(86_400., 0, .1)
    assert (sampled.t0, sampled.end) == (0, 86_400)


@pytest.mark.parametrize("days, runs", [(1.5, 16), (3, 12), (14, 4), (28, 3)])
def test_copies_of_more_users_are_as_good_as_independent(days, runs):
    "M/M/c: the waits of a Poisson log with more users are what theory says, no two jobs at one instant, a subset is a subset."
    from opml_wb.pipesim.answers.stats import mmc_wait
    waits = {u: [] for u in (2, 4, 6)}
    for seed in range(runs):
        rng, T = np.random.default_rng([seed, 3]), days * 86400
        n = round(T / 120)
        w = ps.Workload.from_arrays(rng.uniform(0, T, n), rng.exponential(1, n).clip(1e-9) * 960, "g", t0=0, end=T)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for u in waits:
                grown = w.scale(u)
                assert len(np.unique(grown.arrival)) == len(grown) == u * n and (grown.t0, grown.end) == (0, T)
                waits[u].append(ps.simulate(grown, ps.Platform(ps.Pool("g", 10 * u))).wait.mean())
    for u, got in waits.items():
        assert np.mean(got) == pytest.approx(mmc_wait(u / 120, 1 / 960, 10 * u), rel=.6, abs=3 * np.std(got) / len(got) ** .5), u


def test_copies_keep_rhythm_and_batches_and_say_where_weeks_run_out():
    day = np.arange(28)
    at = np.repeat(day * 86400 + 9 * 3600 + 60. * (day % 5), 6)                  # six at once, soon after nine
    w = ps.Workload.from_arrays(at, np.ones(len(at)), "g", t0=0, end=28 * 86400.)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grown = w.scale(3)
    assert set(grown.since // 3600 % 24) == {9} and set(grown.since // 86400 % 7) == set(range(7))
    assert set(np.unique(grown.arrival, return_counts=True)[1] % 6) == {0}
    with pytest.warns(UserWarning, match="users=5: the trace has 4 whole weeks"): five = w.scale(5)
    assert five.since.max() % 86400 < 11 * 3600 and len(five) == 5 * len(w)


@pytest.mark.parametrize("arrival, t0, said", [
    (np.array([1.76e12, 1.762e12]), None, "look like epoch ms"), ([1.76e18, 1.762e18], None, "look like epoch ns"), ([20260101, 20260102, 20260215], None, "look like dates"),
    (["20260101", "20260102"], None, "look like dates"), (["2026-06-01T08:00:00+02:00", "2026-06-01T09:00:00"], None, "all have a time zone, or none"),
    (["2026-06-01T08:00:00Z", "2026-06-02T09:00:00Z"], "2026-06-01", "all have a time zone, or none"),
    (["2026-06-01 08:00", "2026-06-02 09:00"], pd.Timestamp("2026-06-01", tz="Europe/Berlin"), "all have a time zone, or none")])
def test_times_that_would_be_misread_are_refused(arrival, t0, said):
    with pytest.raises(ValueError, match=said): ps.Workload.from_arrays(arrival, np.ones(len(arrival)), "gpu", t0=t0)


def test_readers_of_jobs_never_guess(tmp_path):
    from opml_wb.pipesim.synth.public_traces import read_jobs
    (tmp_path / "p.csv").write_text("timestamp,duration,num_gpus\n03/02/2026,5,1\n12/02/2026,5,1\n")
    with pytest.raises(ValueError, match="p.csv: timestamp, row 0: expected numbers .s., datetimes or ISO"): ps.Workload.from_philly(tmp_path / "p.csv")
    good = "submitted,seconds,gpus\n2026-06-01,60,1.0\n2026-06-02,60,4.0\n"
    file = tmp_path / "j.csv"
    file.write_text(good)
    assert read_jobs(file).units.tolist() == [1, 4] and read_jobs(file).attrs["columns"]["time"] == "submitted"
    for text, said in ((good.replace("4.0", ""), "j.csv: gpus, row 1: expected"), (good.replace("4.0", "1.5"), "j.csv: gpus, row 1: expected a whole number"), (good.replace("4.0", "0"), "gpus, row 1.* got 0"),
                       (good.replace("\n", ",time\n", 1).replace(".0\n", ".0,7\n"), "just one of time, timestamp, submitted"), ("", "j.csv: expected CSV"), ("\x00\ufffd,\n" * 2, "j.csv")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said): read_jobs(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    with pytest.raises(ValueError, match="j.csv: expected text or .gz"): read_jobs(file)
