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
    return notebook("n = 1", COUNT + "import direct, space.mod", "%precision 4\ndef later():\n    import lazy\n    return lazy.value",
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


TABLE = """import sys, deltalake, pandas as pd, pyarrow as pa
from opml_wb.provenance import FeatureStore
t = pd.Timestamp("2024-01-01", tz="UTC")
FeatureStore("lake").write("t", pd.DataFrame({"id": [1], "t": t, "x": float(sys.argv[1])}), "id", "t")
deltalake.write_deltalake("plain", pa.table({"x": [1.0]}), mode="append")
"""


def test_a_changed_delta_table_runs_again(home, notebook, tmp_path):
    pytest.importorskip("deltalake")
    def write(x): subprocess.run([sys.executable, "-c", TABLE, str(x)], cwd=tmp_path, check=True)
    def said(nb): return run(nb).status
    t = "pd.Timestamp('2024-01-05', tz='UTC')"
    store = f"import pandas as pd\nfrom opml_wb.provenance import FeatureStore\nFeatureStore({str(tmp_path / 'lake')!r})"
    plain = f"import deltalake\ndeltalake.DeltaTable({str(tmp_path / 'plain')!r}%s).to_pyarrow_table()"
    books = [notebook("n = 1", f"{store}.value('t', 1, 'x', {t})", name="now"),
             notebook("n = 1", f"{store}.value('t', 1, 'x', {t}, known_at={t})", name="known"),   # which sets the table's clock
             notebook("n = 1", plain % "", name="plain"),
             notebook("n = 1", plain % ", version=0", name="old")]
    write(1), write(2)
    assert [said(nb) for nb in books] == ["done"] * 4
    assert [said(nb) for nb in books] == ["cached"] * 4
    write(3)
    assert [said(nb) for nb in books] == ["done", "done", "done", "cached"]     # version 0 is what it was
    assert [said(nb) for nb in books] == ["cached"] * 4
    doc = run(books[2]).doc["facts"]["table"]
    assert [(p, v[:9]) for p, v in doc.items()] == [(str(tmp_path / "plain"), "version 2")]


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


# ------------------------------------------------------------------ what the run itself asked

def put(path, text="1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def point(link, to):
    link.unlink(missing_ok=True)
    link.symlink_to(to)


ASKS = {  # what a notebook asks: (its code, what is there before, a change that doesn't matter, one that does)
    "a link's target": ("open('ln').read()", lambda d: (put(d / "a"), put(d / "b", "2"), point(d / "ln", "a")), lambda d: os.utime(d / "a", (1, 1)), lambda d: point(d / "ln", "b")),
    "a folder's link": ("import pandas as pd; pd.read_csv('lf/x.csv')", lambda d: (put(d / "f1/x.csv", "a\n1"), put(d / "f2/x.csv", "a\n2"), point(d / "lf", "f1")), None, lambda d: point(d / "lf", "f2")),
    "where a link points": ("import os; os.readlink('rl')", lambda d: (put(d / "a"), put(d / "c"), point(d / "rl", "a")), None, lambda d: point(d / "rl", "c")),
    "glob": ("import glob; glob.glob('g/*.csv')", lambda d: put(d / "g/a.csv"), lambda d: put(d / "g/b.txt"), lambda d: put(d / "g/b.csv")),
    "Path.glob": ("from pathlib import Path; list(Path('p').glob('**/*.csv'))", lambda d: put(d / "p/a.csv"), lambda d: put(d / "p/b.txt"), lambda d: put(d / "p/q/b.csv")),
    "Path.rglob": ("from pathlib import Path; list(Path('r').rglob('*.csv'))", lambda d: put(d / "r/a.csv"), lambda d: put(d / "r/b.txt"), lambda d: put(d / "r/q/b.csv")),
    "listdir": ("import os; os.listdir('l')", lambda d: put(d / "l/a"), lambda d: put(d / "l/a", "2"), lambda d: put(d / "l/b")),
    "iterdir": ("from pathlib import Path; list(Path('i').iterdir())", lambda d: put(d / "i/a"), None, lambda d: (d / "i/a").unlink()),
    "walk": ("import os; list(os.walk('w'))", lambda d: put(d / "w/s/a"), None, lambda d: put(d / "w/s/b")),
    "exists": ("import os; os.path.exists('o1')", None, lambda d: put(d / "another"), lambda d: put(d / "o1")),
    "is gone": ("import os; os.path.isfile('o2')", lambda d: put(d / "o2"), lambda d: put(d / "o2", "2"), lambda d: (d / "o2").unlink()),
    "is_file": ("from pathlib import Path; Path('o3').is_file()", None, None, lambda d: put(d / "o3")),
    "open in vain": ("try: open('o4')\nexcept OSError: pass", None, None, lambda d: put(d / "o4")),
    "a library in vain": ("import pandas as pd\ntry: pd.read_csv('o5.csv')\nexcept OSError: pass", None, None, lambda d: put(d / "o5.csv", "a\n1")),
    "size": ("import os; os.path.getsize('s')", lambda d: put(d / "s"), lambda d: put(d / "s", "2"), lambda d: put(d / "s", "33")),
    "dot file": ("import os; open(os.path.expanduser('~/.mine/conf')).read()", lambda d: put(d / "user/.mine/conf"), None, lambda d: put(d / "user/.mine/conf", "2")),
    "dot file of a library": ("import pandas as pd; pd.read_csv('~/.mine/x.csv')", lambda d: put(d / "user/.mine/x.csv", "a\n1"), None, lambda d: put(d / "user/.mine/x.csv", "a\n2")),
    "a module in vain": ("try: import not_yet_there\nexcept ImportError: pass", None, None, lambda d: put(d / "not_yet_there.py")),
    "find_spec": ("from importlib.util import find_spec; find_spec('not_there_either')", None, None, lambda d: put(d / "not_there_either.py")),
    "touched only": ("open('t').read()", lambda d: put(d / "t"), lambda d: os.utime(d / "t", (1, 1)), lambda d: put(d / "t", "2")),
}


def test_what_a_run_asked_is_asked_again(home, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for _, before, _, _ in ASKS.values():
        if before: before(tmp_path)
    nb = notebook(*(source for source, *_ in ASKS.values()), params=False, name="asks")
    assert (run(nb).status, run(nb).status) == ("done", "cached")
    for name, (_, _, harmless, change) in ASKS.items():
        if harmless:
            harmless(tmp_path)
            assert run(nb).status == "cached", name
        change(tmp_path)
        assert run(nb).status == "done", name
    assert run(nb).status == "cached"


def test_a_module_in_a_folder_that_the_run_made_is_its_own(home, notebook):
    "It is written by the run's code, and gone with its folder when the run has ended."
    nb = notebook("import sys\nfrom opml_wb.core.kit.files import scratch\nplace = scratch()\n"
                  "(place/'own_nets.py').write_text('A = 1')\nsys.path.insert(0, str(place))\nimport own_nets", params=False, name="writes_a_module")
    assert (run(nb).status, run(nb).status) == ("done", "cached")


def test_variables_and_settings_that_were_read(home, notebook, monkeypatch):
    for name in ("TZ", "OP_A", "OP_B", "OP_C", "OP_D", "OP_E"): monkeypatch.delenv(name, raising=False)
    for i, (variable, source) in enumerate([
            ("OP_A", "import os; os.environ.get('OP_A')"), ("OP_B", "import os; os.getenv('OP_B', 'x')"), ("OP_C", "import os; 'OP_C' in os.environ"),
            ("OP_D", "import os; dict(os.environ); {**os.environ}; list(os.environ.items()); os.environ.get('OP_D')"),
            ("OP_E", "from os import environ\ntry: environ['OP_E']\nexcept KeyError: pass"), ("TZ", "import time; time.localtime(0)")]):
        nb = notebook(source, params=False, name=f"variable{i}")
        assert (run(nb).status, run(nb).status) == ("done", "cached"), source
        monkeypatch.setenv("OP_OTHER", f"{i}")
        assert run(nb).status == "cached", source
        monkeypatch.setenv(variable, "Asia/Tokyo")
        assert (run(nb).status, run(nb).status) == ("done", "cached"), source
        monkeypatch.delenv(variable)
        assert run(nb).status == "cached", source       # as it was: the first run answers
    nb = notebook("x = 1", params=False, name="no clock")
    assert run(nb).status == "done"
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert run(nb).status == "cached"
    nb = notebook("import time\nfrom opml_wb import log\nlog.metric('h', time.localtime(0).tm_hour)", params=False, name="clock")
    assert run(nb).metrics == {"h": 9}
    monkeypatch.setenv("TZ", "UTC")
    assert run(nb).metrics == {"h": 0}                  # also in a zygote that began in another zone
    nb = notebook("import os; os.environ['OP_A']", params=False, name="secret")
    monkeypatch.setenv("OP_A", "pass-word-1234")
    assert "pass-word-1234" not in (run(nb).dir / "run.json").read_text()


def test_the_version_that_was_read_counts(home, notebook, tmp_path):
    for i, (source, want) in enumerate([
            ("n = int(open('f').read()); open('f', 'w').write(str(n + 1))", ["done", "done", "done"]),
            ("f = open('f', 'r+'); n = int(f.read()); f.seek(0); f.write(str(n + 1)); f.close()", ["done", "done", "done"]),
            ("import os; open('f').read(); open('g', 'w').write('7'); os.replace('g', 'f')", ["done", "done", "cached"]),
            ("open('f').read()\nget_ipython().system('echo 8 > f')", ["done", "done", "cached"]),
            ("open('f').read(); open('f', 'w').write('5')", ["done", "cached"])]):
        put(tmp_path / "f", "5")
        nb = notebook(source, params=False, name=f"over{i}")
        assert [run(nb).status for _ in want] == want, source


def test_what_a_run_makes_is_no_reason_to_run_again(home, notebook, tmp_path):
    nb = notebook("n = 1", "import glob, os, tempfile, shutil\nprint(glob.glob('*.res'), os.listdir('.'))\n"
                  "if not os.path.exists('c.res'): open('c.res', 'w').write('1')\n"
                  "if not os.path.isdir('made'): os.mkdir('made')\nopen(f'made/{n}', 'w').write('1'); os.listdir('made')\n"
                  "d = tempfile.mkdtemp(dir='.'); open(d + '/x', 'w').close(); os.listdir('.'); shutil.rmtree(d)\n"
                  "get_ipython().system('touch more.res'); glob.glob('*.res')")
    assert [run(nb).status for _ in range(3)] == ["done", "cached", "cached"]
    shutil.rmtree(tmp_path / "made"), (tmp_path / "c.res").unlink()
    assert run(nb).status == "cached"


LIBRARY = "acme-1.0.dist-info"

def test_a_library_counts_by_what_it_holds_and_only_if_it_was_imported(home, notebook, tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    (site / LIBRARY).mkdir(parents=True)
    (site / "acme.py").write_text("v = 1\n")
    (site / "alone.py").write_text("v = 1\n")           # installed by nobody
    nb = notebook("import acme, alone\ndef later():\n    import psycopg_or_so", params=False)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))

    def status(): return run(nb).status
    def install(text, stamp):
        put(site / "acme.py", text)
        put(site / LIBRARY / "RECORD", f"acme.py,sha256={stamp},7\n{LIBRARY}/RECORD,,\n")
    assert (status(), status()) == ("done", "cached")
    put(site / "acme.py", "v = 2\n")                    # edited where it lies, of the same version and size
    assert (status(), status()) == ("done", "cached")
    install("v = 3\n", "abc")                           # installed anew
    assert (status(), status()) == ("done", "cached")
    install("v = 3\n", "abc")                           # the same once more
    assert status() == "cached"
    put(site / "psycopg_or_so.py"), (site / "psycopg_or_so-1.0.dist-info").mkdir()
    assert status() == "cached"                         # there now, but nobody imports it
    put(site / "alone.py", "v = 2\n")
    assert status() == "done"
    (tmp_path / "acme").mkdir()                         # a plain folder hides no library
    assert status() == "cached"
    install("v = 4\n", "def")
    assert status() == "done"


def test_why_says_what_changed(home, notebook, typed, tmp_path):
    put(tmp_path / "data.csv", "a\n1")
    nb = notebook("n = 1", "import pandas as pd, os\npd.read_csv('data.csv'); os.path.exists('opt'); os.getenv('OP_WHY')", name="asked")
    assert typed("why", nb).returncode == 1             # nothing there yet
    first = typed("run", nb)
    assert "not answered" not in first.stderr
    said = typed("why", nb)
    assert said.returncode == 0 and "answered from the store by run" in said.stdout and "data.csv" in said.stdout
    put(tmp_path / "data.csv", "a\n2")
    said = typed("why", nb, "--json", env={"OP_WHY": "1"})
    assert said.returncode == 1
    found = json.loads(said.stdout)
    assert {r["fact"] for r in found["changed"]} == {"file", "variable"} and found["unseen"] and not found["answered"]
    assert {"code", "env", "library", "there"} <= {r["fact"] for r in found["same"]}
    again = typed("run", nb)
    assert "not answered from the store: " in again.stderr and "data.csv changed since run" in again.stderr and again.returncode == 0
    one, two = [d["id"] for d in Store(home).ls()]
    said = typed("why", two, one)
    assert said.returncode == 1 and "data.csv changed" in said.stdout
    edit(nb, lambda nb: nb.cells[1].update(source=nb.cells[1].source + "\n# more"))
    assert "the notebook's code changed" in typed("run", nb).stderr
    assert "not answered" not in typed("run", nb, "n=2").stderr     # another run, none like it
    assert typed("why", "no-such-thing").returncode == 2


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
