"""Exact bounds of a share, against SciPy's."""

import pytest
from scipy.stats import binom, binomtest

from components.shared import binomial


@pytest.mark.parametrize(
    ("seen", "of", "confidence"),
    [(0, 1, 0.9), (0, 299, 0.95), (4, 1000, 0.999), (7, 60, 0.95), (60, 60, 0.9), (999, 20_000, 0.95)],
)
def test_bounds_are_those_of_clopper_and_pearson(seen, of, confidence):
    # Each end of a two-sided interval is kept with half of its error.
    expected = binomtest(seen, of).proportion_ci(2 * confidence - 1, method="exact")
    assert binomial.upper(seen, of, confidence) == pytest.approx(expected.high, abs=1e-9)
    assert binomial.lower(seen, of, confidence) == pytest.approx(expected.low, abs=1e-9)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.05, 0.2, 0.96])
def test_the_fewest_records_that_show_a_share_are_named(share):
    least = binomial.least_without(share, 0.95)
    assert binom.cdf(0, least, share) <= 0.05 < binom.cdf(0, least - 1, share)


def test_two_hundred_and_ninety_nine_show_one_in_a_hundred():
    assert (binomial.least_without(0.01, 0.95), binomial.least_without(0.05, 0.95)) == (299, 59)
    assert binomial.least_without(1.0, 0.95) == 1
