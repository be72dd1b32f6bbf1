"""The palette for colour-blind readers, and progress written by several processes of one run."""
import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from opml_wb.core.show import ui

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, seen_by=np.eye(3)):
    "CIE L*a*b* (D65) of '#rrggbb' as seen through a 3 x 3 matrix on linear RGB."
    v = np.array([int(colour[i:i+2], 16)/255 for i in (1, 3, 5)])
    v = np.clip(seen_by @ np.where(v <= .04045, v/12.92, ((v+.055)/1.055)**2.4), 0, 1)
    f = XYZ @ v/(XYZ @ np.ones(3))
    f = np.where(f > (6/29)**3, np.cbrt(f), f*(29/6)**2/3+4/29)
    return np.array([116*f[1]-16, 500*(f[0]-f[1]), 200*(f[1]-f[2])])


@pytest.mark.parametrize("kind", ["full colour", *BLIND])
def test_colours_are_told_apart(kind):
    matrix = np.array(BLIND.get(kind, np.eye(3)))
    seen = {name: lab(colour, matrix) for name, colour in ui.COLOURS.items()}
    far = {(a, b): np.linalg.norm(seen[a]-seen[b]) for a, b in combinations(seen, 2)}
    close = min(far, key=far.get)
    assert far[close] > 10, (close, far[close])           # 2.3 is just noticeable


def test_two_processes_write_whole_lines(tmp_path):
    code = ("from opml_wb.core import ui\n"
            "for _ in range(500): ui.status('x'*200)\n"
            "list(ui.progress(range(1000), desc='y'))")
    env = {"OPML_RUN_DIR": str(tmp_path), "PATH": ""}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    kids = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipe) for _ in range(2)]
    said = [k.communicate(timeout=600)[0] for k in kids]
    rows = [json.loads(line) for line in (tmp_path/"progress.jsonl").read_text().splitlines()]
    assert said == [b"", b""] and [k.returncode for k in kids] == [0, 0]
    assert sum(r["desc"] == "x"*200 for r in rows) == 1000
    assert sum((r["i"], r["n"]) == (1000, 1000) for r in rows) == 2


def test_progress_is_cheap_inside_a_run(tmp_path, monkeypatch):
    "However many items pass in an instant, two lines are written."
    monkeypatch.setenv("OPML_RUN_DIR", str(tmp_path))
    monkeypatch.setattr("time.monotonic", lambda: 1.0)
    for _ in ui.progress(range(200_000)): pass
    rows = [json.loads(line) for line in (tmp_path/"progress.jsonl").read_text().splitlines()]
    assert [r["i"] for r in rows] == [0, 200_000]


def test_figures_carry_no_library():
    import plotly.io as pio
    fig = ui.figure("x", "y").add_scatter(y=[1, 2])
    assert "notebook" not in pio.renderers.default and len(fig.to_json()) < 10_000
    assert fig.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
