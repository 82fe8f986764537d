"""The bound that may be looked at every night, against the paper's formulas and the integral that they come from."""

import mpmath
import numpy as np
import pytest
from scipy import stats

from components.shared.anytime import Moments, margin, records_for, rho2_for, share_bounds

RECORDS, RHO2, ALPHA = (1, 30, 365, 10_000), (0.001, 0.02, 1.0), (0.01, 0.05)
CELLS = [(n, rho2, alpha) for n in RECORDS for rho2 in RHO2 for alpha in ALPHA]


@pytest.mark.parametrize(("n", "rho2", "alpha"), CELLS)
def test_two_sides_are_the_papers_theorem(n: int, rho2: float, alpha: float) -> None:
    # arXiv:2103.06476, (4): sqrt(2 (t rho^2 + 1) / (t^2 rho^2) log(sqrt(t rho^2 + 1) / alpha)), in 50 digits.
    with mpmath.workdps(50):
        t, r = mpmath.mpf(n), mpmath.mpf(rho2)
        wanted = mpmath.sqrt(2 * (t * r + 1) / (t**2 * r) * mpmath.log(mpmath.sqrt(t * r + 1) / mpmath.mpf(alpha)))
    assert margin(float(n), rho2, alpha, sides=2) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize(("n", "rho2", "alpha"), CELLS)
def test_one_side_is_outside_the_mixture_that_it_bounds_and_close_to_it(n: int, rho2: float, alpha: float) -> None:
    """The bound is crossed where a mixture of exp(l S - l^2 n / 2), over l half-normal with variance rho^2, reaches
    1 / alpha (Ville's inequality): integrated here as it stands."""

    def mixture(total: mpmath.mpf) -> mpmath.mpf:
        # Completing the square gives the peak and its width, which the integration has to be told.
        width = 1 / mpmath.sqrt(n + 1 / mpmath.mpf(rho2))
        peak = total * width**2
        ends = [0, *(max(0, peak + step * width) for step in (-12, -4, 0, 4, 12))]
        density = 2 / mpmath.sqrt(2 * mpmath.pi * rho2)
        return density * mpmath.quad(
            lambda each: mpmath.exp(each * total - each**2 * n / 2 - each**2 / (2 * mpmath.mpf(rho2))),
            sorted(set(ends)),
        )

    ours = n * margin(float(n), rho2, alpha)
    assert mixture(mpmath.mpf(ours)) >= 1 / alpha
    assert mixture(mpmath.mpf(ours) * 0.9) < 1 / alpha


@pytest.mark.parametrize("drop", [0.05, 0.15, 0.5])
def test_it_is_tightest_where_it_shows_the_drop(drop: float) -> None:
    rho2 = rho2_for(drop, 0.05)
    shown = records_for(drop, rho2, 0.05)
    assert shown is not None
    others = [margin(float(shown), rho2 * factor, 0.05) for factor in (0.2, 0.5, 2.0, 5.0)]
    assert margin(float(shown), rho2, 0.05) <= drop < margin(float(shown - 1), rho2, 0.05)
    assert min(others) > margin(float(shown), rho2, 0.05) * 0.999
    assert records_for(1e-9, rho2, 0.05) is None


def test_moments_of_two_samples_add_up_to_those_of_both() -> None:
    rng = np.random.default_rng(1)
    gains, weights = rng.normal(1e6, 1, 500), rng.integers(1, 40, 500).astype(float)
    whole = Moments.of(gains, weights)
    added = sum((Moments.of(gains[a:b], weights[a:b]) for a, b in ((0, 1), (1, 1), (1, 200), (200, 500))), Moments())
    assert vars(added) == pytest.approx(vars(whole))
    assert whole.mean == pytest.approx(gains.sum() / weights.sum())


def test_the_spread_of_a_mean_per_token_is_what_resampling_gives() -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 40, 400).astype(float)
    gains = weights * rng.normal(0.1, 0.3, 400)
    drawn = rng.integers(0, 400, (4000, 400))
    resampled = gains[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    assert Moments.of(gains, weights).spread() / 400**0.5 == pytest.approx(resampled.std(), rel=0.05)


def test_models_that_have_not_differed_yet_may_differ_on_the_next_record() -> None:
    alike = Moments.of(np.zeros(30), np.ones(30))
    assert alike.spread() == 0
    assert alike.spread(1.0) > 0.2


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 40), (7, 40), (39, 40), (6_000, 9_000)])
def test_a_shares_bounds_are_where_the_mixture_rules_it_out(hits: int, trials: int) -> None:
    least, most = share_bounds(hits, trials, 0.05)
    assert (least == 0, most == 1) == (hits == 0, hits == trials)
    for bound in {least, most} - {0.0, 1.0}:
        assert (trials + 1) * stats.binom.pmf(hits, trials, bound) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_shares_bounds_are_wrong_at_any_look_in_at_most_alpha_of_a_thousand_paths(share: float) -> None:
    rng, looks, alpha = np.random.default_rng(3), np.arange(1, 1001), 0.1
    hits = np.cumsum(rng.random((1000, len(looks))) < share, axis=1)
    bounds = {(hit, trials): share_bounds(hit, trials, alpha)
              for hit, trials in {*zip(hits.ravel().tolist(), np.tile(looks, 1000).tolist(), strict=True)}}  # fmt: skip
    wrong = 0
    for path in hits.tolist():
        looked = [bounds[hit, trials] for trials, hit in enumerate(path, start=1)]
        wrong += any(not least <= share <= most for least, most in looked)
    intervals = stats.beta.interval(1 - alpha, hits + 0.5, looks - hits + 0.5)  # of one look, Jeffreys'
    fixed = int(((share < intervals[0]) | (share > intervals[1])).any(axis=1).sum())
    assert wrong <= alpha * 1000 < fixed
