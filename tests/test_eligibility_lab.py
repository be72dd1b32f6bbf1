"""Chapter 3 in a real JupyterLab, on a dark page: another point e, another threshold, and a heatmap that answers."""
import json

import pytest
from figures import CHROMIUM
from test_lab import HERE, errors, lab, lab_server, page, run_all, scroll_to  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
PLAY = ".jp-CodeCell:has(.noUi-handle)"
SAID = f"() => [...document.querySelectorAll('{PLAY} .widget-html-content')].map(e => e.innerText).join()"
CELLS = f"() => {{ const e = document.querySelector('{PLAY} .js-plotly-plot'); return e && e.data && JSON.stringify(e.data[0].customdata) }}"


def changes(page, act):
    "Do `act`, and wait until the text and the heatmap's verdicts are other ones."
    said, cells = page.evaluate(SAID), page.evaluate(CELLS)
    act()
    page.wait_for_function(f"b => ({SAID})() !== b", arg=said, timeout=20_000)
    page.wait_for_function(f"b => {{ const n = ({CELLS})(); return n && n !== b }}", arg=cells, timeout=20_000)
    return page.evaluate(SAID)


def test_the_heatmap_answers_threshold_and_point(lab, page):
    shots = HERE/"artefacts"
    shots.mkdir(exist_ok=True)
    (lab.folder/"settings"/"@jupyterlab"/"apputils-extension"/"themes.jupyterlab-settings").write_text(json.dumps({"theme": "JupyterLab Dark"}))
    page.goto(lab.format("03_eligibility.ipynb"))
    run_all(page)
    scroll_to(page, f"{PLAY} .noUi-handle")
    page.wait_for_selector(f"{PLAY} .heatmaplayer image", timeout=30_000)
    page.wait_for_timeout(1000)
    scroll_to(page, f"{PLAY} .js-plotly-plot")
    page.screenshot(path=shots/"eligibility-dark.png")

    assert "at 20 %" in page.evaluate(SAID)
    said = changes(page, lambda: page.locator(f"{PLAY} select").first.select_option(label="on reaching Active"))
    assert "on reaching Active" in said

    def up():
        page.locator(f"{PLAY} .noUi-handle").first.focus()
        for _ in range(4): page.keyboard.press("ArrowRight")
    changes(page, up)
    page.wait_for_function(f"() => ({SAID})().includes('at 40 %')", timeout=20_000)        # the last of the four steps
    scroll_to(page, f"{PLAY} .js-plotly-plot")
    page.screenshot(path=shots/"eligibility-dark-moved.png")
    for i, plot in enumerate(page.locator(".jp-OutputArea .js-plotly-plot").all()):
        plot.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        plot.screenshot(path=shots/f"eligibility-dark-{i}.png")
    assert errors(page) == []
