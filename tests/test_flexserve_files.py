"""Model files and models in memory: what is served equals the model in process, or is refused with words that say what to do."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from opml_wb.core.record.models import ModelStore
from opml_wb.flexserve import BundleError, Engine, publish
from opml_wb.flexserve.commands.adding import add, report
from opml_wb.flexserve.requests.request import Refused


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    return ModelStore()


def served(store, name, rows):
    answer = Engine.load(store.resolve(name)).infer(rows)
    return answer.labels[0].astype(float) if answer.probs.shape[-1] == 0 else answer.probs


def plane(n=240):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=n), "b": rng.normal(size=n), "c": pd.Categorical(rng.choice(list("xyz"), n))})
    return frame, ((frame.a > 0) ^ (frame.c == "x") ^ (rng.random(n) < .2)).astype(int)


def test_boosters_answer_as_in_process(store, tmp_path):
    "Whatever the order of the example frame's columns and categories, however training stopped, whatever stands for a gap."
    import xgboost
    def fit(frame, y, **how): return xgboost.XGBClassifier(n_estimators=12, max_depth=3, n_jobs=1, enable_categorical=True, **how).fit(frame, y)
    frame, y = plane()
    two, one = frame[["a", "b"]], fit(frame, y)
    right, turned = one.predict_proba(frame), frame.assign(c=frame.c.cat.reorder_categories(list("zyx")))
    some = frame[frame.c != "x"]
    for example in (frame[["c", "b", "a"]], turned, frame.assign(c=frame.c.astype(str)), some.assign(c=some.c.cat.remove_unused_categories())):
        publish("one", one, example[:40])
        np.testing.assert_allclose(served(store, "one", frame)[0], right, atol=1e-6)
    ab, ba, bare = fit(two, y), fit(two[["b", "a"]], y), fit(two.to_numpy(), y)
    publish("both", {"ab": ab, "ba": ba, "bare": bare}, two)
    for said, model, names in zip(served(store, "both", two), (ab, ba, bare), ("ab", "ba", "ab")):
        np.testing.assert_allclose(said, model.predict_proba(two[list(names)] if model is not bare else two.to_numpy()), atol=1e-6)
    gap = two.mask(two.a > 1, -999.)
    publish("gap", model := fit(gap, y, missing=-999), gap)
    np.testing.assert_allclose(served(store, "gap", gap)[0], model.predict_proba(gap), atol=1e-6)
    stopped = xgboost.XGBClassifier(n_estimators=60, early_stopping_rounds=4, learning_rate=.7, n_jobs=1)
    stopped.fit(two[:150], y[:150], eval_set=[(two[150:], y[150:])], verbose=False).save_model(tmp_path / "early.json")
    assert stopped.best_iteration + 1 < stopped.get_booster().num_boosted_rounds()
    publish("early", stopped, two)
    version, bundle = add(store, "file", str(tmp_path / "early.json"), columns=["b", "a"])
    for name in ("early", "file"): np.testing.assert_allclose(served(store, name, two)[0], stopped.predict_proba(two), atol=1e-6)
    assert f"the first {stopped.best_iteration + 1} rounds" in report("file", version, bundle)
    for odd, says in ((two.rename(columns={"b": "z"}), "column 'b'"), (two.assign(z=1.), "column 'z'")):
        with pytest.raises(BundleError, match=says): publish("odd", ab, odd)
    with pytest.raises(BundleError, match="in this order"): publish("odd", one, frame, columns=[{"name": "a"}, {"name": "b"}, {"name": "c", "kind": "category", "categories": list("zyx")}])
    with pytest.raises(BundleError, match="own columns are a, b"): add(store, "odd", str(tmp_path / "early.json"), columns=["a", "z"])
    with pytest.raises(BundleError, match="two classes apart"): add(store, "odd", str(tmp_path / "early.json"), classes=["x", "y", "z"])
    for kind, truth in (("Regressor", two), ("Classifier", np.c_[y, 1 - y, y])):
        getattr(xgboost, f"XGB{kind}")(n_estimators=2, n_jobs=1).fit(two, truth).save_model(tmp_path / "many.json")
        with pytest.raises(BundleError, match="numbers a row"): add(store, "odd", str(tmp_path / "many.json"))
    assert store.names() == sorted(["one", "both", "gap", "early", "file"])


def test_classes_of_an_onnx_file_are_those_of_its_end(store, tmp_path):
    "The categories of an encoder are none, decision scores are no probabilities, whatever their name; a fraction is no whole number."
    skl2onnx = pytest.importorskip("skl2onnx")
    from skl2onnx.common import data_types as types
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder
    from sklearn.svm import SVC, LinearSVC
    frame = plane(90)[0][["a", "c"]].assign(c=lambda f: f.c.astype(str))
    inputs = [("a", types.FloatTensorType([None, 1])), ("c", types.StringTensorType([None, 1]))]
    def wrote(model, inputs, **how):
        (tmp_path / "m.onnx").write_bytes(skl2onnx.convert_sklearn(model, initial_types=inputs, **how).SerializeToString())
        return str(tmp_path / "m.onnx")
    def pipe(last, unknown="ignore"): return make_pipeline(make_column_transformer(("passthrough", ["a"]), (OneHotEncoder(handle_unknown=unknown), ["c"])), last)
    price, level = pipe(LinearRegression()).fit(frame, 3 * frame.a + (frame.c == "x")), np.array(["lo", "hi"])[(frame.a > 0).astype(int)]
    add(store, "price", wrote(price, inputs))
    np.testing.assert_allclose(served(store, "price", frame), price.predict(frame), atol=1e-5)
    near = pipe(KNeighborsClassifier()).fit(frame, level)
    _, bundle = add(store, "near", wrote(near, inputs, options={"zipmap": False}))
    assert bundle.classes == ["hi", "lo"]
    np.testing.assert_allclose(served(store, "near", frame)[0], near.predict_proba(frame), atol=1e-5)
    with pytest.raises(BundleError, match="Unknown Category.*--golden FILE"): add(store, "odd", wrote(pipe(LinearRegression(), "error").fit(frame, frame.a), inputs))
    with pytest.raises(BundleError, match="LogisticRegression itself refuses it"):
        publish("odd", LogisticRegression().fit(plane(90)[0][["a", "b"]], level), plane(90)[0][["b", "a"]])
    X, floats = np.random.default_rng(1).normal(size=(90, 2)), [("X", types.FloatTensorType([None, 2]))]
    for model, y in ((SVC(), X[:, 0] > 0), (LinearSVC(), X[:, 0] > 0), (LinearSVC(), X.argmax(1) + (X[:, 0] > 1))):
        with pytest.raises(BundleError, match="holds no probabilit|--output logit"): add(store, "odd", wrote(model.fit(X * 9, y), floats), columns=["a", "b"])
    when = np.c_[np.arange(90) + 1_700_000_000., X[:, 0]]
    age = LinearRegression().fit(when, when[:, 0] - 1.7e9)
    for columns, rows in ((None, [{"X": list(w)} for w in when]), (["t", "u"], [{"t": t, "u": u} for t, u in when])):
        add(store, "age", wrote(age, [("X", types.DoubleTensorType([None, 2]))]), columns=columns)
        np.testing.assert_allclose(served(store, "age", rows), age.predict(when), atol=1e-3)
    add(store, "whole", wrote(LogisticRegression().fit(when.astype(int) % 7, level), [("X", types.Int64TensorType([None, 2]))]), columns=["p", "q"])
    for odd in (2.9, 1e30):
        with pytest.raises(ValueError, match="row 0: p: expected a whole number"): Engine.load(store.resolve("whole")).infer([{"p": odd, "q": 1}])


NETS = """
import torch
from torch import nn
from .layers import Line
class Net(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.line, self.give = Line(), give
    def forward(self, x):
        z = self.line(x)
        return {"logit": z[:, :1], "sigmoid": torch.sigmoid(z[:, :1]), "many": torch.sigmoid(z) * 1., "linear": z, "two": (x, z),
                "dict": {"loss": z.sum(), "hidden": x, "logits": z}, "scaled": z[:, :1] * .5}[self.give]
def make(give): return Net(give)
"""
LAYERS = """
import torch
def Line():
    line = torch.nn.Linear(2, 2)
    line.weight.data[:], line.bias.data[:] = .05, torch.tensor([.3, .4])
    return line
"""


def test_what_a_network_gives_is_shown_or_asked(store, tmp_path):
    "One number of two classes, independent sigmoids, several outputs: served as they are, or refused with the option that says it."
    import torch
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "layers.py").write_text(LAYERS)
    rows = [{"a": 1., "b": 2.}]
    def added(give, **how): return add(store, give, f"{tmp_path}/nets.py:make", kwargs={"give": give}, columns=["a", "b"], **how)[1]
    z, two = np.array([.45, .55]), {"classes": ["no", "yes"]}
    sure, soft = 1 / (1 + np.exp(-z[0])), np.exp(z) / np.exp(z).sum()
    for give, how, right in (("sigmoid", two, [1 - sure, sure]), ("logit", {**two, "output": "logit"}, [1 - sure, sure]), ("linear", {}, soft), ("dict", {}, soft),
                             ("two", {"output_name": "1"}, soft)):
        bundle = added(give, **how)
        assert served(store, give, rows).ravel() == pytest.approx(right, abs=1e-6), (give, how)
        if give in ("dict", "two"): assert f"its output {bundle.models[0]['output_name']!r}" in report(give, 1, bundle)
    for give, how, says in (("scaled", two, "--output logit or --output probability"), ("many", {}, "don't add up to 1.*--output logits"), ("two", {}, "gives 0, 1: .*--output-name"),
                            ("linear", {"classes": list("xyz")}, "3 names, but model 'linear' gives 2 numbers")):
        with pytest.raises(BundleError, match=says): added(give, **how)


def test_several_outputs_of_an_onnx_file(store, tmp_path):
    "The one that is called logits, or the one that is named; with neither, all are listed."
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    def wrote(*names):
        nodes = [helper.make_node("Mul", ["x", "x"], [n + "_"]) for i, n in enumerate(names)]
        nodes += [helper.make_node("Neg" if i else "Identity", [n + "_"], [n]) for i, n in enumerate(names)]
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2]) for n in ("x", *names)]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:])
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
        return str(tmp_path / "m.onnx")
    rows, right = [{"a": 1., "b": 2.}], np.exp([-1, -4.]) / np.exp([-1, -4.]).sum()
    for names, how in ((("embedding", "logits"), {}), (("std", "mean"), {"output_name": "mean"})):
        _, bundle = add(store, "m", wrote(*names), columns=["a", "b"], **how)
        assert bundle.models[0]["output_name"] == names[1] and served(store, "m", rows).ravel() == pytest.approx(right, abs=1e-6)
    with pytest.raises(BundleError, match="gives std, mean: which one.*--output-name"): add(store, "m", wrote("std", "mean"), columns=["a", "b"])
    with pytest.raises(BundleError, match="no 'sd': the model gives std, mean"): add(store, "m", wrote("std", "mean"), columns=["a", "b"], output_name="sd")


def test_a_graph_in_training_mode_is_refused(store, tmp_path):
    "Dropout and batch norm that train, in torch.export's graph and in TorchScript; a graph for one number of rows."
    import torch
    from torch import nn
    x, free = torch.randn(4, 2), ({0: torch.export.Dim("b")},)
    for i, layer in enumerate((nn.Dropout(), nn.BatchNorm1d(2), nn.Identity())):
        net = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 2))
        torch.export.save(torch.export.export(net, (x[:3],), dynamic_shapes=free if i < 2 else None), tmp_path / "net.pt2")
        with pytest.raises(BundleError, match=r"call .eval\(\)" if i < 2 else "not one alone"): add(store, "odd", str(tmp_path / "net.pt2"), columns=["a", "b"])
    torch.jit.trace(nn.Sequential(nn.Linear(2, 64), nn.Dropout(), nn.Linear(64, 2)), x, check_trace=False).save(tmp_path / "net.pt")
    with pytest.raises(BundleError, match=r"call .eval\(\)"): add(store, "odd", str(tmp_path / "net.pt"), columns=["a", "b"])


def test_tensors_keep_their_numbers(store, tmp_path):
    "Whole numbers beyond 2^24 and 2^53, and float64: as sent; a fraction is an error of its row."
    import torch
    class Left(torch.nn.Module):
        def forward(self, ids, when): return (ids % 1000).sum(1, keepdim=True).double() + (when - 1_700_000_000)
    given = torch.tensor([[20000001, 3], [2**53 + 1, 5], [7, 8]]), torch.tensor([[1_700_000_000.125], [1_700_000_123.], [1_700_000_000.]], dtype=torch.float64)
    batch = torch.export.Dim("b")
    torch.export.save(torch.export.export(Left(), given, dynamic_shapes=({0: batch}, {0: batch})), tmp_path / "left.pt2")
    _, bundle = add(store, "left", str(tmp_path / "left.pt2"))
    engine, rows = Engine.load(bundle), [{"ids": i, "when": w[0]} for i, w in zip(given[0].tolist(), given[1].tolist())]
    assert engine.infer(rows).labels[0].tolist() == Left()(*given).ravel().tolist()
    assert engine.infer(pd.DataFrame({"ids": [np.array(r["ids"]) for r in rows], "when": [r["when"] for r in rows]})).labels[0].tolist() == Left()(*given).ravel().tolist()
    for ids in ([1.9, 2], [1 << 64, 2], [1e30, 1], ["1", "2"]):
        with pytest.raises(ValueError, match="row 0: ids: expected whole numbers"): engine.infer([{**rows[0], "ids": ids}])


def test_tables_are_read_as_their_types_say_and_no_further_than_the_limit():
    "A kilobyte of Arrow that is a million rows, a CSV of many, numbers that are none, elements that their datatype can't hold."
    pa = pytest.importorskip("pyarrow")
    import json
    from opml_wb.flexserve import Schema
    from opml_wb.flexserve.requests.row_request import ARROW, parse_rows
    from opml_wb.flexserve.requests.row_tensors import rows_in
    schema = Schema.parse([{"name": "a"}, {"name": "n", "gaps": True}])
    def arrow(table, new=pa.ipc.new_stream):
        out = pa.BufferOutputStream()
        with new(out, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as to: to.write_table(table)
        return out.getvalue().to_pybytes()
    zeros = pa.table({"a": pa.array(np.zeros(1_000_000))})
    for kind, body in ((ARROW[0], arrow(zeros)), (ARROW[1], arrow(zeros, pa.ipc.new_file)), (ARROW[0], arrow(pa.table({"a": [[0.] * 1_000_000]}))), ("text/csv", b"a\n" + b"1\n" * 5000)):
        assert len(body) < 20_000
        with pytest.raises(Refused, match="at most 256|too much") as e: parse_rows(body, kind, {}, schema, 256)
        assert e.value.status == 413
    for kind, new in zip(ARROW, (pa.ipc.new_stream, pa.ipc.new_file)):
        assert parse_rows(arrow(pa.table({"a": [1.5, 2], "n": [None, 3]}), new), kind, {}, schema, 256).images.numbers[1].tolist() == [2, 3]
    read = parse_rows("a\n1_5\n\u0661\u0662\n-1.5e3\n".encode(), "text/csv", {}, schema, 256).images
    assert sorted(read.bad) == [0, 1] and read.numbers[2, 0] == -1500
    for datatype, value in (("FP64", "1.5"), ("INT64", -2.7), ("UINT8", -300), ("UINT8", True)):
        body = json.dumps({"inputs": [{"name": "a", "datatype": datatype, "shape": [1], "data": [value]}]}).encode()
        with pytest.raises(Refused, match=f"a: expected {datatype} values, got") as e: rows_in(body, None, schema)
        assert e.value.status == 400


def test_add_says_when_another_version_is_served(store, tmp_path):
    "While a version is pinned, the new one waits, and that is said."
    import xgboost
    from opml_wb.flexserve.commands.cli import flexserve
    frame, y = plane(40)
    xgboost.XGBClassifier(n_estimators=2, n_jobs=1).fit(frame[["a", "b"]], y).save_model(tmp_path / "m.json")
    def opml(*words):
        done = CliRunner().invoke(flexserve, [*map(str, words)])
        assert done.exit_code == 0, done.output
        return done.output
    assert "is served, not this one" not in opml("add", "m", tmp_path / "m.json")
    opml("pin", "m", 1)
    assert "version 1 is served, not this one: opml flexserve unpin m" in opml("add", "m", tmp_path / "m.json")
