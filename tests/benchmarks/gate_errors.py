"""How often the gate errs, and how often it tells, on differences that are hard for a mean.

`python -m tests.benchmarks.gate_errors [REPETITIONS]` prints a table: of candidates that are truly worse than the
champion by the margin, and of equal ones, the share that is promoted by the bound of the mean alone, and with what is
reckoned of rare losses; "-" where the gate cannot tell, whatever comes. Answers have 2 to 10 tokens, and records differ
by 0.2 nats per token or as the row says.
"""

import sys
from collections.abc import Callable

import numpy as np

from components.config.gate import GateConfig
from components.gate import slices
from components.gate.champion import not_worse_than_champion
from components.gate.comparisons import Compared
from components.gate.evidence import Evidence
from components.gate.rare_losses import few_get_much_worse
from components.records.steps import Evaluation, Measured
from components.shared.metrics import METRICS

MARGIN, SPREAD, SIGMA = 0.02, 0.2, 1.5
RECORDS = (60, 240, 300, 1000)
POLICY, MEAN_ALONE = GateConfig(), GateConfig(much_worse_share=1.0)
Lost = Callable[[np.random.Generator, int, float], np.ndarray]
"""What the candidate loses on each record in nats per token, by so much on the whole."""


def skewed(random: np.random.Generator, records: int, worse_by: float) -> np.ndarray:
    mean = np.exp(SIGMA**2 / 2)
    drawn = random.lognormal(0, SIGMA, records) - mean
    return worse_by + SPREAD * drawn / (mean * np.sqrt(np.exp(SIGMA**2) - 1))


def flipping(random: np.random.Generator, records: int, worse_by: float) -> np.ndarray:
    drawn = random.random(records)
    return np.select([drawn < 0.02, drawn < 0.04 + worse_by / 3], [-3.0, 3.0], 0.0)


def rare(share: float, nats: float) -> Lost:
    def lost(random: np.random.Generator, records: int, worse_by: float) -> np.ndarray:
        return np.where(random.random(records) < share, nats, (worse_by - share * nats) / (1 - share))

    return lost


ROWS: dict[str, Lost] = {
    "normal": lambda random, records, worse_by: worse_by + SPREAD * random.standard_normal(records),
    "heavy tails (t, 3 degrees)": lambda random, records, worse_by: (
        worse_by + SPREAD / np.sqrt(3) * random.standard_t(3, records)
    ),
    "skewed (lognormal, sigma 1.5)": skewed,
    "2 % to wrong, 2 % to right, 3 nats": flipping,
    "3 % lose 1.2 nats, others gain": rare(0.03, 1.2),
    "1 % lose 2 nats": rare(0.01, 2.0),
}


def promoted(lost: Lost, records: int, worse_by: float, repetitions: int) -> tuple[float, float | None]:
    """The share that the bound of the mean lets pass, and what both rules do; None where they cannot tell."""
    random = np.random.default_rng(records)
    passed, seen = [], []
    for _ in range(repetitions):
        tokens = random.integers(2, 11, records).astype(float)
        nll = 2.0 * tokens
        columns = {"champion_nll": nll, "candidate_nll": nll + tokens * lost(random, records, worse_by)}
        models = {
            role: Measured(version=role, metrics={"loss": float(columns[f"{role}_nll"].sum() / tokens.sum())})
            for role in ("champion", "candidate")
        }
        measured = Evaluation(run_id="r", records=records, models=models)
        compared = Compared(
            measured, Evidence(tokens, columns), METRICS["loss"], "champion", "production", POLICY.confidence
        )
        passed.append(not_worse_than_champion(MEAN_ALONE, models["champion"], compared).passed)
        shown = few_get_much_worse(POLICY, compared)
        if shown is not None and shown.passed:
            seen.append(not_worse_than_champion(POLICY, models["champion"], compared).passed)
    return float(np.mean(passed)), sum(seen) / repetitions if seen else None


def held_by_a_label(labels: int, records: int, worse_by: float, repetitions: int) -> float:
    """How often a label is shown to be worse, where one of so many is, by so much, and the others are alike."""
    random = np.random.default_rng(labels)
    names = np.resize(np.arange(labels), records).astype(str)
    held = []
    for _ in range(repetitions):
        tokens = random.integers(2, 11, records).astype(float)
        lost = SPREAD * random.standard_normal(records) + np.where(names == "0", worse_by, 0.0)
        nll = {"champion": 2.0 * tokens, "candidate": (2.0 + lost) * tokens}
        models = {role: Measured(version=role, metrics={"loss": of.sum() / tokens.sum()}) for role, of in nll.items()}
        evidence = Evidence(tokens, {f"{role}_nll": of for role, of in nll.items()}, slices={"label": names})
        measured = Evaluation(run_id="r", records=records, models=models)
        compared = Compared(measured, evidence, METRICS["loss"], "champion", "production", POLICY.confidence)
        found = slices.no_slice_is_worse(POLICY, compared)
        held.append(found is not None and not found.passed)
    return float(np.mean(held))


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print("| differences | records | worse: mean alone | worse: gate | equal: mean alone | equal: gate |")
    print("|---|---|---|---|---|---|")
    for name, lost in ROWS.items():
        for records in RECORDS:
            found = [promoted(lost, records, worse_by, repetitions) for worse_by in (MARGIN, 0.0)]
            cells = [f"{mean:.3f} | {'-' if both is None else f'{both:.3f}'}" for mean, both in found]
            print(f"| {name} | {records:,} | {' | '.join(cells)} |", flush=True)
    print("\n| labels | records | held, all alike | one label worse by 0.1 | by 0.2 | by 0.3 |")
    print("|---|---|---|---|---|---|")
    for labels in (4, 20):
        for records in (1000, 3000):
            shares = [held_by_a_label(labels, records, worse_by, repetitions) for worse_by in (0.0, 0.1, 0.2, 0.3)]
            print(f"| {labels} | {records:,} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
