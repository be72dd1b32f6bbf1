"""Sweeps that are killed, doubled, interrupted, pruned, refused: nothing is executed twice, nothing is lost."""
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import processes, until

from opml_wb.core.record.store import Store
from opml_wb.core.sweep.driver import Interrupted, Sweep, sweep
from opml_wb.core.request.canonical import ParamError


@pytest.fixture
def opml_sweep(opml):
    "opml_sweep(*args) -> CompletedProcess of `opml sweep`; `start=True` gives the Popen instead."
    return lambda *args, start=False, **env: opml("sweep", *args, start=start, env=env)


@pytest.fixture
def slow(notebook, tmp_path):
    """A notebook of `pause` seconds that writes a line to a file when it begins and when it ends; told(word) -> executions so far.

    With `meet` drivers it waits for as many; with `gate` above 0 trials behind that number wait until `told.open()`."""
    trace, opened = tmp_path / "trace.txt", tmp_path / "open"
    nb = notebook("n: int = 0\npause: float = 0.1\nmeet: int = 0\ngate: int = 0", f"""
import os, time, psutil
from pathlib import Path
from opml_wb import log
trace = Path({str(trace)!r})
def say(word): os.write(os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND), f'{{word}} {{n}}\\n'.encode())
say('begin')
say(f'driver {{psutil.Process().parents()[1].pid}}')
while len({{line.split()[1] for line in trace.read_text().splitlines() if line.startswith('driver')}}) < meet: time.sleep(.02)
while 0 < gate < n and not os.path.exists({str(opened)!r}): time.sleep(.02)
time.sleep(pause)""", "log.metric('loss', (n - 17)**2); say('end')")

    def told(word="end"): return Counter(line.split()[1] for line in trace.read_text().splitlines() if line.startswith(word)) if trace.exists() else Counter()
    told.open = opened.touch
    return nb, told


def whole(home): return sqlite3.connect(home / "opml.db").execute("pragma integrity_check").fetchone() == ("ok",)


def test_sigkill_of_the_driver_then_the_same_command(opml_sweep, slow, home):
    nb, told = slow
    command = nb, "n=1..40", "gate=14", "--objective", "loss", "--json"
    driver = opml_sweep(*command, start=True)
    assert until(lambda: sum(told().values()) >= 12, 120)
    driver.kill(); driver.wait()
    assert until(lambda: not processes(str(home)), 60), processes(str(home))
    told.open()
    done = {d["key"] for d in Store(home).ls() if d["status"] == "done"}
    assert 10 <= len(done) <= 14                                 # of 12 that told their end, two may not have been recorded yet
    again = opml_sweep(*command)
    got = json.loads(again.stdout)
    assert again.returncode == 0 and len(got["runs"]) == 40 and set(got["counts"]) == {"done", "cached"}, again.stderr
    assert got["executed"] == got["counts"]["done"] == 40 - len(done) and got["counts"]["cached"] == len(done)
    assert Counter(d["key"] for d in Store(home).ls() if d["status"] == "done").most_common(1)[0][1] == 1
    assert len(told()) == 40 and sum(told().values()) <= 40 + 2  # again at most the two that the kill met before they were recorded
    assert whole(home) and not processes(str(home))
    assert [r["params"]["n"] for r in got["runs"]] == list(range(1, 41)) and got["best"] == got["runs"][16]["key"]
    third = json.loads(opml_sweep(*command).stdout)
    assert third["executed"] == 0 and third["counts"] == {"cached": 40} and third["sweep"] == got["sweep"]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_two_at_once_share_the_work(opml_sweep, slow, home, sampler):
    nb, told = slow
    space = ["n=1..40"] if sampler == "grid" else ["n=1..40000", "-n", "40", "--sampler", "tpe"]
    two = [opml_sweep(nb, *space, "meet=2", "--objective", "loss", "--json", start=True) for _ in range(2)]
    texts = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], texts
    a, b = (json.loads(out) for out, _ in texts)
    assert a["executed"] + b["executed"] == 40 and min(a["executed"], b["executed"]) >= 2
    assert [r["key"] for r in a["runs"]] == [r["key"] for r in b["runs"]] and len({r["key"] for r in a["runs"]}) == 40
    assert sum(told("begin").values()) == 40 == Store(home).count() and a["best"] == b["best"] and whole(home)


def test_a_survivor_takes_over_from_a_killed_driver(opml_sweep, slow, home):
    nb, told = slow
    two = [opml_sweep(nb, "n=1..24", "meet=2", "gate=4", "--json", start=True) for _ in range(2)]
    assert until(lambda: sum(told("begin").values()) >= 6 and len(told("driver")) == 2, 120)
    two[0].kill(); two[0].wait()
    told.open()
    out, err = two[1].communicate(timeout=300)
    assert two[1].returncode == 0, err
    assert len(json.loads(out)["runs"]) == 24 and len(told()) == 24
    done = Counter(d["key"] for d in Store(home).ls() if d["status"] == "done")
    assert len(done) == 24 and max(done.values()) == 1
    # a run that the kill met after its last cell, before its end was recorded, is not done and runs again: at most the two in flight
    assert sum(told().values()) <= 24 + 2


def test_a_segfault_is_listed_and_harms_no_other(opml_sweep, home, notebook):
    nb = notebook("n: int = 0", "import os, signal\nif n == 3: os.kill(os.getpid(), signal.SIGSEGV)\nfrom opml_wb import log\nlog.metric('m', n)")
    done = opml_sweep(nb, "n=1..6", "--objective", "m", "--direction", "maximize", "--json")
    got = json.loads(done.stdout)
    assert done.returncode == 1 and got["counts"] == {"done": 5, "failed": 1} and got["best"] == got["runs"][5]["key"]
    assert got["runs"][2]["error"]["signal"] == "SIGSEGV" and got["runs"][2]["error"]["cell"] == 1
    said = opml_sweep(nb, "n=1..6", "--objective", "m")
    assert said.returncode == 1 and "SIGSEGV" in said.stdout and "5 cached, 1 failed of 6, 1 executed now" in said.stdout


def test_shape_of_json_and_frame(home, notebook, opml_sweep):
    nb = notebook("n: int = 0\nlr: float = .1", "from opml_wb import log\nlog.metric('loss', n * lr)")
    s = sweep(nb, {"n": [1, 2], "lr": [.5, .25]}, objective="loss", direction="maximize")
    assert isinstance(s, Sweep) and s.best.params == {"n": 2, "lr": .5}
    frame = s.frame()
    assert list(frame.columns) == ["key", "status", "seconds", "params.n", "params.lr", "metrics.loss"] and list(frame["metrics.loss"]) == [.5, .25, 1, .5]
    got = json.loads(opml_sweep(nb, "lr=0.5,0.25", "n=1,2", "--objective", "loss", "--direction", "maximize", "--json").stdout)
    assert list(got) == ["sweep", "chapter", "objective", "direction", "executed", "counts", "best", "runs"]
    assert got["sweep"] == s.id and got["executed"] == 0 and got["best"] == s.best.key and got["counts"] == {"cached": 4}
    assert set(got["runs"][0]) == set(s.runs[0].to_dict()) and got["runs"][0]["metrics"] == {"loss": .5}
    html = s._repr_html_()
    assert "4 done" in html and s.id[:10] in html


@pytest.mark.parametrize("words,has", [
    (["n=5..1"], "write 1..5"), (["n=1,x"], "expected int"), (["n="], "write values (16,32,64)"), ([], "nothing to vary"), (["nn=1,2"], "did you mean 'n'?"),
    (["lr=0.1..0.5"], "--sampler random"), (["lr=0.1..0.5", "--sampler", "random"], "-n 50"), (["n=1,2", "--sampler", "best"], "tpe"),
    (["n=1,2", "--objective", "los"], "did you mean 'loss'?"), (["n=1,2", "--executor", "tcp://127.0.0.1:9"], "dask scheduler"),
    (["n=1,2", "--executor", "ray"], "papermill"), (["n=1,2", "--prune"], "--objective"), (["n=1,2", "--direction", "up"], "maximize"),
    (["n=1,2", "--jobs", "0"], "jobs"), (["n=1..9", "-n", "3", "--sampler", "tpe"], "--objective"), (["n"], "name=value"), (["n=1", "n=2"], "twice"),
    (["n=1,2", "--objective", "loss", "--objective", "loss"], "given twice"), (["n=1,2", "--objective", "loss", "--direction", "minimize", "--direction", "maximize"], "2 for 1"),
    (["n=1,2", "--objective", "loss", "--objective", "los"], "did you mean 'loss'?"), (["n=1,2", "--objective", "loss", "--objective", "n", "--prune"], "one metric"),
])
def test_refused_with_what_to_write_instead(opml_sweep, home, notebook, words, has):
    nb = notebook("n: int = 0\nlr: float = .1", "from opml_wb import log\nlog.metric('loss', n * lr); log.metric('n', n)")
    done = opml_sweep(nb, *words, "--json")
    error = json.loads(done.stdout)
    assert done.returncode == 2 and error["status"] == "refused" and has in error["error"]["evalue"], error
    assert Store(home).count() == 0
    assert Store(home).db.execute("select (select count(*) from sweep) + (select count(*) from trial)").fetchone() == (0,)


def test_an_objective_that_no_run_logs_is_refused_when_only_a_run_can_tell(home, notebook, slow):
    nb = notebook("n: int = 0", "from opml_wb import log\nfor k in ('loss', 'time'): log.metric(k, n)")
    with pytest.raises(ParamError, match="objective 'los': no run logs it; did you mean 'loss'"): sweep(nb, {"n": (1, 20)}, objective="los")
    store = Store(home)
    assert 3 <= store.count() <= 6 and {d["status"] for d in store.ls()} == {"done"}
    store.reindex()                                              # nor do the folders tell of it
    assert store.db.execute("select (select count(*) from sweep) + (select count(*) from trial)").fetchone() == (0,)


def test_ctrl_c_once_lets_the_running_end_and_twice_stops_them(opml_sweep, slow, home):
    nb, told = slow
    driver = opml_sweep(nb, "n=1..40", "pause=0.5", start=True)
    assert until(lambda: sum(told("begin").values()) >= 4, 120)
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 130 and "the same command runs what is missing" in err
    begun = sum(told("begin").values())
    assert begun < 40 and told("begin") == told() and {d["status"] for d in Store(home).ls()} == {"done"}

    driver = opml_sweep(nb, "n=1..4", "pause=600", "--json", start=True)
    assert until(lambda: sum(told("begin").values()) >= begun + 2, 120)
    driver.send_signal(signal.SIGINT); time.sleep(1); driver.send_signal(signal.SIGINT)  # at once they would be one
    out, err = driver.communicate(timeout=120)
    got = json.loads(out)
    assert driver.returncode == 130 and got["counts"] == {"killed": 2}
    assert until(lambda: not processes(str(home)), 60)
    assert Store(home).db.execute("select count(*) from trial where status='running'").fetchone() == (0,)


STEPS = 20


@pytest.fixture
def prunable(notebook, tmp_path):
    """prunable(metric=) -> a notebook that logs a curve, the lower the less `bad`. From the seventh on it waits half-way until the
    pruner stops it, or until `prunable.open()`."""
    opened = tmp_path / "open"
    def make(metric="loss"):
        return notebook("bad: int = 0", f"import os, time\nfrom opml_wb import log\nfor step in range({STEPS}):\n"
                        f"    while bad > 6 and step == {STEPS // 2} and not os.path.exists({str(opened)!r}): time.sleep(.02)\n"
                        f"    log.metric({metric!r}, ({STEPS} - step) * (1 + bad), step=step)")
    make.open, make.close = opened.touch, opened.unlink
    return make


def test_pruning_saves_work_and_keeps_the_best(home, prunable):
    nb, space = prunable(), {"bad": list(range(12))}
    prunable.open()
    def steps(s): return sum(len(r.series("loss")) for r in s.runs)
    full = sweep(nb, space, objective="loss")
    assert steps(full) == 12 * STEPS
    Store(home).rm([d["id"] for d in Store(home).ls()])
    prunable.close()
    less = sweep(nb, space, objective="loss", pruner="median")
    assert less.best.params == full.best.params and less.counts["pruned"] >= 5 and less.ok
    assert steps(less) <= .85 * 12 * STEPS
    pruned = next(r for r in less.runs if r.status == "pruned")
    assert pruned.error["kind"] == "pruned" and 0 < len(pruned.series("loss")) < STEPS
    assert Store(home).get(pruned.key)[0]["status"] == "pruned"
    again = sweep(nb, space, objective="loss", pruner="median")
    assert again.executed == 0 and again.counts == {"cached": less.counts["done"], "pruned": less.counts["pruned"]}
    prunable.open()
    finished = sweep(nb, space, objective="loss")     # without pruning they are wanted after all
    assert finished.executed == less.counts["pruned"] and finished.counts["cached"] == less.counts["done"]


def stopped(monkeypatch, after, *sweep_args, **options):
    "The Sweep that Ctrl-C ends when `after` runs are known."
    from opml_wb.core.sweep import driver, live

    class Stop(live.Silent):
        def __call__(self, state):
            if len(state.results) >= after and not state.interrupts: os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "live", lambda: Stop())
        with pytest.raises(Interrupted) as e: sweep(*sweep_args, **options)
    return e.value.sweep


def test_a_resumed_study_goes_on_where_it_stopped(home, notebook, monkeypatch):
    nb = notebook("x: float = 0.", "from opml_wb import log\nlog.metric('loss', (x - 3)**2)")
    options = dict(n=16, sampler="tpe", objective="loss", jobs=1, seed=4)
    assert 12 <= len(stopped(monkeypatch, 12, nb, {"x": (-9., 9.)}, **options).runs) < 16
    resumed = sweep(nb, {"x": (-9., 9.)}, **options)
    monkeypatch.setenv("OPML_HOME", str(home / "other"))
    straight = sweep(nb, {"x": (-9., 9.)}, **options)
    assert [r.params for r in resumed.runs] == [r.params for r in straight.runs] and resumed.counts["cached"] >= 12


THREADS = """import os, threading
import numba, numpy, torch, threadpoolctl, xgboost
from opml_wb import log
def fit(name='xgboost'):
    x = numpy.random.default_rng(0).normal(size=(20000, 8))
    xgboost.XGBRegressor(n_estimators=5, n_jobs=n).fit(x, x[:, 0])
    log.metric(name, len(os.listdir('/proc/self/task')) - threading.active_count() + 1)  # threads that it started, and its own
fit()
other = threading.Thread(target=fit, args=['beside']); other.start(); other.join()
log.metric('torch', torch.get_num_threads()); log.metric('numba', numba.get_num_threads()); log.metric('env', int(os.environ.get('OMP_NUM_THREADS', 0)))
for p in threadpoolctl.threadpool_info(): log.metric(p['filepath'], p['num_threads'])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_runs_side_by_side_share_the_cores(home, notebook):
    nb = notebook("n: int | None = None", THREADS)
    from opml_wb.core.sweep.executors import cores
    for r in sweep(nb, {"n": [None, -1]}, jobs=cores() * 2).runs: assert r.ok and set(r.metrics.values()) == {1}, (r.metrics, r.error)
    alone = sweep(nb, {"n": [0]}, jobs=1).runs[0]   # the same measure, with all cores
    assert alone.ok and alone.metrics["torch"] == alone.metrics["xgboost"] == cores(), (alone.metrics, alone.error)


def test_changed_code_is_another_sweep(home, notebook):
    nb = notebook("n: int = 0", "from opml_wb import log\nlog.metric('m', n)")
    first = sweep(nb, {"n": [1, 2]})
    nb.write_text(nb.read_text().replace("log.metric('m', n)", "log.metric('m', n + 1)"))
    second = sweep(nb, {"n": [1, 2]})
    assert second.executed == 2 and second.id != first.id and [r.metrics["m"] for r in second.runs] == [2, 3]


def test_changed_data_of_one_point_runs_it_again(home, notebook, tmp_path):
    for name in "ab": (tmp_path / f"{name}.txt").write_text(name)
    nb = notebook("file: str = ''", "from opml_wb import log\nlog.metric('m', ord(open(file).read()))")
    space = {"file": ["a.txt", "b.txt"]}
    assert [r.metrics["m"] for r in sweep(nb, space).runs] == [97, 98]
    (tmp_path / "b.txt").write_text("c")
    second = sweep(nb, space)
    assert second.counts == {"cached": 1, "done": 1} and [r.metrics["m"] for r in second.runs] == [97, 99]
    assert sweep(nb, space).counts == {"cached": 2}


LOST = {"lost": lambda home: [p.unlink() for p in home.glob("opml.db*")],
        "rebuilt": lambda home: Store(home).reindex(),
        "emptied": lambda home: [Store(home).db.execute(f"delete from {t}") for t in ("sweep", "trial")] and Store(home).reindex()}


@pytest.mark.parametrize("sampler", ["grid", "tpe", "nsga2"])
@pytest.mark.parametrize("how", LOST)
def test_a_lost_index_loses_no_trial(home, notebook, monkeypatch, how, sampler):
    nb = notebook("x: float = 0.\ny: float = 0.", "from opml_wb import log\nlog.metric('a', (x - 3)**2 + abs(y)); log.metric('b', (x + y)**2)")
    space = {"x": (-9., 9.), "y": (-1., 1.)} if sampler != "grid" else {"x": [1., 2., 3.], "y": [0., 1., 2., 4.]}
    options = dict(sampler=sampler, objective=["a", "b"] if sampler == "nsga2" else "a", jobs=1, seed=5, **({} if sampler == "grid" else {"n": 12}))
    stopped(monkeypatch, 8, nb, space, **options)
    rows = Store(home).db.execute("select number, status, point, key, run, attrs from trial order by number").fetchall()
    assert len(rows) >= 8
    LOST[how](home)
    assert Store(home).db.execute("select number, status, point, key, run, attrs from trial order by number").fetchall() == rows
    resumed = sweep(nb, space, **options)
    assert resumed.counts == {"cached": len(rows), "done": 12 - len(rows)}
    monkeypatch.setenv("OPML_HOME", str(home / "other"))
    straight = sweep(nb, space, **options)
    assert [r.params for r in resumed.runs] == [r.params for r in straight.runs] and resumed.id == straight.id


def test_a_run_that_serves_two_sweeps_says_both(home, notebook):
    nb = notebook("n: int = 0", "from opml_wb import log\nlog.metric('m', n)")
    first, second = sweep(nb, {"n": [1, 2]}), sweep(nb, {"n": [2, 3]})
    assert second.executed == 1
    store = Store(home)
    for t in ("sweep", "trial"): store.db.execute(f"delete from {t}")
    store.reindex()
    assert dict(store.db.execute("select sweep, count(*) from trial group by sweep").fetchall()) == {first.id: 2, second.id: 2}
    assert sweep(nb, {"n": [1, 2]}).executed == sweep(nb, {"n": [2, 3]}).executed == 0


def test_several_objectives(home, notebook, opml_sweep):
    nb = notebook("x: float = 0.", "from opml_wb import log\nlog.metric('error', (x - 1)**2)\nif x != 5: log.metric('size', abs(x))")
    s = sweep(nb, {"x": [-1., 0., .5, 1., 2., 5.]}, objective=["error", "size"])
    assert [r.params["x"] for r in s.front] == [1., .5, 0.] and s.ok
    with pytest.raises(AttributeError, match=".front"): s.best
    command = nb, "x=-1,0,0.5,1,2,5", "--objective", "error", "--objective", "size"
    got = json.loads(opml_sweep(*command, "--json").stdout)
    assert got["sweep"] == s.id and got["best"] is None and got["front"] == [r.key for r in s.front] and got["executed"] == 0
    assert (got["objective"], got["direction"]) == (["error", "size"], ["minimize", "minimize"])
    assert "3 not beaten by any other in error and size" in opml_sweep(*command).stdout
    other = opml_sweep(*command, "--direction", "minimize", "--direction", "maximize", "--json")
    got = json.loads(other.stdout)
    assert got["sweep"] != s.id and [r["params"]["x"] for r in got["runs"] if r["key"] in got["front"]] == [1., 2.]
    t = sweep(nb, {"x": (-9., 4.)}, n=24, sampler="tpe", objective=["error", "size"], direction=["minimize", "minimize"], seed=2)
    assert t.executed == 24 and sum(-.5 <= r.params["x"] <= 1.5 for r in t.runs[12:]) >= 4


def test_a_metric_in_any_language_can_be_pruned_by(home, prunable):
    s = sweep(prunable("größe"), {"bad": list(range(10))}, objective="größe", pruner="median")
    assert s.ok and s.counts.get("pruned", 0) >= 2 and s.best.params["bad"] == 0


def test_many_trials_cost_no_more_each(home, notebook, monkeypatch):
    "What a driver reads of the index doesn't grow with the sweep: 400 trials, not 400 times 400 rows."
    from opml_wb.core.sweep.trial_locks import TrialLocks
    read, rows = [], TrialLocks.rows
    monkeypatch.setattr(TrialLocks, "rows", lambda self, *window: read.append(len(found := rows(self, *window))) or found)
    nb = notebook("n: int = 0", "n")
    runs = {}
    from opml_wb.core.sweep import trials
    monkeypatch.setattr(trials, "execute", lambda plan, **_: runs.setdefault(plan.key, fake_run(plan, home)))
    sweep(nb, {"n": (1, 400)}, jobs=2)
    assert sum(read) < 400 * 10
    read.clear()
    assert sweep(nb, {"n": (1, 400)}).executed == 0 and sum(read) <= 400


def fake_run(plan, home):
    "A run of `plan` as the store would have it, without a process."
    from opml_wb.core.engine import run
    from opml_wb.core.record import store as s
    h = Store(home)
    folder, _ = h.begin(plan.request())
    (folder / s.NOTEBOOK).write_text("{}")
    s.finish(folder, status="done", error=None, seconds=0, cpu=0, rss=0)
    return run.Run(h.placed(h.index(folder)))


def test_a_removed_run_is_missing(home, notebook):
    nb = notebook("n: int = 0", "from opml_wb import log\nlog.metric('m', n)")
    first = sweep(nb, {"n": [1, 2, 3]})
    Store(home).rm([first.runs[1].doc["id"]])
    assert sweep(nb, {"n": [1, 2, 3]}).counts == {"cached": 2, "done": 1}


def test_a_store_of_yesterday_gets_the_new_tables(home, notebook):
    store = Store(home)
    for sql in ("drop table sweep", "drop table trial", "drop index run_home", "alter table run drop column home"): store.db.execute(sql)
    store.db.set_version(1)
    store.db.close()
    assert sweep(notebook("n: int = 0", "n"), {"n": [1]}).counts == {"done": 1}


def test_stock_kernels_give_the_same(home, notebook, monkeypatch):
    nb = notebook("n: int = 0", "import random\nfrom opml_wb import log\nlog.metric('m', n); log.metric('r', random.random())")
    stock = sweep(nb, {"n": [1, 2]}, executor="papermill")
    monkeypatch.setenv("OPML_HOME", str(home / "other"))
    assert [r.metrics for r in stock.runs] == [r.metrics for r in sweep(nb, {"n": [1, 2]}).runs] and stock.ok


@pytest.fixture(scope="module")
def cluster():
    "A real cluster on this machine: a scheduler and two worker processes with their nannies."
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as c: yield c


def test_dask_gives_the_same_table_and_artifacts_arrive(home, notebook, cluster, monkeypatch, tmp_path, opml_sweep):
    nb = notebook("n: int = 0", "import random, numpy as np\nfrom opml_wb import log\nfor i in range(3): log.metric('m', n + i, step=i)\nlog.metric('r', random.random())\n"
                                "log.artifact(np.arange(n), 'deep/x.npy')")
    root = tmp_path / "bucket"
    local = sweep(nb, {"n": [1, 2, 3, 4]}).frame().drop(columns=["seconds"])
    other = dict(OPML_HOME=str(home / "other"), OPML_ARTIFACTS=f"file://{root}")
    done = opml_sweep(nb, "n=1..4", "--executor", cluster.scheduler_address, "--json", **other)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    for name, value in other.items(): monkeypatch.setenv(name, value)
    again = sweep(nb, {"n": [1, 2, 3, 4]})
    assert again.executed == 0 and again.frame().drop(columns=["seconds"]).replace("cached", "done").equals(local)
    assert got["executed"] == 4 and len(list(root.rglob("x.npy"))) == 4 and not list(root.glob("*.part-*"))
    r = again.runs[2]
    assert (root / r.doc["id"] / "artifacts" / "deep" / "x.npy").is_file() and list(r.series("m")["value"]) == [3, 4, 5]
    assert r.artifacts["deep/x.npy"].read_bytes() == (root / r.doc["id"] / "artifacts" / "deep" / "x.npy").read_bytes()
    import nbformat
    nbformat.validate(nbformat.read(r.notebook, 4))


def test_dask_survives_the_kill_of_a_worker(home, slow, cluster, tmp_path):
    nb, told = slow
    from distributed import Client
    marker = tmp_path / "killed"
    with Client(cluster) as client:
        pids = client.run(os.getpid)
        from opml_wb.core.sweep import live

        class Kill(live.Silent):
            def __call__(self, state):
                if len(state.results) >= 3 and not marker.exists(): marker.touch(); os.kill(next(iter(pids.values())), 9)
        from opml_wb.core.sweep.driver import drive
        from opml_wb.core.sweep.spec import SweepSpec
        s = drive(SweepSpec(nb, {"n": (1, 12), "pause": .3}), executor=client, show=Kill())
    assert marker.exists() and s.counts == {"done": 12} and len(told()) == 12


def test_two_sweeps_on_one_cluster_leave_each_other_alone(home, slow, cluster, opml_sweep):
    nb, told = slow
    first = opml_sweep(nb, "n=1..6", "pause=1.5", "--executor", cluster.scheduler_address, "--json", start=True)
    assert until(lambda: sum(told("begin").values()) >= 2, 120)
    second = opml_sweep(nb, "n=11..14", "pause=0.5", "--executor", cluster.scheduler_address, "--json", start=True)
    got = [json.loads(p.communicate(timeout=300)[0]) for p in (second, first)]
    assert [g["counts"] for g in got] == [{"done": 4}, {"done": 6}] and set(told("begin").values()) == {1}


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_sweep_and_the_command_resumes(home, slow, opml_sweep, tmp_path):
    pytest.importorskip("distributed")
    nb, told = slow
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    def dask(*words): return subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:], "--no-dashboard"],
                                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", str(port))
    worker = dask("worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path / "w"))
    try:
        assert until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 60)
        command = nb, "n=1..8", "pause=1", "--json"
        driver = opml_sweep(*command, "--executor", f"tcp://127.0.0.1:{port}", start=True)
        assert until(lambda: sum(told().values()) >= 2, 90)
        scheduler.kill()
        out, err = driver.communicate(timeout=90)
        got = json.loads(out)
        assert driver.returncode == 1 and "the Dask scheduler is gone" in err and "the same command runs what is missing" in err and "Traceback" not in err
        assert 1 <= got["counts"]["done"] < 8 and set(got["counts"]) <= {"done", "killed"}
        assert {d["status"] for d in Store(home).ls()} <= {"done", "killed"}
        again = json.loads(opml_sweep(*command).stdout)
        assert again["counts"] == {"cached": got["counts"]["done"], "done": 8 - got["counts"]["done"]}
    finally:
        for p in scheduler, worker: p.kill(); p.wait()


def test_dask_runs_are_seen_live_and_can_be_pruned(home, prunable, cluster):
    s = sweep(prunable(), {"bad": list(range(10))}, objective="loss", pruner="median", executor=cluster.scheduler_address)
    assert s.ok and s.counts.get("pruned", 0) >= 2 and s.best.params["bad"] == 0
