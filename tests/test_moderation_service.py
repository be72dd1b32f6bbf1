"""Moderation's service with real endpoints while its parts are killed, and the console in a browser."""
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import figures
import numpy as np
import pytest

from opml_wb.core.record.models import ModelStore
from opml_wb.moderation import Decisions, Listing, Market, Proxy, ReviewConsole, TopicModel, encode
from opml_wb.moderation.flow.queue import LeaseLost, SqliteQueue
from opml_wb.moderation.flow.service import InProcess, Publisher, publish_topics, to_json
from opml_wb.moderation.flow.worker import Service, queues


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true(): return True
        time.sleep(.05)
    return False


@pytest.fixture(scope="module")
def shop():
    market = Market(rate=500, violations=.03, seed=1)
    days = market.day(0) + market.day(1)
    return market, days, {t: TopicModel("lr", t).fit(days, market.violates(days, t)) for t in market.topics}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_listing_that_tells_no_time_was_listed_when_it_was_judged(shop, tmp_path):
    "In the lake, which is asked for what was known when, it would stand in 1970."
    _, _, models = shop
    asked, told = (SqliteQueue(tmp_path/"q.db", name) for name in ("listings", "predicted"))
    asked.put_many([(x.id, to_json(x)) for x in (Listing("bare", "dagger"), Listing("dated", "dagger", time=1e9))])
    before = time.time()
    assert Proxy(asked, told, InProcess(models), {}).step() == 2
    bare, dated = (json.loads(x.body)["time"] for x in told.claim(2))
    assert before <= bare <= time.time() and dated == 1e9


@pytest.mark.parametrize("odd", [1.7e12, "2024-01-01", -5])
def test_no_alert_fails_by_its_time(shop, tmp_path, odd):
    "Neither a listing whose time is none, nor a prediction that was kept before such were masked."
    _, _, models = shop
    asked, told, review = (SqliteQueue(tmp_path/"q.db", name) for name in ("listings", "predicted", "review"))
    asked.put("new", json.dumps({"id": "new", "title": "dagger", "time": odd}))
    assert Proxy(asked, told, InProcess(models), {"*": 0.}).step() == 1
    told.put("old", json.dumps({"id": "old", "time": odd, "scores": {"w": .9}, "version": 1, "alerts": ["w"], "listing": {"id": "old"}}))
    kept, before = [], time.time()
    class Lake:
        def write(self, name, frame, keys, event_time): kept.append(frame)
    assert Publisher(told, review, Lake()).step() == 2 and {x.key for x in review.claim(9)} == {"new", "old"}
    assert (kept[0].time.map(lambda t: before - 60 <= t.timestamp() <= time.time())).all()


def test_nothing_is_lost_while_proxy_publisher_and_endpoint_are_killed(shop, tmp_path):
    "Each listing is predicted once, alerted ones reach the review queue once; a new version takes over on the way."
    from opml_wb.flexserve.serve import Server
    from opml_wb.provenance import FeatureStore
    market, _, models = shop
    home, where, port = tmp_path / "home", str(tmp_path / "q.db"), free_port()
    store = ModelStore(home / "models")
    publish_topics(models, store=store)
    today = [x for d in (2, 3) for x in market.day(d)]
    server = Server("moderation", home=home, workers=1, port=port)
    try:
        with Service(where, server.url, dict.fromkeys(market.topics, .3), tmp_path / "lake", per_worker=50, most=2, lease_s=4) as service:
            listings, predicted, review = queues(where)
            half = len(today) // 2
            listings.put_many([(x.id, to_json(x)) for x in today[:half]])
            assert until(lambda: listings.depth < half)
            service.proxies.running[0].kill()
            service.tick()
            service.publisher.running[0].kill()
            service.tick()
            server.process.kill(); server.process.wait()
            publish_topics({**models, "money": TopicModel("lr", "money").fit(today, market.violates(today, "money"))}, store=store)
            server = Server("moderation", home=home, workers=1, port=port)
            listings.put_many([(x.id, to_json(x)) for x in today[half:]])
            def done():
                service.tick()
                return not listings.depth and not predicted.depth
            assert until(done, 240), (listings.depth, predicted.depth)
    finally: server.close() if hasattr(server, "close") else server.process.kill()
    import deltalake
    assert FeatureStore(tmp_path / "lake").tables() == ["predictions"]
    frame = deltalake.DeltaTable(str(next((tmp_path / "lake").rglob("_delta_log")).parent)).to_pandas().drop_duplicates(["id", "topic"], keep="last")
    assert set(frame.id) == {x.id for x in today} and set(frame.version) == {1, 2}
    got = []
    while leases := review.claim(100): got += [json.loads(x.body) for x in leases]; review.ack(leases)
    ids = [g["listing"]["id"] for g in got]
    assert len(ids) == len(set(ids)) and set(ids) == set(frame.id[frame.alerted])
    assert len(listings.dead()) == len(predicted.dead()) == 0


@pytest.fixture
def small(tmp_path):
    "A folder on a disk of 24 MB, and what fills it: (folder, fill() -> the file that takes the rest of it)."
    (at := tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", at], capture_output=True).returncode: pytest.skip("needs root, to mount a small disk")
    def fill():
        with open(at / "ballast", "wb", buffering=0) as ballast:
            while True:
                try: ballast.write(bytes(4096))
                except OSError: return at / "ballast"
    yield at, fill
    subprocess.run(["umount", "-l", at])


@pytest.mark.parametrize("what", ["lake", "queues and lake"])
def test_a_full_disk_costs_no_item_its_tries(shop, small, tmp_path, what):
    "Far more attempts than an item has tries, on a disk that is full; then room, and each prediction is there."
    from opml_wb.moderation.flow.broker import Queue
    from opml_wb.moderation.flow.service import InProcess, Proxy, Publisher
    from opml_wb.provenance import FeatureStore
    market, _, models = shop
    at, fill = small
    listings, predicted, review = (Queue((tmp_path if what == "lake" else at) / "q.db", n, most_tries=2) for n in ("in", "predicted", "review"))
    proxy = Proxy(listings, predicted, InProcess(models), dict.fromkeys(market.topics, .3), lease_s=.01)
    publisher = Publisher(predicted, review, FeatureStore(at / "lake"), lease_s=.01)
    listings.put_many([(x.id, to_json(x)) for x in market.day(2)[:60]])
    assert proxy.step() == 32
    ballast, failed = fill(), 0
    for worker in (publisher, proxy) * 8:
        try: worker.step()
        except Exception: failed += 1          # of the disk: OSError, sqlite3's, Delta Lake's
        time.sleep(.02)
    assert failed >= 8 and not len(review.claim(9))
    ballast.unlink()
    assert until(lambda: proxy.step() + publisher.step() == 0 and not listings.depth and not predicted.depth)
    assert [*listings.dead().why, *predicted.dead().why] == []
    import deltalake
    frame = deltalake.DeltaTable(str(next((at / "lake").rglob("_delta_log")).parent)).to_pandas()
    assert len(set(frame.id)) == 60


def test_the_service_waits_a_full_disk_out(shop, small, tmp_path):
    "Queues and lake on a disk that is full for a while: each listing is predicted, and reviewed once if alerted."
    from opml_wb.flexserve.serve import Server
    market, _, models = shop
    (at, fill), home = small, tmp_path / "home"
    publish_topics(models, store=ModelStore(home / "models"))
    today = market.day(2)[:400]
    with Server("moderation", home=home, workers=1) as server, \
         Service(str(at / "q.db"), server.url, dict.fromkeys(market.topics, .3), at / "lake", least=1, most=1, lease_s=5) as service:
        listings, predicted, review = queues(str(at / "q.db"))
        listings.put_many([(x.id, to_json(x)) for x in today[:100]])
        assert until(lambda: not listings.depth and not predicted.depth)     # all of it works
        ballast = fill()
        try: listings.put_many([(x.id, to_json(x)) for x in today[100:]])
        except sqlite3.OperationalError: pass                               # refused, nothing half
        for _ in range(40): service.tick(); time.sleep(.1)
        ballast.unlink()
        listings.put_many([(x.id, to_json(x)) for x in today[100:]])
        def done():
            service.tick()
            return not listings.depth and not predicted.depth
        assert until(done), (listings.depth, predicted.depth)
    got = []
    while leases := review.claim(100): got += [json.loads(x.body) for x in leases]; review.ack(leases)
    import deltalake
    frame = deltalake.DeltaTable(str(next((at / "lake").rglob("_delta_log")).parent)).to_pandas().drop_duplicates(["id", "topic"], keep="last")
    assert [*listings.dead().why, *predicted.dead().why] == [] and set(frame.id) == {x.id for x in today}
    ids = [g["listing"]["id"] for g in got]
    assert len(ids) == len(set(ids)) and set(ids) == set(frame.id[frame.alerted])


def test_the_endpoint_scores_as_the_models_do(shop, tmp_path):
    from opml_wb.flexserve import Client
    from opml_wb.flexserve.serve import Server
    from opml_wb.moderation.flow.service import Proxy
    market, days, models = shop
    publish_topics(models, store=ModelStore(tmp_path / "models"))
    with Server("moderation", home=tmp_path, workers=1) as server:
        told, version = Proxy(None, None, Client(server.url), {}).score(days[:100])
        assert version == 1
        for topic, model in models.items(): assert np.abs(np.array(told[topic]) - model.score(days[:100])).max() <= 1e-5


# --- the console

@pytest.fixture
def desk(tmp_path, shop):
    market, days, _ = shop
    review = SqliteQueue(tmp_path / "q.db", "review")
    review.put_many([(x.id, json.dumps({"listing": json.loads(to_json(x)), "alerts": ["weapons"]}).encode()) for x in days[:40]])
    return ReviewConsole(review, Decisions(tmp_path / "q.db"), "ann", double=.2)


def test_twenty_decisions_by_keyboard_in_a_browser(desk):
    "The next listing comes in the answer to the key; undo takes one back; nothing is asked of the world outside."
    import uvicorn
    from playwright.sync_api import sync_playwright

    from opml_wb.moderation.flow.page import page
    if not figures.CHROMIUM: pytest.skip("needs chromium")
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(page(desk), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert until(lambda: server.started)
        with sync_playwright() as p:
            browser = figures.browser_of(p)
            tab, asked, took = browser.new_page(), [], []
            tab.on("request", lambda r: asked.append(r.url))
            tab.goto(f"http://127.0.0.1:{port}/")
            tab.wait_for_selector("#card h3")
            for i in range(20):
                key = tab.get_attribute("#card", "data-key")
                tab.keyboard.press("dk"[i % 2])
                tab.wait_for_function("k => document.getElementById('card').dataset.key != k", arg=key)
                took.append(tab.evaluate("window.took"))
            shown = tab.get_attribute("#card", "data-key")
            tab.keyboard.press("u")
            tab.wait_for_function("k => document.getElementById('card').dataset.key != k", arg=shown)
            assert "19 decided" in tab.inner_text("#said") and "image/png" in tab.inner_html("#card")
            browser.close()
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)
        assert len(desk.decisions.frame()) == 19
        print(f"\nms to the next listing: median {np.median(took):.0f}, most {max(took):.0f}")
    finally: server.should_exit = True; thread.join(10)


def test_second_looks_go_to_somebody_else_and_agreement_is_told(desk):
    while desk.item(): desk.decide(len(desk.made) % 3 == 0)
    bob, seen = ReviewConsole(desk.queue, desk.decisions, "bob", double=.2), 0
    while bob.item() and seen < 40:
        assert bob.item()["round"] == "second"
        bob.decide(False); seen += 1
    told = desk.decisions.agreement()
    assert seen and told["n"] == seen and 0 <= told["agree"] <= 1
    assert desk.queue.depth == 0


def alerts(path, n):
    queue = SqliteQueue(path, "review")
    queue.put_many([(f"k{i}", json.dumps({"listing": {"id": f"k{i}"}, "alerts": ["weapons"]}).encode()) for i in range(n)])
    return queue


def test_a_full_disk_at_the_decisions_loses_no_alert(tmp_path):
    "More tries than there are listings, none kept: all still wait; with room again each is decided once."
    queue, kept = alerts(tmp_path / "q.db", 30), Decisions(tmp_path / "d.db")
    desk = ReviewConsole(queue, kept, "ann" * 700, double=1.)       # a row a page
    for odd in ("no", None, 2, "True"):
        with pytest.raises(ValueError, match="violates: expected True or False"): desk.decide(odd)
    kept.db.execute(f"pragma max_page_count={kept.db.execute('pragma page_count').fetchone()[0]}")
    failed = 0
    for _ in range(60):                                              # the first one may still fit
        try: desk.decide(True)
        except sqlite3.OperationalError: failed += 1
    assert failed >= 55 and queue.depth == 30 and len(queue.dead()) == 0              # decided ones wait for their second look
    assert len(desk.made) == len(kept.frame()) and desk.item()["key"] == f"k{len(desk.made)}"
    kept.db.execute("pragma max_page_count=1000000")
    while desk.item(): desk.decide(True)
    assert sorted(kept.frame().listing) == sorted(f"k{i}" for i in range(30)) and queue.depth == 30


def test_an_acknowledgement_that_fails_leaves_one_decision(tmp_path, monkeypatch):
    queue, kept = alerts(tmp_path / "q.db", 3), Decisions(tmp_path / "d.db")
    desk, real = ReviewConsole(queue, kept, "ann", double=0.), queue.ack
    def full(_): raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(queue, "ack", full)
    for _ in range(3):
        with pytest.raises(sqlite3.OperationalError): desk.decide(True)
    monkeypatch.setattr(queue, "ack", real)
    assert desk.decide(False)["key"] == "k1" and kept.frame().violates.tolist() == [False] and queue.depth == 2
    def refuse(*_, **__): raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(queue, "put", refuse)
    with pytest.raises(sqlite3.OperationalError): desk.undo()
    assert len(kept.frame()) == 1 and len(desk.made) == 1           # neither undone nor lost
    monkeypatch.undo()
    assert desk.undo()["listing"]["id"] == "k0" and len(kept.frame()) == 0


def test_a_console_killed_between_decision_and_acknowledgement_loses_nothing(tmp_path):
    "The listing comes again; who decides it then replaces what the killed one wrote, and a late one is refused."
    queue, kept, clock = alerts(tmp_path / "q.db", 1), Decisions(tmp_path / "d.db"), [0.]
    subprocess.run([sys.executable, "-c", f"""
import os
from opml_wb.moderation.flow.queue import LeaseLost, SqliteQueue
from opml_wb.moderation.flow.review import Decisions, ReviewConsole
queue = SqliteQueue({str(tmp_path / 'q.db')!r}, "review", now=lambda: 0.)
queue.ack = lambda _: os.kill(os.getpid(), 9)
ReviewConsole(queue, Decisions({str(tmp_path / 'd.db')!r}), "ann", double=0., lease_s=10.).decide(True)"""])
    queue.now = lambda: clock[0]
    assert (kept.frame().moderator.tolist(), queue.depth, queue.claim()) == (["ann"], 1, [])
    clock[0] = 11.
    slow, bob = (ReviewConsole(queue, kept, who, double=0., lease_s=10.) for who in ("cy", "bob"))
    assert slow.item()["key"] == "k0"
    clock[0] = 22.
    assert bob.decide(False) is None and queue.depth == 0
    with pytest.raises(LeaseLost): slow.decide(True)
    assert kept.frame()[["moderator", "violates"]].values.tolist() == [["bob", False]] and slow.item() is None


def test_what_moderators_see_tells_neither_arm_nor_score(desk):
    assert set(desk.item()) == {"key", "listing", "alerts", "round", "waiting"}
    assert not {"arm", "score", "scores", "propensity"} & set(desk.item()["listing"])
