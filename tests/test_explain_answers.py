"Explanations on tables with gaps: refused where untrue, valid ways out, odd columns named."
import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from opml_wb.explain import (Refused, TableModel, additive, counterfactual, disagreement, explain, mitigations, needs,
                             proxies, render, surrogate)
from opml_wb.explain.answers.changes import twins, values_for
from opml_wb.explain.answers.counterfactuals import Search
from opml_wb.explain.data import actionable, load
from opml_wb.explain.judging.proxying import group_auc
from opml_wb.explain.answers.explanation import of
from opml_wb.explain.people.needing import AUDIENCES, every_need
from opml_wb.explain.people.rendering import principal

CAN = actionable("adult")


@pytest.fixture(scope="module", params=["adult", "german"])
def case(request):
    X, y = load(request.param)
    n = min(len(X), 6000)
    order = np.random.default_rng(3).permutation(len(X))[:n]
    X, y = X.iloc[order], y.iloc[order]
    half = n // 2
    model = TableModel(RandomForestClassifier(25, random_state=0), unseen="missing").fit(X[:half], y[:half])
    return request.param, X[:half], X[half:], y[half:], model


@pytest.fixture(scope="module")
def adult():
    X, y = load("adult")
    model = TableModel(RandomForestClassifier(25, random_state=0), unseen="missing").fit(X[:3000], y[:3000])
    return X[:3000], X[3000:5000], y[3000:5000], model


def test_each_disagreeing_row_is_refused_for_each_audience(case):
    name, learn, new, y, model = case
    for depth in (1, 3, 5):
        found = explain(model, new, method="surrogate", depth=depth)
        tree = surrogate(model, new, depth).tree
        differ = tree.predict(model.encode(new)) != model.predict(new)
        assert (~found.agrees).to_numpy().tolist() == differ.tolist() and differ.any()
        for row in new.index[differ][:40]:
            for audience in AUDIENCES:
                with pytest.raises(Refused): render(found, row, audience)
        for row in new.index[~differ][:5]: render(found, row, "customer")


def test_exact_explanations_add_up_and_agree(case):
    _, learn, new, y, model = case
    for background in (None, learn[:40]):
        found = explain(model, new[:300], background=background)
        assert found.agrees.all() and np.abs(found.told - found.score).max() < 1e-9


def test_an_explanation_that_was_tampered_with_is_refused(adult):
    _, new, _, model = adult
    found = explain(model, new[:10])
    wrong = replace(found, agrees=found.agrees & False)
    with pytest.raises(Refused): render(wrong, new.index[0], "business")
    flagged = explain(model, new, method="surrogate", on_disagreement="flag", depth=1)
    row = new.index[~flagged.agrees][0]
    assert all(render(flagged, row, a)[0].startswith("CAUTION") for a in AUDIENCES)


def test_pipelines_are_explained_by_the_columns_of_the_table(adult):
    learn, new, _, _ = adult
    from sklearn.compose import ColumnTransformer
    names = ["age", "sex", "education_num", "race"]
    hot = ColumnTransformer([("hot", OneHotEncoder(handle_unknown="ignore"), ["sex", "race"])], remainder="passthrough")
    y = (learn.age > 40).to_numpy()
    pipe = make_pipeline(hot, RandomForestClassifier(10, random_state=0)).fit(learn[names], y)
    found = explain(pipe, new[names])
    assert list(found.values) == names and found.agrees.all()
    assert found.values.abs().mean().idxmax() == "age"


def test_features_of_a_pipeline_go_to_the_column_that_they_were_made_of():
    "Names that begin alike, short names, masks and gaps don't lead astray; what mixes columns is explained from outside."
    from sklearn.compose import make_column_transformer
    from sklearn.impute import KNNImputer, SimpleImputer
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    rng, n = np.random.default_rng(1), 300
    X = pd.DataFrame({"home": rng.choice(["owner_free", "owner_loan", "rent"], n), "home_owner": rng.normal(size=n),
                      "in__come": rng.normal(size=n), "come": rng.normal(size=n)})
    gaps = X.assign(come=X.come.mask(rng.random(n) < .2))
    hot, forest = OneHotEncoder(sparse_output=False, drop="first"), RandomForestClassifier(10, random_state=0)
    filled = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
    for decides, table, parts, short in (
            ("home", X, [(hot, ["home"])], True), ("home", X, [(hot, [True, False, False, False])], False),
            ("in__come", X[["in__come", "come"]], [(StandardScaler(), ["in__come"])], False),
            ("come", gaps[["come", "in__come"]], [(filled, ["come", "in__come"])], True),
            ("come", X[["come", "in__come"]], [(FunctionTransformer(np.cbrt), ["come"]), ("passthrough", ["in__come"])], True)):
        y = table[decides].eq("rent") if decides == "home" else table[decides].fillna(0) > 0
        steps = make_column_transformer(*parts, remainder="passthrough", verbose_feature_names_out=short)
        found = explain(make_pipeline(steps, forest).fit(table, y), table)
        strength = found.values.abs().mean()
        assert found.method.startswith("Shapley") and found.agrees.all(), decides
        assert strength.idxmax() == decides and strength.drop(decides).sum() < strength[decides] / 5, strength
    mixed = make_pipeline(KNNImputer(), forest).fit(gaps[["come", "in__come"]], gaps.in__come > 0)
    assert explain(mixed, gaps[["come", "in__come"]]).method.startswith("surrogate")
    alone = make_pipeline(forest).fit(X[["come", "in__come"]], X.come > 0)      # a pipeline of the model alone
    assert explain(alone, X[["come", "in__come"]]).agrees.all()


def test_a_surrogate_explains_any_model(adult):
    learn, new, _, _ = adult
    numbers = ["age", "education_num", "hours_per_week"]
    model = LogisticRegression(max_iter=500).fit(learn[numbers], learn.age > 40)
    assert explain(model, new[numbers]).method.startswith("surrogate")
    with pytest.raises(TypeError, match="LogisticRegression"): explain(model, new[numbers], ("local", "inherent"))


def test_additive_curves_are_the_model(adult):
    learn, new, y, _ = adult
    model = additive(learn, learn.age > 38, rounds=40)
    found = explain(model, new, ("local", "inherent"))
    assert found.fidelity == 1 and found.space == "margin"
    assert set(model.curves.column) == set(learn) and (model.curves.groupby("column").rows.sum() == len(learn)).all()


def grid_has_one(model, learn, row):
    "Ask about every change of one, two, three columns to any observed value."
    choices = {c: values_for(model, learn, row, c, way, {}, 10**6) for c, way in CAN.items()}
    grid = Search(model, learn, row, True, choices, twins(learn, list(CAN)))
    for size in (1, 2, 3):
        for columns in itertools.combinations(choices, size):
            trials = [dict(zip(columns, values)) for values in itertools.product(*(choices[c] for c in columns))]
            for k in range(0, len(trials), 20_000): grid.ask(trials[k:k + 20_000])
        if grid.found: return True
    return False


def test_ways_out_exist_where_a_whole_grid_has_one(adult):
    "Valid, directions kept, nothing else changed, nobody's row; found wherever the grid search finds one."
    learn, new, _, model = adult
    refused = new[~model.predict(new)][:14]
    exists = found_there = 0
    for k in range(len(refused)):
        row = refused.iloc[k]
        out = counterfactual(model, row, learn, CAN)
        exists += bool(out) or grid_has_one(model, learn, row)
        found_there += bool(out)
        if not out: continue
        assert (model.predict(out.rows) == out.wanted).all()
        for changes, (_, made) in zip(out.options, out.rows.iterrows()):
            assert {c.column for c in changes} <= set(CAN)
            assert made.age >= row.age and made.education_num >= row.education_num
            for c in set(new) - set(CAN) - {"education"}:
                assert made[c] == row[c] or (pd.isna(made[c]) and pd.isna(row[c]))
            assert not (learn.fillna("?") == made.fillna("?")).all(axis=1).any()
    assert exists >= 5 and found_there == exists


def told(row, option):
    "The row with what an option says of it."
    return {**row, **{c.column: c.new for change in option for c in (change, *change.along)}}


def test_a_told_change_turns_the_answer_and_moves_only_what_may_change():
    "Small tables of distinct values, 0/1 columns, models of any rule or without probabilities; the nearest value; twins told."
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import FixedThresholdClassifier
    from sklearn.svm import SVC
    rng, n = np.random.default_rng(1), 150
    small = pd.DataFrame({"age": rng.permutation(np.arange(20, 65)), "income": rng.permutation(np.arange(1500, 3750, 50))})
    X = pd.DataFrame({"income": rng.normal(size=n).round(3), "guarantor": rng.integers(0, 2, n), "own": rng.random(n) > .5, "debts": rng.random(n)})
    region = pd.DataFrame({"plan": rng.choice(list("abcd"), n), "income": rng.normal(size=n)})
    region["region"] = region.plan.map(dict(a="N", b="S", c="E", d="W"))
    y = (X.guarantor == 1) | (X.income > 1)
    forest, line, may = RandomForestClassifier(15, random_state=0), LogisticRegression(), {"guarantor": "up", "income": "up", "own": "any"}
    found = {}
    for name, model, table, answers, can in (
            ("distinct", TableModel(forest), small, small.age > 42, {"income": "up"}),
            ("twins", TableModel(RandomForestClassifier(15, random_state=0)), region, region.region.isin(["N", "S"]), {"plan": "any"}),
            *((type(m).__name__, m, X, y, may) for m in (
                LogisticRegression(), RandomForestClassifier(15, random_state=0), GradientBoostingClassifier(n_estimators=10),
                FixedThresholdClassifier(line, threshold=.8), SVC(), RidgeClassifier()))):
        model.fit(table, answers)
        no = np.flatnonzero(~model.predict(table).astype(bool))[:4]
        found[name] = [counterfactual(model, table.iloc[k], table, can) for k in no]
        for out in found[name]:
            for option in out.options:
                row = pd.DataFrame([told(out.row, option)])[list(table)].astype(table.dtypes)
                assert model.predict(row)[0] == out.wanted, (name, option)
                assert name == "twins" or {c for c in table if row[c][0] != out.row[c]} <= set(can)
                if name in ("LogisticRegression", "RidgeClassifier") and option[0].column == "income" and len(option) == 1:
                    nearer = sorted(v for v in X.income.unique() if out.row.income < v < option[0].new)
                    assert not model.predict(pd.DataFrame([out.row] * len(nearer)).assign(income=nearer).astype(X.dtypes)).any() if nearer else True
        if table is X: assert all(any(o[0].column == "guarantor" for o in out.options) for out in found[name]), name
    assert not any(found["distinct"])            # income decides nothing, and the age isn't its twin
    assert all("region" in out.sentences()[0] for out in found["twins"])
    both = counterfactual(model := TableModel(forest).fit(region, region.region.isin(["N", "S"])), region[~model.predict(region)].iloc[0],
                          region, {"plan": "any", "region": "any"})
    assert [[c.column for c in option] for option in both.options] == [["plan"], ["plan"]]     # twins that may both change are one change


def test_restricted_columns_are_named_and_kept_out_of_ways_out(adult):
    learn, new, _, model = adult
    found, row = explain(model, new), new.index[~model.predict(new)][0]
    for wrong in ("Sex", ("sex", "incme")):
        with pytest.raises(ValueError, match="restricted: no column"): render(found, row, "customer", restricted=wrong)
    reasons = principal(of(found, row))
    assert reasons[0] not in principal(of(found, row), reasons[0])
    assert "education_num" in principal(of(found, row), "education", 99)       # a name, not a part of one
    outs = {r: counterfactual(model, new.loc[r], learn, CAN) for r in new.index[~model.predict(new)][:12]}
    row, out = next((r, o) for r, o in outs.items() if o)
    moved = {c.column for option in out.options for change in option for c in (change, *change.along)}
    assert out.sentences()[0] in render(found, row, "customer", way_out=out)[0]
    assert "answered differently" not in render(found, row, "customer", way_out=out, restricted=tuple(moved))[0]
    with pytest.raises(ValueError, match="of another row"): render(found, next(r for r in outs if r != row), "customer", way_out=out)


def test_values_are_told_apart():
    from opml_wb.explain.answers.changes import Change
    assert Change("salary", 52349.1, 52349.2).said == "salary 52,349.2 instead of 52,349.1"
    assert str(Change("salary", 52349.25, 52400.25)) == "salary: 52,349 -> 52,400"


def test_what_was_granted_is_asked_for_or_told(tmp_path):
    "Known words are taken, with a warning; others are named; a path, capitals, gaps in 0/1, other separators."
    from opml_wb.explain.data import read
    file = tmp_path / "LOANS.CSV"
    def written(values): pd.DataFrame({"income": range(len(values)), "said": values}).to_csv(file, index=False)
    for yes, no in (("approved", "rejected"), ("accepted", "denied"), ("granted", "refused"), ("good", "bad"), ("yes", "no"), (True, False)):
        written([yes, no, yes])
        with pytest.warns(UserWarning, match=f"'{yes}' in column 'said' is taken to mean so"): got = read(file, "said")[1]
        assert got.tolist() == [True, False, True]
        assert read(file, "said", granted=str(no))[1].tolist() == [False, True, False]
    for first, last in ((0, 1), ("paid", "defaulted"), ("good", "no answer")):
        written([first, last])
        with pytest.raises(ValueError, match="say which one means so"): read(file, "said")
    written([1, 0, None, 1])
    assert read(str(file), "said", granted="1")[1].tolist() == [True, False, True]
    file.write_text("income;said\n1;yes\n")
    with pytest.raises(ValueError, match="separated by ';'"): read(file, "said")


def test_odd_tables_are_named(adult):
    learn, new, _, model = adult
    y = learn.age > 40
    with pytest.raises(ValueError, match="column 'id' has"):
        TableModel(RandomForestClassifier()).fit(learn.assign(id=[f"n{k}" for k in range(len(learn))]), y)
    big = pd.DataFrame({"id": [f"n{k}" for k in range(100_000)], "a": 1.})
    with pytest.raises(ValueError, match="100,000 distinct"): TableModel(RandomForestClassifier()).fit(big, np.arange(100_000) % 2)
    with pytest.raises(ValueError, match="one class only"): TableModel(RandomForestClassifier()).fit(learn, y | True)
    strict = TableModel(RandomForestClassifier(5, random_state=0)).fit(learn.assign(empty=np.nan, same="x"), y)
    assert strict.columns["empty"].note and strict.columns["same"].note
    with pytest.raises(ValueError, match="column 'race': level 'Martian'"):
        explain(strict, new.assign(empty=np.nan, same="x", race="Martian"))
    doubled = pd.concat([new[:3], new[:3]])
    with pytest.raises(ValueError, match="names several rows"): render(explain(model, doubled), doubled.index[0])


def test_disagreement_of_planted_explanations(adult):
    _, new, _, model = adult
    found = explain(model, new[:50])
    turned = replace(found, values=-found.values)
    told = disagreement(found, turned)
    assert np.allclose(told["rank"], 1) and (told.sign == 0).all() and (told.top_k == 1).all()
    mixed = replace(found, values=pd.DataFrame(np.random.default_rng(0).normal(size=found.values.shape), found.values.index,
                                               found.values.columns))
    assert abs(disagreement(found, mixed)["rank"].mean()) < .2


def test_intervals_of_group_auc_cover():
    "95 % intervals hold the true AUC in 93 to 97 % of 400 draws; two groups and three."
    for shifts in ((0., 1.), (0., .7, 1.4)):
        rng, k, hits, draws = np.random.default_rng(1), len(shifts), 0, 400
        def draw(n):
            group = rng.integers(0, k, n)
            x = rng.normal(np.array(shifts)[group])
            return np.column_stack([-(x - s) ** 2 for s in shifts]), group
        truth = group_auc(*draw(400_000))[0]
        for _ in range(draws):
            _, lo, hi = group_auc(*draw(250))
            hits += lo <= truth <= hi
        assert .925 <= hits / draws <= .98, (shifts, hits)


def test_proxies_of_sex_on_adult():
    X, _ = load("adult")
    found = proxies(X[:8000], "sex").set_index("feature")
    alone = found.drop("(joint)")
    assert alone.auc.idxmax() == "relationship" and found.auc["(joint)"] >= .9


def test_mitigations_move_what_they_say():
    X, y = load("adult")
    found = mitigations(X[:4000], y[:4000], "sex", seeds=5).set_index("mitigation")
    assert found.parity_change_hi["constrain"] < 0 and found.parity_change_hi["drop proxies"] < 0
    assert (found[["accuracy_lo", "parity_lo"]].to_numpy() <= found[["accuracy", "parity"]].to_numpy()).all()


def test_any_two_classes_are_taken_and_others_named():
    from opml_wb.explain.judging.disagreements import cost_of_readability
    X, y = load("adult")
    X, y = X[:900], y[:900]
    told = pd.DataFrame({"feature": ["relationship"], "auc": [.9]})
    def parity(answers): return mitigations(X, answers, "sex", seeds=1, told=told, how=("none",)).parity[0]
    assert parity(np.where(y, "yes", "no")) == parity(y + 1) == parity(y)
    curves = additive(X, np.where(y, "yes", "no"), rounds=5)
    found = explain(curves, X[:50], ("local", "inherent"))
    assert found.agrees.all() and set(found.answers) <= {"yes", "no"} and set(found.explained) == {"yes"} and curves.score(X, np.where(y, "yes", "no")) > .7
    assert cost_of_readability(X, y + 1, seeds=1).accuracy.min() > .7
    for wrong, why in ((y * 0, "1 classes"), (X.age, "classes; this is for two"), (y.astype(object).where(X.age > 30), "missing")):
        for call in (lambda: mitigations(X, wrong, "sex"), lambda: additive(X, wrong), lambda: cost_of_readability(X, wrong)):
            with pytest.raises(ValueError, match=why): call()


def test_a_gap_between_groups_stands_beside_what_chance_gives():
    rng = np.random.default_rng(2)
    X = pd.DataFrame({"pay": rng.normal(size=600), "sex": rng.choice(["f", "m"], 600)})
    told = pd.DataFrame({"feature": ["pay"], "auc": [.5]})
    found = mitigations(X, X.pay + rng.normal(size=600) > 0, "sex", seeds=4, told=told, how=("drop",)).iloc[0]
    assert found.parity > 0 and found.parity < 2.5 * found.parity_chance and found.odds_chance > found.parity_chance
    X["pay"] += X.sex.eq("m") * 2
    found = mitigations(X, X.pay > 1, "sex", seeds=2, told=told, how=("none",)).iloc[0]
    assert found.parity > 5 * found.parity_chance


def test_proxies_of_rows_that_recur_and_of_nothing():
    "Rows that are there three times make no proxy; of nothing the interval holds one half in 95 of 100 draws."
    from opml_wb.explain.judging.proxying import TWICE, folded
    rng = np.random.default_rng(7)
    X = pd.DataFrame({"a": rng.normal(size=300), "b": rng.normal(size=300)})
    g = pd.Series(rng.choice(["m", "f"], 300), name="sex")
    thrice = proxies(pd.concat([X] * 3, ignore_index=True), pd.concat([g] * 3, ignore_index=True), folds=3)
    assert thrice.auc.max() < .65 and (thrice.lo < .5).all() and (thrice.hi - thrice.lo).min() > .1
    hits = plain = 0
    for draw in range(160):                # a column of 6 values, told by each value's share in the other folds
        a, g = rng.integers(0, 6, 240), rng.integers(0, 2, 240)
        fold, case = folded(a[:, None].astype(float), g, 3, draw)
        score = np.zeros(240)
        for k in range(3):
            here = fold == k
            score[here] = (np.bincount(a[~here], g[~here], 6) / np.maximum(np.bincount(a[~here], minlength=6), 1))[a[here]]
        _, lo, hi = group_auc(np.column_stack([-score, score]), g, case=case, times=TWICE)
        hits += lo <= .5 <= hi
        _, lo, hi = group_auc(np.column_stack([-score, score]), g)
        plain += lo <= .5 <= hi
    assert .91 <= hits / 160 <= .99 and plain < hits, (hits, plain)


def test_tables_of_other_libraries_gaps_and_names():
    "A gap isn't the text None; numbers held as objects stay numbers; two columns of one name, other libraries' tables are named."
    rng = np.random.default_rng(0)
    walls = pd.DataFrame({"wall": pd.Series(rng.choice(["None", "nan", "Brick", None], 200), dtype=object),
                          "n": pd.Series(rng.integers(0, 12, 200), dtype=object)})
    model = TableModel(RandomForestClassifier(5, random_state=0)).fit(walls, walls.wall.eq("None"))
    codes = model.encode(walls)
    assert (np.isnan(codes[:, 0]) == walls.wall.isna()).all() and len(np.unique(codes[~np.isnan(codes[:, 0]), 0])) == 3
    assert model.columns["n"].levels is None and (codes[:, 1] == walls.n.astype(float)).all()
    twice = pd.DataFrame(rng.normal(size=(30, 2)), columns=[1, "1"])
    class Frame:
        "A table of another library."
        columns = ["a"]
    for table, kind in ((twice, ValueError), (Frame(), TypeError)):
        for call in (lambda: TableModel(RandomForestClassifier()).fit(table, [0, 1] * 15), lambda: explain(LogisticRegression(), table)):
            with pytest.raises(kind, match="name of two columns|to_pandas"): call()
    X = walls[["n"]].astype(float)
    line = LogisticRegression().fit(X, X.n > 5)
    with pytest.raises(ValueError, match="background: only"): explain(line, X, background=X)
    imitated = explain(line, X.assign(n=rng.normal(5.5, 1, 200)), depth=1)
    wrong = replace(imitated, agrees=imitated.agrees & False)
    with pytest.raises(Refused, match=f"answers {imitated.answers[0]}; its score of {imitated.explained[0]} is"): of(wrong, 0)


def test_a_model_file_is_loaded_as_what_it_answers(tmp_path):
    "Counts and ranks are numbers, not classes."
    import xgboost
    from opml_wb.explain.commands import explainer
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(80, 2)), columns=["a", "b"])
    count = xgboost.XGBRegressor(objective="count:poisson", n_estimators=5).fit(X, rng.poisson(np.exp(X.a)))
    ranks = xgboost.XGBRanker(n_estimators=5).fit(X, rng.integers(0, 3, 80), qid=np.repeat(range(8), 10))
    kinds = xgboost.XGBClassifier(n_estimators=5).fit(X, (X.a > 0).astype(int))
    for model in count, ranks, kinds:
        model.save_model(tmp_path / "m.json")
        found = explainer(str(tmp_path / "m.json"))(X)
        assert np.allclose(found.answers, model.predict(X)) and found.agrees.all()


def test_each_need_has_an_answer_with_its_reason():
    table = every_need()
    assert len(table) == len(AUDIENCES) * 16 and table.reason.str.len().min() > 40
    with pytest.raises(ValueError, match="did you mean 'regulator'"): needs("regulater", "decide", "accuracy")


def test_what_a_stranger_fitted_is_explained(adult):
    "Columns in another order, pipelines without trees, native categories, values, classes 0 and 1: by their own columns, in true words."
    import xgboost
    from sklearn.ensemble import HistGradientBoostingClassifier
    learn, new, _, _ = adult
    y, names = (learn.age > 40).to_numpy(), ["age", "hours_per_week", "education_num"]
    bare = RandomForestClassifier(10, random_state=0).fit(learn[names], y)
    turned = explain(bare, new[names[::-1]])
    assert turned.agrees.all() and (turned.answers == bare.predict(new[names])).all()
    with pytest.raises(ValueError, match="no column 'age'"): explain(bare, new[names[1:]])
    some = ["age", "sex", "race"]
    from sklearn.compose import make_column_transformer
    hot = make_column_transformer((OneHotEncoder(), ["sex", "race"]), remainder="passthrough")
    pipe = make_pipeline(hot, HistGradientBoostingClassifier(max_iter=10)).fit(learn[some], y)
    found = explain(pipe, new[some])
    assert list(found.values) == some and (found.answers == pipe.predict(new[some])).all()
    kinds = {"sex": "category", "race": "category"}
    for native in (HistGradientBoostingClassifier(max_iter=10, categorical_features="from_dtype"),
                   xgboost.XGBClassifier(n_estimators=5, enable_categorical=True)):
        table = learn[some].astype(kinds)
        found = explain(native.fit(table, y), table[:500])
        assert (found.answers == native.predict(table[:500])).all() and found.fidelity > .8
    value = xgboost.XGBRegressor(n_estimators=5).fit(learn[names], learn.age)
    assert explain(value, new[names]).space == "value" and explain(value, new[names]).agrees.all()
    three = RandomForestClassifier(10, random_state=0).fit(learn[names], learn.age.to_numpy() // 30)
    found = explain(three, new[names][:50])
    assert not any("granted" in render(found, row, "customer")[0] for row in found.rows.index)
