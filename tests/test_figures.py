"""The figures of the executed chapters, as readers see them: nothing written over something else, axes that can be read, in every state."""
import json
from pathlib import Path

import figures
import pytest
from conftest import ROOT

browser_only = pytest.mark.skipif(figures.CHROMIUM is None, reason="no Chromium on this machine")
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs" / "chapters").glob("*.ipynb"))


def page_of(figs, path):
    "Write plotly figures on one page."
    from opml_wb.core.kit.plotly_json import PLOTLY
    from opml_wb.core.site.one_page import one_page
    from opml_wb.core.site.pages import code, notebook
    outs = [{"output_type": "display_data", "metadata": {}, "data": {PLOTLY: json.loads(f.to_json())}} for f in figs]
    path.write_text(one_page(notebook([code("figures", outs)]), "figures"))
    return path


@pytest.mark.slow
@browser_only
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_figures_of_a_chapter_can_be_read(executed, browser, tmp_path, chapter):
    from opml_wb.core.site.one_page import write_page
    done = executed(ROOT / "nbs" / "chapters" / f"{chapter}.ipynb")
    assert done.ok, done.error
    ran = Path(done.notebook)
    page = write_page(ran, tmp_path / "page.html", chapter)
    assert len(figures.plotly_figures(page)) == len(figures.plotly_figures(ran)) > 0
    assert figures.look_at(page, moves=3, browser=browser) == []


@browser_only
def test_the_checker_sees_what_is_wrong(browser, tmp_path):
    "One figure for each fault, and one without."
    from opml_wb.core.show import ui
    def fig(x=(1, 2, 3), title="", **more): return ui.figure("x, s", "y, m", title, height=300).add_scatter(x=x, y=[1, 2, 3], **more)
    good = fig(x=[.02, 3, 7000]).update_xaxes(type="log")
    over = fig(text=["a long label here"] * 3, mode="markers+text").update_layout(xaxis_range=[-1, 5], yaxis_range=[0, 4])
    over.add_annotation(x=2, y=2, text="a note", showarrow=False)
    outside = fig().add_annotation(x=1, xref="paper", y=2, text="a note that leaves", xanchor="left", showarrow=False)
    cut = fig(text=["a label that ends at the axes"] * 3, mode="markers+text").update_xaxes(range=[1, 3])
    bare = fig(x=[.2, 3, 700]).update_xaxes(type="log", tickformat="", dtick="D2")
    few = fig(x=[2.1, 3, 4]).update_xaxes(type="log", dtick=1)
    untitled = fig().update_yaxes(title_text="")
    long = fig().update_yaxes(title_text="a title of many words that is longer than its axis")
    on_bar = fig().add_bar(x=[1, 2, 3], y=[3, 3, 3]).add_annotation(x=2, y=1, text="a note", showarrow=False)
    found = {}
    for line in figures.look_at(page_of([good, over, outside, cut, bare, few, untitled, long, on_bar], tmp_path / "page.html"), browser=browser):
        what, _, told = line.removeprefix("figure ").partition(": ")
        found.setdefault(int(what.split()[0]), []).append(told)
    def of(number): return " | ".join(found.pop(number, []))
    assert not of(1)
    for number, word in enumerate(("over", "outside", "cut", "bare ticks", "few ticks", "no title", "long", "on a bar"), 2):
        assert word in (said := of(number)), (number, word, said)
    assert not found


@browser_only
def test_the_checker_moves_the_controls_and_sees_the_picture(browser, tmp_path, notebook):
    "A state that is not the first one is looked at; so is what only the static picture has."
    from opml_wb.core.kit.plotly_json import PLOTLY
    from opml_wb.core.show import ui
    from opml_wb.core.show.states import PLAY
    from opml_wb.core.site.one_page import one_page
    from opml_wb.core.site.pages import code
    from opml_wb.core.site.pages import notebook as made
    def move(fig, n): fig.layout.annotations = [{"x": 1, "y": 1 + .01 * i, "text": "said", "showarrow": False} for i in range(n)]
    played = ui.play(ui.figure("x, s", "y, m").add_scatter(x=[0, 2], y=[0, 2]), move, n=(1, 1, 3))
    bundle = {**played._bundle(), **played._states("view")}
    assert PLAY in bundle and PLOTLY in bundle
    page = tmp_path / "page.html"
    page.write_text(one_page(made([code("play", [{"output_type": "display_data", "metadata": {}, "data": bundle}])]), "t"))
    lines = figures.look_at(page, browser=browser)
    assert any("[n #" in line and ": over:" in line for line in lines) and not any(line.startswith("figure 1 '': ") for line in lines)
    crowded = json.loads(ui.figure("x, s", "y, m").add_bar(x=["a" * 40, "b" * 40, "c" * 40, "d" * 40], y=[1, 2, 3, 4]).to_json())
    assert any("over: tick" in fault for fault in figures.faults_of_picture(crowded))


def test_the_names_of_fixed_properties_never_meet():
    "Whatever a machine's times are: where recall rises steeply, a name above and the next one below would."
    import pandas as pd
    from opml_wb.riann.lab.plots import fixed_properties
    names = [f"deg {d}, cand {c}" for d, c in ((4, 8), (8, 16), (16, 32), (16, 64), (16, 200))]
    for times in ([3.3, 5.5, 9.1, 14.8, 33.7], [2.9, 4.7, 7.2, 12.1, 29.7], [3.1, 4.6, 8.1, 14.8, 38.3], [2.8, 5.0, 6.2, 13.2, 27.6]):
        table = pd.DataFrame({"property": names, "cpu_us": times, "recall": [.8576, .9795, .9973, .9986, .9992]})
        assert figures.faults_of_picture(json.loads(fixed_properties(table).to_json())) == [], times
