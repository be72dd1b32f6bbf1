"""One's own chapter, run again, opened on a copy; and the doctor: as people type it, in an empty folder and in a clone."""
import json
import re
import shutil
import time

import pytest
from conftest import ROOT


@pytest.fixture
def command(opml, tmp_path):
    "command(*args, cwd=) -> CompletedProcess of `opml ...`; without a clone around, unless `cwd` says so."
    (tmp_path / "work").mkdir()
    def call(*args, cwd=tmp_path / "work", **env): return opml(*args, cwd=cwd, env={"PYTHONPATH": str(ROOT), **env})
    return call


def test_new_runs_at_once_and_is_listed(command, tmp_path):
    done = command("new", "mine")
    assert done.returncode == 0 and "opml run mine" in done.stdout, done.stderr
    assert "mine" in [c["name"] for c in json.loads(command("list", "--json").stdout)]
    ran = command("run", "mine", "--json", cwd=tmp_path)                    # from another folder, too
    run = json.loads(ran.stdout)
    assert ran.returncode == 0 and run["status"] == "done" and run["chapter"] == "mine", run["error"]
    assert run["cpu"] < 20 and run["claims"] == [] and {"accuracy", "advantage", "win_rate"} <= set(run["metrics"])
    assert .9 < run["metrics"]["accuracy"] < 1


def test_what_the_skeleton_says_of_its_exercises_is_true(home, tmp_path):
    from opml_wb.core.cli.author import new
    from opml_wb.core.engine.run import run
    path = new("mine", tmp_path)
    forest, few = run(path, model="forest", sizes=[800]).metrics, run(path, sizes=[10, 20], repeats=20).metrics
    assert (round(forest["accuracy"], 3), round(forest["accuracy_baseline"], 3)) == (.963, .983)
    assert (round(few["accuracy"], 2), round(few["accuracy_baseline"], 2), round(few["win_rate"], 1)) == (.6, .64, .1)
    claims = run(path, paper=.98, sizes=[800], repeats=2).claims
    assert [c["verdict"] for c in claims] == ["reproduced"]


def test_new_keeps_to_the_house(command, tmp_path):
    command("new", "mine")
    nb = json.loads((tmp_path / "work" / "mine.ipynb").read_text())
    heads = re.findall(r"^## (\d+) ", "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"), re.M)
    assert heads == [str(i) for i in range(1, 11)]
    assert all(not c["outputs"] and c["execution_count"] is None for c in nb["cells"] if c["cell_type"] == "code")
    assert max(len(line) for c in nb["cells"] for line in c["source"]) <= 200


@pytest.mark.parametrize("name, said", [("riann", "already"), ("Mine", "a chapter's name"), ("7", "a chapter's name"), ("../x", "a chapter's name"), ("é", "a chapter's name")])
def test_new_refuses(command, tmp_path, name, said):
    done = command("new", name)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_new_overwrites_nothing(command, tmp_path):
    (tmp_path / "work" / "mine.ipynb").write_text("my work")
    assert command("new", "mine").returncode == 2
    assert (tmp_path / "work" / "mine.ipynb").read_text() == "my work"


def test_new_in_a_clone_takes_the_next_number(command, tmp_path):
    clone = tmp_path / "clone"
    for name in ("opml_wb", "nbs/chapters", "nbs/_templates"): shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", clone)
    for name, number in ("mine", 11), ("yours", 12):
        assert command("new", name, cwd=clone / "nbs", PYTHONPATH=str(clone)).returncode == 0
        assert (clone / "nbs" / "chapters" / f"{number}_{name}.ipynb").exists()
    listed = json.loads(command("list", "--json", cwd=clone, PYTHONPATH=str(clone)).stdout)
    assert {c["name"]: c["number"] for c in listed if c["name"] in ("mine", "yours")} == {"mine": 11, "yours": 12}


def test_rerun_says_what_differs(command, notebook, tmp_path):
    path = notebook("n: int = 3", "from opml_wb import log\nlog.metric('x', n)")
    first = json.loads(command("run", path, "n=4", "--json").stdout)
    same = command("rerun", first["key"])
    assert same.returncode == 0 and "those of then" in same.stdout, same.stdout + same.stderr
    notebook("n: int = 30", "from opml_wb import log\nlog.metric('x', n + .5)")
    again = json.loads(command("rerun", first["id"], "--json").stdout)
    assert again["run"]["params"] == {"n": 4} and again["run"]["metrics"] == {"x": 4.5}
    assert again["since"]["metrics"][0]["delta"] == .5 and "log.metric('x', n + .5)" in again["since"]["code"][0]["diff"]
    notebook("m: int = 30", "1/0")
    refused = command("rerun", first["id"])
    assert refused.returncode == 2 and "its chapter has changed" in refused.stderr, refused.stderr
    assert command("rerun", "zzzz").returncode == 2
    assert len(json.loads(command("ls", "--json").stdout)) == 3            # the refused one left nothing


def test_rerun_of_a_failing_run_fails(command, notebook):
    first = json.loads(command("run", notebook("n = 1", "1/0"), "--json").stdout)
    assert command("rerun", first["key"]).returncode == 1


def test_lab_opens_a_copy(command, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "07_riann.ipynb").write_text("worked on")
    command("new", "mine")
    done = command("lab", "--copy", tmp_path / "copy", "--version")         # JupyterLab itself answers
    assert done.returncode == 0 and re.match(r"\d+\.\d+", done.stdout), done.stderr
    assert (tmp_path / "copy" / "mine.ipynb").exists() and (tmp_path / "copy" / "07_riann.ipynb").read_text() == "worked on"
    assert command("lab", "nowhere", "--copy", tmp_path / "copy").returncode == 2


def test_lab_leaves_the_chapters_alone(command, home, notebook):
    "By default copies in the home are opened, a notebook of one's own is opened itself."
    from opml_wb.core.cli.author import copy_of
    assert command("lab", "riann", "--version").returncode == 0
    copy = home/"lab"/"07_riann.ipynb"
    assert copy.exists() and copy_of("riann", None) == copy
    links = re.findall(r"\]\((guide/[\w.]+)", copy.read_text())
    assert links and all((copy.parent/link).exists() for link in links)   # the glossary lies beside
    own = notebook("n = 1")
    assert str(copy_of(str(own), None)) == str(own)
    assert command("lab", "riann", "--edit", "--copy", home/"x", "--version").returncode == 2


def test_doctor(command, tmp_path, home):
    done = command("doctor")
    assert done.returncode == 0, done.stdout
    for said in ("Python", "cores", "memory", "engine", "free disk", "torch", "hnswlib", "Chromium"): assert said in done.stdout
    told = json.loads(command("doctor", "--json").stdout)
    assert told["ok"] and all(c["advice"] for c in told["checks"] if c["state"] != "ok")
    stock = {c["name"]: c for c in json.loads(command("doctor", "--json", OPML_ENGINE="stock").stdout)["checks"]}
    assert "stock kernels" in stock["engine"]["value"]
    (tmp_path / "file").write_text("")
    sick = command("doctor", "--json", OPML_HOME=str(tmp_path / "file" / "home"))
    checks = {c["name"]: c for c in json.loads(sick.stdout)["checks"]}
    assert sick.returncode == 1 and checks["home"]["state"] == "bad" and "OPML_HOME" in checks["home"]["advice"]


@pytest.fixture
def small(command, tmp_path):
    "small(name, *sources): a registered chapter of one's own with these cells."
    import nbformat
    def make(name, *sources):
        assert command("new", name).returncode == 0
        cells = [nbformat.v4.new_code_cell(s) for s in sources]
        meta = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), tmp_path / "work" / f"{name}.ipynb")
    return make


def test_reproduce_is_one_table_and_one_page(command, small, home):
    claim = "from opml_wb import log\nlog.claim('speed', paper=2, measured={}, how='counted')"
    small("good", claim.format(2))
    small("bad", "1/0")
    done = command("reproduce", "--only", "good,bad", "--json")
    told = {o["chapter"]: o for o in json.loads(done.stdout)}
    assert done.returncode == 1 and told["good"]["claims"][0]["verdict"] == "reproduced" and told["good"]["status"] == "done"
    assert told["bad"]["status"] == "failed" and "ZeroDivisionError" in told["bad"]["error"]
    page = (home / "reproduced.html").read_text()
    assert "speed" in page and "failed: bad" in page and "<script" not in page and "http" not in page
    again = command("reproduce", "--only", "good")
    assert again.returncode == 0 and "cached" in again.stdout, again.stderr
    assert json.loads(command("run", "good", "--json").stdout)["status"] == "cached"


def test_reproduce_says_which_claim_fell(command, small, tmp_path):
    import nbformat
    small("good", "from opml_wb import log\nlog.claim('speed', paper=2, measured=2)")
    assert command("reproduce", "--only", "good").returncode == 0
    path = tmp_path / "work" / "good.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells[0].source = nb.cells[0].source.replace("measured=2", "measured=1")
    nbformat.write(nb, path)
    fell = command("reproduce", "--only", "good", "--json")
    assert fell.returncode == 1
    assert json.loads(fell.stdout)[0]["changes"] == ["fell: speed: not reproduced, reproduced before"]


def test_reproduce_goes_on_after_a_kill(command, small, home, opml, tmp_path):
    small("quick", "x = 1")
    small("slow", f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(.05)")
    words = "reproduce", "--only", "quick,slow", "--jobs", "1"
    first = opml(*words, cwd=tmp_path / "work", env={"PYTHONPATH": str(ROOT)}, start=True)
    deadline = time.monotonic() + 120
    def ended(): return [r["chapter"] for r in json.loads(command("ls", "--json").stdout) if r["status"] == "done"]
    while "quick" not in ended() and time.monotonic() < deadline: time.sleep(.2)
    first.kill()
    first.wait()
    (tmp_path / "go").touch()
    told = {o["chapter"]: o["status"] for o in json.loads(command(*words, "--json").stdout)}
    assert told == {"quick": "cached", "slow": "done"}
