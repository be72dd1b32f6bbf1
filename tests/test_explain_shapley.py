"TreeShap against its definition, against shap where that is installed, and what must be refused."
import importlib.util, itertools, subprocess, sys

import numpy as np
import pytest
import xgboost
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from opml_wb.explain import TreeShap
from opml_wb.explain.answers.tables import Columns
from opml_wb.explain.data import load
from opml_wb.explain.shapley import forests
from opml_wb.explain.shapley.treeshap import by_definition

rng = np.random.default_rng(7)
X = rng.normal(size=(600, 8)).round(2)
X[rng.random(X.shape) < .12] = np.nan
z = np.nan_to_num(X)
TWO = (z[:, 0] + z[:, 1] * z[:, 2] + rng.normal(0, .5, 600) > 0).astype(int)
SEVEN = np.clip((2 * z[:, 0] + z[:, 3] + 3).astype(int), 0, 6)
NUMBER = z[:, 0] * 3 + z[:, 4] ** 2

MODELS = {
    "forest": RandomForestClassifier(12, random_state=0).fit(X, TWO),
    "forest, depth 4": RandomForestClassifier(12, max_depth=4, random_state=0).fit(X, TWO),
    "weighted": RandomForestClassifier(8, class_weight="balanced", random_state=0).fit(X, TWO),
    "seven classes": RandomForestClassifier(6, random_state=0).fit(X, SEVEN),
    "regression": RandomForestRegressor(8, random_state=0).fit(X, NUMBER),
    "extra trees": ExtraTreesClassifier(8, random_state=0).fit(X, TWO),
    "extra regression": ExtraTreesRegressor(8, random_state=0).fit(X, NUMBER),
    "tree": DecisionTreeClassifier(random_state=0).fit(X, TWO),
    "tree regression": DecisionTreeRegressor(max_depth=5, random_state=0).fit(X, NUMBER),
    "one node": DecisionTreeClassifier(min_samples_leaf=500).fit(X, TWO),
    "xgboost": xgboost.XGBClassifier(n_estimators=15, max_depth=5, n_jobs=1).fit(X, TWO),
    "xgboost, seven": xgboost.XGBClassifier(n_estimators=4, max_depth=4, n_jobs=1).fit(X, SEVEN),
    "xgboost, number": xgboost.XGBRegressor(n_estimators=10, max_depth=4, n_jobs=1).fit(X, NUMBER)}


def columns(values):
    "Values of a row as [F, K]."
    return values[:, None] if values.ndim == 1 else values


@pytest.mark.parametrize("name", MODELS)
def test_path_dependent_values_are_those_of_the_definition(name):
    shap = TreeShap(MODELS[name])
    for row in X[[0, 5]]:
        assert np.abs(columns(shap.values(row)[0]) - by_definition(shap.forest, row)).max() <= 1e-12
    assert shap.additivity(X) <= (1e-5 if "xgboost" in name else 1e-10)


@pytest.mark.parametrize("name", ["forest, depth 4", "seven classes", "regression", "tree", "xgboost"])
def test_interventional_values_are_those_of_the_definition(name):
    background = X[-7:]
    shap = TreeShap(MODELS[name], background)
    found, slowly = columns(shap.values(X[3])[0]), by_definition(shap.forest, X[3], background)
    assert np.abs(found - slowly).max() <= 1e-12
    assert shap.additivity(X[:50]) <= (1e-5 if name == "xgboost" else 1e-12)


def test_more_background_rows_than_bits_of_a_word():
    shap = TreeShap(MODELS["forest"], X[:200])
    assert shap.additivity(X[200:260]) <= 1e-12


@pytest.mark.parametrize("n", [1, 31, 32, 33, 200, 600])
def test_a_row_gets_the_same_alone_and_among_others(n):
    shap = TreeShap(MODELS["forest"])
    whole = shap.values(X[:n])
    assert (whole[-1] == shap.values(X[n - 1])[0]).all()
    assert (whole == TreeShap(MODELS["forest"], n_jobs=2).values(X[:n])).all()


def test_interactions_against_their_definition():
    small = RandomForestClassifier(3, max_depth=4, random_state=0).fit(X[:, :4], TWO)
    shap = TreeShap(small)
    forest, n = shap.forest, 4
    from opml_wb.explain.shapley.treeshap import known_value
    def v(s): return sum(known_value(forest, r, X[0, :4], frozenset(s)) for r in forest.root[:-1])[0]
    from math import factorial
    found = shap.interactions(X[:1, :4])[0]
    for i, j in itertools.combinations(range(n), 2):
        rest, total = [k for k in range(n) if k not in (i, j)], 0.
        for k in range(len(rest) + 1):
            for s in itertools.combinations(rest, k):
                w = factorial(k) * factorial(n - k - 2) / factorial(n - 1) / 2
                total += w * (v({*s, i, j}) - v({*s, i}) - v({*s, j}) + v(s))
        assert abs(found[i, j] - total) <= 1e-12
    assert np.abs(found.sum(1) - shap.values(X[:1, :4])[0]).max() <= 1e-12


def test_children_that_no_training_weight_reached():
    "Covers of zero: the definition is the oracle; nothing divides by zero."
    shap = TreeShap(MODELS["tree"])
    cover = shap.forest.cover.copy()
    inner = np.flatnonzero(shap.forest.feature >= 0)[1:]
    for node in (inner[0], shap.forest.left[inner[3]], inner[5]):
        todo = [node]
        while todo:                        # nobody came by here, nor below
            at = todo.pop()
            cover[at] = 0
            if shap.forest.feature[at] >= 0: todo += [shap.forest.left[at], shap.forest.right[at]]
    shap.forest = shap.forest._replace(cover=cover)
    found = shap.values(X[:40])
    assert np.isfinite(found).all()
    for k in range(12): assert np.abs(found[k][:, None] - by_definition(shap.forest, X[k])).max() <= 1e-12


def test_thresholds_are_compared_as_the_model_compares_them():
    "Values right at, below and above thresholds, in 32 and 64 bits, go where the model sends them."
    for name in ("forest", "xgboost", "regression"):
        model = MODELS[name]
        forest = forests.read(model)
        inner = np.flatnonzero((forest.feature >= 0) & np.isfinite(forest.threshold))[:60]
        rows = []
        for node in inner:
            for value in (forest.threshold[node], np.nextafter(forest.threshold[node], np.float32(9)),
                          np.float64(forest.threshold[node]) + 1e-12):
                row = X[node % len(X)].copy()
                row[forest.feature[node]] = value
                rows.append(row)
        rows = np.array(rows)
        said = TreeShap(model).answer(rows)
        assert np.abs(forests.outputs(forest, rows)[:, 0] - said).max() <= (1e-5 if name == "xgboost" else 1e-10)


def test_wide_and_deep_forests():
    wide = rng.normal(size=(400, 120))
    model = RandomForestRegressor(5, max_features=1, random_state=0).fit(wide, wide @ rng.normal(size=120))
    shap = TreeShap(model)
    assert shap.additivity(wide) <= 1e-9 and shap._program.distinct.max() > 8
    against = TreeShap(model, wide[:20])
    assert against.additivity(wide[:30]) <= 1e-9


def test_models_that_cannot_be_explained_are_named():
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.svm import SVC
    for model in (HistGradientBoostingClassifier(), SVC()):
        with pytest.raises(TypeError, match=type(model).__name__): TreeShap(model)
    with pytest.raises(ValueError, match="gblinear"):
        TreeShap(xgboost.XGBClassifier(booster="gblinear", n_estimators=2).fit(X, TWO))


@pytest.fixture(scope="module")
def adult():
    table, y = load("adult")
    codes = Columns(table).encode(table)
    return codes, y.to_numpy()


@pytest.mark.skipif(importlib.util.find_spec("shap") is None, reason="shap is a peer that isn't installed")
@pytest.mark.parametrize("depth", [10, None])
def test_values_are_those_of_shap(adult, depth):
    import shap
    codes, y = adult
    model = RandomForestClassifier(20, max_depth=depth, random_state=0).fit(codes[:8000], y[:8000])
    rows = codes[20_000:20_032]
    theirs = shap.TreeExplainer(model).shap_values(rows, check_additivity=False)[..., 1]
    assert np.abs(TreeShap(model).values(rows) - theirs).max() <= 1e-10


def test_unlimited_forest_on_adult_adds_up(adult):
    codes, y = adult
    model = RandomForestClassifier(10, random_state=0).fit(codes[:16_000], y[:16_000])
    assert np.isnan(codes).any()
    assert TreeShap(model).additivity(codes[16_000:17_000]) <= 1e-10
    assert TreeShap(model, codes[:100]).additivity(codes[16_000:16_040]) <= 1e-12


def test_kernels_are_kept_for_the_next_process():
    "A second process finds the compiled functions and compiles none."
    code = ("import numpy as np; from sklearn.tree import DecisionTreeClassifier; from opml_wb.explain import TreeShap\n"
            "X = np.random.default_rng(0).normal(size=(50, 3)); TreeShap(DecisionTreeClassifier().fit(X, X[:, 0] > 0)).values(X)")
    subprocess.run([sys.executable, "-c", code], check=True)
    again = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "compiling" not in again.stderr


def test_a_model_that_stopped_early_is_read_as_it_predicts(tmp_path):
    "However it was told to stop, and after it was saved and loaded; trees of several outputs are named."
    import xgboost
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 4))
    y = (X[:, 0] + rng.normal(size=300) > 0).astype(int)
    def fitted(**options): return xgboost.XGBClassifier(n_estimators=60, n_jobs=1, **options).fit(X[:200], y[:200], eval_set=[(X[200:], y[200:])], verbose=False)
    for model in fitted(early_stopping_rounds=3), fitted(callbacks=[xgboost.callback.EarlyStopping(rounds=3)]):
        assert model.best_iteration < 40
        model.save_model(tmp_path / "m.json")
        loaded = xgboost.XGBClassifier()
        loaded.load_model(tmp_path / "m.json")
        for one in model, loaded:
            shap = TreeShap(one)
            assert np.allclose(shap.expected + shap.values(X[:50]).sum(1), one.predict(X[:50], output_margin=True), atol=1e-4)
    many = xgboost.XGBRegressor(n_estimators=3, n_jobs=1, multi_strategy="multi_output_tree").fit(X, X[:, :2])
    with pytest.raises(ValueError, match="several values in a leaf"): TreeShap(many)
