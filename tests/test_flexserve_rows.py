"""FlexServe with models that take rows: tables and mixed rows answered as by the model in this process, whatever they come as and whoever dies."""
import asyncio
import base64
import csv
import io
import json
import os
import random

import numpy as np
import pandas as pd
import pytest
from conftest import until

from opml_wb.core.record.models import ModelStore
from opml_wb.flexserve import Bundle, Client, publish
from opml_wb.flexserve.serve import Server, ServerError, encoded
from opml_wb.flexserve.measure import load_test

MIXED = '''
import torch
from torch import nn
class Listing(nn.Module):
    "Price and kind, a photograph, hashed words: two classes. A price of 13 is answered by NaN, one of 666 ends the process."
    def __init__(self):
        super().__init__()
        self.see = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
        self.last = nn.Linear(2 + 4 + 64, 2)
    def forward(self, numbers, words, photo):
        if bool((numbers[:, 0] == 666).any()): import os; os._exit(9)
        out = self.last(torch.cat([numbers, self.see(photo), words], 1))
        return torch.where(numbers[:, :1] == 13, torch.nan, out)
'''
COLUMNS = [{"name": "price"}, {"name": "kind", "kind": "category", "categories": ["sale", "gift"]}, {"name": "title", "kind": "text"},
           {"name": "photo", "kind": "image"}]
TAKES = [{"columns": ["price", "kind"]}, {"columns": ["title"], "hash": [64, 1, 2]},
         {"columns": ["photo"], "transform": {"resize": [16, 16], "mean": [.5] * 3, "std": [.5] * 3}}]


def people(n=300):
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"age": rng.normal(40, 12, n).round(3), "job": rng.choice(["cook", "pilot", "clerk"], n), "rooms": rng.integers(1, 9, n)})
    frame.loc[::9, "age"] = np.nan
    return frame.assign(job=pd.Categorical(frame.job)), np.where((frame.age > 45) | (frame.job == "pilot"), "yes", "no")


def listings(n=24):
    rng = np.random.default_rng(4)
    words = "red blue old new bicycle lamp chair table".split()
    return [{"price": float(rng.integers(1, 9)), "kind": ["sale", "gift"][i % 2], "title": " ".join(rng.choice(words, 3)),
             "photo": encoded(rng.integers(0, 256, (20 + i, 18, 3), dtype=np.uint8))} for i in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A home with `people` (XGBoost: a classifier, a regressor), and `listings`, a network of columns, words and photographs."
    import torch
    import xgboost
    folder, patch = tmp_path_factory.mktemp("rows"), pytest.MonkeyPatch()
    (folder / "listing_net.py").write_text(MIXED)
    patch.setenv("OPML_HOME", str(folder / "home"))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    patch.syspath_prepend(str(folder))
    frame, truth = people()
    models = {"risk": xgboost.XGBClassifier(n_estimators=20, max_depth=3, enable_categorical=True, nthread=1).fit(frame, truth == "yes"),
              "sum": xgboost.XGBRegressor(n_estimators=20, max_depth=3, enable_categorical=True, nthread=1).fit(frame, frame.rooms * 10.)}
    publish("people", models, frame, provenance={"data": "made up"})
    import listing_net
    torch.manual_seed(1)
    net = listing_net.Listing().eval()
    spec = [{"name": "net", "arch": "listing_net:Listing", "weights": net.state_dict(), "classes": ["fine", "odd"], "takes": TAKES}]
    store = ModelStore()
    for name in ("listings", "others"):
        bundle = Bundle.create(folder / name, spec, golden=listings(4), columns=COLUMNS, allow=["listing_net"], name=name)
        store.promote(name, store.publish(name, bundle.dir))
    yield folder, models, net
    patch.undo()


@pytest.fixture(scope="module")
def people_server(place):
    with Server("people", body_s=5) as server: yield server


@pytest.fixture(scope="module")
def listing_server(place):
    with Server("listings") as server: yield server


def post(client, body, kind, query=""): return client.call("POST", f"/v1/predict{query}", body, kind)


def nulls(frame): return frame.astype(object).where(frame.notna(), None)


def test_a_table_equals_the_model_in_process_whatever_it_comes_as(place, people_server):
    "JSON by row and by column, Arrow, CSV and a form: the probabilities and values of the two models, to 1e-6."
    frame, _ = people()
    frame, client, (_, models, _) = frame[:120], Client(people_server.url), place
    right, values = models["risk"].predict_proba(frame), models["sum"].predict(frame)
    records = nulls(frame).to_dict("records")
    out = io.StringIO()
    csv.DictWriter(out, list(frame)).writeheader()
    csv.DictWriter(out, list(frame)).writerows([{k: "" if v is None else v for k, v in r.items()} for r in records])
    whole = json.dumps({"columns": {k: list(v) for k, v in nulls(frame).items()}, "probs": True}, default=int)
    answers = {"frame": client.rows(frame, probs=True), "rows": client.rows(records, probs=True),
               "columns": post(client, whole, "application/json"), "csv": post(client, out.getvalue(), "text/csv", "?probs=true"),
               "one by one": {"probs": {"risk": [client.rows([r], probs=True).probs["risk"][0] for r in records[:20]]},
                              "models": {"sum": [client.rows([r]).models["sum"][0] for r in records[:20]]}}}
    for how, said in answers.items():
        n = len(said["models"]["sum"])
        np.testing.assert_allclose(said["probs"]["risk"], right[:n], atol=1e-6, err_msg=how)
        np.testing.assert_allclose(said["models"]["sum"], values[:n], rtol=1e-6, err_msg=how)
    assert answers["frame"].models["risk"] == ["01"[int(p > .5)] for p in right[:, 1]]
    form = "".join(f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{"" if v is None else v}\r\n' for k, v in records[0].items())
    assert post(client, form + "--x--", "multipart/form-data; boundary=x")["models"]["sum"] == [pytest.approx(float(values[0]), rel=1e-6)]
    about = client.provenance()
    assert about["engine"]["kind"] == "table" and [c["name"] for c in about["engine"]["columns"]] == list(frame)


def test_policies_over_a_table(place, people_server):
    "A policy over the classifier; one over the regressor is refused by name."
    frame, _ = people()
    said = Client(people_server.url).rows(frame[:50], {"kind": "threshold", "target": "1", "threshold": .2, "models": ["risk"]}, probs=True)
    np.testing.assert_array_equal(said.policy["result"], np.array(said.probs["risk"])[:, 1] >= .2)
    with pytest.raises(ServerError, match="'sum' gives values") as e: Client(people_server.url).rows(frame[:2], {"kind": "or", "target": "1"})
    assert e.value.status == 422


GOOD = {"age": 30, "job": "cook", "rooms": 2}


@pytest.mark.parametrize(("body", "kind", "status", "says"), [
    ({"rows": [{**GOOD, "job": "king"}]}, None, 422, "row 0: job: 'king' is none of its 3 categories"),
    ({"rows": [{**GOOD, "rooms": "2"}]}, None, 422, "row 0: rooms: expected a number, got '2'"),
    ({"rows": [GOOD, 7]}, None, 422, "row 1: expected an object"), ({"rows": [{**GOOD, "jop": 1}]}, None, 422, "did you mean 'job'"),
    ({"rows": []}, None, 422, "rows: none"), ({"rows": 3}, None, 422, "rows: expected a list"), ({}, None, 422, "expected `rows`"),
    ({"columns": {"age": [1], "job": []}}, None, 422, "lists of one length"), ({"columns": {"age": 3}}, None, 422, "columns: expected lists"),
    ({"rows": [GOOD], "ids": [1, 2]}, None, 422, "ids"), ({"rows": [GOOD], "colour": 1}, None, 422, "unknown field 'colour'"),
    ({"images": [{"b64": ""}]}, None, 422, "expected `rows`"), ("{", "application/json", 400, "no JSON"), ("[1]", "application/json", 422, "an object"),
    ("age\n1,2\n", "text/csv", 422, "CSV: line 2"), ("", "text/csv", 422, "CSV"), ("x", "application/vnd.apache.arrow.stream", 422, "Arrow"),
    ("x", "image/png", 415, "takes rows"), ({"rows": [{**GOOD, "rooms": 1e999}]}, None, 400, "no JSON"),
    ("--x\r\nContent-Disposition: form-data; name=\"policy\"\r\n\r\nor\r\n--x--", "multipart/form-data; boundary=x", 422, "a field for each")])
def test_odd_rows(people_server, body, kind, status, says):
    "Bad input is refused with its row, its column and what was expected."
    text = body if isinstance(body, str) else json.dumps(body).replace("Infinity", "1e999")
    with pytest.raises(ServerError) as e: post(Client(people_server.url), text, kind or "application/json")
    assert e.value.status == status and says in str(e.value), e.value


def test_a_bad_row_beside_good_ones(people_server):
    "With on_error=skip the row that doesn't fit is null, and the others are answered."
    said = Client(people_server.url).rows([GOOD, {**GOOD, "job": "king"}, GOOD], on_error="skip")
    assert said.models["risk"][1] is None and said.models["risk"][0] == said.models["risk"][2] and [e["index"] for e in said.errors] == [1]


def test_pictures_are_not_rows(people_server):
    "FlexServe's own endpoints take pictures; a server of rows says so."
    with pytest.raises(ServerError, match="takes rows") as e: Client(people_server.url).classify(np.zeros((8, 8, 3), np.uint8))
    assert e.value.status == 422


def test_mixed_rows_equal_the_network(place, listing_server):
    "Numbers, a category, hashed words and a photograph: JSON and a form answer as the network does in this process, to 1e-6."
    import torch
    from opml_wb.flexserve.inputs.feeds import feed_of
    from opml_wb.flexserve.inputs.columns import Schema
    from opml_wb.flexserve.inputs.rows import read_rows
    rows, schema, client, (_, _, net) = listings(), Schema.parse(COLUMNS), Client(listing_server.url), place
    feeds = [feed_of(t, schema).many(read_rows(schema, rows)) for t in TAKES]
    with torch.inference_mode():
        right = torch.softmax(net(*(torch.from_numpy(np.stack(f)) for f in feeds)), 1).numpy()
    np.testing.assert_allclose(client.rows(rows, probs=True).probs["net"], right, atol=1e-6)
    parts = [b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (k.encode(), v if isinstance(v, bytes) else str(v).encode())
             for k, v in rows[0].items()]
    said = post(client, b"".join(parts) + b"--x--", "multipart/form-data; boundary=x", "?probs=true")
    np.testing.assert_allclose(said["probs"]["net"], right[:1], atol=1e-6)
    broken = [{**rows[0], "photo": b"\xff\xd8none"}, rows[1], {**rows[2], "price": 13.}]
    said = client.rows(broken, on_error="skip")
    assert [e["index"] for e in said.errors] == [0, 2] and said.models["net"][1] is not None
    assert said.errors[0]["code"] in ("truncated", "format") and said.errors[1]["code"] == "output" and "'net'" in said.errors[1]["reason"]
    with pytest.raises(ServerError, match="'net' gave numbers that are not finite") as e: client.rows(broken[2:])
    assert e.value.status == 500


def test_a_row_with_a_large_photograph(place):
    "A helper decodes it, the workers are free meanwhile: the answer is the network's, beside rows with small ones; one that ends early is an error."
    import torch
    from opml_wb.flexserve.inputs.columns import Schema
    from opml_wb.flexserve.inputs.feeds import feed_of
    from opml_wb.flexserve.inputs.rows import read_rows
    from opml_wb.flexserve.measure.attack import photograph
    large, (_, _, net) = photograph(6, progressive=True), place
    rows = [r if i % 3 else {**r, "photo": large} for i, r in enumerate(listings(5))]
    feeds = [feed_of(t, Schema.parse(COLUMNS)).many(read_rows(Schema.parse(COLUMNS), rows)) for t in TAKES]
    with torch.inference_mode(): right = torch.softmax(net(*(torch.from_numpy(np.stack(f)) for f in feeds)), 1).numpy()
    with Server("listings") as server:
        client, before = Client(server.url, timeout=300), len(server.workers())
        np.testing.assert_allclose(client.rows(rows, probs=True, deadline_ms=200_000).probs["net"], right, atol=1e-6)
        assert len(server.workers()) > before     # a helper was started
        said = client.rows([{**rows[0], "photo": large[:-len(large) // 3]}, rows[1]], on_error="skip", deadline_ms=200_000)
        assert [(e["index"], e["code"]) for e in said.errors] == [(0, "truncated")] and "photo" in said.errors[0]["reason"] and said.models["net"][1]


def test_a_row_that_ends_its_worker(place):
    "It is an error of that row alone; the others of its request, and of others', are answered."
    with Server("others") as server:
        rows = listings(6)
        said = Client(server.url).rows([*rows[:3], {**rows[3], "price": 666.}, *rows[4:]], on_error="skip")
        assert [(e["index"], e["code"]) for e in said.errors] == [(3, "poison")] and None not in said.models["net"][:3] + said.models["net"][4:]
        assert until(lambda: len(server.workers()) == 2, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["people", "listings"])
def test_killed_workers_lose_no_row(place, name):
    "Workers are killed under load: every request is answered, and right."
    frame, _ = people()
    rows = listings() if name == "listings" else nulls(frame).to_dict("records")
    with Server(name, workers=2) as server:
        client, model = Client(server.url), {"people": "risk", "listings": "net"}[name]
        right = client.rows(rows).models[model]
        def ask(c, n):
            start, size = (7 * c + n) % (len(rows) - 8), (1, 2, 8)[n % 3]
            body = json.dumps({"rows": rows[start:start + size]}, default=lambda b: {"b64": base64.b64encode(b).decode()})
            return (start, size), load_test.post("/v1/predict", body.encode(), "application/json")
        async def kills():
            task = asyncio.create_task(load_test.closed(server.url, ask, 6, 6))
            for _ in range(6):
                await asyncio.sleep(.7)
                if pids := server.workers(): os.kill(random.choice(pids), 9)
            return await task
        replies = asyncio.run(kills())
        assert len(replies) > 50 and {r.status for r in replies} == {200}, [r for r in replies if r.status != 200][:3]
        for r in replies:
            start, size = r.key
            assert json.loads(r.body)["models"][model] == right[start:start + size]



def numbers(frame):
    "The inputs of the Open Inference Protocol for `people`."
    columns = nulls(frame)
    return [{"name": "age", "datatype": "FP64", "shape": [len(frame)], "data": list(columns.age)},
            {"name": "job", "datatype": "BYTES", "shape": [len(frame), 1], "data": list(columns.job)},
            {"name": "rooms", "datatype": "INT64", "shape": [len(frame)], "data": [int(v) for v in columns.rooms]}]


def infer(client, **body): return client.call("POST", "/v2/models/people/infer", json.dumps(body), "application/json")


def test_rows_by_the_open_inference_protocol(place, people_server):
    "An input for each column: the same answers; its metadata names them; a policy with weights is taken, an unknown parameter refused."
    frame, client = people()[0][:20], Client(people_server.url)
    right = client.rows(frame, probs=True)
    said = infer(client, inputs=numbers(frame), outputs=[{"name": "risk:probs"}, {"name": "sum"}], id="7")
    outs = {o["name"]: o for o in said["outputs"]}
    np.testing.assert_allclose(np.reshape(outs["risk:probs"]["data"], outs["risk:probs"]["shape"]), right.probs["risk"], atol=1e-6)
    assert outs["sum"]["datatype"] == "FP64" and outs["sum"]["data"] == right.models["sum"] and said["id"] == "7"
    about = client.call("GET", "/v2/models/people")
    assert [(i["name"], i["datatype"]) for i in about["inputs"]] == [("age", "FP64"), ("job", "BYTES"), ("rooms", "FP64")]
    policy = {"kind": "weighted", "target": "1", "models": ["risk"]}
    said = infer(client, inputs=numbers(frame), parameters={"policy": policy, "weights": {"risk": 2.}})
    assert {o["name"] for o in said["outputs"]} >= {"policy_result", "policy_score"}
    for odd, says in ({"weigths": {"risk": 1}}, "did you mean 'weights'"), ({"policy": "weighted", "target": "1"}, "weights"):
        with pytest.raises(ServerError, match=says) as e: infer(client, inputs=numbers(frame), parameters=odd)
        assert e.value.status in (400, 422)
    with pytest.raises(ServerError, match="inputs: there is no column 'jop'") as e: infer(client, inputs=[{**numbers(frame)[1], "name": "jop"}])
    assert e.value.status == 400


def test_what_the_server_says_of_itself_is_what_it_takes(people_server):
    "The OpenAPI document has the columns, and every field of a request once: parser, document and protocol agree."
    from opml_wb.flexserve.requests.request import DECLARED, PARAMETERS
    schemas = Client(people_server.url).call("GET", "/openapi.json")["components"]["schemas"]
    assert list(schemas["Row"]["properties"]) == ["age", "job", "rooms"] and {"rows", "columns", *DECLARED} <= set(schemas["Predict"]["properties"])
    assert set(schemas["Infer"]["properties"]["parameters"]["properties"]) == {"binary_data_output", *PARAMETERS} and "weights" in PARAMETERS


def test_ids_and_logs(place, tmp_path):
    "Each request keeps its id, each answer has its own; the logs have a line for each, with the rows that were asked."
    logs = {k: tmp_path / f"{k}.jsonl" for k in ("access_log", "decisions")}
    with Server("people", workers=1, **logs) as server:
        async def ask():
            connection = load_test.Connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            body = json.dumps({"rows": [GOOD], "probs": True}).encode()
            out = [await connection.ask(load_test.post("/v1/predict", body, "application/json", **how)) for how in ({"X-Request-Id": "mine-1"}, {"X-Request-Id": "mine-1"}, {})]
            out.append(await connection.ask(load_test.post("/v1/predict", b"{", "application/json")))
            connection.close()
            return out
        replies = asyncio.run(ask())
    heads, bodies = [h for _, h, _ in replies], [json.loads(b) for *_, b in replies[:3]]
    assert [h["x-request-id"] for h in heads[:2]] == ["mine-1"] * 2 and len({h["x-request-id"] for h in heads}) == 3
    assert len({b["id"] for b in bodies}) == 3 and [b["id"] for b in bodies] == [h["x-answer-id"] for h in heads[:3]]
    read = {k: [json.loads(line) for line in f.read_text().splitlines()] for k, f in logs.items()}
    assert [(r["id"], r["status"]) for r in read["access_log"]] == [(h["x-request-id"], s) for h, s in zip(heads, (200, 200, 200, 400))]
    for line, body in zip(read["decisions"], bodies, strict=True):
        assert (line["id"], line["rows"], line["models"], line["probs"]) == (body["id"], [{**GOOD, "age": 30., "rooms": 2.}], body["models"], body["probs"])
        assert line["version"] == 1 and line["digest"] == body["digest"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "examples", "most"), [("people", 120, 2000), ("others", 40, 500)])
def test_fuzzed_rows(place, tmp_path, name, examples, most):
    "Fuzzed cases over all operations of a server of a table (2,000), of mixed rows: no 5xx; it answers afterwards as before."
    pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'opml_wb[dev]'")
    from test_flexserve_server import fuzzed
    rows = nulls(people()[0])[:5].to_dict("records") if name == "people" else listings(5)
    store = ModelStore(tmp_path / "models")
    for _ in range(2): store.publish(name, ModelStore().resolve(name))
    store.promote(name, 1)
    with Server(name, home=tmp_path, workers=1, allow="listing_net") as server:
        client, seen, rounds = Client(server.url), [], 0
        before = client.rows(rows).models
        while len(seen) < most:
            rounds += 1
            seen += fuzzed(server.url, examples)
            assert rounds < 5
        assert {"POST /v1/predict", "POST /v2/models/{model}/infer"} <= {o for o, _ in seen}
        client.pin(1)
        assert client.rows(rows).models == before
        assert all(t["ok"] for t in client.call("GET", "/health/ready")["tasks"].values())
