"""Chapter 8 as an experiment: trains, packs, serves, loses a worker, swaps a version, and says so in metrics."""
import pytest


@pytest.mark.slow
def test_the_chapter_loses_nothing_and_mixes_nothing(executed):
    r = executed("flexserve")
    assert r.ok, r.error
    m = r.metrics
    assert m["lost"] == m["swap_failed"] == m["swap_mixed"] == m["exit_code"] == 0
    assert m["fn_or"] <= m["fn_majority"] <= m["fn_and"] and m["fp_or"] >= m["fp_majority"] >= m["fp_and"]
    assert m["lazy_and_share"] < .45 and m["swap_requests"] > 10
    assert min(m[f"accuracy_{n}"] for n in ("mlp", "convnet", "patch_mixer")) > .6
    assert {c["name"]: c["verdict"] for c in r.claims}["forward calls for a batch through three models"] == "reproduced"


def test_a_target_that_the_pictures_lack_is_refused_before_anything_is_trained(home):
    from opml_wb.core.engine.run import run
    r = run("flexserve", target="cat")
    assert r.status == "failed" and "digits has no class 'cat'" in r.error["evalue"] and not r.metrics
