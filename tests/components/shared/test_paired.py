import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from components.shared.paired import Bounds, Pairs, bounds, few_unseen, mcnemar, records_to_decide, score_bounds


# What R's contingencytables 3.1 prints for its examples (bentur_2009, cavo_2012), from Fagerland, Lydersen and Laake,
# Statistics in Medicine 33 (2014), table VII.
@pytest.mark.parametrize(
    ("won", "lost", "records", "published"), [(1, 7, 21, (-0.517, -0.026)), (6, 16, 161, (-0.1240, -0.0054))]
)
def test_score_bounds_are_the_published_ones(won, lost, records, published):
    assert score_bounds(won, lost, records, 0.975) == pytest.approx(published, abs=5e-4)


def test_score_bounds_of_models_that_never_differ_are_wilson_s_of_no_success():
    z = stats.norm.ppf(0.95)
    assert score_bounds(0, 0, 50, 0.95) == pytest.approx((-(z**2) / (50 + z**2), z**2 / (50 + z**2)))


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (6, 16), (16, 6), (0, 5), (700, 801)])
def test_mcnemar_is_scipy_s_binomial_test(won, lost):
    expected = stats.binomtest(lost, won + lost, 0.5, alternative="greater").pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


def test_bounds_of_a_plain_mean_are_those_of_student_s_t():
    gains = np.random.default_rng(1).standard_normal(60)
    found = bounds(Pairs(gains, np.zeros(60), np.ones(60)), 0.95)
    t = stats.ttest_1samp(gains, 0.0)
    assert found.gain == pytest.approx(gains.mean())
    assert found.error == pytest.approx(stats.sem(gains))
    low, high = t.confidence_interval(0.90)
    assert (found.lower, found.upper) == pytest.approx((low, high), abs=0.15 * found.error)


def test_a_mean_over_tokens_has_the_error_of_the_jackknife():
    random = np.random.default_rng(2)
    tokens = random.integers(1, 12, 300).astype(float)
    ours, theirs = tokens * random.exponential(0.3, 300), tokens * random.exponential(0.35, 300)
    for exponential, relative in itertools.product((False, True), repeat=2):
        pairs = Pairs(ours, theirs, tokens, None, lower_is_better=True, exponential=exponential, relative=relative)

        def gain(kept, exponential=exponential, relative=relative):
            means = np.array([values[kept].sum() / tokens[kept].sum() for values in (theirs, ours)])
            of_theirs, of_ours = np.exp(means) if exponential else means
            return 1 - of_ours / of_theirs if relative else of_theirs - of_ours

        without = np.array([gain(np.arange(300) != row) for row in range(300)])
        found = bounds(pairs, 0.95)
        assert found.gain == pytest.approx(gain(np.arange(300)))
        assert found.error == pytest.approx(math.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum()), rel=0.02)


def test_bounds_of_groups_are_those_of_their_sums():
    random = np.random.default_rng(3)
    groups = random.permutation(np.repeat(np.arange(40), 5))
    tokens = random.integers(1, 9, 200).astype(float)
    gains = tokens * (random.standard_normal(40)[groups] + random.standard_normal(200))
    summed = [np.bincount(groups, weights=values) for values in (gains, np.zeros(200), tokens)]
    expected = bounds(Pairs(*summed), 0.95)
    found = bounds(Pairs(gains, np.zeros(200), tokens, groups), 0.95)
    assert (found.gain, found.lower, found.upper) == pytest.approx((expected.gain, expected.lower, expected.upper))
    assert (found.records, found.groups) == (200, 40)
    alone = bounds(Pairs(gains, np.zeros(200), tokens), 0.95)
    assert found.upper - found.lower > 1.4 * (alone.upper - alone.lower)


def test_bounds_keep_what_they_promise_where_losses_are_skewed_and_records_few():
    """At the margin itself, a lower bound may lie above it in one of twenty samples; plain t bounds do so in more."""
    random, samples, above, above_t = np.random.default_rng(4), 400, 0, 0
    for _ in range(samples):
        gains = 1.0 - random.exponential(1.0, 30)  # mean 0, with a long tail of records that got worse
        above += bounds(Pairs(gains, np.zeros(30), np.ones(30)), 0.95).lower > 0
        above_t += stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue < 0.05
    allowed = samples * 0.05 + 2 * math.sqrt(samples * 0.05 * 0.95)
    assert above <= allowed < above_t


def test_score_bounds_keep_what_they_promise_of_every_small_sample():
    """The exact chance, summed over all tables of 60 records, that a fall of the margin itself looks smaller."""
    records, margin = 60, 0.05
    tables = [(won, lost) for won in range(records + 1) for lost in range(records + 1 - won)]
    passing = np.array([table for table in tables if score_bounds(*table, records, 0.95)[0] >= -margin])
    for lost in (0.05, 0.08, 0.12, 0.2, 0.3):
        shares = [lost - margin, lost, 1 - 2 * lost + margin]
        chance = stats.multinomial.pmf(np.c_[passing, records - passing.sum(axis=1)], records, shares).sum()
        assert chance < 0.065, lost


def test_bounds_keep_what_they_promise_where_few_records_flip_either_way() -> None:
    """The exact chance, summed over all tables of 300 records, that a bound lies above the mean itself."""
    records, flips = 300, 16
    ours = np.zeros((flips, flips))
    for won, lost in itertools.product(range(flips), repeat=2):
        gains = np.repeat([3.0, -3.0, 0.0], [won, lost, records - won - lost])
        found = bounds(Pairs(gains, np.zeros(records), np.ones(records)), 0.95)
        ours[won, lost] = found.lower
    won, lost = np.mgrid[:flips, :flips]
    for share_won, share_lost in ((0.02, 0.02), (0.02, 0.027), (0.03, 0.02)):
        shares = [share_won, share_lost, 1 - share_won - share_lost]
        chances = stats.multinomial.pmf(np.stack([won, lost, records - won - lost], axis=-1), records, shares)
        assert chances[ours > 3 * (share_won - share_lost)].sum() < 0.06


def test_nothing_is_said_of_numbers_that_are_not_finite():
    assert bounds(Pairs(np.array([1.0, math.nan]), np.zeros(2), np.ones(2)), 0.95) is None


def test_so_many_records_are_needed_as_make_the_distance_two_and_a_half_errors():
    found = Bounds(0.0, -0.02, 0.02, error=0.0125, records=250, groups=250)
    needed = records_to_decide(found, -0.02, 0.95)
    assert needed == pytest.approx(250 * (2.486 * 0.0125 / 0.02) ** 2, abs=10)
    assert records_to_decide(found, -1e-6, 0.95) is None


def lower_if_one_more(pairs: Pairs) -> float:
    found = bounds(pairs, 0.95)
    return found.gain - few_unseen(pairs, dataclasses.replace(found, lower=found.gain), 2.0, 0.95)


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_of_a_few_equal_losses_one_more_gives_clopper_and_pearson_s_bound(lost):
    values = np.where(np.arange(300) < lost, 2.0, 0.0)
    pairs = Pairs(values, np.zeros(300), np.ones(300), lower_is_better=True)
    share = stats.beta.ppf(0.95, lost + 1, 300 - lost)
    assert lower_if_one_more(pairs) == pytest.approx(-2 * share, rel=0.01)


@pytest.mark.parametrize(("lost", "of"), [(0, 2.0), (5, 2.0), (3, 1.4)])
def test_no_loss_and_many_and_small_ones_are_left_to_the_bootstrap(lost, of):
    values = np.where(np.arange(300) < lost, of, 0.01 * np.arange(300) / 300)
    pairs = Pairs(values, np.zeros(300), np.ones(300), lower_is_better=True)
    assert few_unseen(pairs, bounds(pairs, 0.95), 2.0, 0.95) == 0


def test_a_loss_on_a_short_answer_counts_as_one_that_may_fall_on_a_long_one():
    tokens = np.arange(400) % 9 + 2.0
    at = np.array([np.flatnonzero(tokens == length)[0] for length in (2, 10)])
    bound = []
    for place in at:
        values = np.where(np.arange(400) == place, 2.0, 0.0) * tokens
        pairs = Pairs(values, np.zeros(400), tokens, lower_is_better=True)
        bound.append(lower_if_one_more(pairs))
    weights = np.random.default_rng(0).exponential(size=(20_000, 401))
    usual = (tokens**2).sum() / tokens.sum()
    for place, found in zip(at, bound, strict=True):
        lost = np.zeros(401)
        lost[place], lost[-1] = 2 * tokens[place], 2 * usual
        simulated = (weights @ lost) / (weights @ np.append(tokens, usual))
        assert found == pytest.approx(-np.quantile(simulated, 0.95), rel=0.03)
