"""Attacks and defences on Adult: games at equal budgets, reconstruction with and without defences, fields from contributions, membership."""
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from opml_wb.explain import TableModel, game, membership, reconstruct, tradeoff
from opml_wb.explain.attack.asking import attributions, moves
from opml_wb.explain.attack.defending import Coarse, RateLimit, min_leaf
from opml_wb.explain.attack.examples import Examples, SyntheticExamples, excess, fidelity
from opml_wb.explain.attack.gaming import games, play, refused
from opml_wb.explain.attack.reconstruction import infer_fields
from opml_wb.explain.data import load

ACTIONABLE = {"age": "up", "education_num": "up", "occupation": "any", "workclass": "any", "hours_per_week": "any"}


@pytest.fixture(scope="module")
def adult():
    "Adult in random order: a model on 1,500 rows, and people whom it never saw."
    X, y = load("adult")
    at = np.random.default_rng(0).permutation(len(X))
    train, others = at[:1500], at[1500:3000]
    model = TableModel(RandomForestClassifier(40, random_state=0), unseen="missing").fit(X.iloc[train], y.iloc[train])
    return model, X.iloc[train], y.iloc[train].to_numpy(), X.iloc[others], y.iloc[others].to_numpy()


# --- gaming

def test_all_arms_play_by_the_same_rules(adult):
    "One budget, allowed fields and directions only, at most three changes; who is granted was granted by the model."
    model, _, _, others, _ = adult
    rows, may = refused(model, others)[:60], moves(others, ACTIONABLE)
    asked = []
    class Counting:
        classes = model.classes
        def predict(self, X): return model.predict(X)
        def predict_proba(self, X):
            asked.append(X)
            return model.predict_proba(X)
    for arm in ("climb", "jump", "learn", "guided climb", "guided jump"):
        asked.clear()
        played = play(Counting(), rows, may, 12, arm, np.random.default_rng(0), attributions(model))
        assert played.queries.between(1, 12).all() and played.changes.max() <= 3
        assert played.flipped.any() and not played.flipped.all()
        tried = asked[1:]                                        # the first is the refusal itself
        assert len(tried) <= 12 and sum(map(len, tried)) == played.queries.sum()
        for t in tried:
            start = rows.loc[t.index]
            for f in others:
                same = (t[f] == start[f]) | (t[f].isna() & start[f].isna())
                if f not in ACTIONABLE: assert same.all(), f
                elif ACTIONABLE[f] == "up": assert (t[f] >= start[f]).all(), f


def test_games_say_what_their_intervals_carry(adult):
    model, _, _, others, _ = adult
    table = games(model, others, ACTIONABLE, (3, 10), range(5), 40)
    assert table.budget.tolist() == [3] * 3 + [10] * 3
    edges, runs = table[table.guide == "edge"], table.attrs["runs"]
    for line in edges.itertuples():
        assert line.lo < line.flipped < line.hi
        best = max(runs[line.budget, arm].mean() for arm in ("climb", "jump", "learn"))
        assert table[(table.budget == line.budget) & (table.guide == "queries")].flipped.item() == pytest.approx(best)
    flipped = table[table.guide != "edge"].set_index(["budget", "guide"]).flipped
    assert flipped[10, "queries"] >= flipped[3, "queries"] and flipped[10, "explanation"] >= flipped[3, "explanation"]


@pytest.mark.parametrize("change, names", [
    (dict(actionable=["agee"]), "did you mean 'age'"), (dict(actionable={"occupation": "up"}), "no up"), (dict(budget=0), "at least 1"),
    (dict(guide="magic"), "magic"), (dict(target="rich"), "classes are"), (dict(actionable=[]), "no field")])
def test_a_game_that_cannot_be_played_is_named(adult, change, names):
    model, _, _, others, _ = adult
    with pytest.raises(ValueError, match=names): game(model, others[:50], **{"actionable": ["age"], "guide": "queries", **change})


def test_models_and_tables_that_tell_nothing():
    X = pd.DataFrame({"a": np.arange(60.), "gap": np.nan, "same": 1.})
    y = X.a > 30
    tree = RandomForestClassifier(5, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="no value at all"): game(tree, X, ["gap"], 3, "queries")
    assert not game(tree, X, ["same"], 3, "queries").flipped.any()
    with pytest.raises(ValueError, match="one class only"): game(RandomForestClassifier(5).fit(X, y * 0), X, ["a"], 3, "queries")
    with pytest.raises(TypeError, match="LogisticRegression"): attributions(LogisticRegression().fit(X[["a"]], y))(X[["a"]])
    with pytest.raises(TypeError, match="LogisticRegression"): min_leaf(LogisticRegression(), X[["a"]], y, 5)


# --- reconstruction

def test_examples_give_the_training_table_away(adult):
    "k = 5, 1 % known, the record itself excluded: 70 % and more; a tenth of the questions is a defence."
    _, train, *_ = adult
    cases = Examples(train, 5)
    near = cases.nearest(train[:200])
    assert (near != np.arange(200)[:, None]).all()
    curve = reconstruct(cases, .01, draws=3).set_index("queries")
    assert curve.lo.iloc[-1] >= .7
    assert .15 < curve.recovered[150] < .35
    limited = reconstruct(cases, .01, defence=lambda e: RateLimit(e, .1), draws=3)
    assert limited.recovered.max() == pytest.approx(curve.recovered[150], abs=.06)


def test_synthetic_examples_hide_people_and_stay_true(adult):
    "Near matches (12 of 14 fields) in excess of people never used: at most .05; fidelity no more than .02 below."
    model, train, _, others, _ = adult
    plain = Examples(train, 5)
    safe = SyntheticExamples(plain, model)
    asked, people = train[:300], others[:300]
    open_, hidden = excess(plain, asked, asked, people), excess(safe, asked, asked, people)
    assert open_["excess"] > .3 and hidden["excess"] <= .05, (open_, hidden)
    assert fidelity(model, safe, people) >= fidelity(model, plain, people) - .02
    assert reconstruct(plain, .01, defence=lambda e: SyntheticExamples(e, model), draws=1).recovered.max() < .015


def test_contributions_give_fields_away_and_three_give_less(adult):
    model, train, _, others, _ = adult
    explain = attributions(model)
    found = infer_fields(explain, train, others[:120], 80, 400, range(2)).set_index("field")
    assert found.recovered["(all)"] > found.baseline["(all)"] + .08
    assert found.recovered["sex"] > found.baseline["sex"]
    fewer = infer_fields(Coarse(explain, 2, 3), train, others[:120], 80, 400, range(2)).set_index("field")
    assert fewer.recovered["(all)"] < found.recovered["(all)"]


def test_membership_by_answers_and_by_explanations(adult):
    model, train, y, others, truth = adult
    told = membership(model, (train, y), (others, truth), "truth")
    assert told.lo > .55
    wide = min_leaf(model, train, y, 20)
    assert membership(wide, (train, y), (others, truth), "truth").value < told.value - .05
    shap = membership(model, train[:300], others[:300], "variance")
    assert shap.lo < shap.value < shap.hi


@pytest.mark.slow
def test_the_table_of_defences(adult):
    model, train, y, *_ = adult
    table = tradeoff(model, train, y, 300, range(3)).set_index(["against", "defence"])
    assert table.attack["records", "none"] > .6 > table.attack["records", "rate limit: n/10 questions"]
    assert table.attack["records", "synthetic examples"] < .03
    assert table.accuracy["membership", "5 people a leaf"] > table.accuracy["membership", "none"] - .03
