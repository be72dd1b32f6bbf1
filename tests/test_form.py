"""The form in a real JupyterLab: move a slider, see an error beside its field, press Run, watch it, read the card."""
import json

import nbformat
import pytest
from conftest import until
from figures import strangers
from test_lab import CONTRAST, HERE, errors, lab, lab_server, page, pytestmark, run_all  # noqa: F401 (fixtures, and the same conditions)


def value(page, field): return page.locator(f".opml-field-{field} .widget-readout").inner_text()


def test_the_form_runs_a_chapter_in_jupyterlab(lab, page):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3 (ipykernel)"}})
    nb.cells = [nbformat.v4.new_code_cell("from opml_wb.core.show.ui import form\nshown = form('riann')\nshown"),
                nbformat.v4.new_markdown_cell("The end")]
    nbformat.write(nb, lab.folder/"chapters"/"form.ipynb")
    outside, faults = strangers(page), []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(lab.format("form.ipynb"))
    run_all(page)
    page.wait_for_selector(".opml-form .opml-field-n_batches .noUi-handle")
    assert page.locator(".opml-form select").count() >= 1 and page.locator(".opml-form .noUi-handle").count() >= 4

    seed = page.locator(".opml-field-seed input")          # an integer without bounds is typed
    seed.fill("many"); seed.press("Enter")
    page.wait_for_function("() => /expected int/.test(document.querySelector('.opml-field-seed').innerText)")
    page.locator(".opml-form-run").click()                 # refused: nothing runs
    page.wait_for_timeout(500)
    assert not (lab.folder/"home"/"runs").exists() or not list((lab.folder/"home"/"runs").iterdir())
    seed.fill("5"); seed.press("Enter")
    page.wait_for_function("() => !/expected int/.test(document.querySelector('.opml-field-seed').innerText)")

    assert value(page, "n_batches") == "10"
    page.locator(".opml-field-n_batches .noUi-handle").focus()
    for _ in range(8): page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.opml-field-n_batches .widget-readout').innerText == '2'")
    page.locator(".opml-form-run").click()
    page.wait_for_function("() => /cell \\d+ of \\d+|streaming|properties/.test(document.querySelector('.opml-form-note').innerText)")
    page.screenshot(path=HERE/"artefacts"/"form-running.png")
    assert page.locator(".opml-form-run").is_disabled() and page.locator(".opml-form-stop").is_enabled()
    page.wait_for_selector(".opml-form-card .card")
    card = page.locator(".opml-form-card").inner_text()
    assert "done" in card and "speedup_graph_1000" in card and "2.42" in card, card
    page.locator(".opml-form-card").scroll_into_view_if_needed()
    page.screenshot(path=HERE/"artefacts"/"form-card.png")
    [run] = [json.loads(p.read_text()) for p in (lab.folder/"home"/"runs").glob("*/run.json")]
    assert run["given"] == {"seed": 5, "n_batches": 2} and run["status"] == "done"
    assert page.locator(".opml-form-run").is_enabled()
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel:text-is('Theme')").hover()
    page.locator(".lm-Menu-itemLabel:text-is('JupyterLab Dark')").click()
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    page.wait_for_timeout(500)
    page.screenshot(path=HERE/"artefacts"/"form-card-dark.png")
    assert page.evaluate(CONTRAST) == []
    assert errors(page) == [] and faults == [] and outside == []


@pytest.mark.parametrize("value, answer", [("3", "done"), ("7", "failed")])
def test_the_form_without_a_browser(home, notebook, value, answer):
    "From a kernel's point of view: what the button does, in a thread, and what it says."
    from opml_wb.core.show.ui import form
    path = notebook("n: int = 1", "from opml_wb import log\nfor i in range(n): log.metric('x', i, step=i)\nassert n < 5, 'too many'")
    f = form(path)
    f.fields["n"].control.value = value
    f.go.click()
    assert f.go.disabled and not f.halt.disabled
    assert until(lambda: not f.thread.is_alive(), 300)
    assert f.result.status == answer and f.result.params == {"n": int(value)}
    assert f"{answer if answer == 'done' else 'too many'}" in f.card.value
    assert not f.go.disabled and f.halt.disabled
