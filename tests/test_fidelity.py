"""What a notebook shows under the workbench equals what it shows under nbclient with a stock kernel.

The notebooks are those of papermill's and nbclient's own test suites (read where they lie, never copied into the
project) and the nastier ones of `tests/notebooks/*.ipy`. Both sides are compared after masking what differs between
any two runs: ids, addresses, times, temporary names. `OURS` lists where a stock kernel loses output or depends on
chance, and what ours shows there.
"""
import copy
import io
import json
import os
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from opml_wb.core import store
from opml_wb.core.zygote import Zygote

HERE = Path(__file__).parent/"notebooks"
PAPERMILL = Path(papermill.__file__).parent/"tests"/"notebooks"
LIBRARIES = ("anywidget", "ipywidgets", "joblib", "matplotlib.pyplot", "numpy", "pandas", "plotly.graph_objects", "tqdm.auto")
NOT_COMPARED = {
    "Interrupt.ipynb": "an endless loop that nbclient's suite interrupts",
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


# --- the two sides -----------------------------------------------------------------------------------------------

def stock(nb, cwd):
    "(executed notebook as it is read from a file, name of what stopped it or None) of nbclient with its own kernel."
    nb, error = executed(nb, cwd)
    return nbformat.reads(nbformat.writes(nb), as_version=4), error


def executed(nb, cwd):
    "(executed notebook, name of what stopped it or None) of nbclient with a kernel of its own."
    nb = nbformat.from_dict(copy.deepcopy(nb))
    client = NotebookClient(nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(cwd)}})
    client.log.setLevel("CRITICAL")
    try: client.execute()
    except CellExecutionError as e:  # sys.exit(0) ends a run well, here as in papermill
        return nb, None if e.ename == "SystemExit" and e.evalue in ("", "0", "None") else e.ename
    except DeadKernelError: return nb, "DeadKernelError"
    return nb, None


def ours(zygote, nb, cwd, run):
    "(executed notebook, name of what stopped it or None) of the workbench; `run`: an empty folder."
    nbformat.write(nb, run/store.NOTEBOOK)
    store.write_json(run/store.REQUEST, {"id": run.name, "key": "k", "chapter": "fidelity", "params": {}})
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    zygote.submit(dict(id=str(run), dir=str(run), cwd=str(cwd), env=env, seed=1, timeout=120, mem=None, injected=None,
                       hooks=[])).result()
    error = store.read_json(run/store.RUN)["error"]
    done = nbformat.read(run/store.NOTEBOOK, as_version=4)
    nbformat.validate(done)
    return done, error and error["ename"]


def place(folder, beside=None):
    "A fresh working folder, with copies of the files `beside`."
    if beside: return Path(shutil.copytree(beside, folder))
    folder.mkdir(parents=True)
    return folder


# --- what is equal -----------------------------------------------------------------------------------------------

MASKS = [
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "DATE"), (r"ipykernel_\d+", "ipykernel_PID"), (r"\b0x[0-9a-f]{6,}\b|(?<=object at )[0-9a-f]{6,}", "ADDRESS"),
    (r"(CPU times|Wall time|user|sys|total): [^\\\n\"]*", r"\1: TIME"), (r"CPU times: TIME[^\\\"]*", "CPU times: TIME"),
    (r"[\d.,]+ [nµm]?s ± [\d.,]+ [nµm]?s per loop", "TIME per loop"), (r"The slowest run took [^\"]*?cached\.\\n", ""),
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
    "What is compared: everything of `nb` that a reader or Jupyter sees, masked, as JSON text per cell and for the metadata."
    names = {}
    def mask(value):
        text = json.dumps(value, sort_keys=True, ensure_ascii=False).replace(str(cwd), "CWD")
        for pattern, name in MASKS: text = re.sub(pattern, name, text)
        return IDS.sub(lambda m: names.setdefault(m[0], f"ID{len(names)}"), text)
    parts = []
    for cell in nb.cells:
        cell = dict(cell, metadata={**cell.metadata, "execution": sorted(cell.metadata.get("execution", {}))})
        if cell["cell_type"] == "code": cell["outputs"] = joined(cell["outputs"])
        cell.pop("id", None)
        parts.append(mask(cell))
    meta = {k: v for k, v in nb.metadata.items() if k != "opml_run"}
    widgets = meta.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {"state": {}})
    return parts + [mask(meta)] + sorted(mask(w) for w in widgets["state"].values())


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
        self.folder, self.pool, self.stocked, self.n = folder, ThreadPoolExecutor(2), {}, 0
        self.zygotes = {}

    def ahead(self, name, nb, beside=None):
        if name in self.stocked: return
        cwd = place(self.folder/"stock"/f"{len(self.stocked)}"/"work", beside)
        self.stocked[name] = self.pool.submit(lambda: (*stock(nb, cwd), cwd))

    def stock(self, name): return self.stocked[name].result()

    def ours(self, nb, beside=None, preload=()):
        if preload not in self.zygotes: self.zygotes[preload] = Zygote(preload)
        self.n += 1
        cwd, run = place(self.folder/"ours"/f"{self.n}"/"work", beside), place(self.folder/"runs"/f"{self.n}")
        return (*ours(self.zygotes[preload], nb, cwd, run), cwd)


def cases():
    "(test id, path, how it is read, folder whose files it needs) of every notebook that is compared."
    found = [(f"own/{p.stem}", p, own, None) for p in sorted(HERE.glob("*.ipy"))]
    for suite, folder in (("papermill", PAPERMILL), ("nbclient", nbclient_files())):
        for p in sorted(folder.rglob("*.ipynb")) if folder else ():
            if p.name not in NOT_COMPARED:
                found.append((f"{suite}/{p.stem}", p, lambda p: nbformat.read(p, as_version=4), folder))
    return {name: rest for name, *rest in found}


CASES = cases()


@pytest.fixture(scope="session")
def bench(request, tmp_path_factory):
    it = Bench(tmp_path_factory.mktemp("fidelity"))
    wanted = dict.fromkeys(i.callspec.params["name"] for i in request.session.items
                           if i.path == Path(__file__) and getattr(i, "callspec", None) and "name" in i.callspec.params)
    for name in wanted:
        path, read, beside = CASES[name]
        it.ahead(name, read(path), beside)
    yield it
    it.pool.shutdown(cancel_futures=True)
    for z in it.zygotes.values(): z.close()


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("own/")])
def test_the_suites_of_papermill_and_nbclient(bench, name):
    path, read, beside = CASES[name]
    assert_equal(bench.stock(name), bench.ours(read(path), beside))


@pytest.mark.parametrize("preload", [(), LIBRARIES], ids=["plain", "preloaded"])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("own/")])
def test_nastier_ones(bench, name, preload):
    path, read, beside = CASES[name]
    assert_equal(bench.stock(name), bench.ours(read(path), beside, preload))
