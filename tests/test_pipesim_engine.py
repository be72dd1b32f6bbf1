"""PipeSim's engine: against a brute-force simulator, theory, critical paths and a list scheduler; faults; the three executors against one another."""
import glob
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import opml_wb.pipesim as ps  # its names are imported when a test uses them

ENGINES = ("numba", "python", "simpy")
POLICIES = ("fifo", "sjf", "priority", "easy")
FOLDER = os.environ.get("OPML_DATA") and os.path.join(os.environ["OPML_DATA"], "pipesim")
real = pytest.mark.skipif(not (FOLDER and os.path.isdir(FOLDER)), reason="needs the real traces (set OPML_DATA to a folder that has pipesim/)")


def dags(n, seed, pools=("cpu", "gpu"), whole=True):
    "`n` pipelines of 1 to 8 tasks, chains, fans and joins, with ties, gangs, zero durations, wrong estimates."
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, n)
    first, T = np.cumsum(size) - size, size.sum()
    edges = [(f + i, f + j) for f, k in zip(first, size) for j in range(1, k) for i in range(j) if rng.random() < 1.3 / j]
    cut = np.floor if whole else lambda x: x
    return ps.Workload.from_arrays(cut(rng.exponential(30, n).cumsum()), cut(rng.exponential(40, T) * (rng.random(T) > .1)), rng.choice(pools, T), units=rng.choice([1, 1, 1, 2, 4], T),
                                pipeline=np.repeat(np.arange(n), size), edges=edges or None, priority=rng.integers(0, 4, n), est=cut(rng.exponential(40, T)),
                                read=rng.choice([0, 0, 500, 900], T), write=rng.choice([0, 0, 300], T))


def brute(work, pools, policy):
    "An independent simulator without heaps: at each instant it looks at every task. `pools`: {name: [(t, capacity)]}."
    T, key = work.n_tasks, dict(fifo=np.zeros(work.n_tasks), easy=np.zeros(work.n_tasks), sjf=work.est, priority=work.priority)[policy]
    names = [work.pools[k] for k in work.pool]
    parents = [set(work.edges[work.edges[:, 1] == i, 0].tolist()) for i in range(T)]
    ready, start, finish, over, t = {}, {}, {}, set(), -1.0
    while True:
        ending = {i for i in finish if finish[i] <= t and i not in over}          # zero durations: another turn of the same instant
        if not ending:
            t = min([x for x in [*work.arrival, *finish.values(), *(s for steps in pools.values() for s, _ in steps)] if x > t], default=math.inf)
            if t == math.inf: return np.array([start.get(i, math.nan) for i in range(T)])
            ending = {i for i in finish if finish[i] == t}
        stepping = {n for n, steps in pools.items() if any(s == t for s, _ in steps)} if not ending & {i for i in start if start[i] == t} else set()
        over |= ending
        newly = [i for i in range(T) if i not in ready and work.arrival[work.pipeline[i]] <= t and parents[i] <= over]
        ready.update(dict.fromkeys(newly, t))
        touched = {names[i] for i in (*ending, *newly)} | stepping
        for name, steps in pools.items():
            if name not in touched: continue
            cap = [c for s, c in steps if s <= t][-1]
            queue = sorted((i for i in range(T) if names[i] == name and i in ready and i not in start), key=lambda i: (key[i], ready[i], work.pipeline[i], i))
            held = lambda: sum(work.units[i] for i in start if names[i] == name and i not in over)
            def begin(i): start[i], finish[i] = t, t + work.dur[i]
            while queue and work.units[queue[0]] <= cap - held(): begin(queue.pop(0))
            if policy != "easy" or not queue: continue
            running = sorted((max(t, start[i] + work.est[i]), work.units[i]) for i in start if names[i] == name and i not in over)
            free_at = lambda x: cap - sum(u for end, u in running if end > x)
            shadow = next((x for x, _ in running if free_at(x) >= work.units[queue[0]]), None)
            if shadow is None: shadow, extra = next((s for s, c in steps if s > t and c >= work.units[queue[0]]), math.inf), 0
            else: extra = free_at(shadow) - work.units[queue[0]]
            for i in queue[1:]:
                if work.units[i] > cap - held(): continue
                if t + work.est[i] <= shadow: begin(i)
                elif work.units[i] <= extra: extra -= work.units[i]; begin(i)


@pytest.mark.parametrize("policy", POLICIES)
def test_as_brute_force(policy):
    for seed in range(12):
        work = dags(25, seed)
        pools = dict(cpu=[(0, 5)], gpu=[(0, 6), (300, 3), (450, 0), (500, 7)])
        platform = ps.Platform([ps.Pool(n, c) for n, c in pools.items()])
        truth = brute(work, pools, policy)
        for engine in ENGINES: assert np.array_equal(ps.simulate(work, platform, policy, engine).start, truth, equal_nan=True), (seed, engine)


@pytest.mark.parametrize("policy", POLICIES)
def test_engines_agree_on_dags(policy):
    work = dags(2000, 7)
    platform = ps.Platform([ps.Pool("cpu", 8), ps.Pool("gpu", [(0, 8), (20_000, 6), (25_000, 9)])], ps.Link(400., latency=.5))
    traces = [ps.simulate(work, platform, policy, engine) for engine in ENGINES]
    for t in traces[1:]: assert np.array_equal(t.start, traces[0].start) and np.array_equal(t.finish, traces[0].finish) and np.array_equal(t.ready, traces[0].ready)
    assert traces[0].wait.mean() > 50 and traces[0].unfinished == 0


@real
@pytest.mark.parametrize("policy", POLICIES)
def test_engines_agree_on_philly(policy):
    work = ps.Workload.from_philly(os.path.join(FOLDER, "philly_2017-10-03_6w.csv.gz"))
    assert (len(work), work.pools, work.units.max(), work.counts["used"]) == (56_630, ("gpu",), 32, 56_630) and work.arrival[0] == 115
    starts = [ps.simulate(work, ps.Platform(ps.Pool("gpu", 700)), policy, engine).start for engine in ENGINES]
    assert np.array_equal(starts[0], starts[1]) and np.array_equal(starts[0], starts[2])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), n=st.integers(0, 30), policy=st.sampled_from(POLICIES), shared=st.sampled_from(["ps", "none", None]), latency=st.sampled_from([0, .1]), whole=st.booleans(),
       cap=st.integers(4, 9), allocate=st.booleans(), drift=st.booleans())
def test_engines_agree_on_anything(seed, n, policy, shared, latency, whole, cap, allocate, drift):
    work = dags(n, seed, whole=whole) if n else ps.Workload.from_arrays([], [], "cpu")
    platform = ps.Platform([ps.Pool("cpu", cap), ps.Pool("gpu", [(0, 4), (200, 0), (333.3, cap)])], shared and ps.Link(300., shared, latency))
    kw = dict(seed=seed, allocator=ps.Allocator(70, most=cap + 2, least=1) if allocate else None,
              drift=ps.Drift(jumps_per_day=40, decay_per_day=2, detectors=(ps.Detector("confidence", .2), ps.Detector("bias", .1, 600.)), horizon=2000, debounce=60) if drift else None)
    traces = [ps.simulate(work, platform, policy, engine, **kw) for engine in ENGINES]
    assert len({t.digest for t in traces}) == 1
    if allocate: assert all(t.capacity.equals(traces[0].capacity) for t in traces)
    if drift: assert len({t.models.to_csv() for t in traces}) == 1


def lines(n, seed):
    "Pipelines whose tasks run one after another (with edges beside the chain), real durations, no two keys alike: nothing is ever tied."
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 7, n)
    first, T = np.cumsum(size) - size, size.sum()
    edges = [(f + i, f + j) for f, k in zip(first, size) for j in range(1, k) for i in range(j) if i == j - 1 or rng.random() < .3]
    return ps.Workload.from_arrays(rng.exponential(30, n).cumsum(), rng.exponential(40, T), rng.choice(["cpu", "gpu"], T), units=rng.choice([1, 1, 2, 4], T), pipeline=np.repeat(np.arange(n), size),
                                   edges=edges, priority=rng.permutation(T), est=rng.exponential(40, T))


def in_order_of_rows(policy, engine, prepare=None):
    "Starts of 200 pipelines, and of the same with tasks and edges in another order, put back."
    work, rng = lines(200, 3), np.random.default_rng(0)
    platform = ps.Platform([ps.Pool("cpu", 6), ps.Pool("gpu", 6)])
    to = rng.permutation(work.n_tasks)
    back = np.argsort(to)
    part = {n: getattr(work, n)[to] for n in ("units", "pipeline", "priority", "est")}
    mixed = ps.Workload.from_arrays(work.arrival, work.dur[to], np.array(work.pools)[work.pool][to], edges=back[work.edges][::-1], **part)
    return ps.simulate(work, platform, policy, engine).start, ps.simulate(mixed, platform, policy, engine).start[back]


@pytest.mark.parametrize("policy", POLICIES)
def test_order_of_rows_is_no_matter(policy):
    "Tasks in any order, edges in any order: each task starts when it did."
    for engine in ENGINES:
        straight, mixed = in_order_of_rows(policy, engine)
        assert np.array_equal(mixed, straight) and not np.isnan(straight).any()


def test_order_of_rows_would_be_seen(monkeypatch):
    "The test above fails where a queue goes by the place of a row."
    from opml_wb.pipesim.engines import simulate
    keys = simulate.keys
    monkeypatch.setattr(simulate, "keys", lambda policy, work: keys(policy, work) + np.arange(work.n_tasks))
    straight, mixed = in_order_of_rows("fifo", "numba")
    assert not np.array_equal(mixed, straight)


N = 350_000

def _queue(rng, mean_gap, dur, servers, policy="fifo", read=None, link=None):
    arrival = rng.exponential(mean_gap, N).cumsum()
    trace = ps.simulate(ps.Workload.from_arrays(arrival, dur, "cpu", read=read), ps.Platform(ps.Pool("cpu", servers), link), policy)
    return (trace.wait if link is None else trace.response)[N // 20:].mean()

CASES = dict(
    mm3=(lambda r: _queue(r, .1, r.exponential(.25, N), 3), lambda: ps.stats.mmc_wait(10, 4, 3)),
    mg1=(lambda r: _queue(r, 1 / .7, r.lognormal(-.5, 1, N), 1), lambda: ps.stats.pollaczek_khinchine(.7, 1, math.e)),
    sjf=(lambda r: _queue(r, 1 / .8, r.exponential(1, N), 1, "sjf"), lambda: ps.stats.mm1_sjf(.8, 1)),
    ps=(lambda r: _queue(r, 1 / .8, np.zeros(N), math.inf, read=r.lognormal(-.5, 1, N) * 1e6, link=ps.Link(1e6)), lambda: ps.stats.mg1_ps(.8, 1)))

@pytest.mark.parametrize("name", CASES)
def test_theory_lies_in_the_interval(name):
    "99 % interval of 20 replications, at most 2 % wide on each side."
    run, theory = CASES[name]
    got = ps.stats.ci(ps.stats.replicate(run, 20, seed=11), .99)
    assert theory() in got, (got, theory())
    assert got.rel <= .02


def test_sjf_on_real_estimates_and_fifo_of_one():
    "One server, by hand: the shortest estimate goes first, whatever the durations."
    work = ps.Workload.from_arrays([0, 1, 1, 1], [10, 5, 1, 3], "cpu", est=[1, 1, 9, 4])
    assert ps.simulate(work, ps.Platform(ps.Pool("cpu", 1)), "sjf").start.tolist() == [0, 10, 18, 15]
    assert ps.simulate(work, ps.Platform(ps.Pool("cpu", 1))).start.tolist() == [0, 10, 15, 16]


def _list_schedule(work, cores):
    "Greedy list scheduling of one DAG in the order (ready, task): an independent event loop."
    parents = [work.edges[work.edges[:, 1] == i, 0] for i in range(work.n_tasks)]
    finish, running, t, waiting = {}, [], 0.0, []
    todo = set(range(work.n_tasks))
    while todo or waiting or running:
        new = sorted(i for i in todo if all(p in finish and finish[p] <= t for p in parents[i]))
        todo -= set(new)
        waiting += new
        while waiting and len(running) < cores:
            i = waiting.pop(0)
            finish[i] = t + work.dur[i]
            running.append(i)
        if not running: break
        t = min(finish[i] for i in running)
        running = [i for i in running if finish[i] > t]
    return max(finish.values())

def _critical_path(work):
    longest = np.zeros(work.n_tasks)
    for _ in range(work.n_tasks):
        new = work.dur.copy()
        np.maximum.at(new, work.edges[:, 1], longest[work.edges[:, 0]] + work.dur[work.edges[:, 1]])
        if np.array_equal(new, longest): return longest.max()
        longest = new

@real
def test_workflows_have_their_critical_path():
    files = sorted(glob.glob(os.path.join(FOLDER, "wfinstances", "*.json.gz")))
    assert len(files) == 4
    for file in files:
        work = ps.Workload.from_wfformat(file)
        for engine in ENGINES:
            assert ps.simulate(work, ps.Platform(ps.Pool("cpu", math.inf)), engine=engine).end == pytest.approx(_critical_path(work), rel=1e-12)
            assert ps.simulate(work, ps.Platform(ps.Pool("cpu", 8)), engine=engine).end == pytest.approx(_list_schedule(work, 8), rel=1e-12)


@real
def test_real_traces_are_counted_to_the_row():
    with pytest.warns(UserWarning, match="897 rows"): pods = ps.Workload.from_openb(os.path.join(FOLDER, "openb_pods.csv.gz"))
    assert pods.counts == dict(rows=8152, used=7255, failed=1870, censored=5193, unscheduled=897) and set(pods.pools) == {"cpu", "gpu"}
    jobs = ps.Workload.from_swf(os.path.join(FOLDER, "hpc2n_subset.swf.gz"))
    assert jobs.counts["rows"] == jobs.counts["used"] == len(jobs) and jobs.counts["censored"] == 25 and np.median(jobs.observed) > 0
    with pytest.warns(UserWarning, match="loads of no request"): served = ps.Workload.from_gentd26(FOLDER)
    c = served.counts
    assert len(served) == c["requests"] == 34_421 and c["rows"] - c["unmatched"] >= c["used"] - c["requests"]


BAD = [("dur, task 1", dict(dur=[1, math.nan])), ("dur, task 0", dict(dur=[-1, 1])), ("arrival, pipeline 0", dict(arrival=[math.nan, 1])), ("arrival, pipeline 1", dict(arrival=[0, math.inf])),
       ("units, task 1", dict(units=[1, 0])), ("edges, row 1.*cycle", dict(arrival=[0], pipeline=[0, 0, 0], dur=[1, 1, 1], edges=[[0, 1], [1, 2], [2, 1]])), ("edges, row 0.*cycle", dict(edges=[[1, 1]])),
       ("edges, row 0", dict(edges=[[0, 9]])), ("est, task 0", dict(est=[-1, 1])), ("pipeline, task 1", dict(pipeline=[0, 7])), ("read, task 1", dict(read=[0, -5]))]

@pytest.mark.parametrize("said, kw", BAD)
def test_bad_rows_are_named(said, kw):
    with pytest.raises(ValueError, match=said): ps.Workload.from_arrays(**{**dict(arrival=[0, 1], dur=[1, 1], pool="gpu"), **kw})

@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_platform_cannot_hold_is_refused(engine):
    work = ps.Workload.from_arrays([0, 1, 2], [1, 1, 1], ["gpu", "gpu", "tpu"], units=[1, 5, 1])
    with pytest.raises(ValueError, match="pool, task 2.*'tpu'"): ps.simulate(work, ps.Platform(ps.Pool("gpu", 9)), engine=engine)
    with pytest.raises(ValueError, match="units, task 1.*at most 4"): ps.simulate(work, ps.Platform([ps.Pool("gpu", 4), ps.Pool("tpu", 1)]), engine=engine)
    with pytest.raises(ValueError, match="engine"): ps.simulate(work, ps.Platform([ps.Pool("gpu", 9), ps.Pool("tpu", 1)]), engine="c++")
    by_place = ps.Workload.from_arrays([0], [1], 1)
    assert ps.simulate(by_place, ps.Platform([ps.Pool("a", 1), ps.Pool("b", 1)]), engine=engine).utilisation(1).query("pool == 'b'").share.tolist() == [1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pool_that_ends_too_small_leaves_nan(engine):
    trace = ps.simulate(ps.Workload.from_arrays([0, 5], [10, 10], "gpu", units=[2, 2]), ps.Platform(ps.Pool("gpu", [(0, 2), (8, 1)])), engine=engine)
    assert trace.finish[0] == 10 and math.isnan(trace.start[1]) and trace.ready[1] == 5 and trace.unfinished == 1 and math.isnan(trace.wait[1])
    assert trace.summary()["unfinished"] == 1
    cut = ps.simulate(ps.Workload.from_arrays([0, 5], [10, 10], "gpu"), ps.Platform(ps.Pool("gpu", 1)), engine=engine, until=10)
    assert math.isnan(cut.finish[0]) and math.isnan(cut.start[1])


def test_policies_with_a_memory():
    class Least(ps.Policy):
        "FIFO by hand; and least attained service: pipelines that had least of a pool go first."
        def __init__(self, fair): super().__init__(); self.fair, self.had = fair, {}
        def round(self, now, queue, pool):
            owner, units, free, out = pool.tasks.pipeline.to_numpy() % 3, pool.tasks.units.to_numpy(), pool.free, []
            for t in sorted(queue, key=lambda t: self.had.get(owner[t], 0)) if self.fair else queue:
                if units[t] > free: break
                free, self.had[owner[t]] = free - units[t], self.had.get(owner[t], 0) + 1
                out.append(t)
            return out
    work, platform = dags(300, 1), ps.Platform([ps.Pool("cpu", 8), ps.Pool("gpu", 8)])
    assert ps.simulate(work, platform, Least(False)).digest == ps.simulate(work, platform, "fifo").digest
    assert ps.simulate(work, platform, Least(True)).digest != ps.simulate(work, platform, "fifo").digest
    with pytest.raises(ValueError, match="overrides round"): ps.simulate(work, platform, Least(True), "numba")
    class Greedy(ps.Policy):
        def round(self, now, queue, pool): return queue
    with pytest.raises(ValueError, match="has .* free"): ps.simulate(work, platform, Greedy())
    class Lost(ps.Policy):
        def round(self, now, queue, pool): return [10**6]
    with pytest.raises(ValueError, match="does not wait"): ps.simulate(work, platform, Lost())


def test_static_keys_run_compiled_and_equal():
    work, platform = dags(500, 2), ps.Platform([ps.Pool("cpu", 8), ps.Pool("gpu", 8)])
    widest = ps.Policy(lambda tasks: -tasks.units, "widest", backfill="easy")
    assert len({ps.simulate(work, platform, widest, e).digest for e in ENGINES}) == 1


def test_autoscaling_follows_demand_and_costs_less():
    rng = np.random.default_rng(0)
    arrival = np.sort(rng.choice([0, 1], 4000) * 43_200 + rng.uniform(0, 7200, 4000))
    work = ps.Workload.from_arrays(arrival, rng.exponential(60, 4000), "gpu")
    small, large = ps.Platform(ps.Pool("gpu", 5)), ps.Platform(ps.Pool("gpu", 40))
    auto = ps.simulate(work, small, allocator=ps.Allocator(60, least=1, most=40))
    assert auto.wait.mean() < ps.simulate(work, small).wait.mean() / 10
    used = auto.capacity
    area = (used.capacity.to_numpy() * np.diff(np.append(used.t, auto.end))).sum()
    assert used.capacity.max() <= 40 and area < .5 * 40 * auto.end


def test_a_fan_of_ten_thousand():
    n = 10_000
    edges = np.concatenate([np.stack([np.zeros(n, int), np.arange(1, n + 1)], 1), np.stack([np.arange(1, n + 1), np.full(n, n + 1)], 1)])
    work = ps.Workload.from_arrays([0], np.ones(n + 2), "cpu", pipeline=np.zeros(n + 2, int), edges=edges)
    for engine in ENGINES: assert ps.simulate(work, ps.Platform(ps.Pool("cpu", 100)), engine=engine).end == 102


def test_plans_do_not_depend_on_workers():
    work = ps.Workload.from_arrays(np.sort(np.random.default_rng(0).uniform(0, 5e4, 3000)), np.random.default_rng(1).exponential(40, 3000), "gpu")
    plans = [ps.capacity_plan(work, ps.Platform(ps.Pool("gpu", 3)), growth=[1, 1.1, 1.2, 1.4], replications=3, slo=300, jobs=j) for j in (1, 3)]
    assert plans[0].equals(plans[1])
    p = plans[0]
    assert p.exec_p50.is_monotonic_increasing and p.wait_p95.is_monotonic_increasing and p.min_capacity.is_monotonic_increasing
    assert p.stable.tolist() == (p.rho < 1).tolist() and not p.stable.iloc[-1]


@pytest.mark.parametrize("days", [.03, 1.2, 3.7, 9.9, 30])
def test_load_grows_with_users_whatever_the_length_of_the_trace(days):
    rng = np.random.default_rng(6)
    work = ps.Workload.from_arrays(np.sort(rng.uniform(0, days * 86400, 4000)), rng.exponential(20 * days, 4000), "cpu")
    plan = ps.capacity_plan(work, ps.Platform([ps.Pool("cpu", 2)]), growth=[1, 1.5, 2, 3], replications=2)
    assert np.allclose(plan.rho / plan.rho[0], plan.growth, rtol=.05)
    assert work.scale(users=3).horizon <= work.horizon and (plan.wait_p95.diff()[1:] > 0).all()


def test_readers_name_the_line_of_a_word(tmp_path):
    good = "1 0 5 10 2 10 -1 2 20 -1 1 1 1 1 1 1 -1 -1\n"
    for text, said in ((good + good.replace("10", "ten", 1), "line 2: expected numbers only, got 'ten'"), (good + "1 2\n", "line 2")):
        (tmp_path / "a.swf").write_text(text)
        with pytest.raises(ValueError, match=said): ps.Workload.from_swf(tmp_path / "a.swf")
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="a.csv: expected CSV"): ps.Workload.from_philly(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="arrival, pipeline 0: expected numbers .*datetimes or ISO"): ps.Workload.from_arrays(["1.1.2020"], [1.], "cpu")


def test_common_numbers_cut_the_variance():
    def mean_wait(capacity, rng, n=5000):
        work = ps.Workload.from_arrays(rng.exponential(1 / .85, n).cumsum(), rng.exponential(3, n), "gpu")
        return ps.simulate(work, ps.Platform(ps.Pool("gpu", capacity))).wait.mean()
    a, b = (ps.stats.replicate(lambda rng: mean_wait(c, rng), 30) for c in (3, 4))
    got = ps.stats.paired_diff(a, b)
    assert got.mean > 0 and got.low > 0 and got.reduction > 1
    policies = [ps.stats.replicate(lambda rng: _policy_wait(p, rng), 30) for p in ("fifo", "easy")]
    assert ps.stats.paired_diff(*policies).reduction >= 3

def _policy_wait(policy, rng, n=4000):
    work = ps.Workload.from_arrays(rng.exponential(1, n).cumsum(), rng.exponential(2.2, n), "gpu", units=rng.choice([1, 1, 2], n))
    return ps.simulate(work, ps.Platform(ps.Pool("gpu", 4)), policy).wait.mean()


KILLED = """
    import sys, numpy as np
    from opml_wb.pipesim import Platform, Pool, Workload, simulate_stream
    def chunks():
        for i in range(120):
            rng = np.random.default_rng(i)
            yield Workload.from_arrays(i * 1000 + np.sort(rng.uniform(0, 1000, 500)), rng.exponential(5, 500), "gpu")
            print(i, flush=True)
    print(simulate_stream(chunks(), Platform(Pool("gpu", 3)), sys.argv[1], resume=True).digest)
"""

def test_a_killed_stream_is_not_read_and_goes_on(tmp_path):
    run = lambda folder: subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(folder)], stdout=subprocess.PIPE, text=True)
    whole = run(tmp_path/"whole")
    broken = run(tmp_path/"broken")
    while int(broken.stdout.readline()) < 50: pass
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    assert list((tmp_path/"broken").glob("tasks-*.parquet"))
    with pytest.raises(ValueError, match="has finished"): ps.Streamed.open(tmp_path/"broken")
    again = run(tmp_path/"broken").communicate()[0].split()[-1]
    assert again == whole.communicate()[0].split()[-1] == ps.Streamed.open(tmp_path/"broken").digest


def test_streams_agree_whatever_the_chunks(tmp_path):
    rng = np.random.default_rng(5)
    work = dags(1500, 5)
    platform = ps.Platform([ps.Pool("cpu", 9), ps.Pool("gpu", [(0, 10), (9000, 5), (14_000, 12)])], ps.Link(350., latency=.2))
    for policy in POLICIES:
        whole, cuts = ps.simulate(work, platform, policy).digest, np.unique(rng.integers(1, len(work), 20))
        for i, bounds in enumerate(([0, len(work)], [0, *cuts, len(work)])):
            chunks = (work.take(np.arange(a, b)) for a, b in zip(bounds, bounds[1:]))
            assert ps.simulate_stream(chunks, platform, tmp_path/f"{policy}{i}", policy).digest == whole


def test_debounce_bounds_a_storm():
    work = ps.Workload.from_arrays(np.zeros(100), np.full(100, 60.), "gpu")
    shift = ps.Drift(decay_per_day=0, jumps_per_day=30, jump=.5, shared=1, debounce=86400, horizon=10 * 86400, detectors=(ps.Detector("drift", .05, 600),))
    models = ps.simulate(work, ps.Platform(ps.Pool("gpu", 2)), drift=shift, seed=3).models
    gaps = models[models.triggered.notna()].sort_values(["model", "triggered"]).groupby("model").triggered.diff().dropna()
    assert len(gaps) > 300 and gaps.min() >= 86400 and (models.groupby("model").size() <= 11).all()
    assert (models.triggered.dropna() % 600 == 0).mean() > .05      # a debounced trigger need not fall on a tick, the others do
    with pytest.raises(ValueError, match="at most"): ps.simulate(work, ps.Platform(ps.Pool("gpu", 2)), drift=ps.Drift(decay_per_day=10, debounce=1e-3, detectors=(ps.Detector("confidence", 1e-6),), horizon=1e6))
