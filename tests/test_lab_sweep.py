"""A sweep in a real JupyterLab: what is shown while it works and when it has ended, on a light and a dark page."""
import json
import re

import nbformat
import pytest
from figures import CHROMIUM, strangers
from test_lab import HERE, errors, lab, lab_server, page  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

WORK = ["lr: float = .1\nhow: str = 'adam'",
        "import time\nfrom opml_wb import log\ntime.sleep(.7)\nif how == 'lion' and lr > .05: raise ValueError(f'diverged at lr={lr:.3g}')\n"
        "log.metric('loss', (lr - .03)**2 + .1 * (how == 'sgd')); log.metric('size', 1 / lr)"]
SWEEPS = ["from opml_wb.core.sweep.driver import sweep",
          "s = sweep(WORK, {'lr': (1e-3, 1., 'log'), 'how': ['adam', 'sgd', 'lion']}, n=16, sampler='random', objective='loss')",
          "s", "sweep(WORK, {'lr': (1e-3, 1., 'log'), 'how': ['adam', 'sgd', 'lion']}, n=16, sampler='random', objective=['loss', 'size'])"]
CELL = ".jp-CodeCell:nth-of-type({})"


def write(folder, name, sources, tags=()):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    if tags: cells[0].metadata["tags"] = list(tags)
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3 (ipykernel)"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder/name)


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_a_sweep_in_jupyterlab(lab, page, theme):
    shots, work, sweeps = HERE/"artefacts", f"work-{theme}.ipynb", f"sweeps-{theme}.ipynb"  # the other's runs are known
    shots.mkdir(exist_ok=True)
    write(lab.folder/"chapters", work, WORK, ["parameters"])
    write(lab.folder/"chapters", sweeps, [f"WORK = {work!r}", *SWEEPS])
    (lab.folder/"settings"/"@jupyterlab"/"apputils-extension"/"themes.jupyterlab-settings").write_text(json.dumps({"theme": f"JupyterLab {theme}"}))
    outside, faults = strangers(page), []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.goto(lab.format(sweeps))
    page.wait_for_selector(".jp-NotebookPanel-toolbar")
    page.get_by_text("(ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    board = page.locator(".jp-OutputArea .opml").first
    page.wait_for_function("() => /\\d running/.test(document.querySelector('.jp-OutputArea .opml')?.innerText)")
    page.wait_for_function("() => parseInt(document.querySelector('.jp-OutputArea .opml')?.innerText.match(/(\\d+) of 16/)?.[1]) >= 6")
    page.screenshot(path=shots/f"sweep-{theme.lower()}-during.png")
    during = board.inner_text()
    assert re.search(r"work-\w+ \d+ of 16", during) and "best loss = " in during and "about" in during and "to come" in during

    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.wait_for_timeout(500)
    page.screenshot(path=shots/f"sweep-{theme.lower()}-after.png")
    ended, result = board.inner_text(), page.locator(".jp-OutputArea .opml").nth(1).inner_text()
    assert f"work-{theme} 16 of 16" in ended and "running" not in ended and "to come" not in ended and "ValueError: diverged" in ended
    assert "lr" in result and "failed" in result and "ValueError: diverged" in result and "sweep " in result
    assert "not beaten by any other in loss and size" in page.locator(".jp-OutputArea .opml").last.inner_text()
    assert page.locator(".jp-OutputArea .opml").count() == 4      # renewed in place, not one below the other
    assert errors(page) == [] and faults == [] and outside == []
