"""The data registry against a server on this machine: what a notebook cannot hold."""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from opml_wb.core.record import data

BODY = os.urandom(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/missing": return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:100_000] if self.path == "/cut" else BODY)     # /cut: the line drops after a third

    def log_message(self, *a): pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.asked = []
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture
def home(tmp_path, monkeypatch, server):
    "A registry of our own in tmp_path/data, and an empty cache."
    root, cache = tmp_path/"data", tmp_path/"cache"
    (root/"a").mkdir(parents=True)
    (root/"a"/"shipped.bin").write_bytes(b"here")
    sha = hashlib.sha256(BODY).hexdigest()
    at = f"http://127.0.0.1:{server.server_port}"

    def add(source, sha=sha, file="a/x.bin"):
        return dict(file=file, bytes=len(BODY), sha256=sha, licence="CC0-1.0", description="noise", source=source)
    reg = {"a/shipped": add(dict(kind="shipped", maker="a:b"), hashlib.sha256(b"here").hexdigest(), "a/shipped.bin"),
           "a/lost": add(dict(kind="shipped", maker="a:b"), file="a/lost.bin")}
    for what, url in dict(good="/good", cut="/cut", missing="/missing").items():
        reg[f"a/{what}"] = add(dict(kind="url", url=at+url), file=f"a/{what}.bin")
    reg["a/wrong"] = add(dict(kind="url", url=at+"/good"), "0"*64, "a/wrong.bin")
    reg["a/offline"] = add(dict(kind="url", url="http://127.0.0.1:9/x"), file="a/offline.bin")
    for what in ("made", "half", "other", "needs"):
        reg[f"a/{what}"] = add(dict(kind="maker", maker=f"{__name__}:{what}", extra="vision"), file=f"a/{what}.bin")
    (root/"registry.json").write_text(json.dumps(reg))
    monkeypatch.delenv("OPML_DATA", raising=False)
    monkeypatch.setattr(data, "root", lambda: root)
    monkeypatch.setattr(data, "cache", lambda: cache)
    return cache


def made(path): Path(path).write_bytes(BODY)
def other(path): Path(path).write_bytes(BODY[::-1])
def needs(path): raise ImportError("no OpenCV here")


def half(path):
    Path(path).write_bytes(BODY[:10])
    raise OSError("no space left on device")


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() or f.name.startswith(".part"))


def test_download_once(home, server):
    assert data.find("a/good") is None and not home.exists()
    assert data.path("a/good").read_bytes() == BODY
    assert data.path("a/good") == data.find("a/good") == home/"a"/"good.bin"
    assert server.asked == ["/good"] and files(home) == ["a/good.bin"]
    assert data.verify("a/good")[0]["status"] == "ok"


@pytest.mark.parametrize("name, reason", [
    ("wrong", "hash"), ("cut", "IncompleteRead|Connection broken"), ("missing", "404"), ("offline", "127.0.0.1"),
    ("half", "no space left"), ("needs", "no OpenCV here")])
def test_failed_fetch_leaves_nothing_and_says_how(home, name, reason):
    with pytest.raises(data.MissingData, match=reason) as e: data.path(f"a/{name}")
    assert f"`opml data fetch a/{name}`" in str(e.value) and f"holds a/{name}.bin" in str(e.value)
    assert ("pip install 'opml_wb[vision]'" in str(e.value)) == (name in ("half", "needs"))
    assert isinstance(e.value, FileNotFoundError) and files(home) == []
    assert data.verify(f"a/{name}")[0]["status"] == "absent"


def test_failed_refetch_keeps_the_good_file(home, server):
    path = data.path("a/good")
    server.shutdown()
    server.server_close()
    with pytest.raises(data.MissingData): data.fetch("a/good", force=True)
    assert path.read_bytes() == BODY and files(home) == ["a/good.bin"]


def test_maker_with_other_bytes_is_kept_and_said(home):
    with pytest.warns(UserWarning, match="a/other was made, but its bytes differ"):
        assert data.path("a/other").is_file()
    assert data.verify("a/other")[0]["status"] == "differs"
    assert data.path("a/made").read_bytes() == BODY and data.verify("a/made")[0]["status"] == "ok"


def test_shipped(home):
    where = {d["name"]: d["where"] for d in data.ls()}
    assert where["a/shipped"] == "shipped" and where["a/lost"] == where["a/good"] == "absent"
    with pytest.raises(data.DataError, match=r"not in the cache \(shipped\)"): data.rm("a/shipped")
    with pytest.raises(data.MissingData, match="reinstall"): data.path("a/lost")
    data.path("a/shipped").write_bytes(b"gone")
    assert data.verify("a/shipped")[0]["status"] == "bad"


def test_rm_and_stale_parts(home):
    data.path("a/good")
    old, new = home/"a"/".part-old", home/"a"/".part-new"
    for f in (old, new): f.mkdir()
    os.utime(old, (1, 1))
    assert data.rm("a/good") == len(BODY) and files(home) == ["a/.part-new", "a/.part-old"]
    data.path("a/good")
    assert files(home) == ["a/.part-new", "a/good.bin"]       # what a killed download left is swept a day later


def test_opml_data_goes_first(home, tmp_path, monkeypatch):
    mine = tmp_path/"mine"
    (mine/"a").mkdir(parents=True)
    (mine/"a"/"good.bin").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPML_DATA", "mine")                   # relative: the answer is absolute all the same
    assert data.path("a/good") == mine/"a"/"good.bin"
    assert data.path("a/shipped").read_bytes() == b"here"
    assert data.verify("a/good")[0]["status"] == "bad"
    with pytest.raises(data.DataError, match="not in the cache"): data.rm("a/good")
    monkeypatch.setenv("OPML_DATA", str(tmp_path/"nowhere"))
    with pytest.raises(data.DataError, match="OPML_DATA=.*expected an existing folder"): data.ls()


def _fetch(out):
    try: out.put(hashlib.sha256(data.fetch("a/good", force=True).read_bytes()).hexdigest())
    except BaseException as e: out.put(repr(e))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the fixture's registry reaches the children by fork")
def test_two_processes_fetch_at_once(home, server):
    ctx = get_context("fork")
    out = ctx.Queue()
    kids = [ctx.Process(target=_fetch, args=(out,)) for _ in range(2)]
    for k in kids: k.start()
    assert [out.get(timeout=30) for _ in kids] == [hashlib.sha256(BODY).hexdigest()]*2
    for k in kids: k.join(10)
    assert files(home) == ["a/good.bin"]


def test_progress_of_a_download_inside_a_run(home, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_RUN_DIR", str(tmp_path))
    data.path("a/good")
    rows = [json.loads(line) for line in (tmp_path/"progress.jsonl").read_text().splitlines()]
    assert rows[0]["desc"] == "download good.bin" and (rows[-1]["i"], rows[-1]["n"]) == (len(BODY), len(BODY))


def test_import_is_light():
    heavy = "('pooch', 'numpy', 'requests', 'tqdm', 'cv2', 'pandas', 'platformdirs')"
    code = ("import sys, opml_wb.core.record.data as d; d.path('riann/sift_photos');"
            f"sys.exit(any(m in sys.modules for m in {heavy}))")
    env = {k: v for k, v in os.environ.items() if k != "OPML_DATA"}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_vision_is_named_where_it_is_absent(monkeypatch):
    from opml_wb.riann import data as sift
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'opml_wb\[vision\]'"): sift.sift_from_photos(10)


def test_full_set_is_large_enough_and_holds_no_query(tmp_path):
    pytest.importorskip("cv2", reason="needs the extra [vision]")
    pytest.importorskip("skimage", reason="needs the extra [vision]")
    import numpy as np

    from opml_wb.riann.data import make
    make(tmp_path/"full.npy", "full")
    full, query = np.load(tmp_path/"full.npy"), np.load(data.path("riann/sift_photos_query"))
    assert full.shape == (51_000, 128) and full.dtype == np.uint8
    rows = {r.tobytes() for r in full}
    assert len(rows) == 51_000 and not rows & {q.tobytes() for q in query}


def test_shipped_files_are_the_registry_s_and_small():
    shipped = [d for d in data.verify() if d["where"] == "shipped"]
    assert {d["name"] for d in shipped} >= {"riann/sift_photos", "riann/sift_photos_query"}
    assert {d["status"] for d in shipped} == {"ok"}
    sizes = {f: f.stat().st_size for f in data.root().rglob("*") if f.is_file()}
    assert max(sizes.values()) < 3e6 and sum(sizes.values()) < 12e6
    readme = (data.root()/"README.md").read_text()
    assert all(e["sha256"] in readme and f"{e['bytes']:,}" in readme for e in data.registry().values())
