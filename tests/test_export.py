"""What MLflow's own client reads back of our runs."""
import json
import math
import os
from importlib.util import find_spec

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra [peers]")

@pytest.fixture
def uri(tmp_path): return f"sqlite:///{tmp_path}/server/mlflow.db"


def read(uri, chapter):
    "{our run id: MLflow's run} of an experiment."
    import mlflow
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name(f"opml/{chapter}").experiment_id])
    return client, {r.data.tags["opml.run_id"]: r for r in found}


SOURCE = """
from opml_wb import log
import pandas as pd, pathlib
for i in range(1200): log.metric("loss", 1 / (i + 1), step=10 * i)
log.metric("recall@10", rate); log.metric("never", float("nan")); log.metric("late", 3.0, step=2.5)
log.table(pd.DataFrame({"a": [1, 2]}), "deep/table")
folder = pathlib.Path(words[0]); folder.mkdir(exist_ok=True); (folder/"inside.txt").write_text("in")
log.artifact(folder, "folder"); log.artifact(b"bytes", "raw.bin")
assert rate < 1, "too much"
"""


def test_runs_read_back_equal(home, notebook, uri, tmp_path):
    from opml_wb.core.cli.export import to_mlflow
    from opml_wb.core.engine.run import run
    path = notebook(f"rate: float = .1\nwords: list[str] = [{str(tmp_path / 'folder')!r}, 'ß']\nnone: 'Optional[int]' = None\n" + "\n".join(f"p{i} = {i}" for i in range(120)), SOURCE)
    good, bad = run(path, rate=1e-7), run(path, rate=2.0)
    assert (good.status, bad.status) == ("done", "failed"), good.error
    assert to_mlflow(uri) == {"exported": 2, "known": 0, "skipped": 0}
    client, runs = read(uri, "nb")
    for r in (good, bad):
        back = runs[r.doc["id"]]
        assert back.info.status == ("FINISHED" if r.ok else "FAILED")
        assert {k: v if isinstance(r.params[k], str) else json.loads(v) for k, v in back.data.params.items()} == r.params
        renamed = json.loads(back.data.tags["opml.renamed"])
        assert {renamed.get(k, k) for k in back.data.metrics} == set(r.metrics)
        for name in back.data.metrics:
            series = r.series(renamed.get(name, name))
            history = sorted(client.get_metric_history(back.info.run_id, name), key=lambda m: m.step)
            assert len(history) == len(series)
            for m, value, step in zip(history, series.value, series.step):
                assert m.value == value or math.isnan(m.value) and math.isnan(value)
                if step is not None and step == step and float(step).is_integer(): assert m.step == step
            began = round(r.doc["started"] * 1000)
            assert all(began - 1 <= m.timestamp <= began + 120_000 for m in history)
        assert set(r.artifacts) == {"deep/table", "folder", "raw.bin"}
        for place in r.artifacts.values():
            got = client.download_artifacts(back.info.run_id, place.relative_to(r.dir / "artifacts").as_posix())
            if place.is_file(): assert open(got, "rb").read() == place.read_bytes()
            else: assert open(os.path.join(got, "inside.txt")).read() == "in"
        whole = json.load(open(client.download_artifacts(back.info.run_id, "opml/run.json")))
        assert whole["params"] == r.params and whole["id"] == r.doc["id"]
    assert (tmp_path / "server" / "mlartifacts").is_dir() and not (ROOT / "mlruns").exists()


def test_again_adds_only_what_is_new_and_mends_what_was_cut_short(home, notebook, uri, monkeypatch):
    from opml_wb.core.cli import export
    from opml_wb.core.engine.run import run
    path = notebook("n = 1", "from opml_wb import log\nlog.metric('x', n)")
    run(path); run(path, n=2)
    send = export._send_files
    def cut(client, run_id, r):
        if r.params["n"] == 2: raise KeyboardInterrupt
        send(client, run_id, r)
    monkeypatch.setattr(export, "_send_files", cut)
    with pytest.raises(KeyboardInterrupt): export.to_mlflow(uri)
    monkeypatch.setattr(export, "_send_files", send)
    run(path, n=3)
    assert export.to_mlflow(uri) == {"exported": 2, "known": 1, "skipped": 0}
    assert export.to_mlflow(uri) == {"exported": 0, "known": 3, "skipped": 0}
    _, runs = read(uri, "nb")
    assert sorted(r.data.params["n"] for r in runs.values()) == ["1", "2", "3"]
    assert all(r.data.tags["opml.complete"] == "true" for r in runs.values())


@pytest.mark.parametrize("uri, said", [("nonsense://x", "Expected sqlite:///FILE.db"), ("http://127.0.0.1:9", "cannot be used"), ("sqlite:////proc/no/x.db", "")])
def test_bad_uri(opml, uri, said):
    done = opml("export", "--mlflow", uri)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_command(opml, home, notebook, uri):
    from opml_wb.core.engine.run import run
    run(notebook("n = 1", "from opml_wb import log\nlog.metric('x', n)"))
    done = opml("export", "--mlflow", uri, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == {"exported": 1, "known": 0, "skipped": 0}, done.stderr
    assert "1 were there" in opml("export", "--mlflow", uri).stdout
    assert opml("export", "--mlflow", uri, "--chapter", "none").returncode == 2
    assert opml("export").returncode == 2
