"""The house in order: package and notebooks agree, imports lead downwards, classes are whole, cells are short, chapters run, the wheel carries them."""
import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import house
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_static", "_templates"} & set(p.parts))
CHAPTERS = sorted((ROOT / "nbs" / "chapters").glob("*.ipynb")) + sorted((ROOT / "nbs" / "bench").glob("*.ipynb"))
BIN = Path(sys.executable).parent
LONG = "kernels",   # notebooks of compiled kernels: one cell is one compiled unit
ALONE = {"opml_wb.riann.graph.kernels",         # one compiled unit: a search, an insertion, and what is inlined into both
         "opml_wb.provenance.watch.traced_kernel"}  # what an installed Jupyter kernel starts, by this name


def name(path): return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def cells(path, kind="code"): return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def text(cell): return "".join(cell["source"])


def none(found, said):
    "Fail with `said` and the places `found`, if there are any."
    assert not found, f"{said} ({len(found)}):\n" + "\n".join(map(str, found[:40]))


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    "A copy of what git tracks or would track, to export, clean and package without touching the tree."
    to = tmp_path_factory.mktemp("copy") / "opml_wb"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for file in filter(None, files.decode().split("\0")):
        if (ROOT / file).is_file():
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, to / file)
    return to


# --- notebooks and package

@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git clone")
def test_export_and_clean_change_nothing(copy):
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "add", "-A"], cwd=copy, check=True)
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([BIN / command], cwd=copy, env=env, check=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True).stdout
    none([line for line in changed.splitlines() if not line.startswith("A ")], "run `nbdev_export && nbdev_clean` and commit what it changes")
    for path in CHAPTERS:
        tags = [c["metadata"].get("tags") or [] for c in cells(copy / path.relative_to(ROOT))]
        assert sum("parameters" in t for t in tags) == 1, f"{path.name} lost its parameters tag"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_clean(path):
    for c in cells(path): assert not c["outputs"] and c["execution_count"] is None, f"{path}: run nbdev_clean"
    assert cells(path, "markdown"), f"{path}: no prose at all"


def test_a_number_stands_once_in_a_folder_and_a_module_in_one_notebook():
    numbers = [f"{p.parent.relative_to(ROOT)}/{m[1]}" for p in NOTEBOOKS if (m := re.match(r"(\d\d)_", p.name))]
    none(sorted({n for n in numbers if numbers.count(n) > 1}), "a notebook's number is its place in the reading order")
    exports = [m[1] for p in NOTEBOOKS for c in cells(p) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", text(c)))]
    none(sorted({e for e in exports if exports.count(e) > 1}), "modules that two notebooks write")


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapters_define_nothing_big(path):
    first = next(i for i, c in enumerate(cells(path)) if not text(c).startswith("#|"))
    assert "parameters" in (cells(path)[first]["metadata"].get("tags") or []), "the first code cell holds the parameters"
    for c in cells(path):
        source = re.sub(r"^\s*[%!].*$", "pass", text(c), flags=re.M)
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), f"{path.name}: a chapter defines no class"
            if isinstance(node, ast.FunctionDef): assert node.end_lineno - node.lineno < 16, f"{path.name}: {node.name} belongs in the package"


def test_chapters_leave_no_folder_behind():
    "Temporary folders of chapters and benches are `scratch`'s or end with a block: none stays when the run has ended."
    none([f"{name(p)}: mkdtemp" for p in CHAPTERS if "mkdtemp" in p.read_text()], "made, and removed by nobody")


@pytest.mark.parametrize("path", [p for p in CHAPTERS if p.parent.name == "chapters"], ids=name)
def test_the_form_of_a_chapter(path): none(house.chapter_form(path), f"{path.stem}: what the form of a chapter asks for")


# --- imports, classes, names

def test_imports_lead_downwards():
    "Also those inside functions: core knows no paper, no paper another one, no wing one above it; no circle."
    none(house.upward(), "imports upwards")
    none(house.module_circles(), "modules that import each other in a circle")
    none(house.room_circles(), "wings that import each other in a circle")


def test_classes_are_whole():
    none(house.slices(), "private classes with one subclass: composition, or fastcore's patch")
    none(house.hung(), "methods hung on a class by assignment")


def test_private_names_stay_private():
    assert len(house.private_uses()) < 20, house.private_uses()


def test_old_import_paths_still_work():
    "Every module that moved gives the same module by its old name, and leaves its package's exports as they are."
    code = """
import importlib, sys, opml_wb
for package in ("core", "eligibility", "pipesim", "provenance", "riann", "flexserve", "moderation"):
    found = importlib.import_module(f"opml_wb.{package}")
    before = {n: getattr(found, n) for n in found.__all__}
    for old, new in getattr(found, "MOVED", {}).items():
        assert importlib.import_module(f"opml_wb.{package}.{old}") is importlib.import_module(f"opml_wb.{package}.{new}"), old
    changed = [n for n in before if getattr(found, n) is not before[n]]
    assert not changed, (package, changed)
from opml_wb.core.run import run
from opml_wb.core.engine import OpmlEngine
from opml_wb.core.sweep import sweep
from opml_wb.core.cli import main
from opml_wb.riann.graph import DynamicHNSW
from opml_wb.provenance.features import FeatureStore
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- words and hints

def test_docstrings_are_plain():
    bare, said = house.bare_clauses(), house.documented()
    assert len(bare) < .01 * len(said), "docstrings that open with a bare what / who / when clause:\n" + "\n".join(bare)
    undocumented = [where for where, node, method in house.public() if not method and not ast.get_docstring(node)]
    none(undocumented, "public functions without a docstring")


def test_public_functions_have_hints():
    bare, every = house.unhinted(), house.public()
    assert len(bare) <= .1 * len(every), f"{len(bare)} of {len(every)} without complete hints:\n" + "\n".join(bare)


# --- sizes

def test_the_size_of_cells_lines_and_modules(record_property, capsys):
    rows, sizes = house.exported(), house.lengths()
    lengths = [n for n, _ in sizes]
    shown = sum(x for *_, x in rows) / len(rows)
    said = (f"{len(sizes)} exported cells: median {lengths[len(sizes) // 2]} lines, 9 in 10 up to {lengths[len(sizes) * 9 // 10]}, "
            f"{shown:.0%} with a visible example; longest: " + ", ".join(f"{p} {n}" for n, p in reversed(sizes[-5:])))
    record_property("cells", said)
    with capsys.disabled(): print(f"\n{said}")
    assert lengths[len(sizes) // 2] <= 10 and lengths[len(sizes) * 9 // 10] <= 24, said
    none([(n, p) for n, p in sizes if n > 60 and not any(k in p for k in LONG)], "cells of more than 60 lines")
    assert shown >= .7, said
    none(house.wide(), "code lines of more than 100 columns (88 in chapters)")
    none([(n, m) for n, m in house.module_lines() if not 60 <= n <= 300 and m not in ALONE], "modules of fewer than 60 or more than 300 lines")


# --- the examples, the chapters, the wheel

@pytest.fixture
def as_it_was():
    "Environment, search path and working directory as they were before, whatever a notebook does to them."
    environ, path, here = dict(os.environ), list(sys.path), os.getcwd()
    os.environ.pop("OPML_HOME", None)
    yield
    os.environ.clear(), os.environ.update(environ)
    sys.path[:] = path
    os.chdir(here)

@pytest.mark.parametrize("path", house.sources(), ids=name)
def test_source_notebook(path, as_it_was):
    "The visible and hidden examples of a source notebook, in this process."
    from nbdev.test import test_nb
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of a class that the notebook defines: no other process could read it
        ok, _ = test_nb(path, skip_flags=["notest"])
    assert ok, out.getvalue()[-6000:]


@pytest.mark.parametrize("path", [pytest.param(p, id=name(p), marks=[pytest.mark.slow] if p.parent.name == "bench" else []) for p in CHAPTERS])
def test_chapters_run(path, executed):
    r = executed(path)
    assert r.ok, r.error
    assert r.metrics, "a chapter logs what it measured"
    for artifact, where in r.artifacts.items(): assert where.exists(), artifact


def test_importing_the_package_is_light():
    heavy = "numpy", "pandas", "torch", "IPython", "pydantic", "click", "numba"
    code = ("import sys, opml_wb, opml_wb.core, opml_wb.eligibility, opml_wb.pipesim, opml_wb.provenance, opml_wb.riann, opml_wb.flexserve\n"
            f"heavy = set({heavy}) & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_imported_is_declared():
    "Every distribution that the package imports is a requirement of it, or of one of its extras."
    from importlib.metadata import packages_distributions, requires
    declared = {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requires("opml_wb")}
    known, missing = packages_distributions(), set()
    for m in house.modules():
        for node in house.nodes(m):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {n.partition(".")[0] for n in names} - {"", "opml_wb"} - sys.stdlib_module_names:
                dists = {d.lower().replace("_", "-") for d in known.get(top, [top])}
                if not dists & declared: missing.add(f"{m}: {top} ({', '.join(dists)})")
    none(sorted(missing), "imported, but declared nowhere in setup.py")


@pytest.mark.slow
def test_the_wheel_carries_chapters_and_data(copy, tmp_path):
    "Without a clone: build the wheel, unpack it into an empty folder, list and find everything there."
    import zipfile
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy], check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "opml_wb" / "py.typed").exists()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OPML_HOME": str(tmp_path / "home")}
    code = ("import opml_wb, json; from opml_wb.core import data; from opml_wb.core.chapter import find;"
            "print(json.dumps([opml_wb.__file__, str(find('riann').path), str(data.path('riann/sift_photos'))]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(str(tmp_path / "site") in where for where in json.loads(done.stdout)), done.stdout
