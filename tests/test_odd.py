"""What nobody plans for: odd text, odd notebooks, runs that damage their own folder, imports that cannot be seen."""
import json
import os
import subprocess
import sys
import threading

import nbformat
import pytest

from opml_wb import log
from opml_wb.core.engine.run import run
from opml_wb.core.record.store import Store

L = "from opml_wb import log\n"


@pytest.mark.parametrize("code", [r"log.metric('\ud800', 1)", r"log.claim('c', paper=1, measured=1, how='\ud800')", r"log.artifact({'a': '\ud800'}, 'x')"])
def test_lone_surrogates_do_not_poison_the_store(opml, notebook, code):
    done = opml("run", notebook("n = 1", L + code), "--json")
    assert json.loads(done.stdout)["status"] == "done", done.stderr
    for args in (["ls", "--json"], ["reindex"], ["claims", "--json"]): assert opml(*args).returncode == 0


def test_an_exception_that_utf8_cannot_hold_is_told(home, notebook):
    r = run(notebook("n = 1", r"raise ValueError('\ud800 here')"))
    assert (r.status, r.error["ename"], r.error["cell"], r.error["line"]) == ("failed", "ValueError", 1, 1)


def test_a_bad_run_file_harms_no_other(home, notebook):
    run(notebook("n = 1"))
    for name, text in (("a", "[1]"), ("b", '{"id": "b"}'), ("c", "{")):
        (home / "runs" / name).mkdir()
        (home / "runs" / name / "run.json").write_text(text)
    assert Store(home).reindex() == (1, ["a", "b", "c"])
    assert len(Store(home).ls()) == 1


def test_the_same_notebook_elsewhere_is_another_run(home, tmp_path):
    for name, value in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.csv").write_text(value)
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(L + "log.input('data.csv'); log.metric('v', float(open('data.csv').read()))", id="c")])
        nbformat.write(nb, tmp_path / name / "nb.ipynb")
    a, b = run(tmp_path / "a" / "nb.ipynb"), run(tmp_path / "b" / "nb.ipynb")
    assert (a.metrics, b.metrics, b.status) == ({"v": 1}, {"v": 2}, "done")


@pytest.mark.parametrize("code", ["import importlib\nf = importlib.import_module('helper').f", "import sys; sys.path.insert(0, 'lib')\nfrom helper2 import f",
                                  "%run helper.py", "f = __import__('helper').f"])
def test_imports_that_cannot_be_seen_are_watched(home, notebook, tmp_path, code):
    (tmp_path / "lib").mkdir()
    for value in (1, 2):
        for name in ("helper.py", "lib/helper2.py"): (tmp_path / name).write_text(f"def f(): return {value}\n")
        nb = notebook("n = 1", code + "\n" + L + "log.metric('f', f())")
        r = run(nb)
        assert (r.status, r.metrics) == ("done", {"f": value})
        assert run(nb).status == "cached"


@pytest.mark.parametrize("name", ["tests", "conftest", "utils", "data", "setup", "nbs"])
def test_a_module_of_the_users_own_is_the_users(home, notebook, tmp_path, name):
    "Whatever our own folder holds: beside the notebook it is found, elsewhere nothing of ours is."
    code = f"import {name}\nfrom opml_wb import log\nlog.metric('x', {name}.x)"
    (tmp_path / f"{name}.py").write_text("x = 3")
    r = run(notebook("n = 1", code))
    assert (r.status, r.metrics) == ("done", {"x": 3})


def test_nothing_of_our_folder_is_on_the_path_of_imports(home, notebook):
    from conftest import ROOT
    code = f"import os, sys\nassert not [p for p in sys.path if os.path.realpath(p) == {str(ROOT)!r}], sys.path"
    code += "\nassert sys.path.index('') > sys.path.index(os.path.dirname(os.__file__)), sys.path  # as a kernel has it"
    assert run(notebook("n = 1", code)).error is None


def test_a_rerun_of_an_executed_notebook_tells_the_new_figures(home, notebook, tmp_path):
    import papermill
    r = run(notebook("i = 0", L + "log.metric('i', i)"), i=1)
    for engine in (None, "opml"):
        papermill.execute_notebook(str(r.notebook), str(tmp_path / "out.ipynb"), {"i": 9}, engine_name=engine, progress_bar=False)
        assert log.read(tmp_path / "out.ipynb")["metrics"] == {"i": 9}
    assert log.read(r)["metrics"] == {"i": 1}


def test_many_threads_and_a_large_environment(home, notebook, monkeypatch):
    monkeypatch.setenv("LARGE", "x" * 100_000)
    nb, out = notebook("n = 1", L + "log.metric('n', n)"), {}
    threads = [threading.Thread(target=lambda i=i: out.update({i: run(nb, n=i, timeout=300).metrics["n"]})) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(300)
    assert out == {i: i for i in range(8)}


@pytest.mark.parametrize("change", [
    lambda nb: nb.pop("metadata"), lambda nb: nb["cells"][0].pop("metadata")])
def test_notebooks_with_parts_missing_run(answer, notebook, change):
    path = notebook("print(1)", params=False)
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb))
    assert answer(path)[1]["status"] == "done"


@pytest.mark.parametrize("change", [
    lambda nb: nb.update(metadata=[]), lambda nb: nb.update(cells=["x"]), lambda nb: nb["metadata"].update(opml="text"),
    lambda nb: nb["metadata"].update(opml={"presets": [1]}), lambda nb: nb["metadata"].update(kernelspec={"name": "ir"}, language_info={"name": "R"})])
def test_notebooks_that_are_none_are_refused(answer, home, notebook, change):
    path = notebook("print(1)", params=False)
    nb = json.loads(path.read_text())
    change(nb)
    path.write_text(json.dumps(nb))
    code, said = answer(path)
    assert (code, said["status"]) == (2, "refused")
    assert not list(home.glob("runs/*"))


def test_a_home_that_cannot_be_used_is_named(opml, tmp_path):
    (tmp_path / "file").write_text("")
    done = opml("ls", "--json", env={"OPML_HOME": str(tmp_path / "file")})
    assert done.returncode == 2 and json.loads(done.stdout)["status"] == "refused" and "OPML_HOME" in done.stdout


def test_a_module_in_another_encoding(home, notebook, tmp_path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    assert run(notebook("n = 1", "import latin\nprint(latin.x)")).ok


@pytest.mark.parametrize("code,status,error", [
    ("import os, shutil; shutil.rmtree(os.environ['OPML_RUN_DIR'])", "failed", {"kind": "engine"}),
    ("import os\nfor _ in range(2): os.makedirs(os.environ['OPML_RUN_DIR'] + '/run.json', exist_ok=True)", "failed", {"kind": "engine"}),
    ("import os\nopen(os.environ['OPML_RUN_DIR'] + '/log.jsonl', 'a').write('{\"kind\": \"metric\"}\\n')", "done", None),
    ("class E(SystemExit): pass\nraise E(0)", "done", None),
    ("import os\nwhile True: os.write(1, b'x' * (1 << 20))", "failed", {"kind": "output"}),
    ("import os\nkept = []\ntry:\n    while True: kept.append(os.open('/dev/null', 0))\nexcept OSError: pass", "done", None),
    ("import os, sys\nif os.fork() == 0: sys.exit(0)\nos.wait()\nos.abort()", "failed", {"kind": "signal", "signal": "SIGABRT"}),
    ("import os\nif os.fork() == 0: raise ValueError\nos.wait()", "done", None),
])
def test_runs_that_harm_themselves(home, notebook, code, status, error):
    r = run(notebook("n = 1", code), timeout=120)
    assert r.status == status, (r.status, r.error)
    for name, value in (error or {}).items(): assert r.error[name] == value, r.error
    assert Store(home).ls()[0]["status"] == status


def test_numbers_of_every_kind(home, notebook):
    import numpy as np
    code = L + ("import enum, numpy as np\nclass E(enum.IntEnum): A = 1\nlog.metric('e', E.A); log.metric('big', 2**64); log.metric('f', np.float32(.5))\n"
                "log.claim('c', paper=1, measured=1, tol=np.float32(.1))")
    r = run(notebook("n = 1", code), timeout=np.float32(300), mem_gb=np.int64(2))
    assert (r.status, r.metrics) == ("done", {"e": 1, "big": 2**64, "f": .5}), r.error


def test_names_of_artifacts_are_those_given(home, notebook, tmp_path):
    code = L + "import pandas as pd\nlog.table(pd.DataFrame({'a': [1]}), 'res'); log.artifact({'a': 1}, 'cfg')"
    nb = notebook("n = 1", code)
    r = run(nb)
    assert {k: v.suffix for k, v in r.artifacts.items()} == {"res": ".parquet", "cfg": ".json"}
    import papermill
    papermill.execute_notebook(str(nb), str(tmp_path / "out.ipynb"), progress_bar=False)
    assert set(log.read(tmp_path / "out.ipynb")["artifacts"]) == {"res", "cfg"}


def test_a_path_stays_a_path(home, notebook, tmp_path):
    nb = notebook("from pathlib import Path\np: Path = Path('nb.ipynb')", L + "log.metric('there', p.exists())")
    assert [run(nb).metrics, run(nb, p=str(tmp_path / "nothing")).metrics] == [{"there": 1}, {"there": 0}]


def test_threads_sleeping_under_a_memory_limit(home, notebook):
    code = "import threading, time\nts = [threading.Thread(target=time.sleep, args=(1,)) for _ in range(200)]\nfor t in ts: t.start()\nfor t in ts: t.join()"
    assert run(notebook("n = 1", code), mem_gb=1).status == "done"


def test_data_in_a_dict_and_in_a_folder(home, notebook, tmp_path):
    (tmp_path / "d").mkdir()
    nb = notebook("a: dict = {'x': 'x.txt'}\nd = 'd'", "pass")
    for path in (tmp_path / "x.txt", tmp_path / "d" / "y.txt"):
        path.write_text("1"); run(nb)
        stat = path.stat()
        path.write_text("2"); os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert run(nb).status == "done"


def test_run_from_a_folder_that_is_gone(tmp_path, notebook):
    code = (f"import os, sys; os.makedirs('gone'); os.chdir('gone'); os.rmdir('../gone')\nfrom opml_wb.core.engine.run import run\n"
            f"print(run({str(notebook('n = 1'))!r}).status)")
    env = {**os.environ, "OPML_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "done", done.stderr
