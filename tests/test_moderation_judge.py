"""Moderation's judges against brute force and planted truths: precision@K, intervals of back-tests, errors and power of races."""
import pickle
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from opml_wb.moderation import Interleaver, Races, audit, backtest, coverage, precision_at_k
from opml_wb.moderation.judge import decision
from opml_wb.moderation.judge.backtest import ranks
from opml_wb.moderation.judge.races import Setting, cost, judged, rate, simulate, strength


def test_precision_equals_brute_force_over_all_orders_of_ties():
    "1,000 random cases: every order of equal scores is tried, and the mean taken."
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(1, 7))
        y, score, k = rng.integers(0, 2, n), rng.integers(0, 3, n) / 2, int(rng.integers(1, n + 1))
        orders = {tuple(sorted(p, key=lambda i: -score[i])) for p in permutations(range(n))}
        every = [y[list(o[:k])].mean() for o in orders]
        assert precision_at_k(y, score, k) == pytest.approx(np.mean(every), abs=1e-12)
        assert precision_at_k(y, score, k, "best") == pytest.approx(max(every))
        assert precision_at_k(y, score, k, "worst") == pytest.approx(min(every))


@pytest.mark.parametrize("y, score, k, said", [
    ([1, 0], [.1, .2], 3, "k: expected 1 to 2"), ([1, 0], [.1, .2], 0, "k: expected 1 to 2"), ([], [], 1, "k: expected 1 to 0"),
    ([1, 0], [.1, np.nan], 1, "score: NaN at 1"), ([1, 3], [.1, .2], 1, "y: expected 0 or 1"), ([1], [.1, .2], 1, "two arrays")])
def test_precision_refuses_by_name(y, score, k, said):
    with pytest.raises(ValueError, match=said): precision_at_k(y, score, k)


def test_one_class_only_is_a_number_and_nothing_to_cover_is_said():
    assert precision_at_k([0, 0, 0], [3, 2, 1], 2) == 0 and precision_at_k([1, 1], [3, 2], 2) == 1
    with pytest.raises(ValueError, match="no violations"): coverage([0, 0], [1, 2], 1, [1, 0])


# --- back-tests

def logs(count, n=2000, days=20, k=100, prevalence=.05, budget=.25, noise=(0, 0), unequal=True, aimed=False):
    """Draw logs of two models whose labels are the current one's alerts and an audit: [(BackTest, truth on the log)].

    `unequal`: days differ in size, as real ones do; `aimed`: the audit is of the new model's own alerts."""
    rng, found = np.random.default_rng(1), []
    strong = [strength(p, k, n, prevalence) for p in (.5, .6)]
    for i in range(count):
        day = np.repeat(np.arange(days), rng.poisson(n, days) if unequal else n)
        y = rng.random(len(day)) < prevalence
        shared = rng.standard_normal(len(day)) * .7 ** .5
        current, new = (shared + y * s + rng.standard_normal(len(day)) * .3 ** .5 for s in strong)
        plan = audit(current, day, k, budget, seed=i, new=new if aimed else None)
        said = np.where(y, rng.random(len(day)) >= noise[0], rng.random(len(day)) < noise[1])
        log = plan.assign(y=np.where(plan.chosen, said, np.nan))
        top = [ranks(s, day) < k for s in (current, new)]
        found.append((backtest(current, new, log, k, noise=noise), (y[top[1]].sum() - y[top[0]].sum()) / (k * days)))
    return found


def held(found): return np.mean([b.corrected_lo <= t <= b.corrected_hi for b, t in found])


def half(found): return np.mean([b.corrected_hi - b.corrected_lo for b, _ in found]) / 2


@pytest.mark.parametrize("count, unequal", [(150, False), (400, True)], ids=["equal days", "days of all sizes"])
def test_a_corrected_back_test_holds_the_truth_where_the_naive_one_has_the_wrong_sign(count, unequal):
    found = logs(count, unequal=unequal)
    assert np.mean([b.delta for b, _ in found]) < -.03 and np.mean([t for _, t in found]) > .08
    assert .86 <= held(found) <= .96, held(found)
    assert half(found) <= .08


def test_an_audit_of_a_known_candidate_tells_as_truly_and_more():
    "With K = 40 the audit for any model is too wide; of the same price, drawn from the candidate's own alerts, it is not."
    aimed, blind = logs(200, k=40, aimed=True), logs(30, k=40)
    assert .86 <= held(aimed) <= .96, held(aimed)
    assert half(aimed) <= .04 < .08 < half(blind)


@pytest.mark.parametrize("given", [dict(k=10, unequal=True), dict(k=5, prevalence=.004, ahead=.3)], ids=["days of all sizes", "violations are rare"])
def test_few_alerts_and_a_small_audit_hold_the_truth_too(given):
    "Hardly any label lies among the low ranks: their rate is near 0, below what is taken for it, each time and not by chance."
    held = 0
    for i in range(50): held += small_log(i, **given)
    assert held >= 41, held                               # of 90 in 100, fewer of 50 are 1 try in 40


def small_log(i, k, n=500, days=20, prevalence=.01, ahead=-.6, unequal=False):
    "Say whether a 90 % interval from an audit of a quarter of k holds the truth of one simulated log."
    rng = np.random.default_rng((3, i))
    day = np.repeat(np.arange(days), rng.integers(n // 6, 2 * n - n // 6, days) if unequal else n)
    y, alike = rng.random(len(day)) < prevalence, rng.normal(size=len(day))
    current, new = (alike + .8 * rng.normal(size=len(day)) + strong * y for strong in (2.2, 2.2 + ahead))
    plan = audit(current, day, k, .25, seed=i)
    found = backtest(current, new, plan.assign(y=np.where(plan.chosen, y, np.nan)), k)
    truth = y[ranks(new, day) < k].sum() - y[ranks(current, day) < k].sum()
    return found.corrected_lo <= truth / (k * days) <= found.corrected_hi


def test_a_back_test_refuses_by_name():
    log = pd.DataFrame({"day": [0.] * 4 + [1.] * 4, "y": 0, "propensity": 1.})
    for k in (0, 2.5, -1):
        with pytest.raises(ValueError, match=f"k: expected a whole number from 1, got {k}"): backtest(range(8), range(8), log, k)
    with pytest.raises(ValueError, match="log.day: missing in row 5"): backtest(range(8), range(8), log.assign(day=[0.] * 4 + [np.nan] * 4), 2)


def test_sixty_days_of_all_sizes_are_corrected():
    "As many propensities as days: once more than 50 of them were refused, and fewer made strata of one label."
    found = logs(25, days=60)
    assert all(not b.why for b, _ in found) and half(found) < .05 and held(found) >= .8


def test_an_audit_for_another_model_is_wide_and_not_wrong():
    "Drawn for one candidate, asked of another: what was never to be reviewed may be anything."
    rng, day = np.random.default_rng(0), np.repeat(np.arange(20), 1000)
    y = rng.random(len(day)) < .05
    current, new, other = (y * 2 + rng.standard_normal(len(day)) for _ in range(3))
    plan = audit(current, day, 20, new=new)
    assert set(plan.propensity[plan["rank"] >= 20].eq(0)) == {True, False} and 20 * 20 * 1.1 < plan.chosen.sum() < 20 * 20 * 1.4
    log = plan.assign(y=np.where(plan.chosen, y, np.nan))
    right, wrong = (backtest(current, s, log, 20) for s in (new, other))
    assert wrong.corrected_hi - wrong.corrected_lo > 3 * (right.corrected_hi - right.corrected_lo)
    truth = (y[ranks(other, day) < 20].sum() - y[ranks(current, day) < 20].sum()) / 400
    assert wrong.corrected_lo <= truth <= wrong.corrected_hi


@pytest.mark.parametrize("change, said", [(dict(current=[.1, np.nan]), "current: expected 2 scores"), (dict(new=[.1]), "new: expected 2 scores"),
                                          (dict(budget=-1), "budget: expected 0 or more")])
def test_an_audit_refuses_by_name(change, said):
    with pytest.raises(ValueError, match=said): audit(**{"current": [.1, .2], "day": [0, 0], "k": 1, **change})


def test_moderators_errors_are_carried_into_the_interval():
    noisy = logs(60, noise=(.15, .02))
    assert held(noisy) >= .75, held(noisy)
    careless = np.mean([b.corrected for b, _ in noisy]) * (1 - .15 - .02)    # what is said without a correction
    truth = np.mean([t for _, t in noisy])
    assert abs(np.mean([b.corrected for b, _ in noisy]) - truth) < abs(careless - truth) + .02


def test_without_propensities_nothing_is_corrected():
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"day": np.repeat([0, 1], 50), "y": rng.integers(0, 2, 100)})
    for broken in (log, log.assign(propensity=np.nan), log.assign(propensity=2.), log.assign(propensity=0.)):
        told = backtest(rng.random(100), rng.random(100), broken, 5)
        assert np.isnan(told.corrected) and "propensity" in told.why and np.isfinite(told.delta)


@pytest.mark.parametrize("days", [4, 12])
def test_intervals_of_gains_cover_over_few_days(days):
    "Hits of both models by day, of which the truth is known: a gain of 20 % in each of 600 logs."
    from opml_wb.moderation.experiment import Days, gains
    rng, k, held = np.random.default_rng(0), 20, []
    for _ in range(600):
        found = {kind: rng.binomial(k, p, days) for kind, p in (("lr", .5), ("gmu", .6))}
        y = [np.arange(3 * k) < 2 * k for _ in range(days)]
        scores = {kind: [np.isin(np.arange(3 * k), np.r_[:n, 3 * k - (k - n):3 * k]) * 1. for n in hits] for kind, hits in found.items()}
        of = gains(scores, Days([], [], y), k).loc["gmu"]
        held.append(of.lo <= 20 <= of.hi)
    assert .925 <= np.mean(held) <= .975, np.mean(held)


# --- races

@pytest.fixture(scope="module")
def equal(): return simulate(Setting(n=1000, k=20, prevalence=.02), 400, 20, seed=1, ab=False)


def test_equal_models_are_hardly_ever_promoted(equal):
    "The upper 99.9 % bound of the count leaves room for chance; the bench counts 2,000 races."
    for races in (equal, simulate(Setting(n=1000, prevalence=.02, burst=.3), 300, 20, seed=2, ab=False),
                  simulate(Setting(n=1000, prevalence=.02, decline=.5), 300, 20, seed=3, ab=False)):
        for verdict, _ in (decision.with_horizon(races.D, 20), decision.any_time(races.D, races.depth)):
            assert rate(verdict, .999)[1] <= .05, rate(verdict)
    assert .3 < (decision.plain_rule(equal.plain, 20)[0] == decision.PROMOTE).mean() < .6


@pytest.mark.parametrize("sizes", [[1] * 7, [1] * 10, [0] * 16 + [1] * 4, [8] + [1] * 12, [1, 2, 3] * 6])
def test_the_error_holds_for_any_sizes_of_differences(sizes):
    "Signs by chance, sizes as they are: few blocks that differ, one burst, all alike (where a bound on z errs in 6.8 %)."
    signs = np.random.default_rng(0).choice([-1, 1], (20_000, len(sizes)))
    said, _ = decision.with_horizon(signs * np.array(sizes), len(sizes))
    assert (said == decision.PROMOTE).mean() <= .0425 + 3 * (.0425 / 20_000) ** .5


def test_bursts_that_only_the_current_model_finds_are_warned_of():
    "Means that are equal are no signs that are: what the test's error holds for, and what is said where a burst came."
    coin = np.random.default_rng(0).random((500, 14))
    won = decision.with_horizon(np.where(coin < 1 / 9, -8, 1), 14)[0] == decision.PROMOTE
    assert .25 < won.mean() < .5                          # not alpha, and the texts say so
    for sizes, warned in (([1, 1, 1, -8, 1], True), ([1, 1, 2, -1, 1], False), ([1] * 5, False)):
        race = Interleaver(20, days=5)
        for d, size in enumerate(sizes):
            for i in race.allocate(np.r_[np.arange(10.) + 9, np.zeros(10), np.ones(30)], np.r_[np.zeros(10), np.arange(10.) + 9, np.ones(30)], [f"{d}-{i}" for i in range(50)]).id:
                race.record(i, int(i.split("-")[1]) in (range(10, 10 + size) if size > 0 else range(-size)))
        assert race.differences()[0].tolist() == sizes and bool(race.report().attrs["warning"]) == warned


def test_an_ab_test_shares_each_block_out_anew():
    "Races are independent: D of equal models has no mean of its own in a block, whatever the block."
    ran = simulate(Setting(n=400, k=10, prevalence=.05), 300, 6, seed=8)
    assert (np.abs(ran.ab.mean(0)) < 4 * ran.ab.std() / 300 ** .5).all()


def test_a_race_too_short_to_prove_anything_says_so():
    with pytest.warns(UserWarning, match="4 blocks can't prove anything at alpha=0.05; 5 can"): Interleaver(4, days=4)
    with pytest.warns(UserWarning, match="10 can"): Races(of=30).start("a", 4, 9)
    assert Interleaver(4, days=5).verdict() == "continue"


def test_better_models_are_promoted_and_worse_ones_are_not():
    better = simulate(Setting(n=1000, prevalence=.02, new=.6, alike=.85), 200, 20, seed=4)
    assert better.overlap >= .55 and judged(better, 20).promoted["sequential"] >= .85
    worse = simulate(Setting(n=1000, prevalence=.02, new=.45), 300, 20, seed=5, ab=False)
    assert (decision.with_horizon(worse.D, 20)[0] == decision.PROMOTE).mean() <= .01
    days, power, spent = cost(better.D, better.reviews)
    ab = better.resampled(300, 80)
    ab_days, _, ab_spent = cost(ab.ab, np.full(ab.ab.shape, 20.))
    assert 0 < days <= 20 and (ab_days == 0 or spent / ab_spent < .4)


def test_races_in_parallel_share_their_error(equal):
    "Thirty races at a thirtieth of the error each: families with a false promotion."
    D = np.random.default_rng(0).choice(equal.D.shape[0], (300, 30))
    signs = np.random.default_rng(1).choice([-1, 1], (300, 30, 20))
    any_ = np.array([(decision.with_horizon(equal.D[rows] * s, 20, .05 / 30)[0] == decision.PROMOTE).any() for rows, s in zip(D, signs)])
    assert rate(any_.astype(int) * decision.PROMOTE, .999)[1] <= .05
    races = Races(of=30)
    assert races.start("a", 20, 20).alpha == pytest.approx(.05 / 30)


def test_the_class_says_what_the_thousands_say(equal):
    "A race by Interleaver's own calls gives the verdict of the arrays."
    rng = np.random.default_rng(0)
    for new in (.5, .9):
        race, D = Interleaver(10, days=8), []
        for _ in range(8):
            y = rng.random(300) < .05
            current, strong = rng.normal(size=300) + 2 * y, rng.normal(size=300) + 2 * y + 4 * (new - .5) * y
            for id in race.allocate(current, strong, np.arange(300)).id: race.record(id, bool(y[id]))
            D.append(race.report().D.iloc[-1])
        assert decision.VERDICTS[decision.with_horizon(D, 8)[0][0]] == race.verdict()


def test_fewer_candidates_than_slots_and_identical_models():
    few = Interleaver(20, days=5)
    for _ in range(5):
        table = few.allocate([.3, .2, .1], [.1, .2, .3], ["a", "b", "c"])
        assert set(table.arm) == {"both"} and len(table) == 3
        for id in table.id: few.record(id, True)
    assert few.verdict() == "keep" and few.report().attrs["depth"] == 3
    empty = Interleaver(4, days=5)
    assert len(empty.allocate([], [], [])) == 0 and empty.verdict() == "continue"
    forever = Interleaver(4)
    for _ in range(30):
        for id in forever.allocate(np.arange(9.), np.arange(9.), range(9)).id: forever.record(id, bool(id % 2))
    assert forever.verdict() == "continue"


def test_a_day_without_traffic_or_without_one_arms_candidates_is_no_block():
    race = Interleaver(4, days=5)
    for _ in range(9): race.allocate([], [], [])
    assert race.verdict() == "continue" and len(race.report()) == 9
    table = race.allocate([.9, .8], [.1, .1], ["a", "b"], thresholds=(.5, .5))      # the new one alerts nothing
    assert set(table.arm) == {"extra"}
    for id in table.id: race.record(id, True)
    assert len(race.differences()[0]) == 0
    for _ in range(5):
        for id in race.allocate(np.arange(9.), -np.arange(9.), range(9)).id: race.record(id, id < 4)
    assert race.verdict() == "promote"


def test_a_sellers_copies_are_one_decision_and_open_reviews_wait():
    race = Interleaver(4, days=5)
    score = np.linspace(1, 0, 12)
    table = race.allocate(score, score, range(12), groups=[0] * 8 + [1, 2, 3, 4])
    assert len(table) == 4 and sum(id < 8 for id in table.id) == 1
    for id in table.id[:3]: race.record(id, False)
    assert len(race.differences()[0]) == 0               # one review is open
    race.record(table.id[3], True)
    race.record(table.id[3], None)                       # taken back
    assert len(race.differences()[0]) == 0
    with pytest.raises(ValueError, match="stands more than once"): race.allocate([1, 2], [1, 2], ["a", "a"])
    with pytest.raises(ValueError, match="NaN for id 'b'"): race.allocate([1, np.nan], [1, 2], ["a", "b"])


def test_the_first_verdict_stays_however_late_a_block_is_decided():
    "Eleven days won are a promotion; the first day, decided last and lost, takes nothing back."
    race, said = Interleaver(2, days=12), []
    for d in range(12): race.allocate([3, 2, 1, 0], [0, 1, 2, 3], [f"{d}{i}" for i in "cxyn"])
    for d in (*range(1, 12), 0):
        for arm in "cn": race.record(f"{d}{arm}", arm == ("n" if d else "c"))
        said.append(race.verdict())
    first = said.index("promote")
    assert first < 11 and set(said[first:]) == {"promote"} and race.differences()[0].tolist() == [1.] * 11 + [-1.]
    race.record("5n", None)                                    # taken back and said again: at its place
    race.record("5n", True)
    assert race.differences()[0].tolist() == [1.] * 11 + [-1.] and pickle.loads(pickle.dumps(race)).verdict() == "promote"


def test_an_id_in_two_blocks_counts_in_both_and_a_missing_group_is_its_own():
    race = Interleaver(4, days=5)
    for ids in ("abcdxy", "abefxy"): race.allocate([9, 8, 0, 0, 5, 4.], [0, 0, 9, 8, 5, 4.], list(ids))
    for i in "abcdef": race.record(i, i in "cdef")
    assert race.report().complete.all() and race.differences()[0].tolist() == [2, 2]
    for missing in (None, np.nan, pd.NA):
        shown = Interleaver(6, days=5).allocate(np.arange(6.), np.arange(6.), list("abcdef"), groups=[missing] * 4 + ["x", "x"])
        assert sorted(shown.id) == list("abcdf")
    assert len(Interleaver(6, days=5).allocate(np.arange(6.), np.arange(6.), list("abcdef"), groups=pd.Series([np.nan] * 5 + [7.]))) == 6
    with pytest.raises(ValueError, match="groups: expected 6, got 3"): race.allocate(np.arange(6.), np.arange(6.), list("abcdef"), groups=["x"] * 3)


def test_the_papers_rule_takes_half_of_the_slots_each():
    race, score = Interleaver(6, rule="paper", days=1), np.linspace(1, 0, 10)
    table = race.allocate(score, score[::-1], range(10))
    assert (table.arm == "current").sum() == (table.arm == "new").sum() == 3
    for id in table.id: race.record(id, id >= 9)         # one more violation is enough
    assert race.verdict() == "promote"
