"""FlexServe's engine against what it must equal: a plain PyTorch loop, torchvision, brute force, on published nets and pictures."""
import multiprocessing as mp
import os
import pickle
import sys

import numpy as np
import pytest

from opml_wb.core.record import data
from opml_wb.core.record.models import ModelError, ModelStore
from opml_wb.flexserve import Bundle, BundleError, Engine, Policy, decode, flips, import_torch, sweep
from opml_wb.flexserve.model.data import CIFAR, cifar, cifar_models

here = pytest.mark.skipif(data.find("flexserve/resnet20") is None, reason="needs the published CIFAR-10 nets: opml data fetch flexserve/resnet20, ...")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home of the module's own: conversions are kept there."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPML_HOME", str(tmp_path_factory.mktemp("home")))
        yield os.environ["OPML_HOME"]


@pytest.fixture(scope="module")
def shown():
    jpegs, truth = cifar()
    pick = np.random.default_rng(0).permutation(600)[:90]
    return [decode(jpegs[i]) for i in pick], truth[pick]


@pytest.fixture(scope="module")
def bundle(home, shown, tmp_path_factory):
    images, truth = shown
    return Bundle.create(tmp_path_factory.mktemp("b")/"cifar", cifar_models(), golden={"images": images[:20], "labels": truth[:20]})


@pytest.fixture(scope="module")
def plain(bundle, shown):
    "(M, B, C) probabilities of a plain PyTorch loop, a picture at a time, without any of ours but the nets."
    import torch
    from opml_wb.flexserve.model import one_thread
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    x = [(torch.tensor(im).permute(2, 0, 1) / 255 - mean) / std for im in shown[0]]
    with torch.no_grad(), one_thread(): return np.stack([[torch.softmax(bundle.module(m["name"])(im[None]), 1)[0].numpy() for im in x] for m in bundle.models])


@here
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_the_ensemble_equals_a_plain_loop_in_any_batches(bundle, shown, plain, kind):
    engine, (images, truth), rng = Engine.load(bundle, kind), shown, np.random.default_rng(1)
    cuts = np.cumsum(rng.choice([1, 2, 3, 5, 8, 13, 40], 60))
    parts = [p for p in np.split(np.arange(len(images)), cuts[cuts < len(images)])]
    answers = [engine.infer([images[i] for i in p]) for p in parts]
    probs, labels = (np.concatenate([getattr(a, k) for a in answers], axis=1) for k in ("probs", "labels"))
    assert np.abs(probs - plain).max() < 1e-4
    top = np.sort(plain, axis=2)
    clear = top[..., -1] - top[..., -2] > 1e-4
    assert (labels == np.array(CIFAR, object)[plain.argmax(2)])[clear].all()
    assert answers[0].models == ["resnet20", "resnet32", "resnet44", "resnet56"]
    assert ((labels == truth).mean(axis=1) > .75).all()
    everything = engine.infer(images)
    assert np.abs(everything.probs - probs).max() < 1e-4


@here
def test_policies_give_exact_fn_and_fp(bundle, shown, plain):
    engine, (images, truth) = Engine.load(bundle, "torch"), shown
    yes, cat = (plain.argmax(2) == CIFAR.index("cat")), truth == "cat"
    for k in range(1, 5):
        v = engine.infer(images, policy={"kind": "k_of_n", "target": "cat", "k": k}).verdict.result
        want = yes.sum(0) >= k
        assert ((~v & cat).sum(), (v & ~cat).sum()) == ((~want & cat).sum(), (want & ~cat).sum())
    answer = engine.infer(images)
    table = sweep(answer.labels, answer.probs, truth, "cat", answer.classes).set_index(["policy", "param"])
    for t in (.1, .3, .5):
        want = plain[:, :, CIFAR.index("cat")].mean(0) >= t
        assert (table.loc[("mean_prob", t), ["FN", "FP"]] == [(~want & cat).sum(), (want & ~cat).sum()]).all()


@here
def test_lazy_verdicts_are_the_full_ones_for_less_work(bundle, shown):
    engine, (images, _) = Engine.load(bundle, "torch"), shown
    for spec, most in (({"kind": "and"}, .45), ({"kind": "majority"}, .7), ({"kind": "or"}, 1.), ({"kind": "threshold", "reduce": "min"}, .45), ({"kind": "vote"}, 1.)):
        policy = {**spec, "target": "cat"}
        full, lazy = (engine.infer(images, policy=policy, lazy=how) for how in (False, True))
        assert (full.verdict.result == lazy.verdict.result).all()
        assert lazy.flops <= most * full.flops


@here
def test_int8_says_how_often_it_agrees(bundle, shown):
    engine = Engine.load(bundle, "onnx-int8")
    assert engine.parity["images"] == 10 and all(m["agreement"] > .8 for m in engine.parity["models"].values())
    assert (engine.infer(shown[0]).labels == Engine.load(bundle, "torch").infer(shown[0]).labels).mean() > .9


@here
def test_the_legacy_checkpoint_is_the_safetensors(tmp_path):
    import torch
    from safetensors.torch import load_file
    ours, theirs = import_torch(data.path("flexserve/legacy"), "opml_wb.flexserve.model.zoo:cifar_resnet20"), load_file(data.path("flexserve/resnet20"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    legacy, = (dict(m, weights=data.path("flexserve/legacy")) for m in cifar_models((20,)))
    a, b = (Bundle.create(tmp_path/n, [m]) for n, m in (("a", legacy), ("b", cifar_models((20,))[0])))
    assert [m["weights"]["sha256"] for m in a.models] == [m["weights"]["sha256"] for m in b.models]


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t}, lambda t: {"state_dict": {"a": t}}, lambda t: [t]])
@pytest.mark.parametrize("how", ["pickle", "torch", "legacy"])
def test_a_pickle_with_code_in_it_runs_nothing(tmp_path, wrap, how):
    import torch
    sprung, file = tmp_path/"sprung", tmp_path/"trap.pth"
    trap = wrap(Trap(str(sprung)))
    if how == "pickle": file.write_bytes(pickle.dumps(trap))
    else: torch.save(trap, file, _use_new_zipfile_serialization=how == "torch")
    entry = {"name": "m", "arch": "opml_wb.flexserve.model.zoo:convnet", "weights": file, "classes": ["a", "b"]}
    for attempt in (lambda: import_torch(file, "opml_wb.flexserve.model.zoo:convnet"), lambda: Bundle.create(tmp_path/"b", [entry])):
        with pytest.raises(BundleError, match="nothing of it was run"): attempt()
    assert not sprung.exists() and not (tmp_path/"b").exists()


def small(path, seed=0, golden=None):
    import torch
    from opml_wb.flexserve.model import zoo
    torch.manual_seed(seed)
    like = {"classes": ["face", "other"], "transform": {"resize": 24, "crop": 24}}
    models = [{"name": n, "arch": f"opml_wb.flexserve.model.zoo:{n}", "weights": getattr(zoo, n)().state_dict(), **like}
              for n in ("convnet", "mlp", "patch_mixer")]
    return Bundle.create(path, models, golden=golden, name="small")


def test_a_flipped_byte_is_not_pinned(home, tmp_path):
    store = ModelStore(tmp_path/"store")
    for seed in (1, 2): store.publish("m", small(tmp_path/str(seed), seed).dir)
    store.promote("m", 1)
    two = Bundle.load(store.resolve("m", version=2))
    weights = two.dir/two.models[1]["weights"]["file"]
    body = bytearray(weights.read_bytes()); body[-5] ^= 1
    os.chmod(weights, 0o644); weights.write_bytes(body)
    for decide in (store.pin, store.promote):
        with pytest.raises(ModelError, match="have changed"): decide("m", 2)
    with pytest.raises(BundleError, match="has changed"): Engine.load(two)
    assert store.current("m") == 1 and Engine.load(store.resolve("m"), "torch").infer([]).labels.shape == (3, 0)


def test_the_flip_report_is_exact(home, tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (rng.integers(24, 60), rng.integers(24, 60), 3), dtype=np.uint8) for _ in range(60)]
    one, two = small(tmp_path/"1", 1), small(tmp_path/"2", 2)
    a, b = (Engine.load(x, "torch").infer(images) for x in (one, two))
    report = flips(one, two, images, policy={"kind": "majority", "target": "face"})
    want = {(i, m) for k, m in enumerate(a.models) for i in range(60) if a.labels[k, i] != b.labels[k, i]}
    assert {(r.picture, r.model) for r in report.table.itertuples() if r.model != "(verdict)"} == want and want
    v = [Policy.parse({"kind": "majority", "target": "face"}).apply(x.labels).result for x in (a, b)]
    assert report.table[report.table.model == "(verdict)"].picture.tolist() == np.flatnonzero(v[0] != v[1]).tolist()


def test_other_answers_than_at_pack_are_refused(home, tmp_path):
    "Whoever changes what the golden set was answered is found out."
    import json
    from opml_wb.flexserve import EngineError
    images = [np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8) for i in range(8)]
    bundle = small(tmp_path/"b", golden=images)
    said = bundle.manifest["golden"]["answers"]["mlp"]
    said["labels"][3] = {"face": "other", "other": "face"}[said["labels"][3]]
    said["margin"][3] = 1.
    (bundle.dir/"bundle.json").write_text(json.dumps(bundle.manifest))
    with pytest.raises(EngineError, match="golden picture 3"): Engine.load(bundle.dir, "torch").check()


def _worker(folder, shared, pipe):
    "Load the bundle as a server's worker does, or on copies of its weights; answer once, then say how much memory is this process's share."
    import psutil
    bundle = Bundle.load(folder)
    engine = Engine.load(bundle, "torch", verify=False)
    for p in () if shared else engine.backend.module.parameters(): p.data = p.data.clone()
    engine.infer([np.zeros((64, 64, 3), np.uint8)])
    pipe.send("up")
    pipe.recv()
    pipe.send(psutil.Process().memory_full_info().pss)
    pipe.recv()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PSS is Linux's")
def test_three_processes_share_the_weights(home, tmp_path):
    "A bundle of 256 MB in three workers (forkserver, as the pool's): at most 0.6 x the memory of copies."
    from opml_wb.flexserve.model import zoo
    weights = zoo.mlp(64, 2, 5200).state_dict()
    Bundle.create(tmp_path/"b", [{"name": "big", "arch": "opml_wb.flexserve.model.zoo:mlp", "kwargs": {"size": 64, "width": 5200}, "weights": weights, "classes": ["a", "b"], "transform": {"crop": 64}}])
    ctx = mp.get_context("forkserver")
    ctx.set_forkserver_preload(["torch", "opml_wb.flexserve.model.ensemble"])
    def total(shared):
        pipes = [ctx.Pipe() for _ in range(3)]
        team = [ctx.Process(target=_worker, args=(str(tmp_path/"b"), shared, theirs)) for _, theirs in pipes]
        for p in team: p.start()
        try:
            for ours, _ in pipes: assert ours.recv() == "up"
            for ours, _ in pipes: ours.send("measure")
            return sum(ours.recv() for ours, _ in pipes)
        finally:
            for p in team: p.kill(); p.join()
    shared, copied = total(True), total(False)
    print(f"shared {shared / 2**20:.0f} MB, copied {copied / 2**20:.0f} MB: {shared / copied:.2f}")
    assert shared <= .6 * copied
