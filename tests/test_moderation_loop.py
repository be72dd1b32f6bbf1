"""Moderation's loop: decisions become labels, labels recorded runs, runs candidates, won races promotions, lost watches rollbacks."""
import numpy as np
import pytest

from opml_wb.core.record.models import ModelStore
from opml_wb.moderation import Market, TopicModel, loop as loops
from opml_wb.moderation.experiment import labelled
from opml_wb.moderation.goods.listings import read
from opml_wb.moderation.loop import Candidate, Loop, lineage, live


@pytest.fixture
def direct(monkeypatch, tmp_path):
    "Train in this process: for what happens after a training, which a recorded run would only slow."
    def train(topic, labels, kind="lr", seed=0, label="violates"):
        frame = labelled(labels)
        model = TopicModel(kind, topic, seed).fit(read(frame), frame.violates, frame.weight)
        path = tmp_path / f"{seed}.npz"
        model.save(path)
        return Candidate(model, path, {"run": f"r{seed}", "data": "", "listings": len(frame), "violations": int(frame.violates.sum())})
    monkeypatch.setattr(loops, "train", train)


def test_a_version_leads_to_its_run_and_its_table(tmp_path, monkeypatch):
    "By a recorded run; another table, or a run that isn't there, is said."
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    market = Market(rate=300, violations=.05, seed=1)
    day, store = market.day(0), ModelStore(tmp_path / "models")
    loop = Loop("weapons", 10, tmp_path / "loop", store=store)
    assert loop.begin(day, market.violates(day, "weapons")) == 1
    told = lineage("moderation-weapons", 1, store)
    assert told["chapter"] == "bench/retrain" and list(told["data"]) == [str(tmp_path / "loop" / "labels-1.parquet")]
    about = store.info("moderation-weapons", 1)["provenance"]
    path = store.resolve("moderation-weapons", version=1)
    store.publish("moderation-weapons", path, provenance={**about, "data": "0" * 64})
    with pytest.raises(LookupError, match="read other data"): lineage("moderation-weapons", 2, store)
    (tmp_path / "other.npz").write_bytes(b"another model")
    store.publish("moderation-weapons", tmp_path / "other.npz", provenance=about)
    with pytest.raises(LookupError, match="kept another model"): lineage("moderation-weapons", 3, store)
    store.publish("moderation-weapons", path, provenance={"run": "gone", "data": ""})
    with pytest.raises(LookupError, match="isn't there"): lineage("moderation-weapons", 4, store)


def test_days_lose_no_decision_and_a_better_model_is_served_after_its_race(direct, tmp_path):
    "The first model has seen a handful of violations; those of the following nights know far more."
    market = Market(rate=250, violations=.06, evasion=.5, adapt=0, seed=2)
    loop = Loop("weapons", 14, tmp_path, store=ModelStore(tmp_path / "models"), days=10, of=4, alpha=.2)
    first = market.day(0)[:150]
    loop.begin(first, market.violates(first, "weapons"))
    lived = live(loop, market, 14, warm=1)
    assert len(loop.decisions.frame()) == lived.reviews.sum() and (lived.reviews <= 28).all()
    events = lived.event[lived.event != ""].tolist()
    assert "promoted" in events and loop.served > 1, events
    versions = loop.store.versions(loop.name)
    assert loop.store.info(loop.name, 2)["metrics"]["verdict"] in ("promote", "keep") and len(versions) >= 2
    assert all((lived.labels >= lived.reviews) & (lived.trained != ""))


def test_a_promoted_model_that_is_worse_is_rolled_back_by_its_watch(direct, tmp_path):
    "From the promotion on only what the replaced model alerts is a violation."
    market = Market(rate=400, violations=.05, evasion=.5, seed=3)
    loop = Loop("weapons", 14, tmp_path, store=ModelStore(tmp_path / "models"), days=10, of=4)
    day = market.day(0)
    loop.begin(day[:120], market.violates(day[:120], "weapons"))
    better = TopicModel("lr", "weapons").fit(day, market.violates(day, "weapons"))
    better.save(tmp_path / "better.npz")
    second = loop.store.publish(loop.name, tmp_path / "better.npz")
    loop.store.mark_stable(loop.name, 1)
    loop.store.promote(loop.name, second)
    loop.replaced, loop.watch, event = 1, loops.Watch(4), ""
    for d in range(1, 30):
        for part in np.array_split(np.arange(len(today := market.day(d))), 4):
            asked = loop.block([today[i] for i in part])
            arm = loop.watch.race.blocks[-1].arm
            for id in asked: loop.decide(id, arm.get(id) == "new")
        event = loop.night()["event"]
        if event: break
    assert event == "rolled back" and loop.served == 1 and loop.watch is None
    assert "rollback" in loop.store.history(loop.name).op.tolist()


def test_a_training_that_fails_leaves_the_served_model_and_says_why(direct, tmp_path, monkeypatch):
    market = Market(rate=200, violations=.05, seed=4)
    day = market.day(0)
    loop = Loop("weapons", 8, tmp_path, store=ModelStore(tmp_path / "models"))
    loop.begin(day, market.violates(day, "weapons"))
    def broken(*_): raise RuntimeError("retrain of weapons: no space left")
    monkeypatch.setattr(loops, "train", broken)
    for id in loop.block(market.day(1)): loop.decide(id, False)
    assert loop.night() == {"trained": "", "labels": 8, "event": "retrain of weapons: no space left", "served": 1}
    assert loop.block([]) == []                          # a shift without traffic
    assert loop.night()["labels"] == 0
