"""The house in order: package and notebooks agree, notebooks are clean and tested, chapters run, the wheel carries them."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = sorted((ROOT / "nbs" / "chapters").glob("*.ipynb")) + sorted((ROOT / "nbs" / "bench").glob("*.ipynb"))
SOURCES = [p for p in NOTEBOOKS if p.parent.name not in ("chapters", "bench", "nbs")]
BIN = Path(sys.executable).parent


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def text(cell): return "".join(cell["source"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what git tracks or would track, to export and clean without touching the tree."
    to = tmp_path_factory.mktemp("copy") / "opml_wb"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, files.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git clone")
def test_export_and_clean_change_nothing(copy):
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "add", "-A"], cwd=copy, check=True)
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([BIN / command], cwd=copy, env=env, check=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=copy, capture_output=True, text=True).stdout
    changed = [line for line in changed.splitlines() if not line.startswith("A ")]
    assert not changed, "run `nbdev_export && nbdev_clean` and commit what it changes:\n" + "\n".join(changed)
    for path in CHAPTERS:
        tags = [c["metadata"].get("tags") or [] for c in cells(copy / path.relative_to(ROOT))]
        assert sum("parameters" in t for t in tags) == 1, f"{path.name} lost its parameters tag"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path):
    for c in cells(path): assert not c["outputs"] and c["execution_count"] is None, f"{path}: run nbdev_clean"
    assert cells(path, "markdown"), f"{path}: no prose at all"
    longest = max((len(text(c).splitlines()) for c in cells(path)), default=0)
    assert longest <= 120, f"{path}: a cell of {longest} lines: nobody can hold it"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapters_define_nothing_big(path):
    first = next(i for i, c in enumerate(cells(path)) if not text(c).startswith("#|"))
    assert "parameters" in (cells(path)[first]["metadata"].get("tags") or []), "the first code cell holds the parameters"
    for c in cells(path):
        source = re.sub(r"^\s*[%!].*$", "pass", text(c), flags=re.M)
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), f"{path.name}: a chapter defines no class"
            if isinstance(node, ast.FunctionDef): assert node.end_lineno - node.lineno < 16, f"{path.name}: {node.name} belongs in the package"


def exported(path):
    "The sources of a notebook's exported cells."
    return [text(c) for c in cells(path) if re.match(r"#\|\s*exports?\b", text(c))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_is_public_is_documented(path):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    public = [n for s in exported(path) for n in ast.parse(s).body if isinstance(n, kinds) and not n.name.startswith("_")]
    bare = [n.name for n in public if not ast.get_docstring(n)]
    assert not bare, f"{path.relative_to(ROOT)}: say in a docstring what these are for, with shapes and units: {', '.join(bare)}"


def test_the_length_of_cells(record_property, capsys):
    "Reported, not judged, below the length that nobody can hold: median, 9 in 10, and the longest."
    sizes = sorted((len(s.splitlines()), p.relative_to(ROOT / "nbs").as_posix()) for p in SOURCES for s in exported(p))
    lengths = [n for n, _ in sizes]
    said = (f"{len(sizes)} exported cells: median {lengths[len(sizes) // 2]} lines, 9 in 10 below {lengths[len(sizes) * 9 // 10]}; longest: "
            + ", ".join(f"{name} {n}" for n, name in reversed(sizes[-5:])))
    record_property("cells", said)
    with capsys.disabled(): print(f"\n{said}")
    assert lengths[len(sizes) // 2] <= 24, f"cells are getting long: {said}"


def test_names_do_not_repeat():
    exports = [m[1] for p in NOTEBOOKS for c in cells(p) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", text(c)))]
    assert len(exports) == len(set(exports))


@pytest.mark.parametrize("room", sorted({p.parent.name for p in NOTEBOOKS} - {"chapters", "bench", "nbs"}))
def test_source_notebooks_pass(room):
    "Each source notebook's visible and hidden examples."
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([BIN / "nbdev_test", "--path", f"nbs/{room}", "--n_workers", "2"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.parent.name == "bench" else []) for p in CHAPTERS])
def test_chapters_run(path, home):
    from opml_wb.core.request.chapter import find
    from opml_wb.core.engine.run import run
    quick = "quick" if "quick" in find(path).meta.get("presets", {}) else None       # what takes long: the same cells on less
    r = run(path, preset=quick, timeout=300)
    assert r.ok, r.error
    assert r.metrics, "a chapter logs what it measured"
    for name, where in r.artifacts.items(): assert where.exists(), name


def test_importing_the_package_is_light():
    code = "import sys, opml_wb; heavy = {'numpy', 'pandas', 'torch', 'IPython', 'pydantic', 'click'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_wheel_carries_chapters_and_data(copy, tmp_path):
    "Without a clone: build the wheel, unpack it into an empty folder, list and find everything there."
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, copy], check=True)
    [wheel] = tmp_path.glob("*.whl")
    import zipfile
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OPML_HOME": str(tmp_path / "home")}
    code = ("import opml_wb, json; from opml_wb.core import data; from opml_wb.core.request.chapter import find;"
            "print(json.dumps([opml_wb.__file__, str(find('riann').path), str(data.path('riann/sift_photos'))]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(str(tmp_path / "site") in where for where in json.loads(done.stdout)), done.stdout
