"""How fresh a hundred nights of deciding keep production: `python -m benchmarks.nights`.

By the losses that were measured on the example (`tests/components/gate/nights.py`), at several distances of two
trainings, with the champion as it is measured and as it is shrunk by its selection; in a still world, and in one where
each night's data make the models of earlier nights wrong by so much.
"""

import itertools

import numpy as np

from benchmarks import example
from components.config.gate import GateConfig
from components.shared import paired
from tests.components.gate.nights import Trainer, lost_of_the_best, year

SPREAD = 0.01
"""Standard deviation of the trainings' true losses at a distance of 1, as the example's two seeds differ."""


def main() -> None:
    parser = example.parser("nights", __doc__)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kept", type=float, nargs="+", default=(0.0,), help="production's share in what is published")
    options = parser.parse_args()
    paired.RESAMPLES, paired.PER_TAIL = 400, 4  # of each bound; the gate takes ten times as many
    print("| distance | data | kept | champion | promoted of 100 | drift | behind | worse by the margin: promoted |")
    print("|---|---|---|---|---|---|---|---|")
    worlds = itertools.product((1.0, 0.7, 0.5), (0.0, 0.002), options.kept, ("measured", "shrunk"))
    for apart, moving, kept, champion in worlds:
        trainer = Trainer(apart=apart, on_the_whole=SPREAD * apart, moving=moving, kept=kept)
        years = [
            year(trainer, GateConfig(), records=options.records, seed=seed, shrinks=champion == "shrunk")
            for seed in range(options.seeds)
        ]
        promoted = [each.promoted for each in years]
        cells = [
            f"{', '.join(map(str, promoted))} (median {np.median(promoted):.0f})",
            "" if moving else f"{max(lost_of_the_best(each.held) for each in years):.3f}",
            f"{max(each.behind for each in years):.3f}",
            f"{sum(each.promoted_worse for each in years)} of {sum(each.worse for each in years)}",
        ]
        print(f"| {apart:g} | {moving:g} | {kept:g} | {champion} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
