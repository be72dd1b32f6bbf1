"""Clients that cost a server much, beside eight that cost it little: the good ones are answered, the honest large ones too, and health is told throughout."""
import asyncio
import io
import json
import os
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import until
from PIL import Image
from test_flexserve_server import FILES, PICTURES, ask, form, metric, place, right, wrong  # noqa: F401

from opml_wb.core.record.models import ModelStore
from opml_wb.flexserve import Bundle, Client
from opml_wb.flexserve.serve import Server, encoded
from opml_wb.flexserve.serve.load_test import Connection, _timed, post  # noqa: F401

DECODED = 24, 24  # what the networks see


def saved(image, kind, **how):
    image.save(out := io.BytesIO(), kind, **how)
    return out.getvalue()


def photograph(megapixels, seed=0, quality=85, **how):
    "A JPEG of so many megapixels that is not flat."
    side = int((megapixels * 1e6) ** .5)
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (97, 101, 3), dtype=np.uint8))
    return saved(small.resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=quality, **how)


def bomb(megapixels, mode="1"):
    "A PNG of a few KB that really has so many megapixels: not its header alone."
    side = int((megapixels * 1e6) ** .5)
    return saved(Image.new(mode, (side, side)), "PNG", optimize=mode == "1")


def headers_only(width=6300, height=6300):
    "A tiny file whose header promises 40 megapixels and whose pixels never come."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pictures(place):  # noqa: F811
    "A server of two networks that see every picture at 24 x 24, two workers; what each says of FILES, and of 12-megapixel photographs."
    import torch
    from opml_wb.flexserve import Engine
    from opml_wb.flexserve.model import zoo
    from opml_wb.flexserve.model.images import decode
    torch.manual_seed(5)
    transform = {"resize": list(DECODED), "mean": [.5, .5, .5], "std": [.25, .25, .25]}
    spec = [{"name": n, "arch": f"opml_wb.flexserve.model.zoo:{n}", "weights": getattr(zoo, n)().state_dict(), "classes": ["no", "yes"],
             "transform": transform} for n in ("mlp", "convnet")]
    bundle = Bundle.create(place / "resized", spec, golden=PICTURES[:4])
    store = ModelStore(place / "home" / "models")
    store.promote("resized", store.publish("resized", bundle.dir))
    engine, photos = Engine.load(bundle, "torch"), [photograph(12, n) for n in range(3)]
    def says(files): return {name: row.tolist() for name, row in zip(engine.names, engine.infer([decode(f) for f in files]).labels)}
    with Server("resized", engine="torch", watchdog_s=2) as server: yield server, {1: says(FILES)}, photos, says(photos)


def begin(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


class Attack:
    "Threads that do harm from 127.0.0.2 until they are told to end; `asked`: [(what, status, answer)]."
    def __init__(self, url, source="127.0.0.2"):
        self.at, self.source = ("127.0.0.1", int(url.rpartition(":")[2])), source
        self.end, self.asked, self.threads, self.open = threading.Event(), [], [], []

    def connect(self): return socket.create_connection(self.at, 60, source_address=(self.source, 0))

    def send(self, what, message):
        "One request, its answer read."
        try:
            with self.connect() as s:
                s.sendall(message.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                data = b""
                while more := s.recv(1 << 16): data += more
        except OSError as e: self.asked.append((what, 0, str(e))); return
        head, _, body = data.partition(b"\r\n\r\n")
        self.asked.append((what, int(head.split()[1]) if head else 0, body[:300]))

    def again(self, what, message):
        "Ask again and again."
        def run():
            while not self.end.is_set(): self.send(what, message)
        self.threads.append(begin(run))

    def half_open(self, n):
        "So many connections that say nothing, or half a header, and are opened anew when they are cut."
        def run():
            while not self.end.is_set():
                self.open = [s for s in self.open if s.fileno() >= 0]
                while len(self.open) < n:
                    self.open.append(s := self.connect())
                    if len(self.open) % 2: s.sendall(b"POST /batch HTTP/1.1\r\nHost: x\r\nContent-Le")
                self.end.wait(1)
        self.threads.append(begin(run))

    def slow(self, size=60 << 20):
        "A large body, a byte at a time."
        def run():
            while not self.end.is_set():
                try:
                    with self.connect() as s:
                        s.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode())
                        while not self.end.is_set(): s.sendall(b" "); self.end.wait(.05)
                except OSError: pass
        self.threads.append(begin(run))

    def close(self):
        self.end.set()
        for s in self.open: s.close()
        for t in self.threads: t.join(120)


def large_json(megabytes):
    "JSON of so many MB: a picture and numbers nobody asked for."
    numbers = b"[" + b",".join([b"1234567"] * (megabytes * 131072)) + b"]"
    return post("/v1/predict", b'{"images": [], "policy": {"kind": "or", "target": ' + numbers + b"}}", "application/json")


def harm(attack, size):
    "All kinds of harm at once; `size` in 0..1 scales it: 1 is just under the server's limits."
    few = [bomb(39 * size), bomb(39 * size, "RGBA"), photograph(24 * size), photograph(24 * size, progressive=True)]
    attack.again("bombs", form(few, X_Deadline_Ms=600_000))
    attack.again("many bombs", form([bomb(39 * size)] * 40))
    attack.again("headers", form([headers_only()] * 256, X_Deadline_Ms=600_000))
    attack.again("photographs", form([photograph(24 * size)] * 4, X_Deadline_Ms=600_000))
    attack.again("json", large_json(int(60 * size)))
    for _ in range(4): attack.slow()
    attack.half_open(int(300 * size))


@contextmanager
def lives(url):
    "The longest wait for /health/live within the block: a list of one number, in s."
    longest, end = [0.], threading.Event()
    def run():
        while not end.is_set():
            began = time.monotonic()
            assert ask(url, "GET", "/health/live", limit=300)[0] == 200
            longest[0] = max(longest[0], time.monotonic() - began)
            end.wait(.1)
    thread = begin(run)
    try: yield longest
    finally: end.set(); thread.join()


def good(url, rounds, clients=8, together=lambda client, n: ((3 * (client + n)) % 50, 1 + (client + n) % 4)):
    "Eight clients that each ask `rounds` times for a few pictures: replies."
    from opml_wb.flexserve.serve.load_test import closed
    def request(client, n):
        if n >= rounds: return None
        k, m = together(client, n)
        return (k, m), form(FILES[k:k + m])
    return asyncio.run(closed(url, request, clients, 600))


def attacked(pictures, size, rounds):
    "(good replies, the wrong ones, the attack, the longest wait for health) while everything harmful is asked for."
    server, says, _, _ = pictures
    attack = Attack(server.url)
    with lives(server.url) as longest:
        harm(attack, size)
        try:
            assert until(lambda: metric(server.url, "flexserve_waiting_jobs ") > 3, 120)   # it has begun to hurt
            replies = good(server.url, rounds)
        finally: attack.close()
    return replies, wrong(replies, says), attack, longest[0]


def test_an_attacker_starves_nobody(pictures):
    """Bombs, photographs, headers that lie, large JSON, slow bodies and half-open connections, all at once: eight good clients get their
    answers, the right ones; nobody's picture is called poison, and no worker is killed."""
    server = pictures[0]
    before = metric(server.url, "flexserve_worker_restarts_total")
    replies, bad, attack, _ = attacked(pictures, .3, rounds=12)
    assert len(replies) == 96 and len(bad) <= .01 * len(replies), bad[:5]
    assert not [a for a in attack.asked if b"poison" in a[2]] and metric(server.url, "flexserve_worker_restarts_total") == before
    assert all(t["ok"] for t in Client(server.url).call("GET", "/health/ready")["tasks"].values())


def test_honest_large_pictures_are_answered(pictures):
    "Photographs of 12 megapixels, many at once on a machine that is busy: each is answered, and right; none is called poison."
    server, _, photos, says = pictures
    burners = [begin(lambda: [zlib.crc32(b"x" * (1 << 20)) for _ in range(3000)]) for _ in range(4)]
    for n in range(3):
        got = Client(server.url).batch(photos * 2, deadline_ms=600_000)
        assert got.models == {name: row * 2 for name, row in says.items()} and not got.errors
    for b in burners: b.join()


def test_real_bombs_are_refused_or_answered(pictures):
    "A few KB that are 39 megapixels: decoded, answered; 41 megapixels: refused unread; both beside a good picture."
    server, says, _, _ = pictures
    client = Client(server.url)
    for mode in ("1", "L", "RGBA"):
        answer = client.batch([FILES[0], bomb(39, mode), bomb(41, mode)], on_error="skip", deadline_ms=600_000)
        assert [(e["index"], e["code"]) for e in answer.errors] == [(2, "pixels")]
        assert [row[0] for row in answer.models.values()] == [row[0] for row in says[1].values()]
        assert all(row[1] is not None and row[2] is None for row in answer.models.values())
    many = ask(server.url, "POST", "/batch", form([bomb(39, "RGBA")] * 256).partition(b"\r\n\r\n")[2],
               Content_Type="multipart/form-data; boundary=load")
    assert many[0] == 413 and "s of CPU to decode" in json.loads(many[2])["error"]


def test_large_bodies_stall_nobody(pictures):
    "JSON of 40 MB is parsed elsewhere, pictures in it are answered; one that is no JSON is refused with its reason."
    server, says, _, _ = pictures
    body = json.dumps({"images": [{"b64": __import__("base64").b64encode(FILES[0]).decode()}], "models": ["mlp"],
                       "provenance": "ref"}).encode()
    status, _, answer = ask(server.url, "POST", "/v1/predict", body[:-1] + b" " * (40 << 20) + b"}", Content_Type="application/json")
    assert status == 200 and json.loads(answer)["models"]["mlp"] == says[1]["mlp"][:1]
    status, _, answer = ask(server.url, "POST", "/v1/predict", body[:-1] + b" " * (1 << 20), Content_Type="application/json")
    assert status == 400 and "no JSON" in json.loads(answer)["error"]
    ids = json.dumps({"images": [{"b64": "", "id": "x" * (3 << 20)}]}).encode()
    assert ask(server.url, "POST", "/v1/predict", ids, Content_Type="application/json")[0] == 413
    multi = form([FILES[0], b"x" * (5 << 20)]).partition(b"\r\n\r\n")[2]
    assert ask(server.url, "POST", "/batch", multi, Content_Type="multipart/form-data; boundary=load")[0] == 422
    assert not os.path.exists("/nowhere")


@pytest.mark.slow
def test_an_attacker_at_the_limits_starves_nobody(pictures):
    "As above, everything just under the server's limits."
    replies, bad, attack, longest = attacked(pictures, 1., rounds=40)
    assert len(bad) <= .01 * len(replies), bad[:5]
    assert not [a for a in attack.asked if b"poison" in a[2]]
