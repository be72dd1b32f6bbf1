"""The figures of an executed notebook, wherever it is read: nbconvert's HTML, with and without scripts, on paper, and our own page."""
import json
import re
from pathlib import Path

import pages
import pytest
from conftest import ROOT
from figures import CHROMIUM

pytest.importorskip("nbconvert", reason="needs nbconvert")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs" / "chapters").glob("*.ipynb"))
THEIRS = r"https://(cdnjs\.cloudflare\.com|cdn\.jsdelivr\.net|unpkg\.com)/"     # require.js, MathJax, mermaid of nbconvert's own page
SEEN = """() => [...document.querySelectorAll('img[src^="data:image/"]')].filter(i => i.naturalWidth > 300 && i.getBoundingClientRect().width > 250
  && i.checkVisibility()).length"""


def figures_of(path):
    cells = json.loads(path.read_text())["cells"]
    datas = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
    return sum("application/vnd.plotly.v1+json" in d for d in datas), sum(any(m in d for m in ("image/jpeg", "image/png")) for d in datas)


def pictures_on_paper(page):
    "How many large pictures the page has when it is printed."
    pdf = page.pdf()
    assert pdf[:4] == b"%PDF"
    return sum(int(w) > 300 for w in re.findall(rb"/Subtype\s*/Image\b[^>]*?/Width\s+(\d+)", pdf)
               or re.findall(rb"/Width\s+(\d+)", pdf))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_figure_is_seen_everywhere(executed, browser, tmp_path, chapter):
    from nbconvert import HTMLExporter

    from opml_wb.core.site.one_page import write_page
    done = executed(ROOT / "nbs" / "chapters" / f"{chapter}.ipynb")
    assert done.ok, done.error
    ran = Path(done.notebook)
    plots, pictures = figures_of(ran)
    assert pictures >= plots > 0                                             # each figure has its picture
    theirs, ours = tmp_path / "nbconvert.html", tmp_path / "ours.html"
    theirs.write_text(HTMLExporter().from_filename(ran)[0])
    write_page(ran, ours, chapter)
    for path in (theirs, ours):
        for scripts in (True, False):
            context = browser.new_context(viewport=pages.WIDE, java_script_enabled=scripts)
            page = pages.open_page(context, path.as_uri())
            if scripts:
                assert page.evaluate(SEEN) >= pictures, path.name
                assert path == theirs or not page.outside, page.outside
                assert not [a for a in page.outside if not re.match(THEIRS, a)], page.outside
            else: assert page.outside == [] and pictures_on_paper(page) >= pictures, path.name
            context.close()
