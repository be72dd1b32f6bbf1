"What a reader of a terminal sees: tables at any width, help on one screen, TSV in a pipe, colours, completion, the place of an error."
import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import click
import nbformat
import pytest
from click.shell_completion import ShellComplete

from opml_wb.core.cli.grammar import sentence
from opml_wb.core.cli.verbs import SECTIONS, VERBS, cli
from opml_wb.core.record.models import ModelStore
from opml_wb.core.record.store import Store

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
COLOURS = re.compile(r"\x1b\[(?:[0-9]+;)*3[0-7]m")


def on_terminal(home, columns, *args, **env):
    "What `opml *args` prints on a terminal of so many columns: lines without escape codes, `raw` with them, and its exit code."
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {**os.environ, "OPML_HOME": str(home), "TERM": "xterm-256color", **env}
    for name in ("COLUMNS", "LINES"): env.pop(name, None)
    process = subprocess.Popen([sys.executable, "-m", "opml_wb.core.cli", *map(str, args)], stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    out, until = b"", time.monotonic() + 120
    while select.select([parent], [], [], max(0, until - time.monotonic()))[0]:
        try: part = os.read(parent, 65536)
        except OSError: break
        if not part: break
        out += part
    os.close(parent)
    raw = out.decode().replace("\r\n", "\n")
    return SimpleNamespace(raw=raw, lines=ANSI.sub("", raw).splitlines(), returncode=process.wait(60))


LONG = "the share of requests that were answered within their deadline while two workers were killed and the third was swapped"
BODY = f'''from opml_wb import log
log.metric("a_metric_with_quite_a_long_name_of_its_own", .123456789); log.metric("loss", n / 3); log.metric("n", n)
log.claim({LONG!r}, paper=.95, measured=.25, unit="requests per second", better="higher")
log.claim("recall", paper=.9, measured=.95, better="higher")'''


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "A home with runs of a chapter, of one of which parameters and metrics are long, and with a failed run."
    folder = tmp_path_factory.mktemp("full")
    def write(name, *sources):
        cells = [nbformat.v4.new_code_cell(s) for s in sources]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"
    demo = write("demo", "n: int = 1  # how many of them there are, which is said in a sentence that doesn't end before the line does\n"
                         "words: list[str] = []  # any", BODY)
    bad = write("bad", "n = 1", "seen = 1\nfor i in range(3):\n    seen / (2 - i)")
    env = {**os.environ, "OPML_HOME": str(folder / "home")}
    for words in ([demo], [demo, "n=2", 'words=["' + '", "'.join(f"word{i}" for i in range(20)) + '"]'], [bad, "n=3"]):
        subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "run", *map(str, words), "--quiet"], env=env, capture_output=True, timeout=120)
    return SimpleNamespace(home=folder / "home", demo=demo, bad=bad, keys=[d["key"] for d in Store(folder / "home").ls()])


# ------------------------------------------------------------------ tables

def tables(full):
    return {"list": ["list"], "benches": ["list", "--benches"], "ls": ["ls"], "claims": ["claims"], "data": ["data", "ls"], "long": ["data", "ls", "--long"],
            "params": ["params", full.demo], "show": ["show", full.keys[1]], "compare": ["compare", *full.keys[1:]],
            "why": ["why", full.keys[1]], "data show": ["data", "show", "eligibility/servicenow"], "help": ["--help"],
            "provenance": ["provenance", "--help"], "flexserve": ["flexserve", "--help"]}


@pytest.mark.parametrize("what", ["list", "benches", "ls", "claims", "data", "long", "params", "compare", "help", "provenance", "flexserve"])
@pytest.mark.parametrize("columns", [80, 200])
def test_no_line_is_too_wide_and_no_word_is_cut(full, what, columns):
    args = tables(full)[what]
    seen = on_terminal(full.home, columns, *args)
    assert seen.lines and max(map(len, seen.lines)) <= columns, seen.raw
    wide = set(" ".join(on_terminal(full.home, 1000, *args).lines).split())     # everything in one line
    own = {"left", "out", "here:", "…"} if any(line.startswith("left out") for line in seen.lines) else {"…"}
    known = wide | own | set(" ".join(line for line in seen.lines if line.startswith("left out")).split())
    for word in " ".join(seen.lines).split():
        piece = any(len(w) > columns - 30 and word in w for w in wide)     # of a path or an address
        if word in known or set(word) == {"─"} or word.isdigit() or piece: continue
        raise AssertionError(f"{word!r} is no word:\n" + "\n".join(seen.lines))


def words_of(seen): return set(" ".join(seen.lines).split())


def test_at_80_columns_the_words_are_there(full):
    seen = on_terminal(full.home, 80, "claims")
    assert set(LONG.split()) <= words_of(seen) and "exceeded" in words_of(seen)
    seen = on_terminal(full.home, 80, "ls")
    assert {'"word3",', "n=2,", "failed", "a_metric_with_quite_a_long_name_of_its_own=0.1235,"} <= words_of(seen)
    licence = next(r["licence"] for r in json.loads(subprocess.run(
        [sys.executable, "-m", "opml_wb.core.cli", "data", "ls", "--json"], capture_output=True, text=True).stdout) if r["name"] == "riann/sift_photos")
    assert set(licence.split()) <= words_of(on_terminal(full.home, 80, "data", "ls", "--long"))


def test_list_has_a_line_for_each_chapter(full):
    seen = on_terminal(full.home, 80, "list")
    chapters = [line for line in seen.lines if re.match(r" ?\d+  \w", line)]
    names = [r["name"] for r in json.loads(subprocess.run(
        [sys.executable, "-m", "opml_wb.core.cli", "list", "--json"], capture_output=True, text=True).stdout) if r["number"]]
    assert [line.split()[1] for line in chapters] == names and len(seen.lines) <= len(names) + 4
    assert "opml list --benches" in seen.lines[-1]


@pytest.mark.parametrize("what", ["list", "benches", "ls", "claims", "data", "params"])
def test_a_pipe_gets_a_record_a_line(full, what):
    args = tables(full)[what]
    env = {**os.environ, "OPML_HOME": str(full.home), "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *map(str, args)], capture_output=True, text=True, env=env)
    kinds = {"benches": ["list"], "params": ["params", full.demo]}
    found = json.loads(subprocess.run([sys.executable, "-m", "opml_wb.core.cli", *map(str, kinds.get(what, args)), "--json"],
                                      capture_output=True, text=True, env=env).stdout)
    found = found["parameters"] if what == "params" else found
    if what == "list": found = [r for r in found if not r["name"].startswith("bench/")]
    assert "\x1b" not in done.stdout
    rows = list(csv.DictReader(io.StringIO(done.stdout), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == len(found) and all(None not in r and None not in r.values() for r in rows)
    first = {"ls": "key", "claims": "claim", "params": "parameter", "data": "name"}.get(what, "chapter")
    assert [r[first] for r in rows] == [r[{"claims": "name", "params": "name"}.get(what, "key" if what == "ls" else "name")] for r in found]


def test_times_and_figures_are_whole_in_a_pipe(full):
    env = {**os.environ, "OPML_HOME": str(full.home)}
    said = subprocess.run([sys.executable, "-m", "opml_wb.core.cli", "ls"], capture_output=True, text=True, env=env).stdout
    row = list(csv.DictReader(io.StringIO(said), delimiter="\t", quoting=csv.QUOTE_NONE))[-1]
    doc = Store(full.home).ls()[-1]
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(doc["started"])) == row["when"] and float(row["seconds"]) == doc["seconds"]


def test_colours(full):
    assert COLOURS.search(on_terminal(full.home, 100, "ls").raw)
    assert not COLOURS.search(on_terminal(full.home, 100, "ls", NO_COLOR="1").raw)
    plain, coloured = (re.sub(r"\d+ \w+ ago +", "", "\n".join(on_terminal(full.home, 100, "ls", **env).lines)) for env in ({"NO_COLOR": "1"}, {}))
    assert plain == coloured


def test_names_of_others_do_no_harm(tmp_path, capfd):
    from opml_wb.core.show.tables import Table
    Table("name\tx", rows=[["a\tb\n\x1b[31mc"]]).print()
    assert capfd.readouterr().out == "name\tx\na b [31mc\n"
    assert [line.plain for line in Table("name", rows=[["a\x1b[31m[red]"]]).lines(40)][-1] == "a [31m[red]"


# ------------------------------------------------------------------ help

def test_help_is_one_screen(full):
    from opml_wb.core.request.plugin import plugged
    seen = on_terminal(full.home, 80, "--help")
    assert len(seen.lines) <= 23 + len(plugged("commands")) and "..." not in seen.raw and "…" not in seen.raw
    for name, (_, text) in VERBS.items(): assert any(re.search(rf"\b{name} +{re.escape(text)}$", line) for line in seen.lines), name
    assert {n for names in SECTIONS.values() for n in names} == set(VERBS)
    assert any(re.search(r"provenance +Trace .*\(paper 4\)$", line) for line in seen.lines) and "_OPML_COMPLETE=bash_source" in seen.raw
    assert not any(re.search(rf"\b{old}  ", line) for old in ("trace", "lineage", "impact", "pipeline") for line in seen.lines)


@pytest.mark.parametrize("noun", ["provenance", "flexserve", "data", "provenance pipeline"])
def test_a_noun_tells_its_verbs_in_full(full, noun):
    seen = on_terminal(full.home, 80, *noun.split(), "--help")
    group = cli
    for word in noun.split(): group = group.get_command(click.Context(group), word)
    said = " ".join(" ".join(seen.lines).split())
    for name, command in group.commands.items(): assert f"{name} {sentence(command.help)}" in said
    named = [n for names in group.sections.values() for n in names]
    assert set(named) <= set(group.commands) and len(named) in (0, len(group.commands))


# ------------------------------------------------------------------ completion

@pytest.fixture
def tab(monkeypatch, full, capfd):
    "tab(*words) -> what TAB offers for the last of them, through click."
    monkeypatch.setenv("OPML_HOME", str(full.home))
    def call(*words):
        found = ShellComplete(cli, {}, "opml", "_OPML_COMPLETE").get_completions([str(w) for w in words[:-1]], words[-1])
        assert capfd.readouterr() == ("", "")
        return [item.value for item in found]
    return call


def test_completion(tab, full):
    assert tab("re") == ["reproduce", "rerun", "reindex"] and "provenance" in tab("p") and "trace" not in tab("")
    assert tab("provenance", "tr") == ["trace"] and tab("trace", "--ker") == ["--kernel"]
    assert tab("run", "ria") == ["riann"] and "bench/hnsw" in tab("params", "bench/")
    assert tab("run", "riann", "see") == ["seed="] and tab("run", "riann", "seed=1", "see") == []
    assert tab("run", "riann", "order=") == ["order=shuffled", "order=photo"]
    assert "dataset=riann/sift_photos_full" in tab("run", "riann", "dataset=riann/")
    assert tab("sweep", "riann", "k=1,2", "st") == ["step="] and tab("why", "riann", "st") == ["step="]
    assert tab("run", full.demo, "wo") == ["words="] and tab("run", "nothing", "x") == []
    assert tab("run", "riann", "--preset", "") == ["paper"] and "quick" in tab("reproduce", "--preset", "qu")
    assert tab("show", full.keys[0][:3]) == [full.keys[0][:10]] and "riann" in tab("compare", full.keys[0], "ri")
    assert tab("provenance", "lineage", full.keys[1][:12]) == [full.keys[1][:12]]
    assert tab("data", "fetch", "riann/time") == ["riann/time_model"] and "fetch" in tab("data", "")


def test_completion_of_models(tab, full, tmp_path):
    (tmp_path / "weights").write_bytes(b"w")
    ModelStore(full.home / "models").publish("cats", tmp_path / "weights")
    assert tab("flexserve", "serve", "ca") == ["cats"] and tab("flexserve", "dem") == ["demo"]


@pytest.mark.parametrize("line, offered", [
    ("opml run riann see", "seed="), ("opml run riann order=ph", "photo"), ("opml run riann seed=1 --preset pa", "paper"), ("opml provenance tr", "trace")])
def test_bash_completes(full, line, offered):
    "The script that `eval` gets, in bash, which cuts words at `=`."
    env = {**os.environ, "OPML_HOME": str(full.home), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    words = [w for part in line.split(" ") for w in re.findall(r"=|[^=]+", part)]
    script = (f"eval \"$(_OPML_COMPLETE=bash_source opml)\"; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
              "_opml_completion opml; printf '%s\\n' \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout == f"{offered}\n", done.stderr


# ------------------------------------------------------------------ errors

def test_an_error_has_its_cell_line_and_source(full):
    "In[n] is what the executed notebook shows, where the given parameters have a cell of their own."
    doc = next(d for d in Store(full.home).ls() if d["status"] == "failed")
    error = doc["error"]
    assert (error["execution_count"], error["cell"], error["line"], error["source"]) == (3, 1, 3, "seen / (2 - i)")
    nb = nbformat.read(full.home / "runs" / doc["id"] / "notebook.ipynb", as_version=4)
    failed = next(c for c in nb.cells if any(o.output_type == "error" for o in c.get("outputs", ())))
    assert failed.execution_count == 3 and failed.source.splitlines()[2].strip() == error["source"]
    said = " ".join(" ".join(on_terminal(full.home, 80, "show", doc["key"]).lines).split())
    assert "ZeroDivisionError: division by zero in In[3], line 3: seen / (2 - i)" in said
    from opml_wb.core.record.card import run_card
    assert "In[3], line 3: seen / (2 - i)" in run_card(doc)


def test_a_crash_has_its_cell_too(opml, notebook):
    done = opml("run", notebook("n = 1", "", "import os\nos.kill(os.getpid(), 11)"), "--quiet")
    assert done.returncode == 1 and "in In[2], line 2: os.kill(os.getpid(), 11)" in done.stderr
    done = opml("run", notebook("n = 1", "import sys\nsys.exit()", "left = 1", name="left"))
    assert done.returncode == 0 and "ended by exit in In[2]: 1 code cell(s)" in done.stdout


# ------------------------------------------------------------------ the page of all commands

def test_the_reference_is_ordered_by_purpose():
    from opml_wb.core.site.api import reference, walk
    from opml_wb.core.site.pages import anchor
    page = reference(cli, "opml")
    heads = re.findall(r"^#+ (opml .*)$", page, re.M)
    assert heads == [name for name, *_ in walk(cli, "opml")][1:]
    assert [h for h in heads if h.count(" ") == 1] == [f"opml {n}" for names in cli.sections.values() for n in names]
    assert {"opml provenance trace", "opml provenance pipeline export", "opml flexserve demo", "opml data show"} <= set(heads)
    linked = re.findall(r"\]\(#([\w-]+)\)", page)
    assert len(linked) > 30 and set(linked) <= {anchor(h) for h in heads}
