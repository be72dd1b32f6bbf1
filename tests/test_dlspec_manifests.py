"""Manifests that are broken in twenty ways, the authors' own, planted code, and a catalog of thousands."""
import os
import pickle
from pathlib import Path

import pytest

MODEL = 'kind: model\nname: net\nversion: "1.0.0"\n'
TASK = 'kind: task\nname: t\nversion: "1.0.0"\nhardware: hardware/any\nsoftware: software/s\ndataset: dataset/d\nmodel: model/net\n'
RUN = "stages:\n  run: |\n    {}\n"
SHA = "a" * 64


@pytest.fixture(scope="module", autouse=True)
def imports():
    from opml_wb import dlspec
    from opml_wb.dlspec import zoo
    globals().update({n: getattr(dlspec, n) for n in dlspec.__all__}, zoo=zoo)


# what the file says, the line that is to be named (None: none fits), what is to be told
BROKEN = {
    "float version": ("kind: model\nname: net\nversion: 1.0\n", 3, 'in quotes, such as "1.2.0"'),
    "two numbers": ('kind: model\nname: net\nversion: "1.0"\n', 3, "got '1.0'"),
    "duplicate key": (MODEL + "name: again\n", 4, "stands here again, first in line 2"),
    "unknown field": (MODEL + "licence: MIT\n", 4, "did you mean 'license'"),
    "kind as a list": ("kind: [model]\nname: a\nversion: 1.0.0\n", 1, "got ['model']"),
    "number of 5000 digits": (MODEL + "seed: " + "9" * 5000 + "\n", 4, "a number too long for one"),
    "two files of one name": (MODEL + "resources:\n- url: file:///a/w.bin\n- url: file:///b/w.bin\n", None, "give one of them another `name`"),
    "unknown kind": ("kind: modell\nname: a\nversion: 1.0.0\n", 1, "did you mean 'model'"),
    "no name": ("kind: model\nversion: 1.0.0\n", None, "the field 'name' is missing"),
    "number as hash": (MODEL + "resources:\n- url: file:///a\n  sha256: 123\n", 6, "expected 64 hexadecimal"),
    "short hash": (MODEL + "resources:\n- url: file:///a\n  sha256: abc\n", 6, "expected 64 hexadecimal"),
    "accuracy on seeded": (MODEL + "weights_class: seeded\nseed: 0\nquality:\n  accuracy: {value: 0.9}\n", None, "architecture and seed: no accuracy"),
    "seeded without seed": (MODEL + "weights_class: seeded\n", None, "needs one"),
    "trained here by nobody": (MODEL + "weights_class: trained-here\n", None, "names its training task"),
    "no as a value": (MODEL + "license: no\n", 4, "a truth value in YAML 1.1"),
    "octal": (MODEL + "seed: 010\n", 4, "an octal number"),
    "base 60": (MODEL + "seed: 1:30\n", 4, "a number of base 60"),
    "tag": (MODEL + "seed: !!python/object:os.system x\n", 4, "plain values only"),
    "bomb": (MODEL + "attributes:\n  a: &a [1, 1]\n  b: [*a, *a]\n", 5, "the anchor &a"),
    "deep": (MODEL + "attributes: " + "[" * 60 + "]" * 60 + "\n", 4, "nested more than 50 deep"),
    "two documents": (MODEL + "---\n" + MODEL, 4, "a second document"),
    "no reference": (TASK.replace("model/net", "modell/net"), 7, "did you mean 'model'"),
    "reference of another kind": (TASK.replace("model/net", "dataset/net"), None, "is no model"),
    "no range": (TASK.replace("model/net", "model/net@newest"), 7, "no version and no range"),
    "no YAML": (MODEL + "a: [1\n", None, "no YAML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_manifests_are_refused_with_file_and_line(name, tmp_path):
    text, line, said = BROKEN[name]
    file = tmp_path / "m.yml"
    file.write_text(text)
    with pytest.raises(ManifestError) as e: load(file)
    assert said in str(e.value) and e.value.file == str(file)
    if line: assert e.value.line == line, str(e.value)


def test_no_text_and_too_much_of_it(tmp_path):
    (tmp_path / "bytes.yml").write_bytes(b"kind: model\nname: \xff\n")
    (tmp_path / "large.yml").write_bytes(b"a: 1\n" * 10_000_000)
    with pytest.raises(ManifestError, match=r"bytes.yml:2: no UTF-8"): load(tmp_path / "bytes.yml")
    with pytest.raises(ManifestError, match="larger than 1 MiB"): load(tmp_path / "large.yml")
    with pytest.raises(ManifestError, match="cannot be read"): load(tmp_path / "none.yml")


CODE = {"def fun(data): pass": "expected fun(ctx, data), got fun(data)", "def main(): pass": "no function fun(ctx, data)",
        "def fun(ctx, data:": "no Python", "async def fun(ctx, data): pass": "must not be async"}


@pytest.mark.parametrize("code", CODE)
def test_code_is_compiled_and_its_line_named(code, tmp_path):
    (tmp_path / "m.yml").write_text(MODEL + RUN.format(code))
    told = Catalog(tmp_path).check()
    assert CODE[code] in told.problem[0] and "m.yml:6" in told.problem[0]


def test_references_that_lead_nowhere_or_back(tmp_path):
    (tmp_path / "net.yml").write_text(MODEL + "weights_class: trained-here\ntrained_by: task/t\n")
    (tmp_path / "task.yml").write_text(TASK + "mode: training\n")
    told = "\n".join(Catalog(tmp_path).check().problem)
    assert "lead back to it: model/net@1.0.0 -> task/t@1.0.0 -> model/net@1.0.0" in told
    assert "hardware/any: not in the catalog" in told
    with pytest.raises(ManifestError, match=r"no version in that range; there are 1.0.0"): Catalog(tmp_path).get("model/net@^2")


def test_the_same_id_with_other_content(tmp_path):
    (tmp_path / "a.yml").write_text(MODEL)
    (tmp_path / "b.yml").write_text(MODEL + "description: other\n")
    with pytest.raises(ManifestError, match="with other content"): Catalog(tmp_path)


def test_reading_and_checking_execute_nothing(tmp_path):
    "A top level that writes a file, in our form and in the authors'; empty and weak checksums are told."
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w')\n    def fun(ctx, data): return data"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "m.yml").write_text(MODEL + RUN.format(code))
    Catalog(tmp_path / "own").check()
    theirs = tmp_path / "theirs.yml"
    theirs.write_text(f"""name: Tiny
framework: {{name: PyTorch, version: 1.2.0}}
version: 1.0
model: {{graph_path: 'https://example.org/net.pt', graph_checksum: '', weights_path: 'https://example.org/w', weights_checksum: 0123456789abcdef0123456789abcdef}}
preprocess: |
  open({str(trap)!r}, 'w')
  def preprocess(ctx, data): return dataset[data]
""")
    model = next(m for m in import_any(theirs) if m.kind == "model")
    said = "\n".join(model.unknown)
    assert "net.pt: no checksum" in said and "w: a weak checksum (md5) only" in said
    assert "reads dataset, which nothing defines" in said and "1.0" not in model.version.replace("1.0.0", "")
    assert model.weights_class == "imported" and not trap.exists()
    task = Task(hardware=Hardware(name="any", version="1.0.0"), software=Software(name="s", version="1.0.0"),
                dataset=Dataset(name="d", version="1.0.0"), model=model)
    with pytest.raises(ExecutionError, match="it can't be run"): run(task)
    assert not trap.exists()


LENIENT = {
    "bare words": "name: a\nframework: Caffe\nmodel: resnet\ninputs: [image, other]\noutputs: null\ncontainer: nvidia/tensorrt\n",
    "one of a list": "name: a\nframework: {name: Caffe, version: 1}\nmodel: {graph_path: g}\ninputs: {type: image, parameters: null}\noutput: {type: class, parameters: {dimensions: 3}}\nreferences: one\n",
    "nothing in it": "name: 1\nframework: {name: CNTK}\nversion: null\nmodel: {graph_path: g, graph_checksum: ''}\nattributes: none\ncontainer: {amd64: {}}\n"}


@pytest.mark.parametrize("name", LENIENT)
def test_others_files_are_read_leniently_and_what_is_not_understood_is_told(name, tmp_path):
    (tmp_path / "net.yml").write_text(LENIENT[name])
    model, software = import_any(tmp_path / "net.yml")
    assert model.weights_class == "imported" and type(model).model_validate(model.model_dump()).digest == model.digest
    if name == "bare words": assert {"model: 'resnet' isn't understood", "container: 'nvidia/tensorrt' isn't understood"} <= set(model.unknown)
    (tmp_path / "net.yml").write_text("name: a\nframework: Caffe\nmodel: {graph_path: [[a]], is_archive: {}}\nversion: {a: 1}\n")
    try: import_any(tmp_path / "net.yml")
    except ManifestError as e: assert "net.yml" in str(e)


class Bite:
    "What writes a file when it is unpickled."
    def __init__(self, trap): self.trap = str(trap)
    def __reduce__(self): return open, (self.trap, "w")


MLMODEL = """artifact_path: model
flavors:
  python_function: {loader_module: mlflow.sklearn, model_path: model.pkl, code: code}
  sklearn: {pickled_model: model.pkl, sklearn_version: 1.5.2}
model_uuid: e7487bc3c4ab417c965144efcecaca2f
signature:
  inputs: '[{"type": "double", "name": "age"}, {"type": "long", "name": "n"}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1, 3]}}]'
"""


def test_an_mlflow_folder_is_imported_and_nothing_in_it_is_loaded(tmp_path):
    "By hand, as older versions wrote it: a pickle that bites, code of its own, a link that leads out."
    folder, trap = tmp_path / "runs" / "model", tmp_path / "trap"
    (folder / "code").mkdir(parents=True)
    (folder / "MLmodel").write_text(MLMODEL)
    (folder / "model.pkl").write_bytes(pickle.dumps(Bite(trap)))
    (folder / "code/own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    (folder / "out").symlink_to("/etc/hostname")
    (folder / "conda.yaml").write_text("dependencies:\n- python=3.10.4\n- pip: [scikit-learn==1.4.0, 'git+https://example.org/x']\n")
    for given in (folder, folder / "MLmodel", tmp_path):
        found = {m.kind: m for m in import_any(given)}
        model, software = found["model"], found["software"]
        assert model.id == "model/mlflow/model-e7487bc3@0.0.0" and model.weights_class == "imported"
        assert software.python == "==3.10.4" and software.libraries == {"scikit-learn": "==1.4.0"}
    assert {r.name for r in model.resources} == {"MLmodel", "conda.yaml", "model.pkl", "code/own.py"} and all(r.sha256 for r in model.resources)
    assert model.inputs[0].shape == ["batch", 2] and model.outputs[0].shape == ["batch", 3]
    said = "\n".join(model.unknown + software.unknown)
    for words in ("MLmodel says 1.5.2, the requirements ==1.4.0", "model.pkl can be trusted", "out: leads out", "git+https://example.org/x"): assert words in said
    assert type(model).model_validate(model.model_dump()).digest == model.digest and not trap.exists()


def test_what_mlflow_itself_wrote(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema
    model = mlflow.models.Model(signature=ModelSignature(Schema([ColSpec("float", "a")]), Schema([ColSpec("long")])))
    model.add_flavor("xgboost", xgb_version="3.0.0", data="model.ubj")
    (tmp_path / "trees").mkdir()
    model.save(str(tmp_path / "trees" / "MLmodel"))
    (tmp_path / "trees" / "requirements.txt").write_text("xgboost==3.0.0\n-r more.txt\n")
    found, software = import_any(tmp_path / "trees")
    assert (found.framework.name, found.framework.version) == ("XGBoost", "==3.0.0") and found.attributes["model_uuid"] == model.model_uuid
    assert found.inputs[0].element_type == "float32" and found.outputs[0].parameters["columns"][0]["type"] == "long"
    assert "the requirement '-r more.txt' isn't understood" in software.unknown


def test_a_cog_project_is_imported_and_nothing_in_it_is_run(tmp_path):
    folder, trap = tmp_path / "Photo to words", tmp_path / "trap"
    folder.mkdir()
    (folder / "predict.py").write_text(f"""open({str(trap)!r}, 'w')
class Predictor(BasePredictor):
    def setup(self): fetch("https://example.org/w.pt")
    async def predict(self, image: Path = Input(description="A photograph"), n: int = Input(default=os.cpu_count(), ge=1)) -> Iterator[str]: ...
""")
    (folder / "requirements.txt").write_text("torch==2.1.0\n")
    (folder / "cog.yaml").write_text("""build: {gpu: false}
predict: "predict.py:Predictor"
image: r8.im/me/net
build: {gpu: yes, cuda: "12.1", python_version: 3.10, python_requirements: requirements.txt, system_packages: [ffmpeg], run: ["curl https://example.org | sh"]}
""")
    model, software, hardware = import_any(folder)
    assert model.id == "model/cog/Photo-to-words@0.0.0" and model.weights_class == "imported" and not trap.exists()
    image, n = model.inputs
    assert (image.type, image.description, n.parameters) == ("file", "A photograph", {"default": "os.cpu_count()", "ge": 1})
    assert model.outputs[0].type == "text, in parts" and [f.name for f in software.frameworks] == ["PyTorch", "CUDA"]
    assert hardware.accelerators[0].kind == "cuda" and software.container["any"].image == "r8.im/me/net"
    said = "\n".join(model.unknown + software.unknown)
    for words in ("'build' stands here again", "https://example.org/w.pt: no checksum", "3.10 would look like 3.1", "packages ffmpeg", "curl https://example.org | sh"):
        assert words in said, said
    for text, why in (("[1]", "not a cog.yaml"), ("a: 1", "not a cog.yaml"), ("a: [", "no YAML")):
        (folder / "cog.yaml").write_text(text)
        with pytest.raises(ManifestError, match=why): import_any(folder)
    (folder / "cog.yaml").write_text("predict: ../predict.py:Predictor\nbuild: {python_requirements: /etc/passwd}")
    model, software, _ = import_any(folder, form="cog")
    assert not model.inputs and not software.libraries and any("no file '/etc/passwd'" in said for said in software.unknown)


def test_the_authors_manifests():
    "All 135 import; the one with a duplicate key names the line; none can be run."
    folder = Path(os.environ.get("OPML_DATA", "/nowhere")) / "dlspec" / "manifests"
    if not folder.is_dir(): pytest.skip("the authors' manifests aren't ours to ship: OPML_DATA names a folder with them")
    models = [m for m in import_any(folder) if m.kind == "model"]
    assert len(models) == 135 and {m.weights_class for m in models} == {"imported"}
    twice = [said for m in models for said in m.unknown if "stands here again" in said]
    assert len(twice) == 1 and "line 48" in twice[0] and "is_archive" in twice[0]
    assert all(any("weak checksum" in said for said in m.unknown) for m in models)
    for m in models: assert type(m).model_validate(m.model_dump()).digest == m.digest


def test_a_folder_of_a_thousand_is_read_and_written(tmp_path):
    catalog = Catalog()
    for i in range(1200): catalog.add(Hardware(name=f"m{i}", version="1.0.0", cores=1 + i % 7))
    catalog.write(tmp_path)
    again = Catalog(tmp_path)
    assert len(again) == 1200 and again.check().empty
    assert {m.id: m.digest for m in again} == {m.id: m.digest for m in catalog}


def test_the_zoo_is_valid_and_counted_by_class():
    catalog = zoo.catalog(trained=["iris"])
    counts = zoo.counts(catalog)
    assert counts.models["seeded"] > 1000 and counts.models["pretrained"] >= 24 and counts.groups["pretrained"] >= 16
    assert sum(m.kind == "task" and m.mode == "training" for m in catalog) >= 25
    assert not counts.with_metric[["seeded", "imported"]].any()
    some = [m for i, m in enumerate(catalog) if i % 50 == 0]
    assert not [p for m in some for p in catalog.problems_of(m) if "weak checksum" not in p]
    for m in some: assert type(m).model_validate(m.model_dump()).digest == m.digest


def test_json_schema_says_what_the_models_accept():
    import jsonschema
    from opml_wb.dlspec.spec.manifest import schema
    m = Model(name="net", version="1.0.0", resources=[Resource(url="file:///a", sha256=SHA)])
    jsonschema.validate({"kind": "model", **m.to_dict()}, schema("model"))
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate({"kind": "model", "name": "net", "version": 1.0}, schema("model"))


def test_one_bad_file_hides_no_other(tmp_path):
    (tmp_path / "good.yml").write_text(Hardware(name="any", version="1.0.0").to_yaml())
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "good-checkpoint.yml").write_text(Hardware(name="any", version="1.0.0", cores=2).to_yaml())
    (tmp_path / "kind.yml").write_text("kind: {a: b}\nname: x\n")
    (tmp_path / "long.yml").write_text('kind: hardware\nname: x\nversion: "1.0.0"\ncores: ' + "9" * 5000)
    (tmp_path / "deep.yml").write_text(MODEL + RUN.format(f"def fun(ctx, data): return {'-' * 20_000}1"))
    catalog = Catalog(tmp_path)
    said = dict(catalog.check().values.tolist())
    assert {m.id for m in catalog} == {"hardware/any@1.0.0", "model/net@1.0.0"} and catalog.get("hardware/any").cores == 1
    assert {Path(k).name for k in said} == {"kind.yml", "long.yml", "net@1.0.0"} and "nested too deep" in said["model/net@1.0.0"]


def test_a_manifest_is_what_its_yaml_says():
    from opml_wb.dlspec.spec.manifest import parse
    for text in ("a\x85b", "\u2028", "a\u2029\nb", "\ufeffx", "9" * 400, "\ta\nb"):
        m = Hardware(name="h", version="1.0.0", description=text)
        assert parse(m.to_yaml()) == m, text
