"""Intervals against scipy's own and against simulation."""

import numpy as np
from scipy import stats

from ray_jobs.sweeping.verdict import interval


def test_one_seed_with_a_token_each_is_the_students_interval_of_the_records():
    nll = np.random.default_rng(0).normal(1.0, 0.3, 40)
    mean, low, high = interval([nll], np.ones(40))
    expected = stats.ttest_1samp(nll, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [nll.mean(), *expected], rtol=1e-9)


def test_seeds_that_differ_on_records_that_do_not_are_the_students_interval_of_the_seeds():
    of_seeds = np.array([1.0, 1.2, 0.9, 1.1])
    found = interval(np.repeat(of_seeds[:, None], 30, axis=1), np.ones(30))
    expected = stats.ttest_1samp(of_seeds, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(found, [of_seeds.mean(), *expected], rtol=1e-9)


def test_the_interval_of_a_gain_holds_it_as_often_as_it_says():
    rng, true, held = np.random.default_rng(1), 0.05, 0
    tokens = rng.integers(1, 6, 60)
    for _ in range(400):
        records, seeds, rest = rng.normal(0, 0.2, 60), rng.normal(0, 0.03, (3, 1)), rng.normal(0, 0.2, (3, 60))
        gain, low, high = interval((true + records + seeds + rest) * tokens, tokens)
        assert low <= gain <= high
        held += low <= true <= high
    assert held / 400 > 0.93  # and 0.95 less two standard errors of 400 draws is 0.928
