"A 300 % churn runbook on real SIFT: in-place repair against hnswlib's replace_deleted and a graph built anew."
import numpy as np
import pytest
import yaml

from opml_wb.core.record.data import path
from opml_wb.riann.lab.churn import churn_runbook, read_runbook, replacing


@pytest.fixture(scope="module")
def sift():
    "5,000 shuffled SIFT vectors and 300 queries, as they are stored."
    base, query = np.load(path("riann/sift_photos")), np.load(path("riann/sift_photos_query"))
    return base[np.random.default_rng(0).permutation(len(base))[:5000]], query[:300]


def test_recall_after_churn_is_a_new_graphs_and_not_less_than_hnswlibs(sift, tmp_path):
    pytest.importorskip("hnswlib")
    book = replacing(2000, 5000, times=3, batch=100)
    file = tmp_path / "runbook.yaml"
    file.write_text(yaml.safe_dump(book))
    assert read_runbook(file) == read_runbook(book)
    df = churn_runbook(file, *sift)
    assert (df.gone == 0).all() and set(df[df.op == "search"].n) == {2000}
    last = df[df.step == df.step.max()].set_index("arm").recall
    assert last["in place"] > last["built anew"] - .004 and last["in place"] > last["hnswlib"] - .003


def test_deletions_without_insertions(sift):
    "Nine in ten go in pieces, as a runbook says it; each search is exact enough and returns none of them."
    steps = [dict(operation="insert", start=0, end=3000)]
    for i in range(0, 2700, 150):
        steps.append(dict(operation="delete", start=i, end=i + 150))
        if i % 900 == 750: steps.append(dict(operation="search"))
    df = churn_runbook({"less": {"max_pts": 3000, **dict(enumerate(steps, 1))}}, *sift, k=10)
    mine = df[(df.arm == "in place") & (df.op == "search")]
    assert list(mine.n) == [2100, 1200, 300] and (mine.gone == 0).all() and mine.recall.min() > .98
