"""The words of the site: the glossary, the links of guide pages and chapters, the commands that pages name."""
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import click
import pytest
from conftest import ROOT

from opml_wb.core.site.pages import anchor

NBS = ROOT/"nbs"
GUIDE = sorted((NBS/"guide").glob("*.md"))
CHAPTERS = sorted((NBS/"chapters").glob("*.ipynb"))
PAGES = [*GUIDE, *CHAPTERS, NBS/"index.ipynb", *sorted((NBS/"bench").glob("*.ipynb"))]
HEAD = re.compile(r"^#{1,6} +(.+?)\s*$", re.M)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    "A page's Markdown without comments, code and fences."
    whole = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        whole = "\n\n".join("".join(c["source"]) for c in json.loads(whole)["cells"] if c["cell_type"] == "markdown")
    whole = re.sub(r"<!--.*?-->|^```.*?^```", "", whole, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "``", whole)


def headings(path: Path) -> list[str]: return HEAD.findall(re.sub(r"<!--.*?-->", "", path.read_text("utf-8"), flags=re.S))


def said(heading: str) -> str: return re.sub(r"<[^>]*>|[`*]", "", heading)


def anchors(path: Path) -> set[str]:
    "The anchors of a page in JupyterLab: each heading as it is written, spaces as hyphens, and those that are set by hand."
    heads = HEAD.findall(prose(path))
    return {said(h).replace(" ", "-") for h in heads} | {a for h in heads for a in re.findall(r'<a id="([^"]*)">', h)}


def test_glossary_is_in_order_and_each_term_can_be_linked_everywhere():
    _, *terms = headings(NBS/"guide"/"glossary.md")
    slugs = [anchor(said(t)) for t in terms]
    assert len(slugs) > 80 and len(set(slugs)) == len(slugs)
    assert [b for a, b in pairwise(slugs) if b < a] == [], "not in alphabetical order"
    for term, slug in zip(terms, slugs, strict=True):  # JupyterLab's anchor is the heading as written, spaces as hyphens
        ok = said(term).replace(" ", "-") == slug or term.startswith(f'<a id="{slug}"></a>')
        assert ok, f'write: ### <a id="{slug}"></a>{said(term)}'


def test_each_term_is_explained():
    text = re.sub(r"<!--.*?-->", "", (NBS/"guide"/"glossary.md").read_text("utf-8"), flags=re.S)
    for entry in text.split("\n### ")[1:]:
        term, _, words = entry.partition("\n")
        assert re.search(r"\.(\s|$)", words) and len(words.split()) >= 3, f"{said(term)}: no sentence explains it"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    "Each link of a page to a file of ours has its file, each anchor its heading."
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target): continue
        file, _, part = target.partition("#")
        there = (path.parent/file).resolve() if file else path
        generated = file.startswith(("../api/", "api/")) or file.endswith("reference.md")  # pages that only the site has
        assert there.exists() or generated, f"{path.name}: no file {file}"
        if part and there.suffix in (".md", ".ipynb"):
            assert part in anchors(there), f"{path.name}: no heading for {target}"
            assert anchor(part) in {anchor(said(h)) for h in HEAD.findall(prose(there))}, f"{path.name}: {target} fails on the site"


def blocks(path: Path, *kinds: str) -> list[tuple[str, str]]:
    "The fenced blocks of a guide page, (language, text), in order."
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    return [b for b in found if b[0] in kinds]


def typed(path: Path) -> list[tuple[str, bool]]:
    "The command lines of a page, and whether each is set as code in its prose: else it is a line of a shell block."
    lines = [line for _, block in blocks(path, "sh") for line in block.splitlines()]
    whole = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    spans = [s for s in re.findall(r"`(opml [^`\n]+)`", whole) if not re.search(r"\.\.\.| \| |VERB|<TAB>", s)]
    return [(line, False) for line in lines if line.strip() and not line.startswith("#")] + [(s, True) for s in spans]


def calls(line: str) -> list[list[str]]:
    "The calls of `opml` in a command line, each as its arguments."
    words = shlex.split(line, comments=True)
    parts = [list(g) for end, g in groupby(words, lambda w: w in ("&&", "||", "|", ";")) if not end]
    bare = ([w for i, w in enumerate(p) if i or not re.match(r"[A-Z_]+=", w)] for p in parts)
    return [p[1:] for p in bare if p and p[0].rpartition("/")[2] == "opml"]


def parameters_of(chapter: str) -> tuple[set[str], set[str]] | None:
    "(parameters, presets) of a chapter; `mine` and `shop` are what `opml new` writes; None for a name that is only an example."
    from opml_wb.core.request.chapter import find
    from opml_wb.core.request.params import describe
    if chapter.endswith(".ipynb") or re.search(r"<|[A-Z]{3}", chapter): return None
    found = find(NBS/"_templates"/"skeleton.ipynb" if chapter in ("mine", "shop") else chapter)
    return {r["name"] for r in describe(found.nb)}, set(found.meta.get("presets") or ())


def check_call(args: list[str], mentioned: bool = False) -> None:
    """Raise unless `opml ARGS` names a command, its options and arguments, and a chapter's own parameters and presets.

    `mentioned`: the words may be a command's name only."""
    from opml_wb.core.cli.grammar import moved
    from opml_wb.core.cli.verbs import cli
    command, ctx, name = cli, click.Context(cli, info_name="opml"), "opml"
    while isinstance(command, click.Group) and args and not args[0].startswith("-"):
        found = command.get_command(ctx, args[0])
        if found is None and mentioned and moved(args): return  # told as an old spelling
        assert found is not None, f"no command {name} {args[0]}"
        command, name, args = found, f"{name} {args[0]}", args[1:]
        ctx = click.Context(command, info_name=name, parent=ctx)
    if {"--help", "-h", "--version"} & set(args) or (mentioned or name == "opml") and not args: return
    assert not isinstance(command, click.Group), f"{name}: no command"
    given, rest, _ = command.make_parser(ctx).parse_args(list(args))
    assert not rest, f"{name}: {rest} is too much"
    for p in command.params:
        there = isinstance(given.get(p.name), (str, tuple, list)) and given[p.name]
        assert there or not (isinstance(p, click.Argument) and p.required), f"{name}: {p.name} is missing"
    if name in ("opml run", "opml sweep", "opml params") and (known := parameters_of(args[0])):
        names = {w.partition("=")[0] for w in args[1:] if re.match(r"\w+=", w)} | {args[i + 1] for i, w in enumerate(args) if w == "-p"}
        assert names <= known[0], f"{' '.join(args)}: no parameter {names - known[0]}"
        assert given.get("preset") in {None, *known[1]}, f"{' '.join(args)}: no preset {given['preset']}"
    if name.startswith("opml data ") and given.get("names"):
        from opml_wb.core.record.data import registry
        assert set(given["names"]) <= registry().keys()


def complete() -> bool:
    "True if this installation has the commands of today: those of papers stand under their names."
    from opml_wb.core.request.plugin import plugged
    return "provenance" in plugged("commands")


@pytest.mark.parametrize("path", GUIDE, ids=lambda p: p.stem)
def test_no_dead_command(path):
    "Each command of a guide page is one of `opml`'s, with its options, and a chapter's parameters and presets."
    if "changes" in path.stem: return  # tells of old spellings, too
    if not complete(): pytest.skip("installed before `opml provenance` was there: pip install -e .")
    for line, mentioned in typed(path):
        for args in calls(line): check_call(args, mentioned)


def test_a_dead_command_is_found():
    for line in "opml rnu riann", "opml run riann nobody=1", "opml run riann --preset nobody", "opml ls --nobody", "opml show", "opml data fetch no/body":
        with pytest.raises((AssertionError, click.ClickException)): check_call(calls(line)[0])
    check_call(calls("OPML_HOME=x .venv/bin/opml run riann seed=3 --show  # words")[0])


SERVES = re.compile(r"\b(lab|serve|demo|docs|fetch|reproduce|flexserve|explain (take|answer|verify)|tcp:|export OPML|pip|pipeline import)\b|riann( --show| k=| --html)|--executor")
ASKS = re.compile(r"opml (why|compare|rerun|provenance check)\b")  # their exit code is the answer


@pytest.mark.slow
def test_the_guide_can_be_typed(tmp_path, home, monkeypatch, request):
    """What the pages say is typed and exits with 0, in reading order and in one home, Python too; KEY stands for the newest runs.

    In a shell, but for lines of one command that was typed there before. Left out: what serves, downloads, installs, needs a
    cluster, or runs for minutes. Those were checked against the commands."""
    (tmp_path/"train.py").write_text("open('model.txt', 'w').write(open('data.csv').read().upper())")
    (tmp_path/"data.csv").write_text("a,b\n1,2\n")
    (tmp_path/"values.yaml").write_text("seed: 1\nsizes: [20, 50]\nrepeats: 1\n")
    here = request.getfixturevalue("typed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    def run(*words, **kw): return subprocess.run(words, capture_output=True, text=True, **kw)
    def entered(line):
        command, *args = shlex.split(line, comments=True)
        again = command == "opml" and args[0] in known and not re.search(r"[|&;<>$*]", line)
        done = here(*args) if again else run("bash", "-c", line)
        known.update(call[0] for call in calls(line) if call)
        if "run" in known: monkeypatch.setenv("OPML_PAGES", "0")     # one run with what its page shows without a kernel
        return done
    ran, known = 0, set()
    for path in GUIDE:
        if not re.match(r"0[2-7]_", path.name): continue
        for kind, block in blocks(path, "sh", "python"):
            if kind == "python" and "import opml_wb as wb" in block + "":
                done = run(sys.executable, "-", input=block)
                assert done.returncode == 0, f"{path.name}: {block}{done.stderr}"
                ran += 1
            for line in block.splitlines() if kind == "sh" else ():
                if SERVES.search(line) or "opml" not in line: continue
                if "opml provenance" in line and not complete(): continue
                keys = dict.fromkeys(d["key"][:12] for d in json.loads(here("ls", "--json").stdout or "[]")) if "KEY" in line else ()
                for key in [*keys, "none"][:line.count("KEY")]: line = line.replace("KEY", key, 1)
                done = entered(line.replace("opml new mine", "opml new mine --folder ."))
                assert done.returncode in ((0, 1, 3) if ASKS.search(line) else (0,)), f"{path.name}: {line}\n{done.stdout}{done.stderr}"
                ran += 1
    assert ran > 20


def test_terms_name_modules_that_are_there():
    "Each term stands once, in order within its table, and the module that owns it exists."
    seen = []
    for table in (NBS/"guide"/"11_terms.md").read_text("utf-8").split("\n## ")[1:]:
        rows = re.findall(r"^\| \*\*(.+?)\*\*.*\| (`[^|]*`) \|$", table, re.M)
        assert rows, table[:80]
        names = [re.sub(r"[^a-z0-9 ]", "", n.lower()) for n, _ in rows]
        assert names == sorted(names), f"out of order: {[b for a, b in pairwise(names) if b < a]}"
        seen += [n for n, _ in rows]
        for module in (m for _, cell in rows for m in re.findall(r"`([^`]+)`", cell)):
            assert importlib.util.find_spec(f"opml_wb.{module}"), module
    assert len(seen) == len(set(seen)) > 80


@pytest.mark.slow
def test_the_servers_page_is_answered(tmp_path):
    "The curl and the Python of the page about serving, asked of the demo: an answer of each model, and a verdict."
    env = {**os.environ, "OPML_HOME": str(tmp_path/"home")}
    page = NBS/"guide"/"06_serving.md"
    server = subprocess.Popen([sys.executable, "-m", "opml_wb.core.cli", "flexserve", "demo"], env=env, text=True, stdout=subprocess.PIPE)
    try:
        said = next(line for line in server.stdout if line.startswith("curl"))
        url, picture = re.search(r"http://[\d.:]+", said)[0], re.search(r"file=@(\S+)", said)[1]
        [curl] = [line for _, block in blocks(page, "sh") for line in block.splitlines() if line.startswith("curl")]
        kind = "image/png" if picture.endswith("png") else "image/jpeg"
        asked = curl.replace("http://127.0.0.1:8080", url).replace("cat.jpg", picture).replace("target=cat", "target=8").replace("image/jpeg", kind)
        answer = json.loads(subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True).stdout)
        assert answer["policy"]["result"] in ([True], [False]) and not answer["errors"], answer
        code = next(code for _, code in blocks(page, "python") if "client = Client(" in code)
        names = {}
        exec(code.replace("http://127.0.0.1:8080", url), names)
        assert names["client"].batch([picture], policy={"kind": "majority", "target": "8"})
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_each_chapter_cites_the_papers_page():
    "The citation of each of our chapters links the address that `PAPERS` has; the figure that stands for it is one of its cells."
    from opml_wb.core.show.overview import PAPERS
    papers = {p.package: p for p in PAPERS}
    for path in CHAPTERS:
        nb = json.loads(path.read_text("utf-8"))
        assert papers[path.stem.partition("_")[2]].url in "".join(nb["cells"][0]["source"]), path.stem
        cover = nb["metadata"]["opml"].get("cover")
        assert cover is None or cover in {c["id"] for c in nb["cells"] if c["cell_type"] == "code"}, path.stem
