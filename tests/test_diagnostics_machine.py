"""Experiments that are killed, stores under many writers, searches that go on, the board in a browser."""
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import figures
import numpy as np
import pandas as pd
import pytest

from opml_wb.core.kit.procs import born, descendants
from opml_wb.diagnostics import Conditioned, Models, Pipeline, available, fio_runs
from opml_wb.diagnostics.disturb import ledger as ledgers
from opml_wb.diagnostics.support.boards import board
from opml_wb.diagnostics.support.serve import FileStore, Results
from opml_wb.diagnostics.telemetry import OUTCOMES, WORKLOAD, large_io_story


def until(done, seconds=60):
    "Wait for a state; its last value."
    end = time.monotonic() + seconds
    while not (value := done()) and time.monotonic() < end: time.sleep(.05)
    return value


DRIVER = """
import sys
from opml_wb.diagnostics import Experiment
for i, row in enumerate(Experiment({{"bs_kib": 4, "target_iops": 100}}, {faults}, seconds=120, period=.3, block=40, seed=1, place={place!r}).rows()):
    print(row["fault"], flush=True)
"""


def driven(home, place, faults):
    "Start an experiment; (process, its token) once a fault is on."
    env = {**os.environ, "OPML_HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(faults=faults, place=str(place))], env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip(): break
    [path] = (home/"diagnostics"/"ledgers").glob("*.jsonl")
    return process, path.stem


can = set(available().query("works").fault)


@pytest.mark.skipif(not {"cpu_hog", "throttle"} <= can or not shutil.which("fio"), reason="needs fio, stress-ng, root and control groups")
@pytest.mark.parametrize("fault", ["cpu_hog", "throttle", "noisy_disk", "network_delay"])
def test_nothing_of_a_killed_experiment_is_left(tmp_path, fault):
    "kill -9 of the driver: its guard ends the processes, removes control groups, scratch files and the ledger."
    if fault not in can: pytest.skip(f"{fault}: {available().set_index('fault').why[fault]}")
    process, token = driven(tmp_path/"home", tmp_path, [fault])
    ours = descendants(process.pid)
    assert ledgers.leftovers(token)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = tmp_path/"home"/"diagnostics"/"ledgers"
    assert until(lambda: not list(folder.iterdir()), 120)
    assert ledgers.leftovers(token) == [] and not list(tmp_path.glob("opml-*"))
    assert until(lambda: not any(map(born, ours)), 120)          # also those that wrote over their mark


@pytest.mark.skipif(not {"cpu_hog", "throttle"} <= can or not shutil.which("fio"), reason="needs fio, stress-ng, root and control groups")
def test_the_janitor_follows_when_the_guard_is_killed_too(tmp_path):
    process, token = driven(tmp_path/"home", tmp_path, ["throttle"])
    guards = [p for p in descendants(process.pid)
              if b"settle" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(guards) == 1
    for pid in (*guards, process.pid): os.kill(pid, signal.SIGKILL)
    process.wait()
    assert list(Path("/sys/fs/cgroup").glob(f"*/opml-{token}"))            # something is left to do
    assert until(lambda: ledgers.janitor(tmp_path/"home"/"diagnostics"/"ledgers"), 120)
    assert ledgers.leftovers(token) == [] and not list(tmp_path.glob("opml-*"))


def delayed():
    "Skip by name where there is no link."
    if "network_delay" not in can: pytest.skip(available().set_index("fault").why["network_delay"])
    if not shutil.which("fio"): pytest.skip("needs fio")


def test_a_delay_of_the_network_is_felt_by_the_victim_alone(tmp_path):
    "Round trips take 25 ms more with the fault; the machine's own interfaces are what they were."
    from opml_wb.diagnostics import Experiment
    delayed()
    before = sorted(os.listdir("/sys/class/net"))
    told = Experiment({"bs_kib": 4, "target_iops": 50}, "network_delay", seconds=60, period=.3, block=1, place=tmp_path)
    rows = []
    for row in told.rows():
        rows.append(row)
        assert sorted(os.listdir("/sys/class/net")) == before
        if {r["fault"] for r in rows} == {"", "network_delay"}: break
    trip = {r["fault"]: r["outcome.net_p50_us"] for r in rows}
    assert trip["network_delay"] > trip[""] + 20_000 and trip["network_delay"] > 25_000
    assert not list(tmp_path.glob("opml-*"))


def test_a_link_answers_in_order_and_says_why_it_cannot(tmp_path, monkeypatch):
    from opml_wb.diagnostics.disturb import network
    if "network_delay" in can:
        with ledgers.Ledger(tmp_path, guard=False) as ledger:
            link = network.Link(ledger, tmp_path/"delay_ms")
            (tmp_path/"delay_ms").write_text("300")
            assert np.isnan(link.ask(timeout=.01))               # its answer comes late ...
            (tmp_path/"delay_ms").unlink()
            assert link.ask(timeout=30.) > 0 and link.ask(timeout=30.) > 0   # ... and is not taken for another's
            link.close()
    monkeypatch.setattr(network, "TUN", str(tmp_path/"none"))
    assert "modprobe tun" in network._tried()


LIVE = """
import sys
from opml_wb.diagnostics.disturb.live import Injections, each
told = Injections(["noisy_disk"], 3, learn_s=1, wait_s=1.5, hold=2, period=.3, place={place!r})
rows = told.run({keep!r}, lambda rows: print(len(rows), flush=True))
print("whole", len(each(rows)), rows[-1]["nth"], flush=True)
"""


def test_injections_go_on_where_they_were_killed(tmp_path):
    "kill -9 after the second of three: its last one is made anew, the first one is kept, and the file goes when all are done."
    if "noisy_disk" not in can: pytest.skip("needs fio")
    keep, code = tmp_path/"live.jsonl", LIVE.format(place=str(tmp_path), keep=str(tmp_path/"live.jsonl"))
    env = {**os.environ, "OPML_HOME": str(tmp_path/"home")}
    driver = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    driver.stdout.readline()
    assert until(lambda: '"nth": 1' in keep.read_text(), 120)
    driver.kill()
    driver.wait()
    first = [r for r in map(json.loads, keep.read_text().splitlines()[1:]) if r["nth"] == 0]
    again = subprocess.run([sys.executable, "-c", code.replace("len(rows)", "rows[0]['t']")], env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert float(again.stdout.split()[0]) == first[0]["t"] and again.stdout.splitlines()[-1] == "whole 3 2"
    assert not keep.exists()


def test_who_flushes_is_named_before_who_computes():
    "A neighbour was busy before; the disk gets slow when another one waits for it: that one is named, whatever the sizes."
    from opml_wb.diagnostics.support.culprit import Culprits
    def used(**rows): return pd.DataFrame.from_dict(rows, orient="index", columns=["cpu", "io", "rss", "blocked"]).rename_axis("command")
    normal = Culprits().learn(used(db=[.1, 1e6, 1e8, 0]))
    now = used(db=[.1, 1e6, 1e8, 0], build=[2., 0, 0, 0], flusher=[.1, 5e6, 1e7, .5])
    assert normal.judge(now).command.tolist() == ["build", "flusher"]
    assert normal.judge(now, {"outcome.write_p99_us"}).command.tolist() == ["flusher", "build"]
    assert normal.judge(now, {"outcome.cpu_us"}).command.tolist() == ["build", "flusher"]
    assert normal.judge(now, lately=used(build=[2., 0, 0, 0])).command.tolist() == ["flusher", "build"]
    assert normal.judge(used(db=[.1, 1e6, 1e8, 0]), {"outcome.cpu_us"}).empty


def test_hours_of_normals_are_recorded_and_replayed(tmp_path):
    "What rings in them is counted with an interval; other experiments' readings are no normals."
    from opml_wb.core.kit.files import append
    from opml_wb.diagnostics.disturb import normals
    path, rng = tmp_path/"normals.jsonl", np.random.default_rng(0)
    for t in range(0, 4 * 3600, 30):
        slow = 20. if t in (9000, 9030, 9060, 12000, 12030) else 1.
        row = {"outcome.cpu_us": slow * rng.uniform(60, 70), "foreign.cpu": .2}
        append(path, {"t": t, "row": row, "used": {"db": [.1, 0, 1e6, 0]}, "experiment": 12000 <= t <= 12030})
    told = normals.replay(path)
    assert (told["slow"], told["alone"], told["newcomers"]) == (1, 1, 0)
    assert told["hours"] > 3.8 and told["slow_lo"] < 1 / told["hours"] < told["slow_hi"] < 1.5
    path.write_text("no json\n{}\n")
    with pytest.raises(ValueError, match="no reading"): normals.replay(path)


WRITER = """
import os, pickle, sys, random
from opml_wb.diagnostics import Models
models, me = Models({root!r}), int(sys.argv[1])
print("ready", flush=True)
for i in range(1000):
    v = models.publish("nvme", {{"whole": list(range(2000)), "by": me}}, {{"i": i}})
    if i % 2 == 0: models.mark_stable(v)
    if i % 5 == 4:
        try: models.rollback("nvme")
        except Exception as e: assert "stable" in str(e), e
"""


def test_models_stay_whole_under_writers_that_are_killed(tmp_path):
    "Eight writers, killed one by one: what is resolved is whole and stable, the history names each version."
    models = Models(tmp_path/"store")
    models.mark_stable(models.publish("nvme", {"whole": list(range(2000)), "by": -1}))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER.format(root=str(tmp_path/"store")), str(k)], stdout=subprocess.PIPE, text=True) for k in range(8)]
    for w in writers: assert w.stdout.readline()
    for w in writers:
        before = len(models.history())
        assert until(lambda: len(models.history()) > before + 3)
        w.kill()
        w.wait()
        v = models.served("nvme")
        assert models.versions().stable[v] and models.resolve("nvme")["whole"] == list(range(2000))
    told = models.history()
    published = told[told.op == "publish"].version.tolist()
    assert published == list(range(1, len(published) + 1)) and set(models.versions().index) == set(published)
    assert all(r["kind"] == "dict" for r in models.lineage(models.served("nvme")))


SEARCH = """
from opml_wb.diagnostics.detect.searching import search, simulated
found = search(*simulated(0, 400), transforms=["none"], selectors=["all"], detectors=["residual", "kmeans"], window=20)
print(found.table.to_json(double_precision=15), flush=True)
"""


def finished(home):
    "The keys of the runs that ended well."
    told = [json.loads(p.read_text()) for p in home.glob("runs/*/run.json")]
    return [r["key"] for r in told if r["status"] == "done"]


def test_a_search_goes_on_where_it_was_killed(tmp_path):
    "kill -9 of the driver in the middle: the same command ends with the choice of a search that was never killed, and executes no run twice."
    from opml_wb.diagnostics.detect.searching import search, simulated
    env = {**os.environ, "OPML_HOME": str(tmp_path)}
    driver = subprocess.Popen([sys.executable, "-c", SEARCH], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert until(lambda: len(finished(tmp_path)) >= 2 or driver.poll() is not None, 600) and driver.poll() is None
    driver.kill()
    driver.wait()
    known = finished(tmp_path)
    again = subprocess.run([sys.executable, "-c", SEARCH], env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    told = pd.read_json(io.StringIO(again.stdout.strip().splitlines()[-1]))
    here = search(*simulated(0, 400), transforms=["none"], selectors=["all"], detectors=["residual", "kmeans"], window=20, sweep=False).table
    assert told.config.tolist() == here.config.tolist() and (told.share < 1).tolist() == (here.share < 1).tolist()
    np.testing.assert_allclose(told.quality, here.quality, rtol=1e-6)
    keys = finished(tmp_path)
    assert set(known) <= set(keys) and len(keys) == len(set(keys)) > len(known)


def test_a_search_says_what_it_tried_within_its_time(tmp_path, monkeypatch):
    from opml_wb.diagnostics.detect.searching import search, simulated
    X, y = simulated(0, 400)
    few = search(X, y, budget_s=0, sweep=False)
    assert 1 <= len(few.table) < 20 and "default" in few.verdict
    models = Models(tmp_path)
    v = few.publish(models, "nvme")
    assert models.lineage(v)[0]["data"] == {"table": few.data, "pipeline": few.config}
    for label, said in ((y[:-1], "expected 400 labels"), (np.where(y, "yes", "no"), "expected 0 and 1"), (y * 2, "expected 0 and 1")):
        with pytest.raises(ValueError, match=said): search(X, label, sweep=False)


@pytest.mark.parametrize("recording", ["first", "second", "third"])
def test_the_papers_story_on_real_runs(recording):
    told = large_io_story(fio_runs(recording), range(4)).groupby("model")[["auroc", "large"]].mean()
    assert told.large["v1"] > .4 and told.large["conditioned"] <= .15
    assert told.auroc["conditioned"] > told.auroc["v2"] + .03 > told.auroc["v1"]


def test_models_are_pickled_whole(tmp_path):
    runs = fio_runs()
    quiet = runs[runs.fault == ""]
    model = Conditioned(WORKLOAD, OUTCOMES).fit(quiet)
    models = Models(tmp_path)
    models.mark_stable(models.publish("a", model, run="r1", data={"fio": "5f"}))
    np.testing.assert_array_equal(models.resolve("a").score(quiet), model.score(quiet))
    assert models.lineage(1)[0]["run"] == "r1" and models.lineage(1)[0]["data"] == {"fio": "5f"}
    for detector in ("residual", "autoencoder", "kmeans"): pickle.dumps(Pipeline(detector=detector).fit(quiet[OUTCOMES].ffill()))


def test_the_board_of_500_systems_in_a_browser(tmp_path):
    "All rows, worst first; a click tells evidence, cause and advice; nothing is asked of anybody else."
    sync = pytest.importorskip("playwright.sync_api")
    if not figures.CHROMIUM: pytest.skip("needs chromium")
    results = Results(FileStore(tmp_path/"r.db"))
    rng = np.random.default_rng(0)
    for i, score in enumerate(rng.exponential(size=500)):
        results.put(f"host-{i:03}", score, 2., config="nvme", evidence=[{"outcome": "read_p99_us", "expected": 900., "seen": 9000.}],
                    causes=[{"node": "noisy <disk>", "evidence": ["busy: 9 against 2"], "advice": "move it", "confidence": .8}])
    page_file = board(results, tmp_path/"board.html")
    with sync.sync_playwright() as p:
        browser = figures.browser_of(p)
        page, asked = browser.new_page(), []
        page.on("request", lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())
        rows = page.locator("tbody tr")
        assert rows.count() == 500 and rows.first.locator("td").first.inner_text() == results.fleet().system[0]
        rows.nth(3).click()
        told = page.locator("#detail").inner_text()
        assert "read_p99_us" in told and "noisy <disk>" in told and "move it" in told
        page.fill("input", "host-123")
        assert rows.count() == 1
        browser.close()
    assert all(u.startswith(("file:", "data:")) for u in asked), asked


def test_watching_names_the_newcomer():
    from opml_wb.diagnostics.support import culprit
    normal = culprit.Culprits()
    for used in culprit.watch(1.5, .3): normal.learn(used)
    code = "import ctypes, time\nctypes.CDLL(None).prctl(15, b'greedy')\nheld = bytearray(b'x') * (500 << 20)\ntime.sleep(120)"
    hog = subprocess.Popen([sys.executable, "-c", code])
    try:
        def named():
            return any("greedy" in set(normal.judge(used).command) for used in culprit.watch(1., .5))
        assert until(named)
    finally:
        hog.kill()
        hog.wait()
