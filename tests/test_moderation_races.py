"""Moderation's races in a running service: durable over kill -9, promoted, watched and rolled back by the file's rows alone."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from opml_wb.core.record.models import ModelError, ModelStore
from opml_wb.moderation import Decisions, Market, ReviewConsole, TopicModel
from opml_wb.moderation.flow.pilot import Pilot, served_arms
from opml_wb.moderation.flow.races import LiveRaces
from opml_wb.moderation.flow.service import publish_topics, to_json
from opml_wb.moderation.flow.worker import kept_at, queues

NOTES = """
import json, sys
sys.path.insert(0, {folder!r})
from test_moderation_races import stream, races_at
races = races_at(sys.argv[1])
for told in stream(1300):
    asked = races.note(told, {{"weapons": 1, "weapons@2": 2}})
    if asked: races.decisions.add(told["id"], "ann", told["bad"], topic="weapons")
print("done")
"""


def races_at(path): return LiveRaces(str(path), k=12, slots=4, every=100, days=8)


def stream(n, seed=0, first=0, good="weapons@2"):
    "Predictions of a bundle whose two models differ: `good` knows the violations."
    rng = np.random.default_rng(seed)
    for i in range(n):
        bad = bool(rng.random() < .1)
        s = {"weapons": float(rng.random()), "weapons@2": float(rng.random())}
        s[good] = s[good] / 2 + bad / 2
        id = f"{seed}-{first + i}"
        yield {"id": id, "scores": s, "alerts": [], "listing": {"id": id, "title": id}, "bad": bad}


def rows(path):
    db = sqlite3.connect(path)
    races = db.execute("select n, topic, role, current, new, low, high, ended from race").fetchall()
    return races, db.execute("select race, block, depth, arms from compared order by race, block").fetchall(), db.execute("select count(*), sum(asked) from seen").fetchone()


def test_a_race_killed_three_times_is_the_race_that_was_not(tmp_path):
    "Each time the process starts at the stream's beginning, as a queue would deliver again what wasn't acknowledged."
    for name in ("whole", "killed"): races_at(tmp_path / name).start("weapons", 1, 2)
    code = NOTES.format(folder=os.path.dirname(__file__))
    def begin(name): return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
    assert "done" in begin("whole").communicate()[0]
    db = sqlite3.connect(tmp_path / "killed")
    for kill in range(3):
        process, upto = begin("killed"), 330 * (kill + 1)
        while process.poll() is None and db.execute("select count(*) from seen").fetchone()[0] < upto: time.sleep(.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "done" in begin("killed").communicate()[0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    race = races_at(tmp_path / "killed").races("weapons")[0]
    assert races_at(tmp_path / "killed").told(race)["verdict"] == races_at(tmp_path / "whole").told(race)["verdict"] == "promote"


@pytest.fixture
def shop(tmp_path):
    "A store with two versions of one topic's model, the first served, and a pilot."
    market = Market(rate=300, violations=.05, seed=0)
    day, store = market.day(0), ModelStore(tmp_path / "models")
    for n in (40, 300):
        TopicModel("lr", "weapons").fit(day[:n], market.violates(day[:n], "weapons")).save(tmp_path / "m.npz")
        store.publish("moderation-weapons", tmp_path / "m.npz")
    store.promote("moderation-weapons", 1)
    return store, Pilot(races_at(tmp_path / "d.db"), store, train=None)


def live(pilot, n, seed, good, arms=None):
    "Let a bundle's predictions pass, each review decided; the arms are those of the store's bundle."
    arms = arms or served_arms(pilot.store, "moderation")
    other = next((a for a in arms if "@" in a), "weapons")
    with pilot.races.writing():
        for told in stream(n, seed, good="weapons@2" if good == "@" else "weapons"):
            told["scores"][other] = told["scores"]["weapons@2"] if other != "weapons" else told["scores"]["weapons"]
            if pilot.races.note(told, arms): pilot.races.decisions.add(told["id"], "ann", told["bad"], topic="weapons")


def until_said(pilot, word, good, first):
    for d in range(40):
        said = pilot.tick()
        if any(word in s for s in said): return said
        live(pilot, 100, first + d, good)
    raise AssertionError(pilot.status())


def test_a_block_decided_late_takes_no_verdict_back(tmp_path):
    "Blocks count from when they were compared and decided, also in a file that noted no such moment."
    races = LiveRaces(str(tmp_path / "r.db"), k=2, slots=2, every=10, days=12)
    race, said = races.start("weapons", 1, 2), []
    for b in range(12):
        races.db.execute("insert into compared (race, block, depth, arms) values (?,?,1,?)", (race.n, b, json.dumps({f"{b}c": "current", f"{b}n": "new"})))
    for b in (*range(1, 12), 0):
        for arm in "cn": races.decisions.add(f"{b}{arm}", "ann", arm == ("n" if b else "c"), topic="weapons")
        said.append(races.told(race)["verdict"])
    first = said.index("promote")
    assert first < 11 and set(said[first:]) == {"promote"}
    races.decisions.add("5n", "bob", True, "second", "weapons")            # a second look doesn't move its block
    assert races.interleaver(race).ended == [*range(1, 12), 0]


def test_a_version_enters_wins_is_watched_and_rolled_back_each_step_by_itself(shop):
    store, pilot = shop
    assert any("version 2 races against 1" in s for s in pilot.tick())
    until_said(pilot, "promoted", "@", 0)
    assert store.current("moderation-weapons") == 2 and served_arms(store, "moderation") == {"weapons": 2, "weapons@1": 1}
    assert [r.role for r in pilot.races.races("weapons")] == ["watch"]
    until_said(pilot, "rolled back", "@", 100)               # now the replaced one knows better
    assert store.current("moderation-weapons") == 1 and served_arms(store, "moderation") == {"weapons": 1}
    assert store.history("moderation-weapons").op.tolist()[-1] == "rollback"
    assert pilot.tick() == []                                # it has had its race
    told = pilot.status()["weapons"]
    assert told["last"]["verdict"] == "rolled back" and told["races"] == []


@pytest.mark.parametrize("step", ["promote", "end", "bundle"])
def test_a_promotion_cut_in_half_is_finished_by_the_next_pilot(shop, tmp_path, step, monkeypatch):
    "Before the store is told, between store and race, before the bundle."
    store, pilot = shop
    pilot.tick()
    for d in range(14): live(pilot, 100, d, "@")
    def cut(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if step == "promote": m.setattr(store, "promote", cut)
        if step == "end": m.setattr(pilot.races, "end", cut)
        if step == "bundle": m.setattr("opml_wb.moderation.flow.pilot.publish_topics", cut)
        with pytest.raises(KeyboardInterrupt): pilot.tick()
    again = Pilot(races_at(tmp_path / "d.db"), ModelStore(tmp_path / "models"))
    again.tick()
    assert again.tick() == [] and served_arms(store, "moderation") == {"weapons": 2, "weapons@1": 1}
    assert store.history("moderation-weapons").op.tolist().count("promote") == 2     # the first, and this one
    assert [(r.role, r.ended) for r in again.races.races("weapons", running=False)] == [("race", "promoted"), ("watch", None)]


def test_a_model_whose_scores_are_tied_floods_no_moderator(tmp_path):
    races = races_at(tmp_path / "d.db")
    race, asked = races.start("weapons", 1, 2), 0
    with races.writing():
        for told in stream(3600, good="weapons"):
            told["scores"]["weapons@2"] = .01
            if races.note(told, {"weapons": 1, "weapons@2": 2}):
                races.decisions.add(told["id"], "ann", told["bad"], topic="weapons")
                asked += 1
        for told in stream(300, seed=1): races.note(told, {"weapons": 1, "weapons@2": 2})
    assert asked <= 36 * 2 * 12 and races.told(races.races("weapons")[0])["verdict"] == "keep", race


def test_a_block_around_a_swap_counts_for_no_race(tmp_path):
    races = races_at(tmp_path / "d.db")
    races.start("weapons", 1, 2)
    with races.writing():
        for i, told in enumerate(stream(500)):
            arms = {"weapons": 1} if i == 350 else {"weapons": 1, "weapons@2": 2}
            races.note(told, arms)
    assert [b for _, b, *_ in rows(tmp_path / "d.db")[1]] == [1, 2, 4]


def test_a_bundle_made_by_hand_loses_no_topic(shop):
    store, pilot = shop
    models = {"weapons": TopicModel.load(store.resolve("moderation-weapons")), "money": TopicModel.load(store.resolve("moderation-weapons"))}
    publish_topics(models, store=store)
    with pytest.raises(ModelError, match="holds money"): pilot.tick()
    assert store.current("moderation") == 1


def test_a_file_of_decisions_from_before_topics_were_kept_is_read(tmp_path):
    db = sqlite3.connect(tmp_path / "old.db")
    db.execute("create table decision (n integer primary key autoincrement, listing text not null, moderator text not null, violates integer not null, "
               "round text not null, at real not null, withdrawn integer not null default 0)")
    db.execute("insert into decision (listing, moderator, violates, round, at) values ('a', 'ann', 0, 'first', 1.)")
    db.commit()
    kept = Decisions(tmp_path / "old.db")
    kept.add("b", "bob", True, topic="weapons")
    assert kept.labels("weapons").to_dict() == {"a": False, "b": True}


@pytest.mark.slow
def test_the_service_is_killed_in_a_race_and_its_successor_promotes(tmp_path, monkeypatch):
    "`opml moderation serve` as a process, kill -9 twice: no listing lost, each predicted once, the race goes on, no process is left."
    import psutil
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    market, store, where = Market(rate=1000, violations=.05, seed=1), ModelStore(tmp_path / "home" / "models"), str(tmp_path / "q.db")
    good = market.day(0) + market.day(1)
    for n in (120, 2000):
        TopicModel("lr", "weapons").fit(good[:n], market.violates(good[:n], "weapons")).save(tmp_path / "m.npz")
        store.publish("moderation-weapons", tmp_path / "m.npz")
    store.promote("moderation-weapons", 1)
    words = [sys.executable, "-m", "opml_wb.core.cli", "moderation", "serve", where, "--block", "150", "-k", "20", "--blocks", "8", "--after", "0", "--most", "1"]
    def begin(): return subprocess.Popen(words, stdout=subprocess.DEVNULL)
    def kin(): return [p for p in psutil.process_iter() if str(tmp_path / "home") in _env(p, "OPML_HOME")]
    service, waiting, kills, sent, truth, day = begin(), queues(where)[0], [1, 4], set(), {}, 2
    desk, races = ReviewConsole(queues(where)[2], Decisions(kept_at(where)), "ann", double=0), LiveRaces(kept_at(where))
    end = time.monotonic() + 400
    try:
        while store.current("moderation-weapons") == 1 and time.monotonic() < end:
            if waiting.depth < 100:
                today = market.day(day)[:400]
                day += 1
                truth |= dict(zip([x.id for x in today], market.violates(today, "weapons").tolist()))
                waiting.put_many([(x.id, to_json(x)) for x in today])
                sent |= {x.id for x in today}
            while item := desk.item(): desk.decide(truth[item["listing"]["id"]])
            if kills and races.db.execute("select count(*) from compared").fetchone()[0] >= kills[0]:
                kills.pop(0)
                service.kill(); service.wait()
                service = begin()
            time.sleep(.1)
        assert store.current("moderation-weapons") == 2 and not kills
        while (waiting.depth or queues(where)[1].depth) and time.monotonic() < end: time.sleep(.1)
        assert {r[0] for r in races.db.execute("select id from seen")} == sent
    finally: service.terminate(); service.wait()
    while kin() and time.monotonic() < end: time.sleep(.2)
    assert kin() == []


def _env(process, name):
    import psutil
    try: return process.environ().get(name, "") if process.pid != os.getpid() else ""
    except psutil.Error: return ""
