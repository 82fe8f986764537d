"""Tails of which the shape is known, by scipy's generalised Pareto distribution and by closed forms."""

import numpy as np
import pytest
from scipy.stats import gamma, genpareto

from components.shared.paired import Pairs, chance_below_zero, generalised_pareto, much_worse_unseen, unseen


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7])
def test_a_shape_is_found_again(shape: float) -> None:
    draws = [np.sort(genpareto.rvs(shape, scale=2.0, size=200, random_state=seed)) for seed in range(40)]
    found = np.array([generalised_pareto(each) for each in draws])
    assert found.mean(axis=0) == pytest.approx([shape, 2.0], abs=0.12)


def test_fewer_sums_of_a_heavy_tail_fall_far_below_its_mean() -> None:
    """Sums of a lognormal, where a bound on the mean fails because the rare values were not drawn."""
    random, mean = np.random.default_rng(0), np.exp(1.5**2 / 2)
    drawn = random.lognormal(0, 1.5, (600, 1000))
    lacks = 1000 * mean - drawn.sum(axis=1)
    lacks_still = lacks - np.array([unseen(each) for each in drawn])
    far = np.quantile(lacks, 0.9)
    assert np.mean(lacks_still > far) < 0.5 * np.mean(lacks > far)
    assert np.mean(lacks_still > 0) > 0.3


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.random.default_rng(0).standard_normal(1000), id="normal"),
        pytest.param(np.where(np.arange(1000) % 100 == 0, 2.0, -0.01), id="one in a hundred"),
        pytest.param(np.where(np.arange(300) % 100 == 0, 2.0, np.linspace(0, 0.01, 300)), id="three apart from all"),
        pytest.param(np.arange(8.0), id="few"),
        pytest.param(np.random.default_rng(3).standard_t(2.5, 1000), id="as heavy on the other side"),
    ],
)
def test_a_tail_that_ends_or_is_none_adds_next_to_nothing(values: np.ndarray) -> None:
    assert unseen(values) <= 0.1 * values.std() * np.sqrt(len(values))


@pytest.mark.parametrize("kind", ["plain", "exponential", "relative", "grouped"])
def test_it_is_in_the_unit_of_the_gain(kind: str) -> None:
    random = np.random.default_rng(3)
    weights = random.integers(2, 11, 1000).astype(float)
    lost = weights * random.lognormal(-3, 1.5, 1000)
    theirs = 2.0 * weights
    groups = np.arange(1000) // 2 if kind == "grouped" else None
    unit = {"exponential": kind == "exponential", "relative": kind == "relative"}
    pairs = Pairs(theirs + lost, theirs, weights, groups=groups, lower_is_better=True, **unit)
    mean = lost.sum() / weights.sum()
    around = lost - mean * weights
    if kind == "grouped":
        around = around.reshape(-1, 2).sum(axis=1)
    plain = unseen(around) / weights.sum()
    assert plain > 0
    # Derivatives of exp(2 + mean) - exp(2), and of (2 + mean) / 2 - 1, by the mean.
    slope = {"exponential": np.exp(2 + mean), "relative": 1 / 2}.get(kind, 1.0)
    assert much_worse_unseen(pairs) == pytest.approx(slope * plain, rel=0.02)


@pytest.mark.parametrize(("gains", "losses"), [(300, 1), (20, 4), (1, 1)])
def test_the_chance_of_a_weighted_sum_is_that_of_two_gamma_numbers(gains: int, losses: int) -> None:
    values = np.append(np.full(gains, 0.01), np.full(losses, -1.0))
    points = (np.arange(20_000) + 0.5) / 20_000
    expected = gamma.cdf(gamma.ppf(points, losses) / 0.01, gains).mean()
    assert chance_below_zero(values) == pytest.approx(expected, abs=0.01)
    assert (chance_below_zero(-values[-losses:]), chance_below_zero(values[-losses:])) == (0.0, 1.0)
