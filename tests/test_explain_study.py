"""Studies with people: power against a simulation, coverage on planted answers, marks on what is simulated."""
import numpy as np
import pandas as pd
import pytest

from opml_wb.explain.people import power as planning
from opml_wb.explain.people.studying import Study


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"age": rng.integers(18, 80, 400), "hours": rng.integers(10, 60, 400)})


def study(rows, tmp, **more):
    said = np.where(rows.hours > 35, "yes", "no")
    return Study(rows, said, {"row alone": None, "with reasons": lambda i: "hours"}, file=tmp / "answers.csv", **more)


@pytest.mark.parametrize("arms, people, items, spread, design", [
    ((.6, .75), 20, 12, .1, "between"), ((.5, .6), 40, 20, .15, "between"), ((.85, .95), 30, 10, .05, "between"),
    ((.6, .7), 40, 12, .1, "within"), ((.7, .78), 25, 24, .2, "within"), (((.8, .6), (.8, .35)), 30, 16, .1, "between"),
    ((.6, .6), 30, 12, .1, "between")])
def test_the_power_agrees_with_a_simulation_within_2_points(arms, people, items, spread, design):
    computed = planning.power(arms, people, items, spread, design)
    simulated = planning.simulated_power(arms, people, items, spread, design, repeats=20000, seed=1)
    assert abs(computed - simulated) < .02, (computed, simulated)


@pytest.mark.parametrize("design, skill, task", [
    ("between", {"row alone": .6, "with reasons": .75}, "forward"), ("within", {"row alone": .6, "with reasons": .75}, "forward"),
    ("between", {"row alone": (.8, .7), "with reasons": (.85, .4)}, "trust")])
def test_the_analysis_covers_a_planted_truth(rows, tmp_path, design, skill, task):
    "90 % intervals: of 100 studies, 90 hold the difference that was planted (150 here, binomial bounds of 99.9 %)."
    said = np.where(rows.hours > 35, "yes", "no")
    truth = np.where(np.random.default_rng(1).random(400) < .6, said, np.where(said == "yes", "no", "yes")) if task == "trust" else None
    made = study(rows, tmp_path, design=design, task=task, truth=truth, items=8)
    planted = planning.score_of(skill["with reasons"]) - planning.score_of(skill["row alone"])
    # each study's users answer as `simulate` does, drawn at once: the CSV's columns that the analysis reads
    inside = 0
    for s in range(150):
        found = made.analyse(made.simulate(skill, 12, seed=1000 + s), level=.9).iloc[-1]
        inside += found.lo <= planted <= found.hi
    assert 122 <= inside <= 146, inside


def test_a_simulated_user_is_marked_everywhere(rows, tmp_path):
    from opml_wb.explain.people.study_plots import SIMULATED, study_figure
    made = study(rows, tmp_path, items=6)
    users = made.simulate({"row alone": .6, "with reasons": .8}, 10)
    assert users.simulated.all() and users.person.str.startswith("simulated").all()
    found = made.analyse(users)
    assert found.simulated.all() and SIMULATED in [a.text for a in study_figure(found).layout.annotations]
    for person in ("ada", "bob", "cyd", "dan"):
        plan = made.session(person)
        for arm, item in zip(plan.arm, plan.item): made.put(person, arm, item, "yes")
    real = made.analyse()
    assert not real.simulated.any() and not study_figure(real).layout.annotations
    with pytest.raises(ValueError, match="mixed"): made.analyse(pd.concat([users, made.answers()]))


def test_arms_are_balanced_and_a_session_goes_on(rows, tmp_path):
    made = study(rows, tmp_path, items=6)
    for n in range(12):
        plan = made.session(f"p{n}")
        assert plan.arm.nunique() == 1 and plan.item.is_unique and len(plan) == 6
        assert (made.model[plan.item] == "yes").sum() == 3
        made.put(f"p{n}", *plan.iloc[0], response="no")
    assert made.answers().arm.value_counts().tolist() == [6, 6]
    form = made.form("p3")
    assert form.left == 5
    form.answer("yes")
    assert made.form("p3").left == 4


def test_a_csv_that_is_no_studys_is_named(rows, tmp_path):
    (tmp_path / "answers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column"): study(rows, tmp_path).answers()
