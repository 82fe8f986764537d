"""The bound that may be looked at every night, against the paper's formulas and the integral that they come from."""

import mpmath
import numpy as np
import pytest
from scipy import stats

from components.shared import anytime
from components.shared.anytime import RHO2, anytime_bounds, margin, records_to_tell, share_bounds
from components.shared.paired import Pairs


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (365, 0.01), (10_000, 0.05)])
def test_one_side_is_outside_the_mixture_that_it_bounds_and_close_to_it(n: int, alpha: float) -> None:
    """The bound is crossed where a mixture of exp(l S - l^2 n / 2), over l half-normal with variance rho^2, reaches
    1 / alpha (Ville's inequality): integrated here as it stands."""

    def mixture(total: mpmath.mpf) -> mpmath.mpf:
        # Completing the square gives the peak and its width, which the integration has to be told.
        width = 1 / mpmath.sqrt(n + 1 / mpmath.mpf(RHO2))
        peak = total * width**2
        ends = [0, *(max(0, peak + step * width) for step in (-12, -4, 0, 4, 12))]
        density = 2 / mpmath.sqrt(2 * mpmath.pi * RHO2)
        return density * mpmath.quad(
            lambda each: mpmath.exp(each * total - each**2 * n / 2 - each**2 / (2 * mpmath.mpf(RHO2))),
            sorted(set(ends)),
        )

    ours = n * float(margin(n, 1 - alpha))
    assert mixture(mpmath.mpf(ours)) >= 1 / alpha
    assert mixture(mpmath.mpf(ours) * 0.9) < 1 / alpha


def test_it_is_tightest_at_some_five_hundred_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_506(rho2: float) -> float:
        monkeypatch.setattr(anytime, "RHO2", rho2)
        return float(margin(506, 0.95))

    here = at_506(1 / 80)
    assert all(at_506(1 / 80 * factor) > here for factor in (0.2, 0.5, 2.0, 5.0))
    assert here == pytest.approx(at_506(1 / 79), rel=1e-4)


def of_gains(gains: "np.typing.ArrayLike") -> Pairs:
    ours = np.array(gains, float)
    return Pairs(ours, np.zeros(len(ours)), np.ones(len(ours)))


def test_the_bound_of_a_mean_per_token_is_so_many_standard_errors_of_it() -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 40, 400).astype(float)
    ours = weights * rng.normal(0.1, 0.3, 400)
    drawn = rng.integers(0, 400, (4000, 400))
    resampled = ours[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    bounds = anytime_bounds(Pairs(ours, np.zeros(400), weights, lower_is_better=True), 0.95)
    assert bounds.gain == pytest.approx(-ours.sum() / weights.sum())
    assert bounds.upper - bounds.gain == pytest.approx(bounds.gain - bounds.lower)
    in_errors = float(margin(400, 0.95)) * 20
    assert bounds.upper - bounds.gain == pytest.approx(resampled.std() * in_errors, rel=0.05)


def test_models_that_have_not_differed_yet_may_differ_on_the_next_record() -> None:
    alike = of_gains(np.zeros(30))
    spreads = [found.upper for largest in (0.0, 1.0) if (found := anytime_bounds(alike, 0.95, largest=largest))]
    assert spreads[0] == 0
    assert spreads[1] > 0.1


@pytest.mark.parametrize("gains", [[], [1.0], [1.0, np.nan], [1.0, np.inf]])
def test_of_too_few_or_unsound_numbers_there_is_no_bound(gains: list[float]) -> None:
    assert anytime_bounds(of_gains(gains), 0.95) is None


def test_at_the_named_number_of_records_the_bound_is_as_near_as_asked() -> None:
    bounds = anytime_bounds(of_gains(np.tile([0.4, -0.3], 60)), 0.95)
    records = records_to_tell(bounds, 0.05, 0.95)
    assert records is not None
    spread = bounds.error * bounds.groups**0.5
    assert 0.97 * 0.05 < spread * float(margin(records, 0.95)) <= 0.05
    assert records_to_tell(bounds, 1e-9, 0.95) is None


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 40), (7, 40), (39, 40), (6_000, 9_000)])
def test_a_shares_bounds_are_where_the_mixture_rules_it_out(hits: int, trials: int) -> None:
    least, most = share_bounds(hits, trials, 0.05)
    assert (least == 0, most == 1) == (hits == 0, hits == trials)
    for bound in {least, most} - {0.0, 1.0}:
        assert (trials + 1) * stats.binom.pmf(hits, trials, bound) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.slow
def test_a_shares_bounds_are_wrong_at_any_look_in_at_most_alpha_of_a_thousand_paths() -> None:
    rng, looks, alpha, share = np.random.default_rng(3), np.arange(1, 1001), 0.1, 0.02
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
