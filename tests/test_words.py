"""The words of the site: the glossary, the links of guide pages and chapters, the commands that pages name."""
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT

from opml_wb.core.site.sources import anchor

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


def anchors(path: Path) -> set[str]: return {anchor(said(h)) for h in HEAD.findall(prose(path))}


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
        if part and there.suffix in (".md", ".ipynb"): assert part in anchors(there), f"{path.name}: no heading for {target}"
