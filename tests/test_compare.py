"""Two real runs, and what is said of them: in the terminal, as JSON, and on a page that asks for nothing."""
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from figures import CHROMIUM, strangers
from test_lab import HERE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a run store that the tests of this file share."
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPML_HOME", str(folder / "home"))
        yield folder
    from opml_wb.core.engine.zygote import close_all
    close_all()


@pytest.fixture(scope="module")
def command(place):
    "command(*args) -> CompletedProcess of `opml ...`."
    def call(*args):
        env = {**os.environ, "OPML_HOME": str(place / "home")}
        return subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)
    return call


@pytest.fixture(scope="module")
def two(place):
    "Two runs of one notebook between which a parameter, a module and a data file changed; and the second one repeated."
    from opml_wb.core.engine.run import run
    module, data, path = place / "my_compare_helper.py", place / "data.txt", place / "nb.ipynb"
    sources = ["n: int = 3\ndata: 'Path' = 'data.txt'", "from opml_wb import log\nimport my_compare_helper as h",
               "for i in range(n): log.metric('loss', h.f(1 / (i + 1)), step=i)\nlog.metric('final', n)", "print('n is', n)",
               "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[n, 1]))"]
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    module.write_text("def f(x):\n    return x\n"); data.write_text("1")
    a = run(path)
    module.write_text("def f(x):\n    return 2 * x\n"); data.write_text("2")
    b = run(path, n=5)
    assert a.ok and b.ok, (a.error, b.error)
    return a, b, run(path, n=5, force=True)


def test_why_two_runs_differ(two, command):
    a, b, c = two
    done = command("compare", a.key, b.doc["id"])
    assert done.returncode == 1 and done.stdout.endswith("differs\n"), done.stderr
    for said in ("parameter n: 3 → 5", "code of my_compare_helper edited: +1 −1 lines", "data data.txt: other content", "-    return x", "+    return 2 * x",
                 "cannot be laid to one"): assert said in done.stdout, done.stdout
    answer = json.loads(command("compare", a.key, b.key, "--json").stdout)
    [d] = answer["differences"]
    assert d["params"] == [{"name": "n", "a": 3, "b": 5}] and d["env"] == [] and not d["same_key"]
    assert [r["name"] for r in d["code"]] == ["my_compare_helper"]
    final = next(m for m in d["metrics"] if m["name"] == "final")
    assert (final["delta"], final["noise"]) == (2, 0)                      # the second was run twice, to the same end
    [noise] = json.loads(command("compare", b.key, b.key, "--json").stdout)["differences"]
    assert noise["same_key"] and "chance" in noise["why"][0]


def test_sources_are_kept_once(two, place):
    home = place / "home"
    kept = sorted(p.name for p in (home / "sources").iterdir())
    shas = {sha for r in two for sha in r.doc["files"].values()}
    assert {p.removesuffix(".py") for p in kept} == shas
    texts = {(home / "sources" / name).read_text() for name in kept}
    assert {"def f(x):\n    return x\n", "def f(x):\n    return 2 * x\n"} <= texts


def test_more_than_two(two, command):
    done = command("compare", two[0].key, two[1].doc["id"], two[2].doc["id"])
    assert done.returncode == 1 and done.stdout.count("against") == 2, done.stdout
    assert len(json.loads(command("compare", *(r.doc["id"] for r in two), "--json").stdout)["differences"]) == 2


@pytest.mark.parametrize("args, said", [(["zzz", "{a}"], "no run 'zzz'"), (["{a}"], "no further run"), (["{a}", "{a}"], "no further run"),
                                        (["{a}", "{b}", "--html", "{tmp}/x.html", "--objective", "los"], "they have: loss, final"),
                                        (["{a}", "{b}", "--html", "{tmp}/no/x.html"], "no folder")])
def test_bad_use(two, command, tmp_path, args, said):
    done = command("compare", *(x.format(a=two[0].key, b=two[1].key, tmp=tmp_path) for x in args))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.html"))


def test_importance_finds_what_was_planted():
    "Of two parameters one drives the metric: it comes first for every seed; where neither does, that is said."
    import numpy as np
    import pandas as pd
    from opml_wb.core.show.importance import importance
    right = silent = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        t = pd.DataFrame({"status": "done", "params.a": rng.uniform(0, 1, 40), "params.b": rng.integers(1, 100, 40), "params.c": rng.choice(["x", "y"], 40)})
        told = importance(t.assign(**{"metrics.m": np.sin(3 * t["params.a"]) + .1 * rng.normal(size=40)}), "m", seed=seed, trees=30, rounds=1)
        right += told.parameter[0] == "a" and told.importance[0] > .5 and told.attrs["r2"] > .5
        empty = importance(t.assign(**{"metrics.m": rng.normal(size=40)}), "m", seed=seed, trees=30, rounds=1)
        silent += "read nothing" in empty.attrs["caveat"]
    assert right == 5 and silent >= 4, (right, silent)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(two, command, place, browser):
    "It draws all its plots, asks for nothing, and its text stands out from its ground in light and in dark."
    for i in range(2):                                                     # company: runs of other keys
        copy = place / "home" / "runs" / f"{i}-{two[0].doc['id']}"
        shutil.copytree(two[0].dir, copy, dirs_exist_ok=True)
        doc = json.loads((copy / "run.json").read_text())
        (copy / "run.json").write_text(json.dumps({**doc, "id": copy.name, "key": f"{i}" * 20, "params": {"n": i + 7, "data": "data.txt"}}))
    assert command("reindex").returncode == 0
    done = command("compare", two[0].doc["id"], two[1].doc["id"], "--html", place / "page.html", "--objective", "loss")
    assert done.returncode == 1, done.stderr
    (HERE / "artefacts").mkdir(exist_ok=True)
    for theme in ("light", "dark"):
        page = browser.new_page(viewport=dict(width=1280, height=1000), color_scheme=theme)
        outside, faults = strangers(page), []
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("console", lambda m: m.type == "error" and faults.append(m.text))
        page.goto((place / "page.html").as_uri())
        for figure in page.locator(".fig").all():
            figure.scroll_into_view_if_needed()
            figure.locator(".main-svg").first.wait_for()
        assert page.locator(".fig").count() == 4 == page.locator(".js-plotly-plot").count()  # a curve, the company, the notebooks' figures
        text, ground = (sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{c}"))[:3])) for c in ("color", "backgroundColor"))
        assert (text < 200, ground < 200) == (theme == "light", theme == "dark") and abs(text - ground) > 400
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=HERE / "artefacts" / f"compare-{theme}.png", full_page=True)
        assert faults == [] and outside == []
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
