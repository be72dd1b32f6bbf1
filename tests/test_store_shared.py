"""One PostgreSQL for several homes, artifacts at a URL, and what is said when either cannot be used."""
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, until

from opml_wb.core.record import artifacts
from opml_wb.core.record import store as s
from opml_wb.core.engine.run import Run, run
from opml_wb.core.record.store import Store, StoreError

BODY = ("n: int = 1", "from opml_wb import log\nimport numpy as np, pathlib, tempfile\nfor i in range(3): log.metric('m', n + i, step=i)\n"
        "log.artifact(np.arange(n), 'deep/x.npy')\nd = pathlib.Path(tempfile.mkdtemp()); (d/'a').mkdir(); (d/'a'/'b').write_text('1'); log.artifact(d, 'folder')")


@pytest.fixture
def homes(tmp_path, postgres, monkeypatch):
    "Two homes, as on two machines, whose index is one PostgreSQL; homes(name) makes it the present one."
    monkeypatch.setenv("OPML_STORE", postgres)

    def use(name):
        monkeypatch.setenv("OPML_HOME", str(tmp_path / name))
        return Store()
    return use


def test_two_homes_see_each_other_and_keep_their_hands_off(typed, homes, notebook, tmp_path):
    nb = notebook(*BODY)
    a = homes("a")
    first = run(nb)
    assert first.ok
    b = homes("b")
    [doc] = b.ls()
    assert doc["id"] == first.doc["id"] and doc["elsewhere"].endswith(str(tmp_path / "a")) and not doc["lost"]
    second = run(nb)                                    # its files cannot be read here: no answer
    assert second.status == "done" and second.doc["id"] != first.doc["id"] and second.key == first.key
    assert run(nb).status == "cached" and len(b.ls()) == 2
    assert b.garbage() == []                            # a newer run of the same key in another home replaces nothing
    assert b.reindex() == (1, []) and {d["id"] for d in b.ls()} == {first.doc["id"], second.doc["id"]}
    with pytest.raises(StoreError, match=f"another home, .*{tmp_path}/a: remove it there"): b.rm([first.doc["id"]])
    listed = typed("ls").stdout
    assert "machine" in listed and "here" in listed
    assert str(tmp_path / "a") in json.loads(typed("show", first.doc["id"], "--json").stdout)["elsewhere"]
    assert "1 run(s)" in typed("rm", first.key).stdout
    assert [d["id"] for d in a.ls()] == [first.doc["id"]] and Path(first.doc["dir"]).is_dir()
    refused = typed("rm", first.key)
    assert refused.returncode == 2 and "--forget" in refused.stderr and a.count() == 1
    assert typed("rm", first.key, "--forget").returncode == 0 and a.count() == 0
    homes("a")
    assert typed("reindex").stdout.startswith("1 runs indexed") and [d["id"] for d in a.ls()] == [first.doc["id"]]


def test_a_run_in_progress_elsewhere_is_left_alone(homes, tmp_path):
    a = homes("a")
    folder, run_id = a.begin({"key": "k", "chapter": "demo", "params": {}})
    a.db.execute("update run set host='another machine'")
    b = homes("b")
    assert b.ls()[0]["status"] == "running" and b.garbage(0) == [] and b.reindex() == (0, []) and b.count() == 1
    shutil.copytree(folder, b.runs / run_id)            # a copied folder is no second run
    assert b.reindex() == (0, [run_id]) and b.ls()[0]["elsewhere"]


def test_a_copied_home_becomes_one_of_its_own(homes, tmp_path):
    a = homes("a")
    _, run_id = a.begin({"key": "k", "chapter": "demo", "params": {}})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    b = homes("b")
    assert b.home != a.home and b.reindex() == (0, [run_id]) and a.count() == 1 and not a.ls()[0].get("elsewhere")
    shutil.move(tmp_path / "a", tmp_path / "moved")     # while a moved one stays the same
    assert homes("moved").home == a.home and not homes("moved").ls()[0].get("elsewhere")


def test_a_home_that_is_busy_is_said(postgres, home, monkeypatch):
    monkeypatch.setenv("OPML_STORE", postgres)
    store, other = Store(), Store()
    store.db.execute("set lock_timeout to '200ms'")
    with other.db.writing(other.home):
        with pytest.raises(StoreError, match="holds this home's rows"): store.begin({"key": "k", "chapter": "demo", "params": {}})
        assert store.count() == 0 and not list(store.runs.iterdir())        # readers don't wait
    store.begin({"key": "k", "chapter": "demo", "params": {}})
    assert other.count() == 1


def test_an_answer_from_another_home_needs_its_files(typed, homes, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{tmp_path}/bucket")
    nb = notebook(*BODY)
    homes("a")
    first = run(nb, n=3)
    url = f"file://{tmp_path}/bucket/{first.doc['id']}"
    assert first.doc["artifact_url"] == url and s.read_json(first.dir / s.RUN)["artifact_url"] == url
    b = homes("b")
    shutil.move(tmp_path / "a", tmp_path / "unplugged")
    answer = run(nb, n=3)
    assert answer.status == "cached" and answer.doc["id"] == first.doc["id"] and b.count() == 1
    assert list(answer.series("m")["value"]) == [3, 4, 5] and s.read_json(answer.notebook)["cells"]
    assert not list(answer.dir.rglob("*.npy")) and answer.places["deep/x.npy"] == f"{url}/artifacts/deep/x.npy"
    assert answer.artifacts["deep/x.npy"].read_bytes() == (tmp_path / "bucket" / first.doc["id"] / "artifacts/deep/x.npy").read_bytes()
    assert (answer.artifacts["folder"] / "a" / "b").read_text() == "1" and str(tmp_path / "b") in answer.places["folder"]
    shown = typed("show", first.key).stdout.replace("\n", "")
    assert "run in" in shown and str(tmp_path / "b") in shown
    for path in (tmp_path / "bucket").rglob("x.npy"): path.unlink()
    assert run(nb, n=3).status == "cached"              # what was fetched is here
    shutil.rmtree(b.root / s.ELSEWHERE)
    again = run(nb, n=3)                                # one of its files is gone: no answer
    assert again.status == "done" and again.doc["id"] != first.doc["id"]


def test_what_another_home_did_is_compared_and_exported(typed, homes, notebook, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'opml_wb[peers]'")
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{tmp_path}/bucket")
    nb = notebook(*BODY)
    homes("a")
    first = run(nb, n=3)
    homes("b")
    shutil.move(tmp_path / "a", tmp_path / "unplugged")
    second = run(nb, n=4)
    done = typed("compare", first.key, second.key)
    assert done.returncode == 1 and "n" in done.stdout, done.stderr
    words = "export", "--mlflow", f"sqlite:///{tmp_path}/mlflow.db", "--json"
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["exported"] == 2, done.stderr
    assert len(list((tmp_path / "mlartifacts").rglob("x.npy"))) == 2


def test_a_changed_artifact_is_not_taken(homes, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{tmp_path}/bucket")
    nb = notebook(*BODY)
    homes("a"); run(nb)
    for path in (tmp_path / "bucket").rglob("x.npy"): path.write_bytes(b"other")
    homes("b")
    with pytest.raises(artifacts.ArtifactError, match="sha256 differs"): run(nb).artifacts
    assert not list((tmp_path / "b").rglob("*x.npy*"))


def test_two_machines_share_a_sweep(postgres, notebook, tmp_path):
    nb = notebook("n: int = 0", "import time; time.sleep(.2)\nfrom opml_wb import log\nlog.metric('loss', (n - 7)**2)")
    env = dict(OPML_STORE=postgres, OPML_ARTIFACTS=f"file://{tmp_path}/bucket")
    words = [sys.executable, "-m", "opml_wb.core.cli", "sweep", str(nb), "n=1..16", "--objective", "loss", "--json"]
    two = [subprocess.Popen(words, cwd=ROOT, env={**os.environ, **env, "OPML_HOME": str(tmp_path / name)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
           for name in "ab"]
    texts = [p.communicate(timeout=180) for p in two]
    assert [p.returncode for p in two] == [0, 0], texts
    a, b = (json.loads(out) for out, _ in texts)
    assert a["executed"] + b["executed"] == 16 and min(a["executed"], b["executed"]) > 1
    assert a["best"] == b["best"] and [r["key"] for r in a["runs"]] == [r["key"] for r in b["runs"]] and [r["metrics"] for r in a["runs"]] == [r["metrics"] for r in b["runs"]]
    assert sum(len(list((tmp_path / name / "runs").iterdir())) for name in "ab") == 16


@pytest.mark.slow
def test_a_driver_killed_on_one_machine_is_survived_by_the_other(postgres, notebook, tmp_path):
    trace = tmp_path / "trace"
    nb = notebook("n: int = 0", f"import os, time\nos.write(os.open({str(trace)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), b'.'); time.sleep(.3)\n"
                                "from opml_wb import log\nlog.metric('loss', n)")
    env = {**os.environ, "OPML_STORE": postgres, "OPML_ARTIFACTS": f"file://{tmp_path}/bucket"}
    words = [sys.executable, "-m", "opml_wb.core.cli", "sweep", str(nb), "n=1..16", "--objective", "loss", "--json"]
    a, b = [subprocess.Popen(words, cwd=ROOT, env={**env, "OPML_HOME": str(tmp_path / name)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"]
    assert until(lambda: trace.exists() and trace.stat().st_size >= 6, 60)
    a.kill(); a.communicate()
    out, err = b.communicate(timeout=120)
    got = json.loads(out)
    assert b.returncode == 0 and len(got["runs"]) == 16 and got["best"] == got["runs"][0]["key"], err
    assert trace.stat().st_size <= 16 + 2               # again at most the two that the kill met


def test_the_server_stops_during_a_run(pg_server, postgres, home, notebook, monkeypatch, opml):
    if os.environ.get("OPML_TEST_PG"): pytest.skip("the server of OPML_TEST_PG is not ours to stop")
    monkeypatch.setenv("OPML_STORE", postgres)
    go = home.parent / "go"
    nb = notebook("n = 1", f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(.05)\nfrom opml_wb import log\nlog.metric('m', 4)")
    running = opml("run", nb, start=True)
    assert until(lambda: list(home.glob("runs/*/log.jsonl")) or list(home.glob("runs/*/progress.jsonl")), 30)
    pg_server.stop()
    try:
        go.touch()
        out, err = running.communicate(timeout=60)
        assert running.returncode == 0 and "opml reindex" in err and pg_server.password not in out + err and "Traceback" not in err, err
        [folder] = home.glob("runs/*")
        assert s.read_json(folder / s.RUN)["metrics"] == {"m": 4}       # the truth is there
        for words in (["ls"], ["run", nb, "-p", "n", "2"], ["gc"], ["claims"]):
            done = opml(*words)
            assert done.returncode == 2 and "does the server run there" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert list(home.glob("runs/*")) == [folder]
    finally: pg_server.start()
    assert opml("reindex").stdout.startswith("1 runs indexed")
    go.unlink()                                                          # it wasn't there when the run first asked for it
    assert json.loads(opml("ls", "--json").stdout)[0]["status"] == "done" and run(nb, timeout=60).status == "cached"


def test_a_connection_that_was_cut_is_made_again(postgres, home, monkeypatch):
    monkeypatch.setenv("OPML_STORE", postgres)
    store, other = Store(), Store()
    other.db.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname=current_database() and pid<>pg_backend_pid()")
    with pytest.raises(StoreError, match="reindex"): store.begin({"key": "k", "chapter": "demo", "params": {}})
    assert list(store.runs.iterdir()) == []             # nothing half-recorded
    store.begin({"key": "k", "chapter": "demo", "params": {}})
    assert store.count() == other.count() == 1


def test_a_fork_has_a_connection_of_its_own(postgres, home, monkeypatch):
    monkeypatch.setenv("OPML_STORE", postgres)
    store = Store()
    pid = os.fork()
    if pid == 0:
        code = 1
        try: store.begin({"key": "k", "chapter": "demo", "params": {}}); code = 0
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and store.count() == 1


@pytest.mark.parametrize("url, said", [
    ("mysql://ann:s3cret@h/db", "expected postgresql://"), ("postgresql://ann:s3cret@h", "names no database"),
    ("postgresql://ann:s3cret@h:x/db", "expected postgresql://"), ("postgresql://ann:s3cret@127.0.0.1:9/db", "does the server run there"),
    ("postgresql://ann:s3cret@no.such.host.invalid/db", "check the host"), ("postgresql://h/db?nonsense=1&password=s3cret", "nonsense"),
    ("SERVER:s3cret", "check user and password"), ("SERVER/nosuch", "createdb"), ("s3cret", "expected postgresql://")])
def test_a_store_that_cannot_be_used_is_named(request, typed, home, notebook, url, said):
    if url.startswith("SERVER"):
        base = request.getfixturevalue("postgres")
        url = base.replace(base.split(":")[2].split("@")[0], "s3cret") if "s3cret" in url else f"{base.rpartition('/')[0]}/nosuch"
    for words in (["ls"], ["run", notebook("n = 1")]):
        done = typed(*words, env={"OPML_STORE": url})
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert url == "s3cret" or "s3cret" not in done.stderr + done.stdout
    assert not list(home.glob("runs/*"))
    check = {c["name"]: c for c in json.loads(typed("doctor", "--json", env={"OPML_STORE": url}).stdout)["checks"]}["store"]
    assert check["state"] == "bad" and said in check["value"] and (url == "s3cret" or "s3cret" not in check["value"])


def test_doctor_says_which_store_answers(typed, home, postgres):
    def check(**env): return {c["name"]: c for c in json.loads(typed("doctor", "--json", env=env).stdout)["checks"]}["store"]
    assert check()["state"] == "ok" and "SQLite" in check()["value"]
    found = check(OPML_STORE=postgres, OPML_ARTIFACTS="memory://x")
    assert found["state"] == "ok" and "PostgreSQL" in found["value"] and "tests:***@" in found["value"] and "memory://x" in found["value"]


def test_without_psycopg(home):
    code = "import sys; sys.modules['psycopg'] = None; from opml_wb.core import cli; cli.main(['ls'])"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OPML_STORE": "postgresql://u:s3cret@h/db"}, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'opml_wb[pg]'" in done.stderr and "s3cret" not in done.stderr
    code = "import sys; from opml_wb.core.record.store import Store; Store().ls(); print('psycopg' in sys.modules, 'fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]


@pytest.mark.parametrize("url, said", [("nosuch://x", "expected file:///FOLDER"), ("file:///proc/x", "that you can write"), ("file:///tmp/x?y=1", "no folder")])
def test_an_artifact_root_that_cannot_be_used_is_named(typed, home, notebook, url, said):
    done = typed("run", notebook("n = 1"), env={"OPML_ARTIFACTS": url})
    assert done.returncode == 2 and said in done.stderr and url in done.stderr and "Traceback" not in done.stderr
    assert not list(home.glob("runs/*"))


def test_a_copy_that_fails_costs_nothing_and_is_made_later(home, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{tmp_path}/bucket")
    from fsspec.implementations.local import LocalFileSystem
    put = LocalFileSystem.put_file

    def full(self, path, *args, **options):
        if path.endswith(s.NOTEBOOK): raise OSError(28, "No space left on device")
        return put(self, path, *args, **options)
    nb = notebook(*BODY)
    with monkeypatch.context() as m, pytest.warns(UserWarning, match="No space left"):
        m.setattr(LocalFileSystem, "put_file", full)
        first = run(nb)
    assert first.ok and "artifact_url" not in first.doc and first.artifacts["deep/x.npy"].exists() and list((tmp_path / "bucket").iterdir()) == []
    again = run(nb)
    assert again.status == "cached" and Store().ls()[0]["artifact_url"] == again.doc["artifact_url"]
    [kept] = (tmp_path / "bucket").iterdir()
    assert kept.name == first.doc["id"] and {p.name for p in kept.iterdir()} == {"artifacts", "notebook.ipynb", "log.jsonl"}
    before = Store().ls()
    assert Store().reindex() == (1, []) and Store().ls() == before


@pytest.mark.parametrize("index", ["sqlite", "postgres"])
def test_gc_and_rm_take_the_copies_too(request, home, typed, notebook, tmp_path, monkeypatch, index):
    if index == "postgres": monkeypatch.setenv("OPML_STORE", request.getfixturevalue("postgres"))
    bucket = tmp_path / "bucket"
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{bucket}")
    nb = notebook(*BODY)
    first, second, other = run(nb), run(nb, force=True), run(nb, n=2)
    (bucket / f"{first.doc['id']}.part-00ff").mkdir()
    (bucket / "20200101-000000-stranger-000000.part-00ff").mkdir()      # somebody else's
    assert len(list(bucket.iterdir())) == 5
    said = typed("gc").stdout
    assert "a broken upload" in said and {p.name for p in bucket.iterdir()} == {second.doc["id"], other.doc["id"], "20200101-000000-stranger-000000.part-00ff"}
    monkeypatch.delenv("OPML_ARTIFACTS")                # the row knows where they are
    bucket.chmod(0o555)
    assert typed("rm", second.key).returncode == (0 if os.getuid() == 0 else 2)
    bucket.chmod(0o755)
    typed("gc")
    assert not (bucket / second.doc["id"]).exists() and Store().count() == 1 and not second.dir.exists()


def test_removal_that_fails_at_the_root_is_tried_again(home, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{tmp_path}/bucket")
    r = run(notebook(*BODY))
    shutil.rmtree(r.dir)                                # even when the folder is lost
    from fsspec.implementations.local import LocalFileSystem
    with monkeypatch.context() as m:
        m.setattr(LocalFileSystem, "rm", lambda *a, **k: (_ for _ in ()).throw(OSError("the bucket doesn't answer")))
        with pytest.raises(StoreError, match="doesn't answer.*`opml gc` tries this again"): Store().rm([r.doc["id"]])
    assert Store().count() == 0 and [d for d, _ in Store().garbage()] == []     # too young
    for p in Store().runs.iterdir(): os.utime(p, (1, 1))
    Store().rm([i for i, _ in Store().garbage()])
    assert list((tmp_path / "bucket").iterdir()) == [] and list(Store().runs.iterdir()) == []


def test_sigkill_in_the_middle_of_a_copy(home, notebook, tmp_path, monkeypatch):
    code = ("import os, sys; from fsspec.implementations.local import LocalFileSystem as L; from opml_wb.core.engine.run import run\n"
            "put = L.put_file\ndef die(self, path, *args, **options):\n    if path.endswith('log.jsonl'): os.kill(os.getpid(), 9)\n    return put(self, path, *args, **options)\n"
            "L.put_file = die; run(sys.argv[1])")
    nb, root = notebook(*BODY), tmp_path / "bucket"
    monkeypatch.setenv("OPML_ARTIFACTS", f"file://{root}")
    assert subprocess.run([sys.executable, "-c", code, str(nb)]).returncode == -9
    [part] = root.iterdir()
    assert ".part-" in part.name
    [doc] = Store().ls()
    assert doc["status"] == "done" and "artifact_url" not in doc        # all of it is here
    assert run(nb).status == "cached" and (root / doc["id"] / "notebook.ipynb").exists()
    Store().rm([name for name, _ in Store().garbage()])
    assert [p.name for p in root.iterdir()] == [doc["id"]]


@pytest.mark.parametrize("server", ["wrapped", "s3"])
def test_a_store_of_objects_as_root(server, home, notebook, monkeypatch):
    "Objects have no folders to rename: s3fs against a server of S3's protocol where both are installed, and fsspec's own wrapper."
    if server == "s3":
        pytest.importorskip("s3fs", reason="needs s3fs"); moto = pytest.importorskip("moto.server", reason="needs moto[server]")
        s3 = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0); s3.start()
        for name, value in dict(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_DEFAULT_REGION="us-east-1", FSSPEC_S3_ENDPOINT_URL="http://%s:%d" % s3.get_host_and_port()).items(): monkeypatch.setenv(name, value)
        import fsspec
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.filesystem("s3").mkdir("bucket")
        monkeypatch.setenv("OPML_ARTIFACTS", "s3://bucket/opml")
    else:
        wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper", reason="needs a newer fsspec")
        opened = artifacts.opened

        def wrapped(url):
            fs, path = opened(url)
            return wrapper.AsyncFileSystemWrapper(fs, asynchronous=False), path
        monkeypatch.setattr(artifacts, "opened", wrapped)
        monkeypatch.setenv("OPML_ARTIFACTS", "memory://objects")
        assert artifacts.is_flat(wrapped("memory://objects")[0])
    r = run(notebook(*BODY))
    assert sorted(artifacts.listing(r.doc["artifact_url"])) == ["artifacts/deep/x.npy", "artifacts/folder/a/b", "log.jsonl", "notebook.ipynb"]
    shutil.rmtree(r.dir / "artifacts")
    assert r.artifacts["deep/x.npy"].exists() and (r.artifacts["folder"] / "a" / "b").read_text() == "1" and artifacts.leftovers(artifacts.artifact_root()) == {}
    Store().rm([r.doc["id"]])
    assert artifacts.listing(r.doc["artifact_url"]) == []
    if server == "s3": s3.stop()


def test_memory_as_root(home, notebook, monkeypatch):
    monkeypatch.setenv("OPML_ARTIFACTS", "memory://opml-tests")
    r = run(notebook(*BODY))
    shutil.rmtree(r.dir / "artifacts")
    assert r.places["folder"].startswith("memory://") and (r.artifacts["folder"] / "a" / "b").read_text() == "1"
    Store().rm([r.doc["id"]])
    assert artifacts.listing(r.doc["artifact_url"]) == []


def test_credentials_are_kept_nowhere(postgres, home, notebook, monkeypatch, tmp_path):
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Guarded(LocalFileSystem):
        "A folder that wants a password in its URL, as sftp:// does."
        protocol = "guarded"

        @classmethod
        def _strip_protocol(cls, path):
            assert "@" not in path or "ann:s3cret@" in path
            return str(tmp_path / "bucket") + "/" + path.rpartition("//")[2].partition("/")[2] if "://" in path else path

        @staticmethod
        def _get_kwargs_from_urls(url):
            assert "ann:s3cret@" in url, f"no password in {url}"
            return {}
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    monkeypatch.setenv("OPML_STORE", postgres); monkeypatch.setenv("OPML_ARTIFACTS", "guarded://ann:s3cret@host/opml")
    r = run(notebook(*BODY))
    assert r.doc["artifact_url"] == f"guarded://host/opml/{r.doc['id']}"
    shutil.rmtree(r.dir / "artifacts")
    assert r.artifacts["deep/x.npy"].exists()
    password = postgres.split(":")[2].split("@")[0]
    for path in home.rglob("*"):
        if path.is_file():
            for word in (b"s3cret", password.encode()): assert word not in path.read_bytes(), path
    rows = [str(Store().db.execute(f"select * from {table}").fetchall()) for table in ("run", "param", "artifact", "home")]
    assert "s3cret" not in str(rows) and password not in str(rows)


def test_gc_drops_sources_that_no_run_names(home, typed, notebook, tmp_path):
    (tmp_path / "helper_of_gc.py").write_text("x = 1\n")
    nb = notebook("n = 1", "import helper_of_gc")
    first = run(nb)
    (tmp_path / "helper_of_gc.py").write_text("x = 2\n")
    second = run(nb)
    kept = {r.doc["files"]["helper_of_gc"] for r in (first, second)}
    assert kept == {p.stem for p in (home / "sources").iterdir()}
    typed("rm", first.key)
    assert "would remove 1 kept source" in typed("gc", "--dry-run").stdout and len(list((home / "sources").iterdir())) == 2
    assert "removed 1 kept source" in typed("gc").stdout
    assert {p.stem for p in (home / "sources").iterdir()} == {second.doc["files"]["helper_of_gc"]}


def test_a_database_that_goes_in_mid_run_is_told_and_nothing_is_lost(homes, notebook, postgres, typed):
    import psycopg
    head, _, name = postgres.rpartition("/")
    base = os.environ.get("OPML_TEST_PG") or f"{head}/postgres"
    homes("a")
    nb = notebook("n = 1", f"import psycopg\nwith psycopg.connect({base!r}, autocommit=True) as db: db.execute('drop database {name} with (force)')",
                  "from opml_wb import log\nlog.metric('m', 2)")
    try:
        done = typed("run", nb, "--json")
        r = json.loads(done.stdout)
        assert (done.returncode, r["status"], r["metrics"]) == (0, "done", {"m": 2}), done.stderr
        assert f"run {r['id']} has ended, done, and is recorded in {r['dir']}" in done.stderr and "`opml reindex` brings it in" in done.stderr
        assert "***" in done.stderr and json.loads(Path(r["dir"], "run.json").read_text())["status"] == "done"
        with pytest.raises(StoreError): Store()
    finally:
        with psycopg.connect(base, autocommit=True) as db: db.execute(f"create database {name}")
    assert Store.rebuilt()[0] == 1 and [d["id"] for d in Store().ls()] == [r["id"]]
