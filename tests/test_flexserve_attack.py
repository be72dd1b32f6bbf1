"""Clients that cost a server much, beside eight that cost it little: the good ones are answered, the honest large ones too, and health is told throughout."""
import base64
import json
import threading
import zlib

import pytest
from conftest import until
from test_flexserve_server import FILES, MULTI, PICTURES, ask, body, form, metric, place, run, wrong  # noqa: F401

from opml_wb.core.record.models import ModelStore
from opml_wb.flexserve import Bundle, Client, Engine
from opml_wb.flexserve.inputs.images import decode
from opml_wb.flexserve.serve import Server
from opml_wb.flexserve.measure.attack import Attack, bomb, photograph, watched


@pytest.fixture(scope="module")
def pictures(place):  # noqa: F811
    "A server of two networks that see every picture at 24 x 24, two workers; what each says of FILES, and of photographs of 12 megapixels."
    import torch
    from opml_wb.flexserve.model import zoo
    torch.manual_seed(5)
    transform = {"resize": [24, 24], "mean": [.5, .5, .5], "std": [.25, .25, .25]}
    spec = [{"name": n, "arch": f"opml_wb.flexserve.model.zoo:{n}", "weights": getattr(zoo, n)().state_dict(), "classes": ["no", "yes"],
             "transform": transform} for n in ("mlp", "convnet")]
    bundle = Bundle.create(place / "resized", spec, golden=PICTURES[:4])
    store = ModelStore(place / "home" / "models")
    store.promote("resized", store.publish("resized", bundle.dir))
    engine, photos = Engine.load(bundle, "torch"), [photograph(12, n) for n in range(3)]
    def says(files): return {name: row.tolist() for name, row in zip(engine.names, engine.infer([decode(f) for f in files]).labels)}
    with Server("resized", engine="torch", watchdog_s=2) as server: yield server, {1: says(FILES)}, photos, says(photos)


def modest(client, n):
    "What client number `client` asks at its turn `n`: one to four small pictures."
    k, m = (3 * (client + n)) % 50, 1 + (client + n) % 4
    return (k, m), form(FILES[k:k + m])


def attacked(pictures, size, rounds):
    "Eight good clients while everything harmful is asked for: (their replies, the wrong ones, what the attacker was told, waits for health)."
    server, says, _, _ = pictures
    attack = Attack(server.url)
    with watched(lambda: ask(server.url, "GET", "/health/live", limit=300)) as live:
        attack.all(size)
        try:
            assert until(lambda: metric(server.url, "flexserve_waiting_jobs ") > 1, 120)   # it has begun to hurt: what is refused at once does not wait
            replies = run(server.url, lambda client, n: modest(client, n) if n < rounds else None, 8)
        finally: attack.close()
    return replies, wrong(replies, says), attack.asked, live


def unharmed(server):
    "No picture was called poison, no worker lost, every background task is well."
    return (not metric(server.url, 'flexserve_bad_images_total{code="poison"}') and not metric(server.url, "flexserve_worker_restarts_total")
            and all(t["ok"] for t in Client(server.url).call("GET", "/health/ready")["tasks"].values()))


def test_an_attacker_starves_nobody(pictures):
    """Bombs, photographs, headers that lie, large JSON, slow bodies and half-open connections, all at once: eight good clients get their
    answers, the right ones; nobody's picture is called poison, and no worker is killed."""
    replies, bad, _, live = attacked(pictures, .3, rounds=12)
    assert len(replies) == 96 and len(bad) <= .01 * len(replies), bad[:5]
    assert len(live) > 5 and unharmed(pictures[0])


def test_honest_large_pictures_are_answered(pictures):
    "Photographs of 12 megapixels, many at once on a machine that is busy: each is answered, and right; none is called poison."
    server, _, photos, says = pictures
    burners = [threading.Thread(target=lambda: [zlib.crc32(b"x" * (1 << 20)) for _ in range(3000)]) for _ in range(4)]
    for b in burners: b.start()
    for _ in range(3):
        got = Client(server.url).batch(photos * 2, deadline_ms=600_000)
        assert got.models == {name: row * 2 for name, row in says.items()} and not got.errors
    for b in burners: b.join()
    assert unharmed(server)


def test_real_bombs_are_refused_or_answered(pictures):
    "A few KB that are 39 megapixels: decoded, answered; 41 megapixels: refused unread; both beside a good picture."
    server, says, _, _ = pictures
    client = Client(server.url)
    for mode in ("1", "L", "RGBA"):
        answer = client.batch([FILES[0], bomb(39, mode), bomb(41, mode)], on_error="skip", deadline_ms=600_000)
        assert [(e["index"], e["code"]) for e in answer.errors] == [(2, "pixels")]
        assert [row[0] for row in answer.models.values()] == [row[0] for row in says[1].values()]
        assert all(row[1] is not None and row[2] is None for row in answer.models.values())
    status, _, said = ask(server.url, "POST", "/batch", body([bomb(39, "RGBA")] * 256), limit=300, **MULTI)
    assert status == 413 and "s of CPU to decode" in json.loads(said)["error"]


def test_large_bodies_are_parsed_elsewhere(pictures):
    "A picture in 40 MB of JSON is answered; what is no JSON is refused with its reason, fields of MBs too; a large form as a small one."
    server, says, _, _ = pictures
    def predict(text):
        status, _, said = ask(server.url, "POST", "/v1/predict", text, limit=300, Content_Type="application/json")
        return status, json.loads(said)
    given = json.dumps({"images": [{"b64": base64.b64encode(FILES[0]).decode()}], "models": ["mlp"]}).encode()
    status, said = predict(given[:-1] + b" " * (40 << 20) + b"}")
    assert status == 200 and said["models"] == {"mlp": says[1]["mlp"][:1]}
    status, said = predict(given[:-1] + b" " * (1 << 20))
    assert status == 400 and "no JSON" in said["error"]
    assert predict(json.dumps({"images": [{"b64": "", "id": "x" * (3 << 20)}]}).encode())[0] == 413
    status, _, said = ask(server.url, "POST", "/batch", body([FILES[0], b"x" * (5 << 20)]), limit=300, **MULTI)
    assert status == 422 and [e["index"] for e in json.loads(said)["errors"]] == [1]


@pytest.mark.slow
def test_an_attacker_at_the_limits_starves_nobody(pictures):
    "As above, everything just under the server's limits."
    replies, bad, asked, _ = attacked(pictures, 1., rounds=20)
    assert len(replies) == 160 and len(bad) <= 1, bad[:5]
    assert unharmed(pictures[0]) and {what for what, *_ in asked} == {"bombs", "many bombs", "promises", "photographs", "json"}
