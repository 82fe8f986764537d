"""What a year of decisions on one test set costs, and how often one is wrong: `python -m benchmarks.looks`.

Each night's candidate is compared with the best version on the same records, by a normal mean. Good ones are as good as
the best; bad ones are worse by the margin itself, which is where a test errs most. Part of what is seen is the same
every night, as the records are. Compared are LOND and the rule that all looks share one error rate.
"""

import numpy as np
from scipy.stats import norm

from components.config.gate import GateConfig
from components.registry.event_log import confidence_at

SPREAD = 0.22
"""Nats per token from record to record, of two seeds of the example."""
MARGIN, YEARS, NIGHTS = GateConfig().total_budget, 4000, 100


def records(look: int, passed: int) -> int:
    """Records that show with power 0.8 that an equal candidate is equal."""
    sure = norm.ppf(confidence_at(look, 0.95, passed))
    return int(np.ceil(((sure + norm.ppf(0.8)) * SPREAD / MARGIN) ** 2))


def simulated(bad: float, shared: float, *, counts_passes: bool, number: int) -> tuple[float, float, float]:
    """The expected share of bad ones among those that pass, the chance of any, and the share of good ones that pass."""
    random = np.random.default_rng(0)
    is_bad = random.random((YEARS, NIGHTS)) < bad
    same = np.sqrt(shared) * random.standard_normal((YEARS, 1))
    noise = same + np.sqrt(1 - shared) * random.standard_normal((YEARS, NIGHTS))
    seen = noise + np.where(is_bad, 0.0, MARGIN / SPREAD * np.sqrt(number))
    passes = np.zeros((YEARS, NIGHTS), dtype=bool)
    for night in range(NIGHTS):
        counts, place = np.unique(passes.sum(axis=1) * counts_passes, return_inverse=True)
        levels = norm.ppf([confidence_at(night + 1, 0.95, int(each)) for each in counts])
        passes[:, night] = seen[:, night] > levels[place]
    wrong = (passes & is_bad).sum(axis=1)
    share = wrong / np.maximum(passes.sum(axis=1), 1)
    return float(share.mean()), float((wrong > 0).mean()), float(passes[~is_bad].mean())


def main() -> None:
    print("| look | passed before | records, one error rate | records, LOND | fewer |\n|---|---|---|---|---|")
    for look in (1, 10, 20, 100):
        passed = round(0.8 * (look - 1))
        before, after = records(look, 0), records(look, passed)
        print(f"| {look} | {passed} | {before} | {after} | {1 - after / before:.0%} |")
    print()
    print("| bad candidates | shared noise | records | rule | wrong of those that pass | any wrong | good that pass |")
    print("|---|---|---|---|---|---|---|")
    for bad in (0.2, 0.5, 0.9):
        for shared in (0.0, 0.5, 0.9):
            for number in (150, 300):
                for name, counts_passes in (("one error rate", False), ("LOND", True)):
                    found = simulated(bad, shared, counts_passes=counts_passes, number=number)
                    cells = " | ".join(f"{each:.3f}" for each in found)
                    print(f"| {bad:.0%} | {shared:g} | {number} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
