"""The command `opml` as users type it: every command, its JSON, its exit codes, its refusals, and plug-ins."""
import csv
import io
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import processes, until

from opml_wb.core.cli.verbs import main
from opml_wb.core.record.store import Store

RUN = {"key", "status", "chapter", "params", "metrics", "claims", "notebook", "dir", "seconds", "cpu", "rss", "error"}
ERROR = {"kind", "ename", "evalue", "cell", "line", "signal", "exitcode"}
CLAIM = {"name", "paper", "measured", "unit", "better", "how", "verdict", "why"}
PARAMS = '''from typing import Annotated, Literal
from opml_wb.core.request.params import Range
n: Annotated[int, Range(1, 100)] = 3  # how many
rate: float = .5  # share per second
kind: Literal["a", "b"] = "a"
text = "x"
sizes: list[int] = [1, 2]
free = None'''
LOG = '''from opml_wb import log
print("shown in the notebook only")
log.metric("square", n * n); log.metric("loss", float("nan")); log.metric("top", float("inf"))
log.claim("speed-up", paper=2.0, measured=3.5, unit="x", better="higher", how="counted")
log.claim("recall", paper=.9, measured=.2, better="higher", why="other data, \\"quoted\\", ü")
log.artifact({"k": [1, 2]}, "table")'''
PRESETS = {"opml": {"presets": {"paper": {"n": 50, "kind": "b"}, "wrong": {"n": 500}}, "title": "A demo"}}


def strict(text):
    "The one JSON value that `text` is; NaN and infinities are no JSON."
    def no(name): raise AssertionError(f"{name} is not JSON")
    return json.loads(text, parse_constant=no)


@pytest.fixture
def typed(home, capfd, monkeypatch):
    "typed(*args) -> what `opml` would end with, asked in this process: quicker where another one adds nothing."
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)     # `main` sets its own

    def call(*args):
        with pytest.raises(SystemExit) as end: main([str(a) for a in args])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err)
    return call


@pytest.fixture
def run_json(typed):
    "run_json(*args) -> (exit code, the JSON object) of `opml run ... --json`, asked in this process."
    def call(*args):
        done = typed("run", *args, "--json")
        return done.returncode, strict(done.stdout)
    return call


@pytest.fixture
def demo(notebook): return notebook(PARAMS, LOG, name="demo", **PRESETS)


# ------------------------------------------------------------------ run

def test_run_json(opml, demo):
    began = time.time()
    done = opml("run", demo, "n=4", "--json")
    r = strict(done.stdout)
    assert done.returncode == 0 and RUN <= set(r) and r["error"] is None and "shown in" not in done.stdout + done.stderr
    assert r["status"] == "done" and r["chapter"] == "demo"
    assert r["params"] == {"n": 4, "rate": .5, "kind": "a", "text": "x", "sizes": [1, 2], "free": None}
    assert r["metrics"] == {"square": 16, "loss": "NaN", "top": "Infinity"}
    first, second = r["claims"]
    assert CLAIM <= set(first) and first["verdict"] == "exceeded" and first["measured"] == 3.5 and first["how"] == "counted"
    assert second["verdict"] == "not reproduced" and second["why"] == 'other data, "quoted", ü'
    assert Path(r["dir"]).is_absolute() and Path(r["dir"]).is_dir() and Path(r["notebook"]).parent == Path(r["dir"])
    nb = nbformat.read(r["notebook"], as_version=4)
    nbformat.validate(nb)
    assert "shown in the notebook only" in nb.cells[2].outputs[0].text and nb.cells[1].source.endswith("n = 4\n")
    assert 0 < r["seconds"] < time.time() - began and 0 < r["cpu"] < 60 and r["rss"] > 1 << 20

    again = strict(opml("run", demo, "n=4", "--json").stdout)
    assert again == {**r, "status": "cached"}           # with the original figures
    assert len(strict(opml("ls", "--json").stdout)) == 1


def test_run_json_of_a_failure(run_json, notebook):
    nb = notebook("n = 1", "from opml_wb import log\nlog.metric('seen', n)", "a = 1\nraise ValueError('no \"luck\"')")
    code, r = run_json(nb)
    assert code == 1 and RUN <= set(r) and set(r["error"]) >= ERROR
    assert r["status"] == "failed" and r["metrics"] == {"seen": 1}
    assert {k: r["error"][k] for k in ERROR} == {"kind": "exception", "ename": "ValueError", "evalue": 'no "luck"', "cell": 2,
                                                 "line": 2, "signal": None, "exitcode": None}
    code, r = run_json(notebook("n = 1", "import os; os.kill(os.getpid(), 11)", name="other"), "--timeout", 60)
    assert code == 1 and r["error"]["signal"] == "SIGSEGV"
    code, r = run_json(notebook("n = 1", "while True: pass", name="third"), "--timeout", ".5", "--mem-gb", "1")
    assert code == 1 and r["status"] == "timeout" and r["error"]["kind"] == "timeout"


def test_the_cell_of_an_error_is_the_source_notebooks(answer, notebook):
    code, r = answer(notebook("n = 1", "1 / n"), "n=0")      # one cell was injected before it
    assert code == 1 and r["error"]["cell"] == 1 and r["error"]["ename"] == "ZeroDivisionError"


def test_run_for_people(opml, home, demo):
    done = opml("run", demo, "--show")
    assert done.returncode == 0 and done.stderr == "running demo ...\n"
    [folder] = home.glob("runs/*")
    for word in ("square", "speed-up", "exceeded", "not reproduced", "other data", "jupyter lab", "rate", str(folder)):
        assert word in done.stdout, done.stdout
    done = opml("run", demo)
    assert "cached" in done.stdout and "square = 9" in done.stdout
    done = opml("run", demo, "--quiet")
    assert done.returncode == 0 and done.stdout == done.stderr == ""


def test_quiet_speaks_of_a_failure_on_stderr(opml, notebook):
    done = opml("run", notebook("n = 1", "raise ValueError('why it failed')"), "--quiet")
    assert done.returncode == 1 and done.stdout == "" and "why it failed" in done.stderr and "in In[2], line 1: raise ValueError" in done.stderr


def test_progress_is_told_on_stderr(opml, notebook):
    nb = notebook("n = 1", "from opml_wb.core import ui\nimport time\nui.status('compiling the kernels'); time.sleep(.4)")
    done = opml("run", nb)
    assert "compiling the kernels" in done.stderr and "compiling" not in done.stdout


GIVEN = [
    (["-p", "n", "7"], {"n": 7}), (["n=7", "-p", "text", "a=b=c"], {"n": 7, "text": "a=b=c"}),
    (["text=a=b"], {"text": "a=b"}), (["text="], {"text": ""}), (["text=é \"q\" 'p' \\ \n\ttab 中"], {"text": "é \"q\" 'p' \\ \n\ttab 中"}),
    (["text=--json"], {"text": "--json"}), (["-p", "text", "--json"], {"text": "--json"}), (["rate=-1e-3"], {"rate": -.001}),
    (["sizes=3,4"], {"sizes": [3, 4]}), (["sizes=[]"], {"sizes": []}), (["free={\"k\": [1, null]}"], {"free": {"k": [1, None]}}),
    (["free=3"], {"free": 3}), (["--preset", "paper"], {"n": 50, "kind": "b"}), (["--preset", "paper", "n=2"], {"n": 2, "kind": "b"}),
]


def test_parameters_arrive_as_they_were_meant(typed, notebook):
    body = "from opml_wb import log\nimport json\nlog.artifact(json.dumps([n, rate, kind, text, sizes, free]).encode(), 'all.json')"
    nb = notebook(PARAMS, body, **PRESETS)
    for given, want in GIVEN:
        done = typed("run", "--json", nb, *given)
        r, full = strict(done.stdout), {"n": 3, "rate": .5, "kind": "a", "text": "x", "sizes": [1, 2], "free": None, **want}
        assert done.returncode == 0 and r["params"] == full, given
        assert json.loads((Path(r["dir"]) / "artifacts" / "all.json").read_text()) == list(full.values()), given


@pytest.mark.parametrize("given, param, words", [
    (["nn=3"], "nn", ["unknown parameter 'nn'", "did you mean 'n'"]), (["txet=3"], "txet", ["did you mean 'text'"]),
    (["n=many"], "n", ["'n'", "expected int", "'many'"]), (["n=2.5"], "n", ["expected int"]), (["n=0"], "n", ["'n'", "1", "100", "got 0"]),
    (["n=101"], "n", ["101"]), (["rate=nan"], "rate", ["'rate'", "expected"]), (["rate=inf"], "rate", ["'rate'"]),
    (["kind=c"], "kind", ["'a' | 'b'", "'c'"]), (["sizes=1,x"], "sizes", ["'sizes'", "list[int]"]),
    (["--preset", "wrong"], "n", ["500"]), (["-p", "n", "x"], "n", ["expected int"]),
    (["--preset", "papr"], None, ["did you mean 'paper'", "no preset 'papr'"]), (["n=1", "n=2"], None, ["'n' is given twice"]),
    (["n=1", "-p", "n", "2"], None, ["given twice"]), (["n"], None, ["'n'", "name=value"]), (["=3"], None, ["name=value"]),
    (["--timeout", "0"], "timeout", ["timeout", "above 0"]), (["--timeout", "nan"], "timeout", ["timeout"]),
    (["--mem-gb", "-1"], "mem_gb", ["mem_gb"]), (["--timeout", "soon"], None, ["--timeout"]), (["--color"], None, ["--color"]),
    (["-p", "n"], None, ["-p"]),
])
def test_refusals(typed, home, demo, given, param, words):
    said = typed("run", "--json", demo, *given)
    r = strict(said.stdout)
    assert said.returncode == 2 and set(r) == {"status", "error"} and r["status"] == "refused" and ERROR <= set(r["error"])
    for word in words: assert word in r["error"]["evalue"], r
    assert r["error"]["param"] == param and r["error"]["kind"] == ("parameter" if param else "usage")
    assert not list(home.glob("runs/*")) and (not home.exists() or Store(home).count() == 0)


def test_refusals_for_people(opml, home, demo):
    for given, word in (["nn=3"], "did you mean 'n'"), (["--timeout", "soon"], "--timeout"), (["--preset", "papr"], "did you mean 'paper'"):
        done = opml("run", demo, *given)
        assert done.returncode == 2 and done.stdout == "" and word in done.stderr and "Traceback" not in done.stderr
    assert not list(home.glob("runs/*"))


def test_refused_notebooks(typed, home, notebook, tmp_path):
    bare = notebook("n = 1", "m = 2", name="bare", params=False)
    two = nbformat.read(notebook("n = 1", "m = 2", name="two"), as_version=4)
    two.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(two, tmp_path / "two.ipynb")
    text, other, r_lang = (tmp_path / name for name in ("text.ipynb", "other.ipynb", "r.ipynb"))
    text.write_text("not JSON"), other.write_text('{"cells": []}')
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "ir", "language": "R", "display_name": "R"}}), r_lang)
    for path, given, cell, words in [(bare, ["n=2"], 0, ["no cell is tagged 'parameters'", "cell 0"]),
                                     (tmp_path / "two.ipynb", [], 1, ["cells 0, 1", "parameters"]),
                                     (tmp_path / "two.ipynb", ["n=2"], 1, ["cells 0, 1"]), (text, [], None, ["not a notebook"]),
                                     (other, [], None, ["not a notebook"]), (r_lang, [], None, ["written in R"]),
                                     (tmp_path / "none.ipynb", [], None, ["no notebook"]), (tmp_path, [], None, ["unknown chapter"])]:
        done = typed("run", path, *given, "--json")
        r = strict(done.stdout)
        assert done.returncode == 2 and r["status"] == "refused" and r["error"]["cell"] == cell, (path, r)
        for word in words: assert word in r["error"]["evalue"], r
    assert not list(home.glob("runs/*"))
    assert typed("run", bare, "--json").returncode == 0       # without parameters it runs


def test_unknown_chapter_names_the_nearest(opml):
    name = json.loads(opml("list", "--json").stdout)[0]["name"]
    done = opml("run", name + "x", "--json")
    said = strict(done.stdout)["error"]["evalue"]
    assert done.returncode == 2 and f"did you mean {name!r}" in said and "There are:" in said
    assert opml("params", name + "x").returncode == 2


def test_bad_use(typed):
    for args in (["frob"], ["ls", "--frob"], ["show"], ["rm"], ["data"], ["data", "frob"], ["run"], ["gc", "--older-than", "soon"],
                 ["show", "0123"], ["rm", "0123"], ["data", "fetch", "no/such"], ["data", "verify", "no/such"]):
        done = typed(*args)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip(), (args, done)
    assert strict(typed("show", "0123", "--json").stdout)["status"] == "refused"


def test_options_may_stand_anywhere(opml, demo):
    done = opml("run", "--json", "-p", "n", "2", demo, "rate=1.5")
    assert strict(done.stdout)["params"]["rate"] == 1.5


def test_only_json_on_stdout_whatever_the_notebook_writes(opml, notebook):
    nb = notebook("n = 1", "import os, sys, subprocess, warnings\nos.write(1, b'raw out'); os.write(2, b'raw err')\n"
                           "subprocess.run('echo child; echo child >&2', shell=True)\nsys.__stdout__.write('dunder')\n"
                           "warnings.warn('careful'); print('x'); print('y', file=sys.stderr)")
    done = opml("run", nb, "--json")
    assert strict(done.stdout)["status"] == "done" and done.stdout.count("\n{") == 0


def test_a_relative_path_and_the_folder_of_the_call(opml, tmp_path, notebook):
    notebook("import pathlib\nwhere = pathlib.Path.cwd()", "from opml_wb import log\nlog.metric('same', float(str(where) == log_dir))"
             .replace("log_dir", repr(str(tmp_path))), name="here")
    done = opml("run", "here.ipynb", "--json", cwd=tmp_path)
    r = strict(done.stdout)
    assert r["metrics"] == {"same": 1.0} and r["chapter"] == "here"


# ------------------------------------------------------------------ the store's commands

def test_ls_show_rm(typed, run_json, demo, notebook, home):
    assert typed("ls", "--json").stdout.strip() == "[]" and "no runs yet" in typed("ls").stderr
    runs = [run_json(demo, f"n={n}")[1] for n in (1, 2, 3)]
    _, failed = run_json(notebook("n = 1", "1/0", name="bad"))
    listed = strict(typed("ls", "--json").stdout)
    assert [d["key"] for d in listed] == [r["key"] for r in [failed, *runs[::-1]]]      # newest first
    for d in listed: assert RUN <= set(d)
    assert listed[0]["error"]["ename"] == "ZeroDivisionError" and listed[1]["metrics"] == runs[2]["metrics"]
    assert [d["chapter"] for d in strict(typed("ls", "--json", "--chapter", "demo").stdout)] == ["demo"] * 3
    table = typed("ls", "-n", "2")
    assert table.stderr == "2 more: opml ls -n 0\n"
    table = table.stdout
    assert "failed" in table and runs[0]["key"][:10] not in table
    assert runs[0]["key"][:10] in typed("ls", "-n", "0").stdout

    key = runs[1]["key"]
    assert strict(typed("show", key[:8], "--json").stdout) == {**runs[1]}
    page = home/"page.html"
    typed("show", key[:8], "--html", str(page))
    assert "shown in the notebook only" in page.read_text() and "<script src" not in page.read_text()
    for word in ("speed-up", "square", "other data"): assert word in typed("show", key).stdout
    assert typed("rm", key).returncode == 0 and not Path(runs[1]["dir"]).exists()
    assert typed("show", key).returncode == 2 and len(strict(typed("ls", "--json").stdout)) == 3
    assert typed("rm", "").returncode == 2 and len(Store(home).ls()) == 3      # an empty key is no key


def test_claims(typed, run_json, demo, notebook):
    assert strict(typed("claims", "--json").stdout) == [] and "no claims yet" in typed("claims").stderr
    assert len(typed("claims", "--csv").stdout.splitlines()) == 1
    other = notebook("n = 1", "from opml_wb import log\nlog.claim('odd, \"name\"\\nü', paper=float('nan'), measured=n)", name="another")
    run_json(demo, "n=1"); run_json(demo, "n=2"); run_json(other)
    rows = strict(typed("claims", "--json").stdout)
    assert [(r["chapter"], r["name"], r["verdict"]) for r in rows] == [
        ("another", 'odd, "name"\nü', "not reproduced"), ("demo", "speed-up", "exceeded"), ("demo", "recall", "not reproduced")]
    for r in rows: assert CLAIM <= set(r)
    assert rows[0]["paper"] == "NaN" and rows[1]["key"] == Store().ls(2)[1]["key"]       # the newest run of each chapter
    table = list(csv.DictReader(io.StringIO(typed("claims", "--csv").stdout)))
    assert [(t["chapter"], t["name"], float(t["measured"])) for t in table] == [(r["chapter"], r["name"], r["measured"]) for r in rows]
    assert math.isnan(float(table[0]["paper"])) and table[2]["why"] == 'other data, "quoted", ü'
    assert "exceeded" in typed("claims").stdout


def test_gc(typed, run_json, demo, home):
    runs = [run_json(demo, "--force")[1] for _ in range(2)] + [run_json(demo, "n=9")[1]]
    dry = typed("gc", "--dry-run").stdout
    assert f"would remove {runs[0]['id']}" in dry and "1 to remove, 3 in the store" in dry and Path(runs[0]["dir"]).exists()
    assert "1 removed, 2 in the store" in typed("gc").stdout and not Path(runs[0]["dir"]).exists()
    assert "0 removed" in typed("gc", "--older-than", "1h").stdout
    assert "2 to remove" in typed("gc", "--older-than", "0", "--dry-run").stdout
    assert "2 removed, 0 in" in typed("gc", "--older-than", "0d").stdout and not list((home / "runs").iterdir())


def test_reindex(opml, answer, demo, home):
    answer(demo)
    before = opml("ls", "--json").stdout
    for part in home.glob("opml.db*"): part.unlink()
    done = opml("reindex")
    assert done.returncode == 0 and "1 runs indexed" in done.stdout and opml("ls", "--json").stdout == before
    assert answer(demo)[1]["status"] == "cached"


# ------------------------------------------------------------------ chapters, parameters, data, lab

def test_list_and_params(typed, run_json, demo):
    rows = strict(typed("list", "--json").stdout)
    assert rows and {"name", "number", "title", "path", "presets"} <= set(rows[0])
    for r in rows: assert Path(r["path"]).is_file() and r["title"]
    table = typed("list", "--benches").stdout
    for r in rows: assert r["name"] in table
    short = typed("list")
    assert "bench/" not in short.stdout and "riann" in short.stdout and "opml list --benches" in short.stderr
    numbered = next((r for r in rows if r["number"]), None)
    if numbered: assert strict(typed("params", numbered["number"], "--json").stdout)["chapter"] == numbered["name"]

    said = strict(typed("params", demo, "--json").stdout)
    assert said["presets"] == PRESETS["opml"]["presets"]
    by_name = {p["name"]: p for p in said["parameters"]}
    assert list(by_name) == ["n", "rate", "kind", "text", "sizes", "free"]
    assert (by_name["n"]["lo"], by_name["n"]["hi"], by_name["n"]["default"], by_name["n"]["help"]) == (1, 100, 3, "how many")
    table = typed("params", demo).stdout
    for word in ("how many", "1 .. 100", 'preset\tvalues\npaper\tkind="b", n=50', "list[int]"): assert word in table, table


def test_data(opml, tmp_path):
    env = {"OPML_DATA": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    rows = strict(opml("data", "ls", "--json", env=env).stdout)
    by_name = {r["name"]: r for r in rows}
    assert by_name["riann/sift_photos"]["where"] == "shipped" and "riann/sift_photos" in opml("data", "ls", env=env).stdout
    done = opml("data", "fetch", "riann/sift_photos", env=env)
    assert done.returncode == 0 and Path(done.stdout.strip().partition(": ")[2]).is_file()
    done = opml("data", "verify", "riann/sift_photos", env=env)
    assert done.returncode == 0 and done.stdout.split() == ["ok", "riann/sift_photos"]
    done = opml("data", "rm", "riann/sift_photos", env=env)
    assert done.returncode == 2 and "not in the cache" in done.stderr
    mine = tmp_path / "mine" / by_name["riann/sift_photos"].get("file", "riann/sift_photos.npy")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"damaged")
    done = opml("data", "verify", "riann/sift_photos", env={**env, "OPML_DATA": str(tmp_path / "mine")})
    assert done.returncode == 1 and "bad" in done.stdout
    done = opml("data", "ls", env={**env, "OPML_DATA": str(tmp_path / "nowhere")})
    assert done.returncode == 2 and "OPML_DATA" in done.stderr


def test_help_of_everything(typed):
    text = typed("--help").stdout
    for command in ("list", "params", "run", "ls", "show", "rm", "claims", "gc", "reindex", "data", "lab"):
        assert f" {command} " in text
        done = typed(command, "--help")
        assert done.returncode == 0 and "Usage: opml" in done.stdout
    for option in ("-p", "--preset", "--force", "--timeout", "--mem-gb", "--show", "--quiet", "--json"):
        assert option in typed("run", "--help").stdout
    assert typed("lab", "--help").returncode == 0 and typed("--version").stdout.startswith("opml")


def test_home_is_found_beside_settings_ini(opml, tmp_path, notebook):
    nb = notebook("n = 1")
    inner = tmp_path / "project" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "project" / "settings.ini").write_text("[DEFAULT]\n")
    r = strict(opml("run", nb, "--json", cwd=inner, env={"OPML_HOME": ""}).stdout)
    assert Path(r["dir"]).parents[1] == tmp_path / "project" / ".opml"
    assert (tmp_path / "project" / ".opml" / ".gitignore").read_text() == "*\n"
    r = strict(opml("run", nb, "--json", cwd=tmp_path, env={"OPML_HOME": "", "HOME": str(tmp_path / "me")}).stdout)
    assert Path(r["dir"]).parents[1] == tmp_path / "me" / ".opml"


def test_a_closed_pipe_is_no_error(opml, answer, demo, home):
    store = Store(home)
    folder, run_id = store.begin({"key": "k", "chapter": "demo", "params": {}, "given": {"x": "y" * 200}, "preset": None})
    doc = json.loads((folder / "request.json").read_text())
    store.entries.put([{**doc, "id": f"{run_id}-{i}", "status": "running"} for i in range(600)])
    listing = opml("ls", "-n", "0", start=True)
    listing.stdout.readline(); listing.stdout.close()
    err = listing.stderr.read()
    listing.wait(20); listing.stderr.close()
    assert listing.returncode == 0 and "Traceback" not in err and "Error" not in err, err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["list", "list --json", "data ls", "params riann", "--help"])
def test_a_reader_that_closes_at_once_is_no_error(home, words, unbuffered):
    "As `opml list | true`: however Python keeps its output, exit code 0 and nothing said."
    env = {**os.environ, "OPML_HOME": str(home), "PYTHONUNBUFFERED": unbuffered}
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *words.split()], stdout=writes, stderr=subprocess.PIPE, text=True, env=env, timeout=120)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_leaves_no_process(opml, demo, home):
    opml("run", demo, "--json")
    assert until(lambda: not processes(str(home)), 5)


# ------------------------------------------------------------------ plug-ins

ACME = '''
import contextlib, pathlib, click
@click.command()
@click.argument("who")
def hello(who):
    "Greets."
    click.echo(f"hello {who}")
    return 3
@contextlib.contextmanager
def mark(folder, request):
    (folder / "before").write_text(request["key"])
    yield
    (folder / "after").write_text((folder / "log.jsonl").read_text())
@contextlib.contextmanager
def late(folder, request):
    yield
    raise OSError("the disk of the hook")
NUMBER = 3
NOTEBOOK = pathlib.Path(__file__).with_name("demo.ipynb")
'''


NOUN = '''
from opml_wb.core.cli.grammar import Noun
@click.group(cls=Noun)
def noun(): "Things of Acme."
@noun.command()
@click.argument("who")
@click.option("--loud", is_flag=True)
def verb(who, loud):
    "Says it."
    click.echo(who + "!" * loud)
    return 4
'''


@pytest.fixture
def plug(tmp_path, notebook):
    "plug(**groups) -> environment in which the package `acme` registers these {group: {name: object}}."
    def install(**groups):
        site = tmp_path / "plugged"
        info = site / "acme-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (site / "acme.py").write_text(ACME)
        notebook("n = 2", "from opml_wb import log\nlog.metric('n', n)", name="acme", **PRESETS).replace(site / "demo.ipynb")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(
            f"[opml_wb.{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()) for group, entries in groups.items()))
        return {"PYTHONPATH": str(site)}
    return install


def test_a_command_of_another_package(opml, plug):
    env = plug(commands={"hello": "acme:hello", "gone": "acme_gone:x", "odd": "acme:NUMBER", "ls": "acme:hello"})
    done = opml("hello", "you", env=env)
    assert (done.returncode, done.stdout) == (3, "hello you\n") and "Greets" in opml("hello", "--help", env=env).stdout
    listed = opml("--help", env=env)
    told = {line.split()[-2]: line.split()[-1] for line in listed.stdout.splitlines() if line.endswith(("Greets", "acme_gone", "acme"))}
    assert listed.returncode == 0 and listed.stderr == "" and told["hello"] == "Greets" and told["package"] == "acme"
    for name, why in (("gone", "No module named 'acme_gone'"), ("odd", "expected a click command")):
        done = opml(name, env=env)
        assert done.returncode == 2 and f"opml_wb.commands {name!r} of package 'acme'" in done.stderr and why in done.stderr
        assert "Traceback" not in done.stderr
    assert opml("ls", env=env).stderr.count("no runs yet") == 1          # ours cannot be replaced


def test_an_old_spelling_names_the_new_one(opml, plug):
    env = plug(commands={"noun": "acme:noun"}, moved_commands={"verb": "acme:noun", "gone": "acme_gone:x", "ls": "acme:noun"})
    (Path(env["PYTHONPATH"]) / "acme.py").write_text(ACME + NOUN)
    new, old = opml("noun", "verb", "a", "--loud", env=env), opml("verb", "a", "--loud", env=env)
    assert (new.returncode, new.stdout, new.stderr) == (4, "a!\n", "")
    assert (old.returncode, old.stdout) == (4, "a!\n") and old.stderr.count("\n") == 1 and "`opml noun verb`" in old.stderr
    assert "Usage: opml noun verb" in opml("verb", "--help", env=env).stdout
    assert "verb" not in [line.split()[0] for line in opml("--help", env=env).stdout.splitlines() if line.strip()]
    assert opml("gone", env=env).returncode == 2 and "noun" not in opml("ls", env=env).stderr
    assert "no command 'vrb'; did you mean 'verb'?" in opml("noun", "vrb", env=env).stderr


def test_what_was_moved_is_there(opml, tmp_path):
    for old in "trace", "lineage", "impact", "check", "search", "pipeline":
        done = opml(old, "--help")
        assert done.returncode == 0 and f"Usage: opml provenance {old}" in done.stdout
        assert done.stderr == f"opml: `opml {old}` is now `opml provenance {old}`; the old spelling goes with the next version\n"
    done = opml("trace", "--json", "--", "sh", "-c", "exit 4", cwd=tmp_path)
    assert done.returncode == 4 and strict(done.stdout)["exit"] == 4


def test_help_imports_no_plug_in(opml, plug, tmp_path):
    env = plug(commands={"hello": "acme:hello"}, chapters={"acme": "acme:NOTEBOOK"}, run_hooks={"mark": "acme:mark"})
    (tmp_path / "plugged" / "acme.py").write_text("raise SystemExit('imported')")
    for args in (["--help"], ["ls"], ["claims"], ["run", "--help"]):
        done = opml(*args, env=env)
        assert done.returncode == 0 and "imported" not in done.stderr + done.stdout


def test_a_chapter_of_another_package(opml, plug, home):
    env = plug(chapters={"acme": "acme:NOTEBOOK", "gone": "acme_gone:x", "odd": "acme:NUMBER"})
    done = opml("list", "--json", env=env)
    rows = {r["name"]: r for r in strict(done.stdout)}
    assert done.returncode == 0 and rows["acme"]["title"] == "A demo" and not {"gone", "odd"} & set(rows)
    assert "opml_wb.chapters 'gone' of package 'acme'" in done.stderr and "'odd'" in done.stderr and "Traceback" not in done.stderr
    r = strict(opml("run", "acme", "n=5", "--json", env=env).stdout)
    assert r["metrics"] == {"n": 5} and r["chapter"] == "acme"
    done = opml("run", "gone", env=env)
    assert done.returncode == 2 and "No module named 'acme_gone'" in done.stderr
    assert "did you mean 'acme'" in opml("run", "acmee", env=env).stderr


def test_a_run_hook_of_another_package(opml, plug, demo):
    r = strict(opml("run", demo, "--json", env=plug(run_hooks={"mark": "acme:mark"})).stdout)
    folder = Path(r["dir"])
    assert r["status"] == "done" and (folder / "before").read_text() == r["key"] and "square" in (folder / "after").read_text()


@pytest.mark.parametrize("hook, why", [("acme_gone:x", "No module named 'acme_gone'"), ("acme:NUMBER", "not callable"),
                                       ("acme:late", "the disk of the hook")])
def test_a_broken_run_hook_is_named(opml, plug, demo, hook, why):
    "Provenance with a hole would be worse than no run: it fails, says whose fault it is, and keeps what was shown."
    done = opml("run", demo, "--json", env=plug(run_hooks={"bad": hook, "mark": "acme:mark"}))
    r = strict(done.stdout)
    assert done.returncode == 1 and r["status"] == "failed" and r["error"]["kind"] == "engine"
    assert "opml_wb.run_hooks 'bad'" in r["error"]["evalue"] and why in r["error"]["evalue"]
    assert Path(r["notebook"]).exists() and Store().ls()[0]["key"] == r["key"]
