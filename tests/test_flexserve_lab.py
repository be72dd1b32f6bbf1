"""Chapter 8 in a real JupyterLab, on a dark page: the slider moves verdicts and counts, and the server hears nothing of it."""
import json

import pytest
from figures import CHROMIUM
from test_lab import HERE, errors, lab, lab_server, page, run_all, scroll_to  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
PLAY = ".jp-CodeCell:has(.noUi-handle)"
SAID = f"() => [...document.querySelectorAll('{PLAY} .widget-html-content')].map(e => e.innerText).join()"
NOW = f"() => {{ const e = document.querySelector('{PLAY} .js-plotly-plot'); return e && e.data && JSON.stringify(e.data[4]) }}"


def changes(page, act, point=True):
    "Do `act`, and wait until the text and (with `point`) the point on the frontier are other ones."
    said, now = page.evaluate(SAID), page.evaluate(NOW)
    act()
    page.wait_for_function(f"b => ({SAID})() !== b", arg=said)
    if point: page.wait_for_function(f"b => {{ const n = ({NOW})(); return n && n !== b }}", arg=now)
    return page.evaluate(SAID)


def test_the_slider_moves_along_the_frontier(lab, page):
    shots = HERE/"artefacts"
    shots.mkdir(exist_ok=True)
    settings = lab.folder/"settings"/"@jupyterlab"/"apputils-extension"/"themes.jupyterlab-settings"
    settings.write_text(json.dumps({"theme": "JupyterLab Dark"}))
    page.goto(lab.format("08_flexserve.ipynb"))
    run_all(page)
    scroll_to(page, f"{PLAY} .js-plotly-plot")
    page.wait_for_selector(f"{PLAY} .js-plotly-plot .scatterlayer")
    page.wait_for_timeout(1000)
    page.screenshot(path=shots/"flexserve-dark.png")
    assert "2 of 3 models" in page.evaluate(SAID) and "version 1" in page.evaluate(SAID)

    def up():
        handle = page.locator(f"{PLAY} .noUi-handle").last
        handle.focus()
        for _ in range(4): page.keyboard.press("PageUp")
    said = changes(page, up)
    assert "3 of 3 models" in said
    changes(page, lambda: page.locator(f"{PLAY} select").nth(1).select_option(label="mean probability"), point=False)      # two policies may meet in one point
    assert "version 1" in page.evaluate(SAID)      # the server is closed by now: whatever is shown comes from the one answer
    scroll_to(page, f"{PLAY} .js-plotly-plot")
    page.screenshot(path=shots/"flexserve-dark-moved.png")
    for i, plot in enumerate(page.locator(".jp-OutputArea .js-plotly-plot").all()):
        plot.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        plot.screenshot(path=shots/f"flexserve-dark-{i}.png")
    assert errors(page) == []
