"""What a notebook shows under the workbench equals what it shows under nbclient with a stock kernel.

The notebooks are those of papermill's and nbclient's own test suites (read where they lie, never copied into the
project) and the nastier ones of `tests/notebooks/*.ipy`. Both sides are compared after masking what differs between
any two runs: ids, addresses, times, temporary names. `OURS` lists where a stock kernel loses output or depends on
chance, and what ours shows there.
"""
import copy
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty

import nbformat
import pytest

from opml_wb.core.kit.files import read_json, write_json
from opml_wb.core.record import store
from opml_wb.core.engine.zygote import Zygote

HERE = Path(__file__).parent/"notebooks"
PAPERMILL = Path(find_spec("papermill").origin).parent/"tests"/"notebooks"
LIBRARIES = ("anywidget", "ipywidgets", "joblib", "matplotlib.pyplot", "numpy", "pandas", "plotly.graph_objects", "tqdm.auto")
NOT_COMPARED = {
    "Interrupt.ipynb": "an endless loop that nbclient's suite interrupts",
    "Autokill.ipynb": "kills its own process: see test_one_that_kills_itself",
    "keyboard_interrupt.ipynb": "sleeps a minute for papermill's suite to interrupt it",
    "notimplemented_translator.ipynb": "is written in R",
    "Parallel Execute A.ipynb": "waits for B: see test_two_that_wait_for_each_other",
    "Parallel Execute B.ipynb": "waits for A: see test_two_that_wait_for_each_other",
}


def nbclient_files():
    "The folder `tests/files` of nbclient's source package, unpacked below $OPML_NBCLIENT_SRC; None where it is absent."
    folder = os.environ.get("OPML_NBCLIENT_SRC")
    if not folder: return None
    for archive in sorted(Path(folder).glob("nbclient-*.tar.gz")):
        root = archive.with_suffix("").with_suffix("")
        if not root.is_dir():
            with tarfile.open(archive) as tar: tar.extractall(folder, filter="data")
        return root/"tests"/"files"
    return None


def own(path):
    "The notebook that an `.ipy` file of `tests/notebooks` describes: `# %%` opens a cell, `tags=a,b` may follow."
    nb, cells = nbformat.v4.new_notebook(), re.split(r"^# %%(.*)\n", path.read_text(), flags=re.M)[1:]
    for head, source in zip(cells[::2], cells[1::2]):
        cell = nbformat.v4.new_code_cell(source.rstrip("\n"))
        if "tags=" in head: cell.metadata["tags"] = head.split("tags=")[1].split(",")
        nb.cells.append(cell)
    return nb


def by_hand():
    "Notebooks of every format that Jupyter still reads, with all kinds of cells, metadata and attachments."
    new = nbformat.v4
    cells = [new.new_markdown_cell("![dot](attachment:dot.png)", attachments={"dot.png": {"image/png": "iVBORw0KGgo="}}),
             new.new_raw_cell("raw\ntext", metadata={"raw_mimetype": "text/x-rst"}), new.new_code_cell(""), new.new_code_cell("  \n"),
             new.new_code_cell("x = 1\nprint(x)", metadata={"collapsed": True, "scrolled": "auto", "name": "first", "own": {"a": [1]}}),
             new.new_code_cell("1/0", metadata={"tags": ["skip-execution", "other"]}, execution_count=7,
                               outputs=[new.new_output("stream", text="from before")]),
             new.new_code_cell("x", outputs=[new.new_output("stream", text="replaced")], execution_count=3),
             new.new_code_cell("# only a comment"), new.new_markdown_cell("end")]
    for minor in range(6):
        nb = copy.deepcopy(new.new_notebook(cells=cells, metadata={"title": "t", "authors": [{"name": "a"}]}))
        nb.nbformat_minor = minor
        for c in nb.cells:
            if minor < 5: c.pop("id")
            if minor < 1: c.pop("attachments", None)
        yield f"4.{minor}", nb
    v3 = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": "old"}, "worksheets": [{"metadata": {}, "cells": [
        {"cell_type": "heading", "level": 2, "metadata": {}, "source": "Title"},
        {"cell_type": "code", "language": "python", "collapsed": False, "input": "print('v3')\n1", "metadata": {}, "outputs": [
            {"output_type": "pyout", "prompt_number": 1, "text": "old", "metadata": {}}], "prompt_number": 1},
        {"cell_type": "code", "language": "python", "collapsed": True, "input": "raise ValueError(1)", "metadata": {}, "outputs": []}]}]}
    yield "3", v3


# --- the two sides -----------------------------------------------------------------------------------------------

def stock(nb, cwd):
    "(executed notebook as it is read from a file, name of what stopped it or None) of nbclient with its own kernel."
    nb, error = executed(nb, cwd)
    return nbformat.reads(nbformat.writes(nb), as_version=4), error


def executed(nb, cwd):
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    client = stock_client()(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})
    client.log.setLevel("CRITICAL")
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # with it, a kernel captures no descriptors
    try: client.execute(env=env)
    except CellExecutionError as e:  # sys.exit(0) ends a run well, here as in papermill
        return nb, None if e.ename == "SystemExit" and e.evalue in ("", "0", "None") else e.ename
    except DeadKernelError: return nb, "DeadKernelError"
    return nb, None


@lru_cache(None)
def stock_client():
    "nbclient, which may sleep until its timeout when it answers an Output widget while it waits: here it looks again."
    from nbclient import NotebookClient

    class Stock(NotebookClient):
        async def async_start_new_kernel_client(self):
            kc = await super().async_start_new_kernel_client()
            wait = kc.shell_channel.get_msg
            async def get_msg(timeout=None):
                until = time.monotonic() + (timeout or 3600)
                while True:
                    try: return await wait(timeout=.2)
                    except Empty:
                        if time.monotonic() > until: raise
            kc.shell_channel.get_msg = get_msg
            return kc
    return Stock


def ours(zygote, nb, cwd, run):
    "(executed notebook, name of what stopped it or None) of the workbench; `run`: an empty folder."
    (run/store.NOTEBOOK).write_text(json.dumps(nb), "utf-8")
    write_json(run/store.REQUEST, {"id": run.name, "key": "k", "chapter": "fidelity", "params": {}})
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    zygote.submit(dict(id=str(run), dir=str(run), cwd=str(cwd), env=env, seed=1, timeout=600, mem=None, injected=None,
                       hooks=[])).result()
    error = read_json(run/store.RUN)["error"]
    done = nbformat.read(run/store.NOTEBOOK, as_version=4)
    if nbformat.validator.isvalid(nbformat.reads(json.dumps(nb), as_version=4)): nbformat.validate(done)
    return done, error and error["ename"]


# --- what is equal -----------------------------------------------------------------------------------------------

MASKS = [
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "DATE"), (r"ipykernel_\d+", "ipykernel_PID"), (r"\b0x[0-9a-f]{6,}\b|(?<=object at )[0-9a-f]{6,}", "ADDRESS"),
    (r"(CPU times|Wall time|user|sys|total): [^\\\n\"]*", r"\1: TIME"), (r"CPU times: TIME[^\\\"]*", "CPU times: TIME"),
    (r"[\d.,]+ [nµμm]?s ± [\d.,]+ [nµμm]?s per loop", "TIME per loop"), (r"The slowest run took [^\"]*?cached\.\\n", ""),
    (r"\d+(\.\d+)?it/s|\?it/s|\d\d:\d\d<\d\d:\d\d", "RATE"), (r"/tmp\w{8}\.json", "/CONNECTION.json"),
]
IDS = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])|\bT_[0-9a-f]{5}(?![0-9a-f])")


def joined(outputs):
    "Outputs with neighbouring pieces of one stream made one: where a kernel splits them depends on its clock."
    out = []
    for o in outputs:
        if out and o.output_type == "stream" == out[-1].output_type and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(copy.deepcopy(o))
    return out


def shown(nb, cwd):
    """What is compared: all that a reader or Jupyter sees of `nb`, masked, as JSON text: cells, metadata, widgets.

    Both get the pictures that the engine adds to plotly's figures."""
    from opml_wb.core.kit.picture import illustrated
    illustrated(nb)
    names = {}
    def mask(value, name=lambda m: names.setdefault(m[0], f"ID{len(names)}")):
        text = json.dumps(value, sort_keys=True, ensure_ascii=False).replace(str(cwd), "CWD")
        for pattern, to in MASKS: text = re.sub(pattern, to, text)
        return IDS.sub(name, text)
    cells = []
    for cell in nb.cells:
        cell = {**cell, "metadata": {**cell.metadata, "execution": sorted(cell.metadata.get("execution", {}))}}
        if cell["cell_type"] == "code": cell["outputs"] = joined(cell["outputs"])
        if "either-order" in cell["metadata"].get("tags", []):  # a kernel reads each stream in a thread of its own
            cell["outputs"] = joined(sorted(cell["outputs"], key=lambda o: o.get("name", "")))
        cell.pop("id", None)
        cells.append(mask(cell))
    meta = {k: v for k, v in nb.metadata.items() if k not in ("opml_run", "widgets")}
    state = nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {"state": {}})["state"]
    return cells + [mask(meta)] + sorted(mask(tree(key, state), "ID") for key in state)


def tree(key, state, above=()):
    "The state of widget `key` with the widgets that it refers to in the place of their ids."
    def resolve(value):
        if isinstance(value, dict): return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, list): return [resolve(v) for v in value]
        if not isinstance(value, str) or not value.startswith("IPY_MODEL_"): return value
        return "itself" if value in above else tree(value[10:], state, (*above, value))
    return resolve(state.get(key, "gone"))


def assert_equal(left, right):
    "`left` from nbclient, `right` ours: (notebook, name of what stopped it, working folder)."
    a, b = shown(left[0], left[2]), shown(right[0], right[2])
    wrong = [f"{i}: nbclient {x}\n{i}: ours     {y}" for i, (x, y) in enumerate(zip(a, b)) if x != y]
    assert not wrong and len(a) == len(b), f"{len(wrong)} parts differ, {len(a)} and {len(b)} in all\n" + "\n".join(wrong)
    assert left[1] == right[1]


# --- the tests ---------------------------------------------------------------------------------------------------

class Bench:
    "Runs notebooks on both sides; the stock kernels, which take a second each, start ahead of the tests that need them."
    def __init__(self, folder):
        self.folder, self.pool, self.stocked, self.zygotes = folder, ThreadPoolExecutor(2), {}, {}

    def place(self, beside=None):
        "A fresh folder, with copies of the files `beside`."
        folder = Path(tempfile.mkdtemp(dir=self.folder))/"work"
        if beside: return Path(shutil.copytree(beside, folder))
        folder.mkdir()
        return folder

    def ahead(self, name, nb, beside=None):
        if name in self.stocked: return
        cwd = self.place(beside)
        self.stocked[name] = self.pool.submit(lambda: (*stock(nb, cwd), cwd))

    def stock(self, name): return self.stocked[name].result()

    def ours(self, nb, beside=None, preload=()):
        if preload not in self.zygotes: self.zygotes[preload] = Zygote(preload)
        cwd, run = self.place(beside), self.place()
        return (*ours(self.zygotes[preload], nb, cwd, run), cwd)


def cases():
    "{name: (the notebook as its file holds it, folder whose files it needs)} of all that is compared."
    found = {f"own/{p.stem}": (own(p), None) for p in sorted(HERE.glob("*.ipy"))}
    found |= {f"format/{version}": (nb, None) for version, nb in by_hand()}
    for suite, folder in (("papermill", PAPERMILL), ("nbclient", nbclient_files())):
        for p in sorted(folder.rglob("*.ipynb")) if folder else ():
            if p.name not in NOT_COMPARED: found[f"{suite}/{p.stem}"] = json.loads(p.read_text("utf-8")), folder
    return found


CASES = cases()


@pytest.fixture(scope="session")
def bench(request, tmp_path_factory):
    it = Bench(tmp_path_factory.mktemp("fidelity"))
    asked = [getattr(i, "callspec", None) for i in request.session.items if i.path == Path(__file__)]
    for name in dict.fromkeys(c.params["name"] for c in asked if c and "name" in c.params):
        if name in CASES: it.ahead(name, *CASES[name])
    yield it
    it.pool.shutdown(cancel_futures=True)
    for z in it.zygotes.values(): z.close()


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("own/")])
def test_suites_and_formats(bench, name):
    assert_equal(bench.stock(name), bench.ours(*CASES[name]))


@pytest.mark.parametrize("name, preload", [pytest.param(n, (), id=n[4:]) for n in CASES if n.startswith("own/")] + [
    pytest.param(f"own/{n}", LIBRARIES, id=f"{n}, imported ahead") for n in ("displays", "plots", "widgets")])
def test_nastier_ones(bench, name, preload):
    assert_equal(bench.stock(name), bench.ours(*CASES[name], preload))


def test_two_that_wait_for_each_other(bench, tmp_path, monkeypatch):
    files = nbclient_files()
    if not files: pytest.skip("$OPML_NBCLIENT_SRC names no folder with nbclient's source package")
    pair = [json.loads((files/f"Parallel Execute {x}.ipynb").read_text("utf-8")) for x in "AB"]
    both = []
    for side in ("stock", "ours"):
        (tmp_path/side).mkdir()
        monkeypatch.setenv("NBEXECUTE_TEST_PARALLEL_TMPDIR", str(tmp_path/side))
        work = (lambda nb: (*stock(nb, tmp_path), tmp_path)) if side == "stock" else bench.ours
        with ThreadPoolExecutor(2) as pool: both.append(list(pool.map(work, pair)))
    for left, right in zip(*both): assert_equal(left, right)


def test_one_that_kills_itself(bench):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (
        "print('one')\n1", "import os, signal\nprint('two', flush=True)\nos.kill(os.getpid(), signal.SIGTERM)", "print('three')")])
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="what was saved with the notebook")]
    bench.ahead("kill", nb)
    (a, stopped, at), (b, why, there) = bench.stock("kill"), bench.ours(nb)
    assert (stopped, why) == ("DeadKernelError", "SIGTERM")
    assert shown(a, at)[0] == shown(b, there)[0] and shown(a, at)[2:] == shown(b, there)[2:]
    assert [o.output_type for o in b.cells[1].outputs] == ["stream", "error"] and b.cells[1].outputs[0].text == "two\n"
    assert [c.execution_count for c in b.cells] == [c.execution_count for c in a.cells] == [1, 2, None]


@pytest.mark.parametrize("call", ["exit", "quit", "exit()", "print('x')\nquit(False)"])
def test_exit_ends_the_kernel_a_tenth_of_a_second_later(bench, call):
    "What begins before that is executed; when depends on the machine, so the second cell isn't compared."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ("1", call, "import time; time.sleep(.3)", "print('never')")])
    bench.ahead(call, nb)
    (a, stopped, at), (b, why, there) = bench.stock(call), bench.ours(nb)
    assert stopped == why == "DeadKernelError"
    for i in (0, 1, 3): assert shown(a, at)[i] == shown(b, there)[i]


def test_exit_in_the_last_cell_and_exit_that_keeps_the_kernel(bench):
    for name, sources in ("last", ["1", "exit"]), ("kept", ["exit(True)", "print('on')"]):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        bench.ahead(name, nb)
        assert_equal(bench.stock(name), bench.ours(nb))


def test_the_suites_are_there():
    assert len([n for n in CASES if n.startswith("papermill/")]) >= 20
    if nbclient_files() is None: pytest.skip("$OPML_NBCLIENT_SRC names no folder with nbclient's source package")
    assert len([n for n in CASES if n.startswith("nbclient/")]) >= 17


# what ours shows where a stock kernel loses output or leaves it to chance: name -> (why, cells, text of each cell)
OURS = {
    "descriptor": ("a kernel reads its pipes in threads; what comes last in a cell may come too late for nbclient",
                   ["import os\nprint('first')\nos.write(1, b'last\\n');"], ["first\nlast\n"]),
    "subprocess to sys.stdout": ("sys.stdout.fileno() of a kernel is the terminal that started it",
                                 ["import subprocess, sys\nsubprocess.run(['echo', 'x'], stdout=sys.stdout);"], ["x\n"]),
    "background task": ("nbclient drops what an earlier cell's task shows later; Jupyter puts it below that cell, and so do we",
                        ["import asyncio\nasync def f():\n    await asyncio.sleep(.05)\n    print('later')\nt = asyncio.create_task(f())\nprint('now')",
                         "print('second')\nawait t"], ["now\nlater\n", "second\n"]),
    "replaced stdout": ("unflushed text is lost when sys.stdout is replaced",
                        ["import sys\nprint('a')\nsys.stdout = sys.__stdout__"], ["a\n"]),
    "lone surrogate": ("a kernel's stream cannot encode it and loses all that waits with it (nothing is shown at all)",
                       ["print('before \\ud800 after')"], ["before \\ud800 after\n"]),
    "much output": ("a reader's browser would not open it: 8 MiB a cell are kept",
                    ["for i in range(200): print('x' * 99_999)", "print('next cell')"],
                    ["x" * 99_999 + "\n", "next cell\n"]),
}


@pytest.mark.parametrize("name", OURS)
def test_where_ours_shows_more(bench, name):
    why, sources, texts = OURS[name]
    nb, error, _ = bench.ours(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]))
    assert error is None
    got = ["".join(o.text for o in joined(c.outputs) if o.output_type == "stream") for c in nb.cells]
    if name == "much output":
        assert got[0].startswith(texts[0]) and got[0].endswith("cut after 8 MiB\n") and 8 << 20 <= len(got[0]) < (8 << 20) + 100
        got, texts = got[1:], texts[1:]
    assert got == texts, why
