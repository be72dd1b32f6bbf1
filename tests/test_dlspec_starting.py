"""From a stranger's model file to a checked task, with the command line alone; what others wrote is imported, and nothing of it is executed."""
import json
import pickle
import re
import zipfile

import numpy as np
import pytest

@pytest.fixture(scope="module")
def base():
    "The zoo, made once."
    from opml_wb.dlspec import zoo
    return zoo.catalog(trained=[])


@pytest.fixture
def cli(tmp_path, monkeypatch, base):
    "cli(*words) -> (exit code, output) of `opml dlspec WORDS`, in this process, in a folder of its own."
    from click.testing import CliRunner
    from opml_wb.dlspec.commands import dlspec
    from opml_wb.dlspec.spec.catalog import Catalog
    from opml_wb.dlspec.zoo import census
    def copied(trained=()):
        out = Catalog()
        for m in base: out.add(m)
        return out
    monkeypatch.setattr(census, "catalog", copied)
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OPML_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    def call(*words):
        done = CliRunner().invoke(dlspec, [str(w) for w in words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output
    return call


def iris():
    from sklearn.datasets import load_iris
    x, y = load_iris(return_X_y=True)
    return x.astype("float32"), y


def linear():
    import torch
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1))


def two_inputs(file):
    "Two inputs of tokens, of one free length, and two outputs."
    import onnx
    from onnx import TensorProto as T
    from onnx import helper
    ports = [helper.make_tensor_value_info(n, k, ["N", "length"]) for n, k in (("ids", T.INT64), ("mask", T.INT64), ("z", T.INT64), ("w", T.INT64))]
    nodes = [helper.make_node("Mul", ["ids", "mask"], ["z"]), helper.make_node("Add", ["ids", "mask"], ["w"])]
    graph = helper.make_graph(nodes, "g", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(file))


def state(file):
    import torch
    torch.save(linear().state_dict(), file)


def checkpoint(file):
    import torch
    torch.save({"epoch": 3, "net": linear().state_dict()}, file)


def module(file):
    import torch
    torch.save(linear(), file)


def script(file):
    import torch
    torch.jit.trace(linear(), torch.zeros(2, 4)).save(str(file))


def exported(file):
    import torch
    torch.export.save(torch.export.export(linear(), (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)), str(file))


def tensors(file):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file
    save_file(linear().state_dict(), str(file))


def boosted(file):
    xgboost = pytest.importorskip("xgboost")
    xgboost.XGBClassifier(n_estimators=2).fit(*iris()).save_model(file)


def forest(file):
    import joblib
    from sklearn.ensemble import RandomForestClassifier
    joblib.dump(RandomForestClassifier(3, random_state=0).fit(*iris()), file, compress=3 if "packed" in file.name else 0)


def pickled(file):
    from sklearn.linear_model import LogisticRegression
    file.write_bytes(pickle.dumps(LogisticRegression(max_iter=500).fit(*iris())))


def lite(file):
    from importlib.metadata import PackageNotFoundError, files
    try: found = next(f for f in files("pymicro-wakeword") if f.name == "alexa.tflite")
    except (PackageNotFoundError, StopIteration): pytest.skip("no wheel with a .tflite is here: opml dlspec wheels")
    pytest.importorskip("ai_edge_litert")
    file.write_bytes(found.locate().read_bytes())


def beside(file):
    "A network whose weights lie in a file of their own, in a folder beside it."
    import onnx
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper
    ports = [helper.make_tensor_value_info(n, T.FLOAT, [None, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [numpy_helper.from_array(np.ones(4, "float32"), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)


def python(text): return lambda file: file.write_text(text)


NET = "NET = lambda: __import__('torch').nn.Sequential(__import__('torch').nn.Linear(4, 3), __import__('torch').nn.Softmax(1))"
PORT = {"shape": "inputs:\n- type: tensor\n  name: x\n  element_type: float32\n  shape: [batch, 4]\n"}
TORCH = """from torch import nn
class Block(nn.Sequential): pass
class Net(nn.Module):
    def __init__(self, width, classes=3):
        super().__init__()
        self.parts = Block(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, classes))
    def forward(self, x): return self.parts(x)
if __name__ == "__main__": raise SystemExit("not when it is described, nor run")
"""
FILES = {   # file: (what writes it, what a person fills in: old text -> new; shape: it says none)
    "two.onnx": (two_inputs, {}), "large.onnx": (beside, {}), "net.pt": (state, {"NET = None": NET, **PORT}), "old.pth": (checkpoint, {"NET = None": NET, **PORT}),
    "whole.pt": (module, {"TRUSTED = False": "TRUSTED = True", **PORT}), "script.pt": (script, {**PORT}), "program.pt2": (exported, {}),
    "net.safetensors": (tensors, {"NET = None": NET, **PORT}), "trees.json": (boosted, {}), "trees.ubj": (boosted, {}),
    "forest.joblib": (forest, {"TRUSTED = False": "TRUSTED = True"}), "packed.joblib": (forest, {"TRUSTED = False": "TRUSTED = True"}),
    "line.pkl": (pickled, {"TRUSTED = False": "TRUSTED = True"}), "wake.tflite": (lite, {}),
    "my model (1).py": (python("def run(data):\n    return [2 * x for x in data]\n"), {**PORT}),
    "build.py": (python("import torch\ndef build(): return torch.nn.Linear(4, 2)\n"), {**PORT}),
    "sized.py": (python("import torch\ndef build(width, n=2): return torch.nn.Linear(width, n)\n"), {"'width': None": "'width': 4", **PORT}),
    "net.py": (python(TORCH), {"'width': None": "'width': 4", **PORT}),
    "onnx.py": (python("def fun(ctx, data): return data\n"), {**PORT})}   # named like a software of the zoo


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_a_checked_task(name, cli, tmp_path):
    "init, check, run, which names what is to be filled in until it is; then the task is run and gives outputs."
    write, fills = FILES[name]
    write(tmp_path / name)
    code, said = cli("init", name, "--to", "mine", "--json")
    assert code == 0, said
    assert [f["file"].split("/")[1] for f in json.loads(said)] == ["hardware", "software", "dataset", "model", "task"]
    task = f"task/{next((tmp_path / 'mine/task').iterdir()).stem}"
    file = next((tmp_path / "mine/model").iterdir())
    if fills:
        code, said = cli("run", task, "--catalog", "mine")
        assert code == 1 and "to be filled in" in said and re.search(r"in <(model|dataset)/.+>, line \d+, in fun", said), said
    text = file.read_text()
    for old, new in fills.items():
        if old == "shape" and "\ninputs:\n" in text: text = re.sub(r"(\n  element_type: float32\n)", r"\1  shape: [batch, 4]\n", text, count=1)
        elif old == "shape": text += new
        else:
            assert text.count(old) == 1, text
            text = text.replace(old, new)
    file.write_text(text)
    assert cli("check", "mine") == (0, "all good\n")
    code, said = cli("run", task, "--catalog", "mine", "--json")
    assert code == 0, said
    assert json.loads(said)["log"]["outputs_sha256"]


BROKEN = {
    "empty.onnx": (b"", "an empty file"), "zeros.pt": (bytes(5000), "an empty file"), "readme.onnx": (b"# My model\n", "its suffix says ONNX, its content is text: '# My model'"),
    "half.onnx": (b"\x08\x09\x3a\xffgarbage", "no ONNX that onnxruntime can read"), "half.pt": (b"PK\x03\x04" + b"x" * 100, "cut off or broken"),
    "half.safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64) + b"1234", "cut off: 4 bytes of 8"),
    "bad.safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":3}'.ljust(64), "no safetensors"), "half.ubj": (b"{L\0\0\0\0\0\0\0\x07learner{", "no XGBoost that can be read"),
    "other.json": (b'{"a": 1}', "its suffix says XGBoost, its content is text"), "text.joblib": (b"hello\n", "its content is text: 'hello'"),
    "half.keras": (b"PK\x03\x04" + b"x" * 100, "cut off or broken"), "other.h5": (b"a text\n", "its suffix says HDF5, its content is text"),
    "theirs.py": (b"import keras\ndef build(): return keras.Sequential()\n", "imports no torch"), "image.pt": (b"\x89PNG\r\n\x1a\n" + bytes(100), "its suffix says PyTorch, its content is something else"), "packed.joblib": (b"x\x9c\xff\xff\xff", "a packed pickle that is broken"),
    "syntax.py": (b"def run(:\n", "syntax.py:1: no Python"), "latin.py": (b"# \xe9\n", "no text in UTF-8"), "blank.py": (b"", "an empty file"),
    "main.py": (b"def main(): pass\n", "no function run(ctx, data), and none that builds a network"), "many.py": (b"def run(a, b, c): pass\n", "got 3 arguments")}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_model_is_named(name, cli, tmp_path):
    content, why = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    code, said = cli("init", name, "--to", "mine")
    assert code == 1 and said.startswith(f"Error: {name}:") and why in said, said
    assert not (tmp_path / "mine").exists()


def wheel(folder, name, version):
    "The smallest wheel: a module that knows its version."
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as z:
        z.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_the_environment_of_a_software_is_made_used_and_checked(cli, tmp_path, monkeypatch):
    "Of a wheel that lies here, no index asked: made by the command, where the executor finds it; another version under the same ID is told."
    wheel(tmp_path, "opmlsmall", "1.2")
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_DISABLE_PIP_VERSION_CHECK", "1")): monkeypatch.setenv(name, value)
    (tmp_path / "mine").mkdir()
    def software(said): (tmp_path / "mine/small.yml").write_text(f'kind: software\nname: mine/small\nversion: "1.0.0"\n{said}')
    def made(): return cli("venv", "software/mine/small", "--catalog", "mine")
    software('python: "<3"\n')
    assert made()[0] == 1 and "asked for is <3" in made()[1]
    software('libraries: {"opmlsmall[fast]": ">=1.1"}\n')
    code, said = made()
    assert code == 0 and said.strip().endswith("venvs/mine/small@1.0.0"), said
    (tmp_path / "mine/net.yml").write_text('kind: model\nname: net\nversion: "1.0.0"\nstages:\n  run: |\n    import opmlsmall\n    def fun(ctx, data): return opmlsmall.VERSION\n')
    (tmp_path / "mine/data.yml").write_text('kind: dataset\nname: mine\nversion: "1.0.0"\n')
    (tmp_path / "mine/task.yml").write_text('kind: task\nname: t\nversion: "1.0.0"\nhardware: hardware/any\nsoftware: software/mine/small\ndataset: dataset/mine\nmodel: model/net\n')
    code, said = cli("run", "task/t", "--catalog", "mine", "--executor", "venv", "--json")
    assert code == 0 and '"1.2"' in said, said
    software('libraries: {opmlsmall: "==1.3"}\n')
    assert made()[0] == 1 and "opmlsmall 1.2, asked for is ==1.3" in made()[1] and "made anew if you remove" in made()[1]


def test_folders_are_named(cli, tmp_path):
    for folder in ("theirs", "plain"): (tmp_path / folder).mkdir()
    (tmp_path / "theirs/bundle.json").write_text("{}")
    (tmp_path / "plain/net.onnx").write_text("")
    assert "opml dlspec import theirs" in cli("init", "theirs")[1] and "net.onnx" in cli("init", "plain")[1]


LAYERS = {"class_name": "Functional", "config": {"layers": [
    {"class_name": "InputLayer", "config": {"batch_shape": [None, 28, 28, 1], "name": "image"}},
    {"class_name": "Lambda", "config": {"function": "code"}}], "input_layers": [["image", 0, 0]]}}


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "plain.keras", "net.weights.h5"])
def test_a_keras_file_is_read_by_its_json(name, cli, tmp_path):
    "Without Keras or h5py: the shape of its input, and whether it may hold code."
    said = {**LAYERS, "config": {**LAYERS["config"], "layers": LAYERS["config"]["layers"][:1 if "plain" in name else 2]}}
    if name.endswith(".h5"): (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n\0" + (b"" if "weights" in name else json.dumps(said).encode()) + b"\0")
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for entry, text in (("config.json", json.dumps(said)), ("metadata.json", '{"keras_version": "3.5.0"}')): z.writestr(entry, text)
    code, out = cli("init", name, "--to", "mine", "--json")
    assert code == 0, out
    unknown = "\n".join(json.loads(out)[3]["unknown"])
    text = next((tmp_path / "mine/model").iterdir()).read_text()
    assert ("TRUSTED in stages.run" in unknown) == (name in ("net.keras", "net.h5")) and "name: Keras" in text
    assert ("weights alone" in unknown) == ("weights" in name) and ("- 28" in text) == ("weights" not in name)


class Bomb:
    "What writes a file when it is unpickled."
    def __reduce__(self): return open, ("bitten", "w")


@pytest.mark.parametrize("name", ["bomb.pkl", "bomb.joblib", "bomb.pt", "new.pt"])
def test_a_pickle_is_never_opened_without_being_told(name, cli, tmp_path):
    if name == "new.pt":
        import torch
        torch.save({"x": Bomb()}, tmp_path / name)
    else: (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    code, said = cli("init", name, "--to", "mine", "--json")
    assert code == 0 and "whether you trust the file: TRUSTED in stages.run" in json.loads(said)[3]["unknown"]
    assert "io.open" in cli("show", f"model/{name.split('.')[0]}", "--catalog", "mine")[1] or name == "new.pt"
    with open(tmp_path / "mine/model" / f"{name.split('.')[0]}.yml", "a") as f: f.write(PORT["shape"])
    code, said = cli("run", f"task/{name.split('.')[0]}", "--catalog", "mine")
    assert code == 1 and "TRUSTED is to be filled in" in said
    assert not (tmp_path / "bitten").exists()


def test_nothing_of_a_person_is_overwritten(cli, tmp_path):
    two_inputs(tmp_path / "net.onnx")
    file = tmp_path / "mine/model/net.yml"
    assert cli("init", "net.onnx", "--to", "mine")[0] == 0 == cli("init", "net.onnx", "--to", "mine")[0]
    for change in (lambda text: text.replace("1.0.0", "1.1.0") + "description: by hand\n", lambda text: text + "  typo: [\n"):
        file.write_text(edited := change(file.read_text()))
        code, said = cli("init", "net.onnx", "--to", "mine")
        assert code == 1 and "mine/model/net.yml: it is there already, with other content, which would be lost" in said and file.read_text() == edited
    for i, folder in enumerate(("a/net", "b/net")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cog.yaml").write_text("build:\n  python_version: '3.11'\npredict: predict.py:Predictor\n")
        (tmp_path / folder / "predict.py").write_text(f"class Predictor:\n    def predict(self, x: int) -> int: return {i}\n")
    assert cli("import", "a/net", "--to", "theirs")[0] == 0
    kept = {p: p.read_text() for p in (tmp_path / "theirs").rglob("*.yml")}
    code, said = cli("import", "b/net", "--to", "theirs")
    assert code == 1 and "with other content, which would be lost" in said
    assert {p: p.read_text() for p in (tmp_path / "theirs").rglob("*.yml")} == kept


def test_the_choice_of_a_network_is_told(cli, tmp_path):
    (tmp_path / "net.py").write_text("import torch\ndef make_loaders(): return []\ndef get_model(): return torch.nn.Linear(4, 3)\n")
    said = cli("init", "net.py", "--to", "mine")[1]
    assert "which network: get_model was taken, not make_loaders" in said
    assert "get_model(**ARGUMENTS)" in (tmp_path / "mine/model/net.yml").read_text()


def test_a_run_that_nobody_can_judge_is_no_success(cli, tmp_path):
    "Nor one whose metrics are no numbers an error."
    from opml_wb.dlspec import Dataset, Hardware, Model, Software, Stages, Task, run
    from opml_wb.dlspec.commands import dlspec
    def task(text, **more):
        parts = dict(hardware=Hardware(name="h", version="1.0.0"), software=Software(name="s", version="1.0.0"), dataset=Dataset(name="d", version="1.0.0"))
        return Task(**parts, model=Model(name="m", version="1.0.0", stages=Stages(run=f"def fun(ctx, data): return {text}")), **more)
    log = run(task("[1]")).log
    for text, code, words in (("[1]", 0, "outputs: as in the reference log"), ("[1] ", 1, "the log can't be judged: the log was made with model/m@1.0.0"),
                              ("{'outputs': 1, 'metrics': {'m': None, 'n': [[1]]}}", 1, "n = [[1]]")):
        (tmp_path / "t.yml").write_text(task(text, log=log).to_yaml())
        assert dlspec.main(["run", "t.yml"], standalone_mode=False) == code and words in cli("run", "t.yml")[1], text
