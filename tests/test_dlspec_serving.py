"""A model of the catalog behind an endpoint, and a task as a run of the workbench: what is served or was read is named by the manifest."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

OPML = [sys.executable, "-m", "opml_wb.core.cli"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home in which the photographs' models are trained once."
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("home")
    patch.setenv("OPML_HOME", str(folder))
    yield folder
    patch.undo()


def publish(*words, code=0):
    "What `opml flexserve publish WORDS` prints, in this process."
    from click.testing import CliRunner
    from opml_wb.flexserve.commands.cli import flexserve
    done = CliRunner().invoke(flexserve, ["publish", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def opml(*words, home, code=0, **env):
    "Standard output of `opml WORDS`."
    done = subprocess.run([*OPML, *map(str, words)], capture_output=True, text=True, env={**os.environ, "OPML_HOME": str(home), **env})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- behind an endpoint

def photographs():
    "Patches of the data set's test part, and what the manifest's stages answer."
    from opml_wb.dlspec.zoo.census import known
    from opml_wb.dlspec.zoo.serving import told
    zoo = known(refs=["model/photos/trees"])
    return told(zoo.get("task/photos/trees"), zoo)


def test_a_model_of_the_catalog_is_served_and_named_in_each_answer(home):
    from opml_wb.flexserve import Client
    from opml_wb.flexserve.serve import Server
    assert "model/photos/trees@1.0.0" in opml("flexserve", "publish", "patches", "--dlspec", "model/photos/trees@^1", home=home)
    images, said = photographs()
    with Server("patches", home=home, workers=1) as server:
        answer = Client(server.url).batch(images, provenance="full")
    [labels] = answer["models"].values()
    assert sum(a == b for a, b in zip(labels, said)) >= len(said) - 1 and len(said) > 32   # one near tie
    [model] = answer["provenance"]["models"]
    assert model["provenance"]["dlspec"] == "model/photos/trees@1.0.0" and model["provenance"]["trained_by"].startswith("task/training/photos/trees")


REFUSED = {"model/photos/svm@1.0.0": "gives no probabilities", "model/magika": "only models of pictures", "model/timm/resnet18@1.0.0": "is seeded",
           "model/photos/tree@1.0.0": "did you mean 'photos/trees'", "task/photos/trees": "not a model", "model/photos/trees@2": "no version in that range"}


@pytest.mark.parametrize("ref", REFUSED)
def test_what_cannot_be_served_is_refused_and_nothing_is_published(ref, home):
    assert REFUSED[ref] in publish("none", "--dlspec", ref, code=1)
    assert publish("none", code=2)
    from opml_wb.core.record.models import ModelStore
    assert "none" not in ModelStore().names()


def test_a_model_that_would_answer_otherwise_is_not_published(home, tmp_path):
    "Its input says RGB, its own code reads BGR: found by the pictures that go along."
    from opml_wb.dlspec import Catalog
    from opml_wb.dlspec.zoo.census import known
    zoo = known(refs=["model/photos/linear"])
    model, task = zoo.get("model/photos/linear"), zoo.get("task/photos/linear")
    pre = model.stages.pre.replace('if said["color_mode"] == "BGR"', "if True")
    assert pre != model.stages.pre
    wrong, own = model.model_copy(update={"name": "wrong", "stages": model.stages.model_copy(update={"pre": pre})}), Catalog()
    own.add(wrong)
    own.add(task.model_copy(update={"name": "wrong", "model": wrong.id, "log": None}))
    own.write(tmp_path)
    said = publish("wrong", "--dlspec", "model/wrong", "--catalog", tmp_path, code=1)
    assert "otherwise than its own code" in said and "not published" in said


def test_networks_of_cifar_answer_as_their_manifests_say(home):
    if not (Path(os.environ.get("OPML_DATA", "/nowhere")) / "flexserve" / "resnet20-cifar10.safetensors").exists():
        pytest.skip("the networks aren't ours to ship: OPML_DATA names a folder with them")
    from opml_wb.core.record.models import ModelStore
    from opml_wb.dlspec import run
    from opml_wb.dlspec.zoo.census import known
    zoo = known()
    assert run(zoo.get("task/cifar10/resnet20"), catalog=zoo).matches == {"accuracy": True}
    publish("cifar", "--dlspec", "model/cifar10/resnet20@1.0.0")
    [about] = ModelStore().info("cifar", 1)["provenance"]["models"].values()
    assert about["dlspec"] == "model/cifar10/resnet20@1.0.0" and about["weights"] == zoo.get("model/cifar10/resnet20").resources[0].sha256


def test_a_bundle_comes_back_as_a_manifest_that_is_served_again(home, tmp_path):
    from opml_wb.dlspec import Catalog, import_any
    from opml_wb.flexserve import Bundle
    from opml_wb.flexserve.model.zoo import convnet
    entry = {"name": "net", "arch": "opml_wb.flexserve.model.zoo:convnet", "weights": convnet().state_dict(), "classes": ["no", "yes"], "transform": {"resize": [16, 16]}}
    Bundle.create(tmp_path / "pets", [entry])
    [model] = import_any(tmp_path / "pets")
    assert model.id == "model/pets/net@1.0.0" and model.inputs[0].parameters["resize"] == [16, 16]
    own = Catalog()
    own.add(model)
    own.write(tmp_path / "own")
    assert "model/pets/net@1.0.0" in publish("pets", "--dlspec", "model/pets/net", "--catalog", tmp_path / "own")


# --- as a run

def notebook(folder):
    "A chapter that runs a task on a file, with weights in another one: ({file name: its sha256}, path)."
    files = {"rows.csv": "1,2\n3,4\n5,6\n", "net.json": "[2.0, 1.0]\n"}
    sha = {}
    for name, said in files.items():
        (folder / name).write_text(said)
        sha[name] = hashlib.sha256(said.encode()).hexdigest()
    code = f"""
from opml_wb import log
from opml_wb.dlspec import Dataset, Hardware, Model, Resource, Software, Task, run
from opml_wb.dlspec.spec.manifest import Stages
data = Dataset(name="rows", version="1.0.0", resources=[Resource(url="{(folder / 'rows.csv').as_uri()}", sha256="{sha['rows.csv']}")],
               load="def fun(ctx, data): return [[float(x) for x in line.split(',')] for line in open(data[0])]")
model = Model(name="net", version="1.0.0", resources=[Resource(url="{(folder / 'net.json').as_uri()}", sha256="{sha['net.json']}")], stages=Stages(run='''
import json
def fun(ctx, data):
    w = json.load(open(ctx["files"]["net.json"]))
    return [k * sum(a * b for a, b in zip(w, x)) for x in data]
'''.replace("k *", f"{{k}} *")))
task = Task(hardware=Hardware(name="any", version="1.0.0"), software=Software(name="s", version="1.0.0"), dataset=data, model=model)
log.metric("total", sum(run(task, executor=executor).outputs))
"""
    parameters = nbformat.v4.new_code_cell("k: int = 1\nexecutor: str = 'inprocess'")
    parameters.metadata.tags = ["parameters"]
    cells = [nbformat.v4.new_markdown_cell("# A task"), parameters, nbformat.v4.new_code_cell(code)]
    path = folder / "task.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return sha, path


def runs(home): return sorted((home / "runs").iterdir(), key=lambda p: p.stat().st_mtime)


@pytest.mark.parametrize("executor", ["inprocess", "venv"])
def test_a_task_is_a_run_like_any_other(executor, tmp_path):
    "Recorded, answered from the store, and its data set's and model's files are inputs, which capture found: also when they were fetched before."
    sha, path = notebook(tmp_path)
    home = tmp_path / "home"
    assert "total = 30" in opml("run", path, f"executor={executor}", home=home)
    assert "cached" in opml("run", path, f"executor={executor}", home=home)
    assert "total = 60" in opml("run", path, f"executor={executor}", "k=2", home=home)
    first, second = (opml("provenance", "lineage", folder.name, home=home) for folder in runs(home)[-2:])
    for said in (first, second):
        read = {line.split("\t")[2] for line in said.splitlines() if line.startswith("read\t")}
        assert set(sha.values()) <= read, said
    assert f"before: {runs(home)[-2].name}" in second        # it used the files that the first had fetched


def test_a_resource_that_changed_in_the_store_is_fetched_again(tmp_path):
    from opml_wb.dlspec.execute.resources import SOUND, Resources
    from opml_wb.dlspec import Resource
    (tmp_path / "net.bin").write_bytes(b"weights" * 100)
    r = Resource(url=str(tmp_path / "net.bin"), sha256=hashlib.sha256(b"weights" * 100).hexdigest())
    file = Resources(tmp_path / "store").fetch(r)
    file.chmod(0o644)
    file.write_bytes(b"flipped" * 100)
    for forget in (False, True):                             # this process saw it whole; another one did not
        if forget: SOUND.clear()
        again = Resources(tmp_path / "store")
        assert again.fetch(r).read_bytes() == b"weights" * 100 and (forget or again.fetched == 1)
