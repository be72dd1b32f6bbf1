"""Questions to runs that were really captured: lineage, impact by version, reproduction, export. What a test expects is written by hand."""
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import nbformat
import pytest

from opml_wb.core.record import data
from opml_wb.core.engine.run import run
from opml_wb.core.record.database import StoreError
from opml_wb.provenance import FeatureStore, check, footprint, impact, last_successful, latest_using, most_used, rerun, search, tag
from opml_wb.provenance.journal.lineage_db import LineageReader, record_stage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="capture needs Linux")
PY = [sys.executable, "-S", "-E", "-c"]


def traced(home, work, *words):
    "The JSON object of `opml provenance trace` of `words`, in folder `work`."
    words = words if len(words) > 1 else (*PY, words[0])
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "provenance", "trace", "--json", "--", *words], cwd=work, env={**os.environ, "OPML_HOME": str(home)}, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def trace(home, tmp_path, monkeypatch):
    "trace(code or words...) -> the JSON object of `opml provenance trace`, in the working directory, which is the test's own."
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return lambda *words: traced(home, work, *words)


def copy(source, to, more=""): return f"a = open({source!r}).read(); open({to!r}, 'w').write(a + {more!r})"


def touched(frame): return sorted((op, os.path.basename(path)) for op, path in zip(frame.op, frame.path))


STAGES = {"clean": copy("raw.csv", "clean.csv", "c"), "features": copy("clean.csv", "features.csv", "f"), "tree": copy("features.csv", "tree.bin", "t"), "net": copy("features.csv", "net.bin", "n"),
          "reclean": copy("raw.csv", "clean.csv", "new"), "third": copy("clean.csv", "third.bin")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(home, folder, {name: run}): raw -> clean -> features -> two models; then `clean` is made anew over its own file, and a third model from that."
    folder = tmp_path_factory.mktemp("dag")
    (folder / "raw.csv").write_text("1\n2\n")
    return folder / "home", folder, {name: traced(folder / "home", folder, code)["run"] for name, code in STAGES.items()}


@pytest.fixture
def dag(made, monkeypatch):
    "{name: run} of the stages that were made once for all tests."
    monkeypatch.setenv("OPML_HOME", str(made[0]))
    monkeypatch.chdir(made[1])
    return made[2]


def test_footprint_and_impact_of_a_forked_dag_with_an_overwritten_intermediate(dag):
    assert touched(footprint(dag["clean"])) == [("created", "clean.csv"), ("read", "raw.csv")]
    assert touched(footprint(dag["reclean"])) == [("modified", "clean.csv"), ("read", "raw.csv")]
    by = {v: k for k, v in dag.items()}
    one = {name: {by[r] for r in impact(run).run} for name, run in dag.items()}
    assert one == {"clean": {"features"}, "features": {"tree", "net"}, "reclean": {"third"}, "tree": set(), "net": set(), "third": set()}
    assert {by[r] for r in impact(dag["clean"], transitive=True).run} == {"features", "tree", "net"}
    assert touched(impact(dag["features"])) == [("created", "net.bin"), ("created", "tree.bin"), ("read", "features.csv"), ("read", "features.csv")]
    assert list(impact(dag["clean"]).columns) == ["run", "op", "path", "version"]
    versions = dict(zip(footprint(dag["features"]).path, footprint(dag["features"]).version))
    assert versions[os.path.abspath("clean.csv")] != footprint(dag["third"]).version[0]


def test_who_used_what(dag):
    used = most_used().set_index(most_used().path.map(os.path.basename))
    assert (used.runs["features.csv"], used.runs["raw.csv"], used.versions["clean.csv"]) == (2, 2, 2)
    assert latest_using("features.csv")["run"] == dag["net"]
    assert search("features.csv tree").run.tolist() == [dag["tree"]]
    assert last_successful(LineageReader().stage(dag["third"])["pipeline"])["run"] == dag["third"]
    tag(dag["tree"], "shipped")
    assert search("shipped").run.tolist() == [dag["tree"]]


def test_rerun_repeats_only_what_must_be(trace):
    Path("raw.csv").write_text("1\n2\n")
    runs = {name: trace(STAGES[name])["run"] for name in ("clean", "features", "tree")}
    count = lambda: LineageReader().runs.count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = rerun(runs["tree"])
    assert again.ok and again.verdict == "same" and count() == 4
    assert footprint(again.doc["id"]).version.tolist()[0] == footprint(runs["tree"]).version.tolist()[0]
    Path("features.csv").unlink()
    with pytest.warns(UserWarning, match="features.csv: then .*, now None"): again = rerun(runs["tree"])
    assert again.verdict == "same" and count() == 6 and not Path("features.csv").exists()         # `features`, then `tree`
    with pytest.warns(UserWarning): again = rerun(runs["tree"], apply=True)
    assert again.applied == [os.path.abspath("features.csv")] and count() == 8 and Path("features.csv").read_text() == "1\n2\ncf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rerun(runs["tree"], from_failed=False)
    assert count() == 11                                          # all three


def test_a_pipeline_goes_on_from_the_stage_that_failed(trace):
    Path("raw.csv").write_text("1")
    first = trace(copy("raw.csv", "clean.csv"))
    Path("fit.py").write_text("a = open('clean.csv').read(); raise SystemExit(int(a))")
    failed = trace(*PY[:1], "-S", "fit.py")
    assert failed["exit"] == 1 and touched(footprint(failed["run"])) == [("read", "clean.csv"), ("read", "fit.py")]
    Path("fit.py").write_text("a = open('clean.csv').read(); open('model', 'w').write(a)")
    with pytest.warns(UserWarning, match="code .*fit.py"): again = rerun(failed["run"], apply=True)
    assert again.ok and again.verdict == "differs" and Path("model").read_text() == "1" and len(LineageReader().runs.ls()) == 3
    assert first["run"] in {r["id"] for r in LineageReader().runs.ls()}


KILLED = """
import os, sys, warnings
from opml_wb.provenance.ask import in_place, reproduce
warnings.simplefilter("ignore")
points = iter(range(1, 99))
def point(*_):
    if next(points) == int(sys.argv[2]): os.kill(os.getpid(), 9)
def then(call): return lambda *a, **k: (call(*a, **k), point())[0]
in_place.tell, reproduce.view_for, reproduce.execute = point, then(reproduce.view_for), then(reproduce.execute)
reproduce.rerun(sys.argv[1], apply=True)
"""


def views_of(home):
    "The scratch folders that lie about for this home."
    found = []
    for base in ("/var/tmp", tempfile.gettempdir(), home):
        for plan in Path(base).glob("opml-view-*/plan.json"):
            with contextlib.suppress(FileNotFoundError):          # another test's, done with
                if str(home) in plan.read_text(): found.append(plan)
    return found


def test_a_killed_rerun_loses_nothing_and_leaves_nothing(trace, home, tmp_path):
    "Killed in the view, after it, and at each step of putting one file in place; the user goes on writing before the next call."
    Path("in.txt").write_text("1")
    run = trace(copy("in.txt", "out.txt", "!"))["run"]
    for at in (1, 2, 5, 6, 99):                                   # the view is made, it was executed; ready beside its place, exchanged; not killed
        Path("out.txt").unlink(missing_ok=True)
        Path("in.txt").write_text("1")
        done = subprocess.run([sys.executable, "-c", KILLED, run, str(at)], timeout=300)
        assert done.returncode == (0 if at == 99 else -9) and Path("in.txt").read_text() == "1"
        assert not Path("out.txt").exists() or Path("out.txt").read_text() == "1!"
        if at == 99: break
        assert views_of(home)
        for name in ("in.txt", "out.txt"): Path(name).write_text("written since")
        with pytest.raises(StoreError, match="in.txt: no file has its content of then"): rerun(run)
        assert Path("in.txt").read_text() == Path("out.txt").read_text() == "written since"
        assert sorted(os.listdir()) == ["in.txt", "out.txt"] and not list(home.glob("reruns/*")) and not views_of(home)
    assert Path("out.txt").read_text() == "1!"


def test_a_rerun_writes_through_no_planted_link(trace, tmp_path):
    Path("in.txt").write_text("1")
    os.mkdir("out")
    run = trace(copy("in.txt", "out/out.txt", "!"))["run"]
    trace(copy("in.txt", "kept.txt"))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "out.txt").write_text("precious")
    for name in ("in.txt.opml-part", "in.txt.opml-aside"): os.symlink(tmp_path / "precious" / "out.txt", name)
    Path("in.txt").unlink()
    os.symlink(tmp_path / "precious" / "out.txt", "in.txt")
    Path("out/out.txt").unlink()
    os.symlink(tmp_path / "precious" / "out.txt", "out/out.txt")
    with pytest.warns(UserWarning, match="in.txt"): again = rerun(run, apply=True)
    assert again.verdict == "same" and again.refused == [f"{os.path.abspath('out')}/out.txt was changed since; it is left as it is"]
    Path("out/out.txt").unlink()
    os.rmdir("out")
    os.symlink(tmp_path / "precious", "out")                      # the folder is another one
    with pytest.warns(UserWarning), pytest.raises(StoreError, match="'out' on the way to it is a link"): rerun(run, apply=True)
    assert (tmp_path / "precious" / "out.txt").read_text() == "precious" and os.path.islink("in.txt")


def test_a_rerun_of_a_rerun_in_a_tree_that_cannot_be_written_by_absolute_paths(trace, tmp_path):
    Path("sub").mkdir()
    Path("sub/in.txt").write_text("1")
    run = trace(copy(os.path.abspath("sub/in.txt"), os.path.abspath("sub/out.txt"), "!"))["run"]
    trace(copy("sub/in.txt", "kept.txt"))
    Path("sub/in.txt").write_text("2")
    Path("sub/out.txt").write_text("2!")
    inode = os.stat("sub/out.txt").st_ino
    os.chmod("sub", 0o555)
    try:
        for _ in range(2):
            with pytest.warns(UserWarning, match="input .*in.txt"): again = rerun(run)
            assert again.verdict == "same" and again.of == run and os.stat("sub/out.txt").st_ino == inode
            run = again.doc["id"]
    finally: os.chmod("sub", 0o755)
    assert (Path("sub/in.txt").read_text(), Path("sub/out.txt").read_text()) == ("2", "2!")
    subprocess.run(["rm", "-r", "sub"], check=True)               # the folders are gone, too
    with pytest.warns(UserWarning): again = rerun(run, apply=True)
    assert again.verdict == "same" and Path("sub/out.txt").read_text() == "1!" and not Path("sub/in.txt").exists()
    Path("kept.txt").unlink()
    with pytest.warns(UserWarning), pytest.raises(StoreError, match="sub/in.txt: no file has its content"): rerun(run, apply=True)
    assert Path("sub/out.txt").read_text() == "1!"


def test_a_rerun_changes_a_file_in_place_from_what_it_was(trace):
    "What it found comes back in the view; what the user wrote since stays, and is refused by name."
    Path("log.txt").write_text("a")
    more = "a = open('log.txt').read(); open('log.txt', 'w').write(a + 'b')"
    run = trace(more)["run"]
    Path("log before").write_text("a")
    trace("open('log before').read()")
    assert Path("log.txt").read_text() == "ab"
    with pytest.warns(UserWarning): again = rerun(run, apply=True)
    assert again.verdict == "same" and again.applied == [] and Path("log.txt").read_text() == "ab"
    Path("log.txt").write_text("abc")
    with pytest.warns(UserWarning): again = rerun(run, apply=True)
    assert again.verdict == "same" and Path("log.txt").read_text() == "abc" and "log.txt was changed since" in again.refused[0]
    unsure = trace("import os; open('random', 'w').write(os.urandom(8).hex())")["run"]
    assert rerun(unsure).verdict == "differs"


W = "open('out', 'w').write"
BESIDE = {  # what changes after the run: (code, before it, after it, verdict, what is named)
    "nothing": (f"{W}('1')", None, None, "same", ""),
    "a variable": (f"import os; {W}(os.environ.get('OPENED', ''))", None, lambda: os.environ.update(OPENED="1"), "differs", "environment OPENED"),
    "a file that wasn't there": (f"try: open('a.ini')\nexcept OSError: {W}('1')", None, lambda: Path("a.ini").write_text("x"), "differs", "input a.ini"),
    "a new file in its folder": (f"import glob; {W}(str(glob.glob('*.csv')))", None, lambda: Path("new.csv").write_text("x"), "differs", "+ new.csv"),
    "a file nobody looked for": (f"import json; {W}('1')", None, lambda: Path("notes.md").write_text("x"), "same", ""),
    "its own folder": ("import os; os.makedirs('o/p'); os.listdir('.'); open('o/p/x', 'w').write('1')", None, None, "same", ""),
    "the network": (f"import socket\ntry: socket.create_connection(('127.0.0.1', 9))\nexcept OSError: {W}('1')", None, None, "cannot tell", "connected to 127.0.0.1:9"),
    "an appended file": ("open('log', 'a').write('1')", lambda: Path("log").write_text("0"), None, "differs", "input log"),
    "a large input overwritten": ("a = open('big', 'rb').read(9); open('big', 'wb').write(a)", lambda: os.truncate(os.open("big", os.O_CREAT | os.O_WRONLY), 40 << 20), None, "cannot tell", "big: the content"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_check_names_what_a_run_depends_on_beside_its_files(trace, opml, home, monkeypatch, what):
    code, before, after, verdict, named = BESIDE[what]
    monkeypatch.setenv("OPENED", "")
    if before: before()
    Path("stage.py").write_text(code)
    run = trace(sys.executable, "stage.py")["run"]
    if after: after()
    found = check(run)
    said = [f"{d['class']} {os.path.relpath(d['name'])} {d['now']}" if "/" in d["name"] else f"{d['class']} {d['name']} {d['now']}" for d in found["differences"]] + found["unknown"]
    assert found["verdict"] == verdict and named in "\n".join(said), found
    if what == "the network":
        done = opml("provenance", "check", run, env={"OPML_HOME": str(home)}, cwd=Path.cwd())
        assert done.returncode == 3 and done.stdout.startswith("cannot tell\n"), done.stdout + done.stderr


def test_standard_input_and_repeats_that_came_out_otherwise_cannot_be_told(trace, home):
    words = [sys.executable, "-m", "opml_wb.core.cli", "provenance", "trace", "--json", "--", *PY, "import os, sys; sys.stdin.read(); open('out', 'w').write(os.urandom(4).hex())"]
    runs = [json.loads(subprocess.run(words, input=b"x", capture_output=True, env={**os.environ, "OPML_HOME": str(home)}).stdout)["run"] for _ in range(2)]
    found = check(runs[0])
    assert found["verdict"] == "differs" or found["verdict"] == "cannot tell"
    assert any("standard input was a pipe" in line for line in found["unknown"]) and any("came out otherwise" in line for line in found["unknown"])


def test_the_commands_know_runs_of_commands(trace, opml, home, tmp_path):
    "show, rerun and compare of a trace: exit codes 0, 1 and 2, and nothing wider than 80 columns."
    def said(*words):
        done = opml(*words, env={"OPML_HOME": str(home), "COLUMNS": "80"}, cwd=Path.cwd())
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr
    Path("in.txt").write_text("1")
    first = trace("sh", "-c", "cat in.txt > out.txt")["run"]
    assert said("show", first)[0] == 0 and all(w in said("show", first)[1] for w in ("cat in.txt > out.txt", "in.txt", "out.txt"))
    assert said("rerun", first)[0] == 0 and "\nsame\n" in said("rerun", first)[1]
    Path("kept").write_text("1")
    trace("cat", "kept")
    Path("in.txt").write_text("2")
    Path("out.txt").unlink()
    code, text = said("rerun", first, "--apply")
    assert code == 0 and "put in place" in text and Path("out.txt").read_text() == "1" and Path("in.txt").read_text() == "2"
    second = trace("sh", "-c", "cat in.txt > out.txt")["run"]
    code, text = said("compare", first, second)
    assert code == 1 and "input in.txt" in text and text.rstrip().endswith("differs")
    assert json.loads(opml("compare", first, second, "--json", env={"OPML_HOME": str(home)}).stdout)["differences"][0]["verdict"] == "differs"
    again = json.loads(opml("rerun", second, "--json", env={"OPML_HOME": str(home)}, cwd=Path.cwd()).stdout)
    assert again["verdict"] == "same" and again["of"] == second and [os.path.basename(r["name"]) for r in again["outputs"]] == ["out.txt"]
    assert max(len(line) for w in ("show", "rerun") for line in said(w, second)[1].splitlines() if str(tmp_path) not in line and "\t" not in line) <= 80
    Path("kept").unlink()
    code, text = said("rerun", first)
    assert code == 2 and "in.txt: no file has its content of then" in text
    secret = trace("sh", "-c", "cat in.txt > x.txt", "--password", "hunter22")["run"]
    assert said("rerun", secret)[0] == 2 and "secret" in said("rerun", secret)[1]
    assert said("rerun", first, "--apply", "--json")[0] == 2 and said("compare", first, first)[0] == 2


SAME = {"verdict": "same", "differences": [], "unknown": []}
CELLS = ["n: int = 3\nfile: str = 'x.csv'", "import cloudpickle, helper\nfrom opml_wb import log", "values = [float(v) for v in open(file)]", "log.metric('total', helper.add(values) * n)"]


@pytest.fixture
def chapter(tmp_path, home, notebook):
    "A chapter with data, a module and Markdown, and its run."
    (tmp_path / "x.csv").write_text("1\n2\n3\n")
    (tmp_path / "helper.py").write_text("def add(xs): return sum(xs)  # all\n")
    path = notebook(*CELLS, name="sums")
    nb = nbformat.read(path, 4)
    nb.cells.insert(1, nbformat.v4.new_markdown_cell("# Sums"))
    nbformat.write(nb, path)
    first = run(path, n=4)
    assert first.ok, first.error
    return path, first


def edit(path, cell, source):
    nb = nbformat.read(path, 4)
    nb.cells[cell].source = source
    nbformat.write(nb, path)


def found(run): return [(d["class"], os.path.basename(d["name"])) for d in check(run)["differences"]]


def test_check_names_each_difference_in_its_class(chapter, tmp_path):
    path, first = chapter
    assert check(first) == SAME
    edit(path, 1, "# Sums, in other words")
    edit(path, 3, CELLS[2] + "   # a comment")
    (tmp_path / "helper.py").write_text("# a comment\ndef add(xs): return sum(xs)\n")
    assert check(first) == SAME
    edit(path, 3, CELLS[2])
    (tmp_path / "x.csv").write_text("1\n2\n4\n")
    assert (check(first)["verdict"], found(first)) == ("differs", [("input", "x.csv")])
    (tmp_path / "x.csv").write_text("1\n2\n3\n")
    edit(path, 4, CELLS[3].replace("* n", "+ n"))
    assert found(first) == [("code", "cell 4")]
    assert check(first)["differences"][0]["then"] == CELLS[3]
    edit(path, 4, CELLS[3])
    (tmp_path / "helper.py").write_text("def add(xs): return sum(xs) + 1\n")
    assert found(first) == [("code", "helper")]
    (tmp_path / "helper.py").write_text("def add(xs): return sum(xs)  # all\n")
    LineageReader().db.execute("update prov_package set version='0.0.1' where name='cloudpickle'")
    [d] = check(first)["differences"]
    assert (d["class"], d["name"], d["then"]) == ("package", "cloudpickle", "0.0.1") and d["now"]


def test_rerun_reproduces_the_metrics_and_warns_first(chapter, tmp_path):
    path, first = chapter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = rerun(first)
    assert again.metrics == first.metrics == {"total": 24.0} and again.doc["id"] != first.doc["id"] and again.params["n"] == 4
    edit(path, 4, CELLS[3].replace("* n", "+ n"))
    with pytest.warns(UserWarning, match="code cell 4"): assert rerun(first.key).metrics == {"total": 10.0}


def test_an_input_comes_back_for_the_time_of_the_run(chapter, tmp_path):
    path, first = chapter
    (tmp_path / "kept.csv").write_text("1\n2\n3\n")
    other = run(path, file="kept.csv")                            # another run read the same content elsewhere
    (tmp_path / "x.csv").write_text("9\n")
    with pytest.warns(UserWarning, match="input .*x.csv"): again = rerun(first)
    assert again.metrics == first.metrics and (tmp_path / "x.csv").read_text() == "9\n" and other.ok
    assert not list(tmp_path.glob("*.opml-*"))


LOAD = """
import sys, pandas as pd
from opml_wb.provenance import FeatureStore
day = pd.Timestamp("2020-01-01", tz="UTC")
FeatureStore("lake").write("t", pd.DataFrame({"id": [1], "day": day, "x": [float(sys.argv[1])]}), "id", "day")
"""
FIT = """
import pandas as pd
from opml_wb.provenance import FeatureStore
open("model", "w").write(str(FeatureStore("lake").value("t", 1, "x", pd.Timestamp("2020-01-02", tz="UTC"))))
"""


def test_a_model_names_the_table_versions_it_was_trained_on(trace):
    Path("load.py").write_text(LOAD)
    Path("fit.py").write_text(FIT)
    first = trace(sys.executable, "load.py", "1")
    fit = trace(sys.executable, "fit.py")
    second = trace(sys.executable, "load.py", "2")
    tables = [(e["op"], e["version"], os.path.basename(e["path"])) for r in (first, fit, second) for e in LineageReader().events(r["run"]) if e["kind"] == "table"]
    assert tables == [("created", "delta:0", "t"), ("read", "delta:0", "t"), ("modified", "delta:1", "t")]
    assert set(impact(first["run"]).run) == {fit["run"], second["run"]}
    assert found(fit["run"]) == [("input", "t")]
    with pytest.warns(UserWarning, match="then delta:0, now delta:1"): assert rerun(fit["run"]).ok
    assert Path("model").read_text() == "1.0"                     # read at its version
    assert [r["version"] for r in FeatureStore("lake").history("t").to_dict("records")] == [0, 1]


def test_openlineage_events_are_valid(dag):
    from opml_wb.provenance.ask.openlineage import openlineage
    ol = pytest.importorskip("openlineage.client.event_v2")
    for name in dag:
        for e in openlineage(dag[name]):
            made = ol.RunEvent(eventTime=e["eventTime"], producer=e["producer"], eventType=ol.RunState[e["eventType"]], run=ol.Run(**e["run"]), job=ol.Job(**e["job"]),
                               inputs=[ol.InputDataset(**d) for d in e["inputs"]], outputs=[ol.OutputDataset(**d) for d in e["outputs"]])
            assert made.schemaURL == e["schemaURL"]
    with pytest.raises(ValueError): ol.Run(runId="no uuid")


@pytest.mark.skipif(data.find("provenance/openlineage") is None, reason="needs `opml data fetch provenance/openlineage`")
def test_openlineage_events_fit_the_standards_schema(dag):
    import jsonschema
    from opml_wb.provenance.ask.openlineage import openlineage
    schema = jsonschema.Draft202012Validator(json.loads(data.path("provenance/openlineage").read_text()), format_checker=jsonschema.FormatChecker())
    for name in dag:
        for e in openlineage(dag[name]): schema.validate(e)
    assert not schema.is_valid({**e, "run": {}})


def test_a_chapter_goes_elsewhere_in_one_file(chapter, tmp_path, opml, monkeypatch):
    path, first = chapter
    done = opml("provenance", "pipeline", "export", first.key, tmp_path / "sums.zip")
    assert done.returncode == 0, done.stderr
    there = tmp_path / "there"
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "other home"))
    done = opml("provenance", "pipeline", "import", tmp_path / "sums.zip", "--to", there, "--json", env={"OPML_HOME": str(tmp_path / "other home")})
    told = json.loads(done.stdout)
    assert sorted(p.name for p in there.iterdir()) == ["helper.py", "sums.ipynb", "x.csv"] and told["differences"] == []
    again = run(told["commands"][0]["words"][2], preset="imported")
    assert again.metrics == first.metrics


def test_the_verbs_print_json(dag, made, opml):
    def ask(*words): return json.loads(opml("provenance", *words, "--json", cwd=made[1], env={"OPML_HOME": str(made[0])}).stdout)
    assert ask("lineage", dag["features"])["before"] == [dag["clean"]]
    assert [e["op"] for e in ask("lineage", "clean.csv")["events"]] == ["created", "read", "modified", "read"]
    assert {r["run"] for r in ask("impact", dag["clean"], "--transitive")} == {dag["features"], dag["tree"], dag["net"]}
    assert ask("check", dag["tree"]) == SAME
    assert [r["run"] for r in ask("search", "tree.bin")] == [dag["tree"]]
    refused = opml("provenance", "impact", "nothing")
    assert refused.returncode == 2 and "no run 'nothing'" in refused.stderr


def test_paths_that_are_not_utf8_pass_every_question(trace, home, opml, tmp_path):
    odd = os.fsdecode(b"in\xff\xfe.txt")
    Path(odd).write_text("x")
    first = trace(*PY, "import os; open(b'out\\xfd.txt', 'w').write(open(b'in\\xff\\xfe.txt').read())")["run"]
    second = trace(*PY, "open(b'last\\xfc', 'w').write(open(b'out\\xfd.txt').read())")["run"]
    out, last = (os.path.abspath(os.fsdecode(n)) for n in (b"out\xfd.txt", b"last\xfc"))
    assert set(footprint(first).path) == {os.path.abspath(odd), out} and set(impact(first).path) == {out, last}
    assert list(most_used().path) == [out, os.path.abspath(odd)] and most_used().runs.tolist() == [1, 1]
    assert latest_using(out)["run"] == latest_using(os.fsencode(out))["run"] == second and tag(out, "good") == ["good"]
    assert check(second)["verdict"] == "same" and search("last").run.tolist() == [second]
    from opml_wb.provenance import lineage_graph
    from opml_wb.provenance.ask.openlineage import openlineage
    assert "out" in lineage_graph(second).to_json() and json.dumps(openlineage(second), ensure_ascii=False).encode()

    def ask(*words): return json.loads(opml("provenance", *words, "--json", env={"OPML_HOME": str(home)}, cwd=Path.cwd()).stdout)
    assert {r["path"] for r in ask("impact", first)} == {out, last} == {e["path"] for e in ask("lineage", second)["events"]}
    assert ask("lineage", out)["path"] == out
    assert set(ask("pipeline", "export", second, "all.zip")["files"]) == {odd}
    there = Path(ask("pipeline", "import", "all.zip", "--to", str(tmp_path / "there"))["folder"])
    assert os.listdir(there) == [odd] and (there / odd).read_text() == "x"
    Path(out).write_text("y")
    difference, = ask("check", second)["differences"]
    assert (difference["class"], difference["name"]) == ("input", out)


def test_postgres_answers_the_same(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPML_STORE", postgres)
    stage, runs = {"who": "ann", "code": "c"}, {}
    runs["clean"] = record_stage("clean", ("created", "/d/clean.csv", "5f"), stage=stage, params={"seed": 1})
    runs["fit"] = record_stage("fit", ("read", "/d/clean.csv", "5f"), ("created", "/d/model", "6a"), stage=stage, params={"seed": 1})
    tag(runs["fit"], "good one")
    assert set(impact(runs["clean"]).run) == {runs["fit"]}
    assert [search(t).run.tolist() for t in ("clean.csv mod", "good", "ann")] == [[runs["fit"]], [runs["fit"]], [runs["fit"], runs["clean"]]]
    assert (last_successful("fit")["who"], latest_using("/d/clean.csv")["run"], most_used().runs.tolist()) == ("ann", runs["fit"], [1])


def test_a_home_and_a_lake_of_before_still_open(tmp_path, monkeypatch):
    "Two traces, tags, words and a vacuumed table with a pin, written by the version before the modules were renamed."
    import pandas as pd
    with tarfile.open(Path(__file__).with_name("provenance_home.tar.xz")) as old: old.extractall(tmp_path, filter="data")
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    reader = LineageReader()
    fit, clean = (d["id"] for d in reader.runs.ls())
    assert touched(footprint(clean)) == [("created", "mid.csv"), ("read", "in.csv")] and set(impact(clean).run) == {fit}
    assert (tag(fit), search("kept").run.tolist(), reader.stage(fit)["who"]) == (["kept"], [fit], "ann")
    files = {name: (tmp_path / "home" / name).read_bytes() for name in ("tags.jsonl", f"runs/{fit}/provenance.json")}
    for end in ("", "-wal", "-shm"): (tmp_path / "home" / f"opml.db{end}").unlink(missing_ok=True)
    assert set(impact(clean).run) == {fit} and tag(fit) == ["kept"]                  # from the folders alone
    assert files == {name: (tmp_path / "home" / name).read_bytes() for name in files}
    fs, day = FeatureStore(tmp_path / "lake"), pd.Timestamp("2020-01-01", tz="UTC")
    assert fs.history("t").readable.tolist() == [False, True, True] and fs.pins("t") == [(2, fit)]
    assert [fs.value("t", 1, "x", day, day + pd.Timedelta(days=n)) for n in (1, 2)] == [1., 2.]
    with pytest.raises(LookupError, match="vacuumed"): fs.value("t", 1, "x", day, day)
    assert fs.write("t", pd.DataFrame({"id": [1], "t": day, "x": [9.]}), "id", "t") > 2 and fs.value("t", 1, "x", day) == 9.


def test_old_module_paths_lead_to_the_new_modules():
    from importlib import import_module
    for old, name in (("files", "version_of"), ("store", "Ledger"), ("store", "Reader"), ("tracer", "enter"), ("facts", "machine"), ("net", "events"),
                      ("verbs", "lineage"), ("commits", "PinnedError"), ("reproduce", "check"), ("kernel", "install"), ("graph", "Graph")):
        assert hasattr(import_module(f"opml_wb.provenance.{old}"), name), old
    assert subprocess.run([sys.executable, "-m", "opml_wb.provenance.kernel"]).returncode == 0      # a kernelspec of before starts so
