"""Answers that belong to who asked, values that are the same in every process, times that are a stage's own, and files that are what they were."""
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from conftest import until


@pytest.fixture(scope="module", autouse=True)
def imports():
    from opml_wb import dlspec
    from opml_wb.dlspec.execute.workers import WARM, close_all
    globals().update({n: getattr(dlspec, n) for n in dlspec.__all__}, WARM=WARM)
    yield
    close_all()


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch): monkeypatch.setenv("OPML_HOME", str(tmp_path / "home"))


def task(run="", dataset=None, hardware=None, software=None, model=None, mode="inference", log=None, **stages):
    return Task(hardware=hardware or Hardware(name="any", version="1.0.0"), software=software or Software(name="answers", version="1.0.0", libraries={"numpy": ""}),
                dataset=dataset or Dataset(name="d", version="1.0.0"), mode=mode, log=log,
                model=Model(name="m", version="1.0.0", stages=Stages(run=run, **stages), **(model or {})))


def resource(path, **more): return Resource(url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **more)


def worker(): return WARM["venv", task().software.digest]


def gone(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError: return True


# --- whose answer it is

def test_after_ctrl_c_the_next_answer_is_its_own():
    t = task("import time\ndef fun(ctx, data):\n    time.sleep(data[1])\n    return data[0]")
    assert run(t, data=["first", 0], executor="venv").outputs == "first"
    sent, ended = worker().number + 1, worker()
    def interrupt():
        assert until(lambda: ended.number == sent, 30)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt): run(t, data=["interrupted", 60], executor="venv")
    assert ended.closed
    assert [run(t, data=[word, 0], executor="venv").outputs for word in ("second", "third")] == ["second", "third"]


def test_threads_and_forks_get_their_own_answers():
    t = task("import time\ndef fun(ctx, data):\n    time.sleep(.005)\n    return data[0] * 10")
    run(t, data=[0], executor="venv")
    def asked(k): return [run(t, data=[k], executor="venv").outputs for _ in range(5)]
    got = {}
    threads = [threading.Thread(target=lambda k=k: got.update({k: asked(k)})) for k in (1, 2, 3)]
    for one in threads: one.start()
    for one in threads: one.join()
    assert got == {k: [10 * k] * 5 for k in (1, 2, 3)}
    mine, (read, write) = worker().process.pid, os.pipe()
    pid = os.fork()
    if not pid:
        try: os.write(write, json.dumps([asked(4), worker().process.pid != mine]).encode())
        finally: os._exit(0)
    told = json.loads(os.read(read, 1000))
    os.waitpid(pid, 0)
    assert told == [[40] * 5, True] and asked(5) == [50] * 5 and worker().process.pid == mine


# --- what stages print and start

LOUD = "def fun(ctx, data):\n    print('x' * 200_000)\n    return 1"
FORKS = "import multiprocessing\ndef fun(ctx, data):\n    with multiprocessing.get_context('fork').Pool(2) as pool: return pool.map(abs, data)"
CHILD = "import subprocess\ndef fun(ctx, data): return subprocess.Popen(['sleep', '1000']).pid"


def test_prints_and_forks_of_a_stage_end():
    assert run(task(LOUD), data=[1], executor="venv", limit_s=60).outputs == 1
    assert run(task(FORKS), data=[-1, 2], executor="venv", limit_s=60).outputs == [1, 2]
    said = task("import os, sys\ndef fun(ctx, data):\n    print('the last words', file=sys.stderr)\n    os._exit(3)")
    with pytest.raises(ExecutionError, match="exit code 3: (?s:.*)the last words"): run(said, data=[1], executor="venv")


OWNER = """
import sys, time
from opml_wb.dlspec import *
stages = Stages(run=%r)
t = Task(hardware=Hardware(name="any", version="1.0.0"), software=Software(name="s", version="1.0.0"), dataset=Dataset(name="d", version="1.0.0"),
         model=Model(name="m", version="1.0.0", stages=stages))
print(run(t, executor="venv", data=0).outputs, flush=True)
time.sleep(1000)
""" % CHILD


def test_no_child_of_a_stage_outlives_worker_or_owner():
    child = run(task(CHILD), data=0, executor="venv").outputs
    assert not gone(child)
    worker().close()
    assert until(lambda: gone(child), 30)
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    child = int(owner.stdout.readline())
    assert not gone(child)
    owner.kill()
    owner.communicate()
    assert until(lambda: gone(child), 30)


# --- one form of values

VALUES = {
    "sparse": ("s.csr_matrix(np.eye(3))", "s.csr_matrix(np.eye(3) * -7)"),
    "table": ("pd.DataFrame({'id': ['a'] * 1000, 'p': np.zeros(1000)}, index=range(7, 1007))", "pd.DataFrame({'id': ['a'] * 1000, 'p': np.arange(1000) == 500}, index=range(7, 1007))"),
    "columns": ("pd.DataFrame({'a': [1]})", "pd.DataFrame({'b': [1]})"),
    "column": ("{'p': pd.Series(np.zeros(1000))}", "{'p': pd.Series(np.arange(1000) == 500)}"),
    "category": ("pd.Categorical(['x', None])", "pd.Categorical([None, 'x'])"),
    "zone": ("pd.Series(pd.to_datetime(['2020-01-01']).tz_localize('CET'))", "pd.Series(pd.to_datetime(['2020-01-01']).tz_localize('UTC'))"),
    "objects": ("np.array([f'cat{i}' for i in range(20000)], object)", "np.array([f'dog{i}' for i in range(20000)], object)"),
    "text": ("np.array([f'cat{i}' for i in range(20000)])", "np.array([f'dog{i}' for i in range(20000)])"),
    "scalars": ("list(np.arange(20000) / 3)", "list(np.arange(20000) / 4)"),
    "masked": ("np.ma.masked_array([1, 2, 3], [0, 1, 0])", "np.ma.masked_array([1, 2, 3], [0, 0, 0])"),
    "times": ("np.array(['2020-01-01'], 'datetime64[D]')", "np.array(['2020-01-02'], 'datetime64[D]')"),
    "whole": ("np.int64(4)", "np.int64(5)"),
    "keys": ("{(1, 2): 3, 1: 1j}", "{(1, 3): 3, 1: 1j}"),
    "long": ("10**5000", "10**5000 + 1"),
    "path": ("pathlib.Path('/a')", "pathlib.Path('/b')"),
}
HEAD = "import pathlib\nimport numpy as np, pandas as pd, scipy.sparse as s\n"


def test_outputs_have_one_form_in_every_process():
    "The same in this process and in a worker, another one for other content, and never by how it prints."
    def both(text):
        t = task(f"{HEAD}def fun(ctx, data): return {text}")
        return run(t, data=[1]), run(t.model_copy(update={"log": run(t, data=[1]).log}), data=[1], executor="venv")
    for name, (one, other) in VALUES.items():
        (here, there), (else_, _) = both(one), both(other)
        assert there.matches == {"outputs": True} and not there.unjudged, name
        assert here.log.outputs_sha256 == there.log.outputs_sha256 != else_.log.outputs_sha256, name
        if name not in ("scalars", "whole"): assert type(here.outputs) is type(there.outputs), name
    table = both(VALUES["table"][0])
    import pandas as pd
    pd.testing.assert_frame_equal(table[0].outputs, table[1].outputs)


def test_what_has_no_form_is_not_judged():
    for text in ("{'a', 'b'}", "object()", "np.zeros(2, [('a', 'i4')])"):
        t = task(f"{HEAD}def fun(ctx, data): return {text}")
        first = run(t, data=[1])
        again = run(t.model_copy(update={"log": first.log}), data=[1])
        assert first.log.outputs_sha256 is None and not again.matches and "can't be compared" in again.unjudged["outputs"]
        with pytest.raises(ExecutionError, match="can't leave the worker"): run(t, data=[1], executor="venv")


def test_metrics_that_are_no_numbers_are_kept_out_of_the_log():
    from opml_wb.dlspec.spec.manifest import parse
    text = "{'nan': float('nan'), 'none': None, 'matrix': [[1, 2]], 'text': 'high', 'good': np.float32(.5)}"
    result = run(task(f"{HEAD}def fun(ctx, data): return {{'outputs': [1], 'metrics': {text}}}"), data=[1])
    assert parse(result.log.to_yaml()) == result.log and list(result.log.metrics) == ["good"] and len(result.log.unknown) == 4
    assert result.metrics["matrix"] == [[1, 2]] and "good 0.5" in repr(result)


# --- items and time

LAZY = "import time\ndef fun(ctx, data):\n    for x in data:\n        time.sleep(.01)\n        yield x"
YIELDS = "import time\ndef fun(ctx, data):\n    for x in data:\n        time.sleep(.005)\n        yield 2 * x"


def test_time_and_items_of_lazy_stages_are_their_own():
    trace = run(task("def fun(ctx, data): return [x for x in data]", pre=LAZY), data=[1, 2, 3]).trace.set_index("step").seconds
    assert trace["pre"] >= .03 and trace["run"] < trace["pre"]
    for executor in ("inprocess", "venv"):
        for how in ({"batch": 2}, {"scenario": "offline"}, {"scenario": "single-stream"}):
            result = run(task(YIELDS, pre="def fun(ctx, data): return map(int, data)"), data=[1, 2, 3], executor=executor, **how)
            assert result.outputs == [2, 4, 6] and result.metrics.get("latency_p50_s", 1.) >= .005, how


def test_items_are_items_and_arguments_are_checked():
    for pre, kind in (("{'x': [1]}", "dict"), ("'text'", "str"), ("pd.DataFrame({'a': [1]})", "DataFrame"), ("3", "int")):
        t = task("def fun(ctx, data): return 1", pre=f"{HEAD}def fun(ctx, data): return {pre}")
        for how in ({"batch": 2}, {"scenario": "offline"}):
            with pytest.raises(TypeError, match=f"a {kind} is not a list of items"): run(t, data=[1], **how)
    t = task("def fun(ctx, data): return data")
    for how, why in (({"repeats": 0}, "repeats: expected"), ({"batch": -2}, "batch: expected"), ({"scenario": "offline", "data": []}, "there are no items")):
        with pytest.raises(ValueError, match=why): run(t, **{"data": [1], **how})
    with pytest.raises(TypeError, match="give them in the stage post"):
        run(task("def fun(ctx, data): return {'outputs': data, 'metrics': {'n': 1}}"), data=[1, 2, 3], batch=2)


def test_batches_are_joined_by_their_type():
    for text in ("pd.DataFrame({'id': data, 'p': [x / 2 for x in data]})", "{'p': np.asarray(data) * 1.}", "s.csr_matrix([[x] for x in data])",
                 "np.ma.masked_array(data, [x == 2 for x in data])", "pd.Series(data)", "[str(x) for x in data]", "{'a': {'b': np.ones((len(data), 2))}}"):
        t = task(f"{HEAD}def fun(ctx, data): return {text}")
        whole = run(t, data=[1, 2, 3])
        for how in ({"batch": 2}, {"scenario": "single-stream"}): assert run(t, data=[1, 2, 3], **how).log.outputs_sha256 == whole.log.outputs_sha256, text
    assert run(task("def fun(ctx, data): return sum(data)"), data=[1, 2, 3], batch=2).outputs == [3, 3]


# --- files

READ = "def fun(ctx, data): return [open(p).read() for p in data]"


def test_files_of_one_name_are_all_there_and_keep_their_suffix(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.csv").write_text(name)
    files = [resource(tmp_path / name / "labels.csv") for name in ("train", "test")]
    assert run(task("def fun(ctx, data): return data", Dataset(name="two", version="1.0.0", resources=files, load=READ))).outputs == ["train", "test"]
    with pytest.raises(ValueError, match="give one of them another `name`"): Model(name="m", version="1.0.0", resources=files)
    assert Model(name="m", version="1.0.0", resources=[files[0], resource(tmp_path / "test" / "labels.csv", name="t.csv")])
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    table = Dataset(name="t", version="1.0.0", resources=[resource(tmp_path / "t.csv.gz")], load="import pandas as pd\ndef fun(ctx, data): return pd.read_csv(data[0])")
    assert run(task("def fun(ctx, data): return data", table)).outputs.b.tolist() == [2]


def test_files_without_a_checksum_are_fetched_anew(tmp_path):
    from opml_wb.dlspec.execute.resources import Resources
    file = tmp_path / "data.csv"
    t = task("def fun(ctx, data): return data", Dataset(name="u", version="1.0.0", resources=[Resource(url=file.as_uri())], load=READ))
    place = Resources(allow=["*"]).place(t.dataset.resources[0])
    for text in ("old\n" * 9, "new\n" * 9):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(f"{place.name}.part").write_text("of a kill\n")
        file.write_text(text)
        result = run(t, allow_unverified=[file.as_uri()])
        assert result.outputs == [text] and result.log.environment["unverified"] == {file.as_uri(): hashlib.sha256(text.encode()).hexdigest()}


def test_an_unpacked_folder_is_what_was_packed(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z: z.writestr("a.txt", "1"), z.writestr("b.txt", "2")
    packed = [resource(tmp_path / "x.zip", unpack=True)]
    def loads(text): return task("def fun(ctx, data): return data", Dataset(name="z", version="1.0.0", resources=packed, load=f"import os, pathlib\ndef fun(ctx, data):\n    p = pathlib.Path(data[0])\n{text}"))
    total = "    return sum(int(q.read_text()) for q in p.rglob('*.txt'))"
    assert run(loads(total)).outputs == 3
    for change in ("(p / 'c.txt').write_text('100')", "os.chmod(p / 'a.txt', 0o644); (p / 'a.txt').write_text('5')", "(p / 'b.txt').unlink()"):
        run(loads(f"    {change}\n    return 0"))
        result = run(loads(total))
        assert result.outputs == 3 and "has changed: unpacked again" in result.trace.note.iloc[-1]


def test_paths_mean_the_same_in_a_worker(tmp_path, monkeypatch):
    (tmp_path / "near.txt").write_text("near")
    (tmp_path / "hardware.py").write_text("WHOSE = 'mine'")
    monkeypatch.chdir(tmp_path)
    assert run(task(READ), data=["near.txt"], executor="venv").outputs == ["near"]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    mine = task("import hardware\ndef fun(ctx, data): return hardware.WHOSE", software=Software(name="fresh", version="1.0.0"))
    assert run(mine, data=0, executor="venv").outputs == "mine"


# --- what a log says

def test_a_log_judges_what_it_was_made_with():
    t = task("def fun(ctx, data): return [2 * x for x in data]")
    first = run(t, data=[1, 2], scenario="offline")
    assert set(first.log.metrics) and run(t.model_copy(update={"log": first.log}), data=[1, 2], scenario="offline").matches == {"outputs": True}
    other = task("def fun(ctx, data): return [2 * x for x in data]", model={"description": "another"}, log=first.log)
    for result in (run(other, data=[1, 2]), run(t.model_copy(update={"log": first.log}), data=[1, 3])):
        assert not result.matches and "the log was made with" in result.unjudged["the log"]
    facts = first.log.environment
    import numpy as np
    assert facts["libraries"] == {"numpy": np.__version__} and all(isinstance(n, int) for n in facts["threads"].values())


def test_threads_are_those_that_are_used():
    software = Software(name="three", version="1.0.0", libraries={"torch": ""}, env={"OMP_NUM_THREADS": "3"})
    t = task("import torch\ndef fun(ctx, data): return torch.get_num_threads()", software=software)
    for executor in ("inprocess", "venv"):
        result = run(t, data=0, executor=executor)
        assert result.log.environment["threads"]["torch"] == result.outputs


def test_settings_that_differ_must_be_made(tmp_path):
    kinds = [Hardware(name=f"turbo-{on}", version="1.0.0", settings={"turbo": on}) for on in (True, False)]
    t = task("def fun(ctx, data): return 0")
    with pytest.raises(ExecutionError, match="turbo: unsupported: the alternatives differ in it"):
        vary(t, hardware=kinds, repeats=1, data=0, options={"sysfs": tmp_path})
    from opml_wb.dlspec.execute.hardware import Machine, unmet
    one, two = ({"cuda": [80.] * n} for n in (1, 2))
    need = Hardware(name="x", version="1.0.0", accelerators=[{"kind": "cuda", "memory_gb": 40}] * 2)
    assert [len(unmet(need, Machine("x86_64", 8, 64, frozenset(), have))) for have in (one, two)] == [1, 0]


# --- training

def test_a_training_keeps_its_artifacts_apart(tmp_path):
    (tmp_path / "base.bin").write_bytes(b"base")
    stages = dict(train="import os\ndef fun(ctx, data):\n    with open(ctx['files']['base.bin'], 'rb') as f: return {'w.bin': f.read() + os.urandom(4)}",
                  model={"resources": [resource(tmp_path / "base.bin")], "quality": {"accuracy": {"value": .9}}})
    t = task("def fun(ctx, data):\n    with open(ctx['files']['w.bin'], 'rb') as f: return f.read()", mode="training", **stages)
    made = [run(t, data=0, out=tmp_path / "out").model for _ in range(2)]
    assert [m.quality for m in made] == [{}, {}]
    use = [run(t.model_copy(update={"model": m, "mode": "inference"}), data=0).outputs for m in made]
    assert use[0] != use[1] and use[0].startswith(b"base")
    clash = task("", train="def fun(ctx, data): return {'a/w.bin': b'1', 'b/w.bin': b'2'}", mode="training")
    with pytest.raises(ExecutionError, match="two artifacts with the file name w.bin"): run(clash, data=0)


STAGES = {"pickle": ("import pickle\nclass Net:\n    pass\ndef fun(ctx, data): return type(pickle.loads(pickle.dumps(Net()))).__name__", "Net"),
          "dataclass": ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Box:\n    x: int\ndef fun(ctx, data): return Box(1).x", 1),
          "source": ("import inspect\nclass Net:\n    pass\ndef fun(ctx, data): return inspect.getsource(Net)", "class Net:\n    pass\n")}


def test_a_stage_is_a_module():
    for text, expected in STAGES.values():
        for executor in ("inprocess", "venv"): assert run(task(text), data=0, executor=executor).outputs == expected
