"""Answers of FlexServe about rows: each is logged, and answered for by its id and for each audience, over HTTP and in process."""
import json
import pickle

import numpy as np
import pandas as pd
import pytest

xgboost = pytest.importorskip("xgboost")
testclient = pytest.importorskip("starlette.testclient")
flexserve = pytest.importorskip("opml_wb.flexserve.serve.http")

from opml_wb.core.record.models import ModelStore
from opml_wb.explain import DecisionLog, TableModel, explain
from opml_wb.explain.record.serving import AnswerLog, Recorded

AUDIENCES = "regulator", "business", "customer"


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(3)
    X = pd.DataFrame({"age": rng.normal(40, 12, 300).round(2), "hours": rng.integers(5, 60, 300).astype(float)})
    X.loc[::9, "age"] = np.nan
    return X, np.where((X.age > 45) | (X.hours > 45), 1, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory, people):
    "A server of an XGBoost model of rows, with a log in front: (client, log, the model, version)."
    publish = pytest.importorskip("opml_wb.flexserve.model.publish").publish
    folder, patch = tmp_path_factory.mktemp("served"), pytest.MonkeyPatch()
    patch.setenv("OPML_HOME", str(folder / "home"))
    X, y = people
    inner = xgboost.XGBClassifier(n_estimators=20, max_depth=3, nthread=1).fit(X, y)
    version = publish("people", inner, X)
    log = DecisionLog(folder / "log.db", models=ModelStore())
    model = TableModel(inner)
    from opml_wb.explain.answers.tables import Columns
    model.encoder = Columns(X)
    answers = AnswerLog(log, lambda rows: explain(model, rows, on_disagreement="flag"))
    app = Recorded(flexserve.create_app(ModelStore(), "people"), answers)
    with testclient.TestClient(app) as client:
        from conftest import until
        assert until(lambda: client.get("/health/ready").status_code == 200, 90)
        yield client, log, model, version
    log.close()
    patch.undo()


def sent(X): return json.loads(X.to_json(orient="records"))


def test_every_answer_is_logged_and_answered_for_by_its_id(place, people):
    client, log, model, version = place
    X, _ = people
    before = len(log)
    said = client.post("/v1/predict", json={"rows": sent(X[:20])}).json()
    ids = said["decisions"]
    assert len(set(ids)) == 20 and len(log) == before + 20
    for i in (0, 7, 19):
        record = log.read(ids[i])
        assert str(record["answer"]) == str(next(iter(said["models"].values()))[i])
        assert (record["model"], record["version"]) == ("people", version) and record["explanation"]["agrees"]
        assert record["model_hash"] == ModelStore().info("people", version)["digest"]
        texts = {a: client.get(f"/v1/decisions/{ids[i]}", params={"audience": a}).json()["text"] for a in AUDIENCES}
        assert len(set(texts.values())) == 3
        assert texts == {a: log.answer(ids[i], a) for a in AUDIENCES}, "over HTTP as in process"
    assert log.verify().ok


def test_columns_and_csv_are_read_too(place, people):
    client, log, *_ = place
    X, _ = people
    columns = {c: [None if v != v else v for v in X[c][:4]] for c in X}
    csv = dict(content=X[:4].to_csv(index=False).encode(), headers={"content-type": "text/csv"})
    for how in (dict(json={"columns": columns}), csv):
        ids = client.post("/v1/predict", **how).json()["decisions"]
        assert [log.read(i)["answer"] for i in ids] and set(log.read(ids[0])["input"]) == {"age", "hours"}


def infer(client, X, model="people", at="", **more):
    "Ask by the Open Inference Protocol, a tensor for each column."
    inputs = [{"name": c, "datatype": "FP64" if X[c].dtype.kind in "fi" else "BYTES", "shape": [len(X)],
               "data": [None if v != v else v for v in X[c].tolist()]} for c in X]
    return client.post(f"/v2/models/{model}{at}/infer", json={"inputs": inputs, **more})


def test_every_route_is_logged(place, people):
    "The Open Inference Protocol of the ensemble, of a version and of a member, plain and binary: as /v1."
    client, log, model, version = place
    X, _ = people
    X = X[:3]
    for how in ({}, {"at": f"/versions/{version}"}, {"parameters": {"binary_data_output": True}}):
        reply = infer(client, X, **how)
        assert reply.status_code == 200, reply.text
        answer = reply.headers["x-answer-id"]
        said = [log.read(f"{answer}.{i}") for i in range(3)]
        assert [str(r["answer"]) for r in said] == [str(v) for v in model.predict(X)]
        assert all(r["explanation"]["agrees"] for r in said) and said[0]["input"] == {"age": None, "hours": X.hours[0]}
        texts = {a: client.get(f"/v1/decisions/{answer}.1", params={"audience": a}).json()["text"] for a in AUDIENCES}
        assert len(set(texts.values())) == 3
    one = infer(client, X[1:2]).headers["x-answer-id"]
    assert client.get(f"/v1/decisions/{one}").json()["text"] == log.answer(f"{one}.0"), "one row: by the answer's own id"
    before = len(log)
    assert client.post("/batch", files={"file": b"no picture"}).status_code == 422 and infer(client, X[["age"]]).status_code in (200, 400, 422)
    assert client.get("/v2/models/people").status_code == 200 and len(log) <= before + 3


def test_a_bad_row_is_left_out_and_the_others_are_logged(place, people):
    client, log, *_ = place
    said = client.post("/v1/predict", json={"rows": [{"age": 30, "hours": 8}, {"age": "old"}], "on_error": "skip"}).json()
    assert said["decisions"] == [f"{said['id']}.0", None] and log.read(said["decisions"][0])["explanation"]


def test_a_file_of_answers_is_taken_once(place, people, tmp_path, typed):
    "What `opml flexserve serve --decisions` writes is logged afterwards, explained, and each row once."
    from opml_wb.flexserve.logs import LineLog
    client, _, model, _ = place
    X, _ = people
    file, logs = tmp_path / "answers.jsonl", client.app.state.service.logs
    logs.decisions = LineLog(str(file))
    said = client.post("/v1/predict", json={"rows": sent(X[:4])}).json()
    answer = infer(client, X[:2]).headers["x-answer-id"]
    logs.decisions.close()
    logs.decisions = None
    log = DecisionLog(tmp_path / "log.db", models=ModelStore())
    answers = AnswerLog(log, lambda rows: explain(model, rows, on_disagreement="flag"))
    assert [answers.take(file), answers.take(file)] == [6, 0]
    told = [log.read(f"{said['id']}.{i}") for i in range(4)] + [log.read(f"{answer}.{i}") for i in range(2)]
    assert [r["explanation"]["values"] for r in told[:2]] == [r["explanation"]["values"] for r in told[4:]]
    assert len({log.answer(f"{answer}.0", a) for a in AUDIENCES}) == 3 and log.verify().ok
    log.close()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))       # as the guide types it
    db = str(tmp_path / "typed.db")
    for words in (("take", str(file), "--log", db, "--model", str(tmp_path / "model.pkl")),
                  ("answer", db, f"{answer}.0", "--audience", "business"), ("verify", db)):
        done = typed("explain", *words)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_server_with_tokens_answers_for_decisions_to_its_tokens_only(tmp_path):
    from hashlib import sha256
    from types import SimpleNamespace as Space

    from opml_wb.flexserve.settings import Tokens
    tokens = Tokens(f"infer {sha256(b'secret').hexdigest()}")
    app = Space(state=Space(service=Space(predictor=Space(heard=[]), tokens=tokens)))
    log = DecisionLog(tmp_path / "log.db")
    id = AnswerLog(log).put([{"age": 3}], ["no"], "people")[0]
    client = testclient.TestClient(Recorded(app, AnswerLog(log)))
    heads = {}, {"Authorization": "Bearer guess"}, {"Authorization": "Bearer secret"}
    assert [client.get(f"/v1/decisions/{id}", headers=h).status_code for h in heads] == [403, 403, 200]
    log.close()


def test_several_models_of_categories_and_gaps_are_explained_each_by_its_own(people, tmp_path, monkeypatch):
    "A pipeline with a text column and a regressor, both through ONNX: float32 answers, explained where true."
    pytest.importorskip("skl2onnx")
    from conftest import until
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    from opml_wb.flexserve.model.publish import publish
    monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))
    X = people[0].fillna(40.)
    X["job"] = np.random.default_rng(0).choice(["cook", "pilot", "clerk"], len(X))
    def one_hot(last): return make_pipeline(make_column_transformer((OneHotEncoder(), ["job"]), remainder="passthrough"), last)
    models = {"risk": one_hot(RandomForestClassifier(10, random_state=0)).fit(X, np.where((X.age > 45) | (X.job == "pilot"), "yes", "no")),
              "sum": one_hot(RandomForestRegressor(10, random_state=0)).fit(X, X.hours * 10.1)}
    publish("two", models, X)
    log = DecisionLog(tmp_path / "log.db", models=ModelStore())
    def by(model): return lambda rows: explain(model, rows, on_disagreement="flag")
    app = Recorded(flexserve.create_app(ModelStore(), "two"), AnswerLog(log, {name: by(model) for name, model in models.items()}))
    with testclient.TestClient(app) as client:
        assert until(lambda: client.get("/health/ready").status_code == 200, 90)
        said = client.post("/v1/predict", json={"rows": sent(X[:4])}).json()
        assert len(said["decisions"]) == 8 and said["decisions"][0] == f"{said['id']}.0.risk"
        member = infer(client, X[:2], "sum").headers["x-answer-id"]
        policy = client.post("/v1/predict", json={"rows": sent(X[:1]), "policy": {"kind": "or", "target": "yes", "models": ["risk"]}}).json()
        assert client.get(f"/v1/decisions/{member}.0", params={"audience": "regulator"}).status_code == 200
    told = [log.read(id) for id in said["decisions"]]
    assert all(t["explanation"]["agrees"] for t in told) and told[0]["input"]["job"] == X.job[0]
    assert log.read(f"{member}.1")["answer"] == pytest.approx(told[5]["answer"])
    odd = log.read(policy["decisions"][0])
    assert odd["explanation"] is None and "no explainer" in odd["defences"]["not explained"]
    assert log.verify().ok
    log.close()


def test_an_explanation_that_is_not_true_of_the_answer_is_refused(place, people):
    "The server goes on to another model; the explainer still has the old one."
    client, log, model, version = place
    X, y = people
    from conftest import until
    from opml_wb.flexserve.model.publish import publish
    other = xgboost.XGBClassifier(n_estimators=20, max_depth=3, nthread=1).fit(X, 1 - y)
    newer = publish("people", other, X)
    assert until(lambda: client.get("/health/ready").json()["version"] == newer, 60)
    said = client.post("/v1/predict", json={"rows": sent(X[:20])}).json()
    old = [str(v) for v in model.predict(X[:20])]
    given = [str(v) for v in next(iter(said["models"].values()))]
    differ = [i for i in range(20) if given[i] != old[i]]
    assert len(differ) > 10
    for i in range(20):
        told = client.get(f"/v1/decisions/{said['decisions'][i]}")
        assert told.status_code == (409 if i in differ else 200)


def test_what_fails_is_not_logged_and_unknown_ids_are_404(place):
    client, log, *_ = place
    before = len(log)
    assert client.post("/v1/predict", json={"rows": [{"agee": 3}]}).status_code == 422
    assert client.get("/v1/decisions/nobody").status_code == 404
    assert client.get("/health/live").json() == {"live": True}
    assert len(log) == before
