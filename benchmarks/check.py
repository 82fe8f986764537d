"""How often `fineloop adapters check` errs over years of nightly looks, and after how many records it tells.

Production is as good as the other version, or worse by the drop that is named. All nights of all years are judged at
once; `--confirmed` years are also judged night by night by the gate's own `judge`, and both have to agree on every
night. Beside it stands a fixed sample: the one-sided z-test at the same level, with as many records as show the drop in
half of all samples, as the median of the looks does, and in 80 % of them.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks import example
from components.config.gate import GateConfig
from components.gate.check import judge, records_for_rare
from components.shared.anytime import margin
from components.shared.paired import Array, Pairs

GATE = GateConfig()
FOR_RARE = records_for_rare(GATE, 1.0)
Draw = Callable[[np.random.Generator, tuple[int, int], float], Array]


def normal(rng: np.random.Generator, size: tuple[int, int], gain: float) -> Array:
    return rng.normal(gain, 0.35, size)


def heavy(rng: np.random.Generator, size: tuple[int, int], gain: float) -> Array:
    return gain + 0.35 / 3**0.5 * rng.standard_t(3, size)


def skewed(rng: np.random.Generator, size: tuple[int, int], gain: float) -> Array:
    """Now and then production loses much."""
    drawn = rng.lognormal(0, 1, size)
    return gain - (drawn - math.exp(0.5)) * 0.35 / ((math.e - 1) * math.e) ** 0.5


def right_or_wrong(rng: np.random.Generator, size: tuple[int, int], gain: float) -> Array:
    """1 where production alone is right, -1 where the other is; they differ on a tenth of the records."""
    drawn = rng.random(size)
    return np.where(drawn < (0.1 + gain) / 2, 1.0, np.where(drawn < 0.1, -1.0, 0.0))


KINDS: dict[str, tuple[Draw, float, float]] = {
    "normal": (normal, 0.35, 0.0),
    "t, 3 degrees of freedom": (heavy, 0.35, 0.0),
    "lognormal losses": (skewed, 0.35, 0.0),
    "right or wrong": (right_or_wrong, 0.1**0.5, 1.0),
}
"""By name: how differences are drawn, their standard deviation, and how much one record can gain."""


def verdicts(differences: Array, a_night: int, drop: float, largest: float) -> tuple[npt.NDArray[np.bool_], ...]:
    """Whether each night of each year says worse, and whether it says as good or better; years are rows."""
    ends = np.arange(a_night, differences.shape[1] + 1, a_night)
    sums, squares = (np.cumsum(each, axis=1)[:, ends - 1] for each in (differences, differences**2))
    spread = np.sqrt((squares - sums**2 / ends + 2 * largest**2) / (ends - 1))
    gain, width = sums / ends, spread * margin(ends, GATE.confidence)
    enough, loses_less = ends >= GATE.min_records, gain - width > -drop
    good = enough & ((gain > width) | (loses_less & (ends >= FOR_RARE)))
    return enough & (gain + width < 0) & ~loses_less, good


def confirm(differences: Array, a_night: int, drop: float, largest: float, worse: Array, good: Array) -> None:
    """Raise AssertionError unless the gate's own code says the same on every night of this year."""
    for night, (is_worse, is_good) in enumerate(zip(worse, good, strict=True)):
        drawn = differences[: (night + 1) * a_night]
        pairs = Pairs(drawn, np.zeros(len(drawn)), np.ones(len(drawn)))
        verdict = judge(
            pairs, drop, GATE.confidence, least=GATE.min_records, for_rare=FOR_RARE, largest=largest
        ).verdict
        assert (verdict == "worse", verdict in ("as good", "still better")) == (is_worse, is_good), (night, verdict)


def main() -> None:
    parser = example.parser("check", __doc__)
    parser.add_argument("--years", type=int, default=2000)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--a-night", type=int, default=20, help="new records a night")
    parser.add_argument("--drop", type=float, default=0.05)
    parser.add_argument("--confirmed", type=int, default=3, help="years of each kind that the gate's code judges too")
    options = parser.parse_args()
    print(f"{options.years:,} years of {options.nights} looks at {options.a_night} records, drop {options.drop:g}")
    print("false alarms: of equal versions, years with any look that says worse; missed: of worse ones, any as good")
    print(f"{'differences':<25}{'false alarms':>14}{'missed':>9}{'records to tell':>17}{'80 % of years':>15}", end="")
    print(f"{'fixed, half':>13}{'fixed, 80 %':>13}")
    rng = np.random.default_rng(0)
    for name, (draw, deviation, largest) in KINDS.items():
        told: dict[float, tuple[float, Array]] = {}
        for gain in (0.0, -options.drop):
            wrong, first = 0, []
            for block in range(0, options.years, 200):
                years = min(200, options.years - block)
                drawn = draw(rng, (years, options.nights * options.a_night), gain)
                worse, good = verdicts(drawn, options.a_night, options.drop, largest)
                for year in range(min(years, options.confirmed) if block == 0 else 0):
                    confirm(drawn[year], options.a_night, options.drop, largest, worse[year], good[year])
                right, false = (good, worse) if gain == 0 else (worse, good)
                wrong += int(false.any(axis=1).sum())
                first += np.where(right.any(axis=1), (right.argmax(axis=1) + 1) * options.a_night, np.inf).tolist()
            told[gain] = wrong / options.years, np.array(first)
        (alarms, _), (missed, first_told) = told[0.0], told[-options.drop]
        z = NormalDist().inv_cdf(GATE.confidence)
        fixed = [math.ceil(((z + more) * deviation / options.drop) ** 2) for more in (0.0, NormalDist().inv_cdf(0.8))]
        told_by = [f"{np.quantile(first_told, share, method='higher'):,.0f}" for share in (0.5, 0.8)]
        print(f"{name:<25}{alarms:>13.1%} {missed:>8.1%}{told_by[0]:>17}{told_by[1]:>15}{fixed[0]:>13,}{fixed[1]:>13,}")


if __name__ == "__main__":
    main()
