"""How often the gate errs, and how often it tells, on differences that are hard for a mean.

`python -m benchmarks.gate_errors` prints the share of candidates that are promoted and truly worse than the
champion by the margin, equal, or better by half of it; "-" where the gate cannot tell, whatever comes. Answers are as
long as the example's, of 2 to 4 tokens. Losses differ from record to record by 0.2 nats per token or as the row says,
and by 0.05 besides; metrics from 0 to 1 by half of that number: half a nat is a quarter of an answer. `--outside`
prints the same of losses that are rarer and larger than those that the gate allows for, `--labels` how often a slice is
held, and `--power` how often an equal candidate passes by what is assumed before there is one.
"""

from collections.abc import Callable

import numpy as np

from benchmarks import example
from components.config.gate import LARGE_LOSS, GateConfig
from components.gate.comparisons import Compared, Evidence, few_get_much_worse, not_worse_than_champion
from components.gate.policy import no_slice_is_worse
from components.prepare import power as assumed
from components.records.steps import Evaluation, Measured, Role
from components.shared.metrics import METRICS, metric_of
from tests.components.gate.measured_losses import read

MARGIN, SPREAD, SIGMA, NOISE = 0.02, 0.2, 1.5, 0.05
RECORDS = (60, 240, 299, 300, 400, 1000)
COMPARED = ("loss", "exact_match", "token_f1", "rouge_l")
STEPS = {"exact_match": 1, "token_f1": 4}
"""Values of a metric above 0: an answer is right or wrong, and one of few words has few values of F1."""
POPULATION = 200_000
NEAR = 0.8
"""A gain so few standard errors above the margin does not pass, and is not looked at more closely."""
POLICY = GateConfig()
Lost = Callable[[np.random.Generator, float, float], np.ndarray]
"""What each of POPULATION records loses, by so much on the whole, where a large loss of one record is so much."""


def skewed(random: np.random.Generator, worse_by: float, large: float) -> np.ndarray:
    mean = np.exp(SIGMA**2 / 2)
    drawn: np.ndarray = random.lognormal(0, SIGMA, POPULATION) - mean
    return worse_by + SPREAD * large / LARGE_LOSS * drawn / (mean * np.sqrt(np.exp(SIGMA**2) - 1))


def flipping(random: np.random.Generator, worse_by: float, large: float) -> np.ndarray:
    drawn, size = random.random(POPULATION), 1.5 * large if large > 1 else 1.0
    return np.select([drawn < 0.02, drawn < 0.04 + worse_by / size], [-size, size], 0.0)


def rare(part: float, nats: float) -> Lost:
    """So large losses, which use up so large a part of the margin."""

    def lost(random: np.random.Generator, worse_by: float, large: float) -> np.ndarray:
        size = nats * large / LARGE_LOSS
        share = part * MARGIN / size
        return np.where(random.random(POPULATION) < share, size, (worse_by - share * size) / (1 - share))

    return lost


ROWS: dict[str, Lost] = {
    "normal": lambda random, worse_by, large: (
        worse_by + SPREAD * large / LARGE_LOSS * random.standard_normal(POPULATION)
    ),
    "heavy tails (t, 3 degrees)": lambda random, worse_by, large: (
        worse_by + SPREAD * large / LARGE_LOSS / np.sqrt(3) * random.standard_t(3, POPULATION)
    ),
    "skewed (lognormal, sigma 1.5)": skewed,
    "2 % to wrong, 2 % to right, 3 nats": flipping,
    "3 % lose 1.2 nats, others gain": rare(1.8, 1.2),
    "1 % lose 2 nats": rare(1.0, 2.0),
}
OUTSIDE: dict[str, Lost] = {"0.5 % lose 4 nats": rare(1.0, 4.0), "0.3 % lose 8 nats": rare(1.2, 8.0)}


def population(lost: Lost, metric: str, worse_by: float) -> tuple[np.ndarray, np.ndarray]:
    """The champion's and the candidate's value of each record, per token."""
    random = np.random.default_rng(0)
    if metric == "loss":
        values = lost(random, worse_by, LARGE_LOSS) + NOISE * random.standard_normal(POPULATION)
        return np.full(POPULATION, 20.0), 20.0 + values + worse_by - values.mean()
    values, steps = lost(random, worse_by, 1.0), STEPS.get(metric)
    if steps is None:
        values += NOISE / LARGE_LOSS * random.standard_normal(POPULATION)
    for _ in range(4):
        values = np.clip(values + worse_by - values.mean(), -1, 1)
    if steps is not None:  # rounded up or down, on the whole the same
        sums = np.floor(np.cumsum(random.permutation(values) * steps))
        values = np.diff(sums, prepend=0.0) / steps
    low, high = np.maximum(values, 0), np.minimum(1 + values, 1)
    champion = low + (high - low) * random.random(POPULATION)
    if steps is not None:
        champion = np.round(champion * steps) / steps
    return champion, champion - values


def decided(policy: GateConfig, tokens: np.ndarray, values: dict[Role, np.ndarray]) -> tuple[bool, bool]:
    """Whether the rules on the champion can tell of records of which these are the sums, and whether they all pass."""
    row = metric_of(policy.metric)
    weights = tokens if row.per_token else np.ones(len(tokens))
    evidence = Evidence(tokens, {f"{role}_{row.column or row.key}": of for role, of in values.items()})
    models: dict[str, Measured | None] = {
        role: Measured(version=role, metrics={row.key: float(of.sum() / weights.sum())}) for role, of in values.items()
    }
    measured = Evaluation(run_id="r", records=len(tokens), models=models)
    compared = Compared(measured, evidence, row, "champion", "production", policy.confidence)
    shown = few_get_much_worse(policy, compared)
    can_tell = shown is None or shown.passed
    return can_tell, can_tell and not_worse_than_champion(policy, models["champion"], compared).passed


def promoted(lost: Lost, metric: str, records: int, worse_by: float, repetitions: int) -> float | None:
    """The share that the rules on the champion let pass; None where they cannot tell."""
    random, told, passed = np.random.default_rng(records), False, 0
    policy, row = GateConfig(metric=metric), metric_of(metric)
    everything, lengths = population(lost, metric, worse_by), read("icd10").tokens
    for number in range(repetitions):
        rows, tokens = random.integers(0, POPULATION, records), lengths[random.integers(0, len(lengths), records)]
        weights = tokens if row.per_token else np.ones(records)
        champion, candidate = (each[rows] * weights for each in everything)
        gains = (champion - candidate) * (1 if row.lower_is_better else -1)
        gain = gains.sum() / weights.sum()
        error = np.sqrt(((gains - gain * weights) ** 2).sum()) / weights.sum()
        if number and gain + MARGIN < NEAR * error:
            continue
        may_tell, passes = decided(policy, tokens, {"champion": champion, "candidate": candidate})
        told = told or may_tell
        passed += passes
        if not told and number > 20:
            return None
    return passed / repetitions if told else None


def held_by_a_label(labels: int, records: int, worse_by: float, repetitions: int) -> float:
    """How often a label is shown to be worse, where one of so many is, by so much, and the others are alike."""
    random = np.random.default_rng(labels)
    names = np.resize(np.arange(labels), records).astype(str)
    held = []
    for _ in range(repetitions):
        tokens = random.integers(2, 11, records).astype(float)
        lost = SPREAD * random.standard_normal(records) + np.where(names == "0", worse_by, 0.0)
        nll = {"champion": 2.0 * tokens, "candidate": (2.0 + lost) * tokens}
        models: dict[str, Measured | None] = {
            role: Measured(version=role, metrics={"loss": of.sum() / tokens.sum()}) for role, of in nll.items()
        }
        evidence = Evidence(tokens, {f"{role}_nll": of for role, of in nll.items()}, slices={"label": names})
        measured = Evaluation(run_id="r", records=records, models=models)
        compared = Compared(measured, evidence, METRICS["loss"], "champion", "production", POLICY.confidence)
        found = no_slice_is_worse(POLICY, compared)
        held.append(found is not None and not found.passed)
    return float(np.mean(held))


def main() -> None:
    parser = example.parser("gate_errors", __doc__)
    parser.add_argument("--repetitions", type=int, default=2000, help="of a worse candidate; of others an eighth")
    parser.add_argument("--metrics", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--records", nargs="+", type=int, default=RECORDS)
    parser.add_argument("--outside", action="store_true")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--power", action="store_true", help="print what is said before there is a comparison")
    options = parser.parse_args()
    if options.power:
        return power()
    if options.labels:
        return by_label(options.repetitions)
    print("| metric | differences | records | worse by the margin | equal | better by half of it |")
    print("|---|---|---|---|---|---|")
    for metric in options.metrics:
        for name, lost in (OUTSIDE if options.outside else ROWS).items():
            for records in options.records:
                numbers = {MARGIN: options.repetitions} | dict.fromkeys((0.0, -MARGIN / 2), options.repetitions // 8)
                shares = [promoted(lost, metric, records, worse_by, number) for worse_by, number in numbers.items()]
                cells = " | ".join("-" if share is None else f"{share:.3f}" for share in shares)
                print(f"| {METRICS[metric].label} | {name} | {records:,} | {cells} |", flush=True)


def power() -> None:
    """How often an equal candidate, half the way from production, passes by what `init`, `data` and `run` assume."""
    print("| records | exact match at 0.02, 0.03, 0.05 | loss at 0.02, 0.05 |\n|---|---|---|")
    for records in (100, 150, 200, 300, 500, 1000):
        cells = []
        spreads = (("exact_match", (0.02, 0.03, 0.05), assumed.CHANGED), ("loss", (0.02, 0.05), assumed.SPREAD))
        for metric, margins, spread in spreads:
            gates = (GateConfig(metric=metric, worse_than_champion_by=margin) for margin in margins)
            passes = [assumed.power_of(gate, records, spread / 2)["equal_passes"] for gate in gates]
            cells.append(", ".join(f"{each:.2f}" if each else "never" for each in passes))
        print(f"| {records:,} | {' | '.join(cells)} |")


def by_label(repetitions: int) -> None:
    print("| labels | records | held, all alike | one label worse by 0.1 | by 0.2 | by 0.3 |")
    print("|---|---|---|---|---|---|")
    for labels in (4, 20):
        for records in (1000, 3000):
            shares = [held_by_a_label(labels, records, worse_by, repetitions) for worse_by in (0.0, 0.1, 0.2, 0.3)]
            print(f"| {labels} | {records:,} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
