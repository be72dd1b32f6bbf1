"""Answers of FlexServe about rows: each is logged, and answered for by its id and for each audience, over HTTP and in process."""
import json

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
