"""When a run is answered from the store and when it must run again; the same numbers every time and in every way."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT

from opml_wb import log
from opml_wb.core.request import chapter, dependencies as deps
from opml_wb.core.request.params import ParamError
from opml_wb.core.engine.run import Run, run
from opml_wb.core.record.store import Store

COUNT = "from pathlib import Path\nwith open('count', 'a') as f: f.write('x')\n"
PRESETS = {"opml": {"presets": {"paper": {"n": 50, "kind": "b"}}}}


@pytest.fixture
def times(tmp_path):
    "How often a notebook that starts with COUNT has been executed."
    return lambda: len((tmp_path / "count").read_text()) if (tmp_path / "count").exists() else 0


def edit(path, change):
    "Change a notebook's cells in place."
    nb = nbformat.read(path, as_version=4)
    change(nb)
    nbformat.write(nb, path)


def figures(r): return r.key, r.dir, r.seconds, r.cpu, r.rss, r.doc["started"], r.metrics


# ------------------------------------------------------------------ answered from the store

def test_the_same_run_executes_nothing_and_keeps_its_figures(home, notebook, times):
    nb = notebook("n = 1\nkind = 'a'", COUNT + "from opml_wb import log\nlog.metric('n', n)", **PRESETS)
    first, second = run(nb), run(nb)
    assert (first.status, second.status, times()) == ("done", "cached", 1) and figures(first) == figures(second)
    assert len(Store(home).ls()) == 1 and second.ok
    assert run(nb, n=1).status == run(nb, {"n": np.int64(1)}).status == "cached"        # the default, given
    other = run(nb, n=2)
    assert other.status == "done" and other.key != first.key and other.metrics == {"n": 2}
    again = run(nb, n=2, force=True)
    assert again.status == "done" and again.key == other.key and again.dir != other.dir and times() == 3
    assert run(nb, n=2).dir == again.dir                # the newest answers
    preset = run(nb, preset="paper")
    assert preset.params == {"n": 50, "kind": "b"} and preset.doc["preset"] == "paper"
    assert run(nb, n=50, kind="b").dir == preset.dir and run(nb, n=50).status == "done"
    assert run(nb, preset="paper", timeout=100, mem_gb=4).status == "cached"    # limits change no result
    with pytest.raises(chapter.ChapterError, match="did you mean 'paper'"): run(nb, preset="papper")
    with pytest.raises(ParamError): run(nb, preset="paper", n="many")


def test_what_does_not_matter(home, notebook, times):
    nb = notebook("n = 1", COUNT)
    key = run(nb).key

    def change(nb):
        nb.cells.insert(0, nbformat.v4.new_markdown_cell("# Prose"))
        nb.cells.append(nbformat.v4.new_raw_cell("raw"))
        nb.cells[2].outputs = [nbformat.v4.new_output("stream", text="old")]
        nb.cells[2].execution_count = 12
        nb.cells[2].metadata["collapsed"] = True
        nb.cells[2].id = "another"
        nb.metadata["title"] = "Other"
    edit(nb, change)
    assert (run(nb).status, run(nb).key, times()) == ("cached", key, 1)
    edit(nb, lambda nb: nb.cells[2].metadata.update(tags=["skip-execution"]))
    assert run(nb).status == "done" and times() == 1    # a tag that changes what is executed is code
    edit(nb, lambda nb: nb.cells[2].metadata.update(tags=[]))
    edit(nb, lambda nb: nb.cells[2].update(source=nb.cells[2].source + "m = 3\n"))
    assert run(nb).status == "done" and times() == 2


def test_a_failed_or_lost_run_is_no_answer(home, notebook, times):
    nb = notebook("n = 1", COUNT + "if n == 1: raise ValueError\nif n == 2: raise SystemExit(1)")
    for n, status in ((1, "failed"), (2, "failed"), (3, "done")):
        for _ in range(2): r = run(nb, n=n)
        assert r.status == ("cached" if status == "done" else status)
    assert times() == 5
    assert run(notebook("n = 1", "while True: pass", name="slow"), timeout=.3).status == "timeout"
    shutil.rmtree(r.dir)
    r = run(nb, n=3)
    assert r.status == "done" and times() == 6
    r.notebook.unlink()
    r = run(nb, n=3)
    assert r.status == "done" and times() == 7          # a run without its notebook can't be shown
    Store(home).rm([r.doc["id"]])
    assert run(nb, n=3).status == "done" and times() == 8


# ------------------------------------------------------------------ code

@pytest.fixture
def project(tmp_path, notebook):
    "A notebook and the modules around it: direct -> deep -> pkg.inner, lazy inside a function, unrelated."
    for name, text in {"direct.py": "from deep import value\n", "deep.py": "from pkg.inner import value\n", "pkg/__init__.py": "",
                       "pkg/inner.py": "from .data import value\n", "pkg/data.py": "value = 1\n", "pkg/unused.py": "x = 1\n",
                       "lazy.py": "value = 10\n", "space/mod.py": "value = 100\n", "unrelated.py": "x = 1\n"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return notebook("n = 1", COUNT + "import direct, space.mod", "%matplotlib inline\ndef later():\n    import lazy\n    return lazy.value",
                    "!true\nfrom opml_wb import log\nlog.metric('sum', direct.value + later() + space.mod.value)")


@pytest.mark.parametrize("module", ["unrelated.py", "pkg/unused.py", "new.py"])
def test_a_module_that_is_not_imported_does_not_matter(home, project, tmp_path, module):
    first = run(project)
    (tmp_path / module).write_text("x = 22\n")
    assert first.metrics == {"sum": 111} and run(project).status == "cached"


def test_a_changed_line_in_an_imported_module_runs_again(home, project, tmp_path, times):
    assert run(project).metrics == {"sum": 111}
    total, count = 111, 1
    for module, extra, line in [("pkg/data.py", 999, "value = 1000"), ("lazy.py", 90, "value = 100"), ("space/mod.py", 9900, "value = 10000"),
                                ("direct.py", 5, "from deep import value\nvalue += 5"), ("deep.py", 6, "from pkg.inner import value\nvalue += 6"),
                                ("pkg/__init__.py", 0, "# a comment is a change too")]:
        (tmp_path / module).write_text(line + "\n")
        r, total, count = run(project), total + extra, count + 1
        assert (r.status, r.metrics, times()) == ("done", {"sum": total}, count), module
    assert run(project).status == "cached"


def test_an_edit_within_the_same_second_is_seen(home, notebook, tmp_path, monkeypatch):
    "A .pyc knows its source by second and size only; an old one must not answer under the new code's key."
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    module, nb = tmp_path / "quick.py", notebook("n = 1", "import quick\nfrom opml_wb import log\nlog.metric('v', quick.v)")
    for v in (1, 2, 3):
        module.write_text(f"v = {v}\n")
        os.utime(module, (1e9, 1e9))
        r = run(nb)
        assert r.status == "done" and r.metrics == {"v": v}


def test_the_packages_own_modules_count_by_line_and_by_import(tmp_path, notebook):
    "With a copy of the package: a line in `riann` re-runs a notebook of `riann`, a line elsewhere doesn't."
    shutil.copytree(ROOT / "opml_wb", tmp_path / "opml_wb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.npy"))
    nb = notebook("n = 1", "def use():\n    from opml_wb.riann.graph.hnsw import DynamicHNSW")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OPML_HOME": str(tmp_path / "home")}

    def status():
        done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "run", nb, "--json"], cwd=tmp_path, env=env, capture_output=True, text=True)
        return json.loads(done.stdout)["status"]
    assert (status(), status()) == ("done", "cached")
    for name, want in (("riann/lab/bench.py", "cached"), ("core/cli/verbs.py", "cached"), ("core/show/compare.py", "cached"), ("riann/graph/hnsw.py", "done"),
                       ("riann/__init__.py", "done"), ("__init__.py", "done")):
        with open(tmp_path / "opml_wb" / name, "a") as f: f.write("\n# one more line\n")
        assert status() == want, name


def test_the_closure_is_found_without_executing(tmp_path, notebook):
    (tmp_path / "boom.py").write_text("raise SystemExit('imported')\nimport pandas\n")
    nb = notebook("n = 1", "import boom, opml_wb.riann.graph.hnsw\nraise SystemExit")
    found = deps.dependencies(chapter.find(nb), {"n": 1})
    assert {"boom", "opml_wb", "opml_wb.riann", "opml_wb.riann.graph.hnsw"} <= set(found["files"])
    assert {"pandas", "numpy", "numba", "python"} <= set(found["env"]) and "opml_wb.core.cli.verbs" not in found["files"]


def test_an_upgraded_library_runs_again(answer, notebook, tmp_path):
    site = tmp_path / "site-packages"
    for name in ("acme", "other"):
        (site / f"{name}-1.0.dist-info").mkdir(parents=True)
        (site / f"{name}.py").write_text("version = 1\n")
    nb, env = notebook("n = 1", "import acme"), {"PYTHONPATH": str(site)}

    def status(): return answer(nb, env=env)[1]["status"]
    assert (status(), status()) == ("done", "cached")
    (site / "other-1.0.dist-info").rename(site / "other-2.0.dist-info")
    assert status() == "cached"                         # not imported
    (site / "acme-1.0.dist-info").rename(site / "acme-1.1.dist-info")
    assert (status(), status()) == ("done", "cached")


# ------------------------------------------------------------------ data

def test_changed_data_runs_again(home, notebook, times, tmp_path):
    data, read, folder = tmp_path / "data.csv", tmp_path / "read.csv", tmp_path / "folder"
    folder.mkdir()
    for path in (data, read, folder / "a"): path.write_text("1\n")
    nb = notebook(f"path = {str(data)!r}\nwhere = [{str(folder)!r}]\nplain = 'words that are no path'",
                  COUNT + f"from opml_wb import log\nlog.input({str(read)!r})\nlog.metric('x', float(open(path).read()) + float(open({str(read)!r}).read()))")
    first = run(nb)
    assert first.metrics == {"x": 2} and list(first.doc["inputs"]) == [str(read)]
    assert run(nb).status == "cached"
    data.write_text("5\n")
    second = run(nb)                                    # a parameter that is a path
    assert second.metrics == {"x": 6} and second.key != first.key and run(nb).status == "cached"
    read.write_text("7\n")
    third = run(nb)                                     # a file that the notebook named by log.input
    assert third.metrics == {"x": 12} and third.key == second.key and run(nb).status == "cached"
    (folder / "b").write_text("new")
    assert run(nb).status == "done" and run(nb).status == "cached" and times() == 4
    data.write_text("1\n"), (folder / "b").unlink(), read.write_text("1\n")
    assert times() == 4 and run(nb).metrics == {"x": 2}
    read.unlink()
    assert run(nb).status == "failed"


def test_changed_registry_data_runs_again(home, notebook, times, tmp_path, monkeypatch):
    from opml_wb.core.record import data
    mine = tmp_path / "mine" / data.entry("riann/sift_photos")["file"]
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"one")
    declared = notebook("n = 1", COUNT, name="declared", opml={"data": ["riann/sift_photos"]})
    named = notebook("name = 'riann/sift_photos'", COUNT, name="named")
    for nb in (declared, named): assert run(nb).status == "done" and run(nb).status == "cached"
    monkeypatch.setenv("OPML_DATA", str(tmp_path / "mine"))
    for text in (b"one", b"two"):
        mine.write_bytes(text)
        for nb in (declared, named): assert run(nb).status == "done" and run(nb).status == "cached"
    mine.write_bytes(b"one")
    for nb in (declared, named): assert run(nb).status == "cached"      # known data, a known answer
    assert times() == 6


# ------------------------------------------------------------------ the same numbers

DRAW = '''import random, numpy as np
from opml_wb import log
log.metric("random", random.random())
log.metric("legacy", np.random.rand())
log.metric("generator", np.random.default_rng().random())
log.metric("second", np.random.default_rng().random())
log.metric("sequence", np.random.default_rng(np.random.SeedSequence()).random())
log.metric("shuffled", random.sample(range(10**6), 1)[0])
log.metric("set", float(list({str(i) for i in range(100)})[0]))
log.metric("own", np.random.default_rng(5).random())
'''
EAGER = "import torch\n" + DRAW + "log.metric('torch', torch.rand(1)); log.metric('normal', torch.nn.Linear(2, 2).weight[0, 0].detach())"
LAZY = DRAW + "def late():\n    import torch\n    return torch.rand(1), torch.nn.Linear(2, 2).weight[0, 0].detach()\na, b = late()\nlog.metric('torch', a); log.metric('normal', b)"


def test_an_unseeded_notebook_gives_the_same_numbers(home, notebook, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    eager = notebook("n = 1", EAGER, name="draws")
    first = run(eager).metrics
    assert len(first) == 10 and first == run(eager, force=True).metrics
    assert first["generator"] != first["second"] and first["own"] == np.random.default_rng(5).random()
    other = run(eager, n=2).metrics
    assert {k for k in first if first[k] == other[k]} == {"own", "set"}
    lazy = notebook("n = 1", LAZY, name="draws").rename(tmp_path / "elsewhere" / "draws.ipynb")
    assert run(lazy).metrics == first                   # whether torch was there before the fork or came later
    renamed = run(notebook("n = 1", EAGER, name="renamed")).metrics
    assert all(renamed[k] != first[k] for k in ("random", "legacy", "generator", "torch"))


def test_a_new_process_gives_the_same_numbers(answer, notebook):
    nb = notebook("n = 1", DRAW)
    (_, a), (_, b) = answer(nb), answer(nb, "--force")
    assert a["metrics"] == b["metrics"] and a["dir"] != b["dir"] and len(a["metrics"]) == 8


def test_ones_own_seed_wins(home, notebook):
    r = run(notebook("seed = 3", "import random, numpy as np\nfrom opml_wb import log\nrandom.seed(seed); np.random.seed(seed)\n"
                                 "log.metric('a', random.random()); log.metric('b', np.random.rand())"))
    import random
    assert r.metrics == {"a": random.Random(3).random(), "b": np.random.RandomState(3).rand()}


# ------------------------------------------------------------------ three ways

BODY = '''import numpy as np, pandas as pd
from opml_wb import log
rng = np.random.default_rng(seed)
for step in range(5): log.metric("loss", rng.random(), step=step)
log.metric("not a number", float("nan")); log.metric("scalar", np.float32(.5)); log.metric("int", seed); log.metric("été", name.count("x"))
log.claim("speed-up", paper=2.42, measured=2.42 * (1 + rng.random()), unit="x", how="counted\\ntwice")
log.claim("recall", paper=.9, measured=.2, better="higher", tol=.1, why="other 'data'")
log.table(pd.DataFrame({"a": [1, 2]}), "rows")
log.artifact({"k": 1}, "settings")
log.artifact(b"12", "raw.bin")
log.input(path)
log.metric("loss", rng.random(), step=5)
'''


def test_three_ways_give_the_same_record(home, typed, notebook, tmp_path):
    (tmp_path / "in.txt").write_text("input")
    nb = notebook(f"seed: int = 0  # of the generator\nname = ''\npath = {str(tmp_path / 'in.txt')!r}", "# prose", BODY, name="three")
    name, papermill = "xx é \"q\"\n'x'", Path(sys.executable).with_name("papermill")
    for out, engine in (("stock", []), ("engine", ["--engine", "opml"])):
        done = subprocess.run([papermill, *engine, nb, tmp_path / f"{out}.ipynb", "-p", "seed", "3", "-p", "name", name, "--no-progress-bar"],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = typed("run", nb, "seed=3", "-p", "name", name, "--json")
    ours = json.loads(done.stdout)
    records = [log.read(path) for path in (tmp_path / "stock.ipynb", tmp_path / "engine.ipynb", ours["notebook"])]
    for record in records:
        assert {k: record[k] for k in ("metrics", "points", "claims", "inputs")} == {k: records[0][k] for k in ("metrics", "points", "claims", "inputs")}
        assert sorted(Path(a).stem for a in record["artifacts"]) == ["raw", "rows", "settings"]
    metrics = records[0]["metrics"]
    assert metrics["int"] == 3 and metrics["not a number"] == "NaN" and metrics["été"] == 3 and records[0]["points"]["loss"] == 6
    assert [c["verdict"] for c in records[0]["claims"]] == ["exceeded", "not reproduced"] and len(records[0]["inputs"]) == 1
    assert ours["metrics"] == metrics and Run(Store().get(ours["key"])[0]).series("loss")["step"].tolist() == [0, 1, 2, 3, 4, 5]
    for path in (tmp_path / "engine.ipynb", ours["notebook"]):
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
        assert [c.metadata.get("tags") for c in nb.cells][:2] == [["parameters"], ["injected-parameters"]]


def test_stock_papermill_gives_the_unseeded_engine_the_seed_of_the_run(home, typed, notebook, tmp_path):
    nb = notebook("n = 1", DRAW, name="draws")
    papermill = Path(sys.executable).with_name("papermill")
    subprocess.run([papermill, "--engine", "opml", nb, tmp_path / "out.ipynb", "-p", "n", "2", "--no-progress-bar"], check=True,
                   cwd=tmp_path, capture_output=True)
    assert log.read(tmp_path / "out.ipynb")["metrics"] == json.loads(typed("run", nb, "n=2", "--json").stdout)["metrics"]
