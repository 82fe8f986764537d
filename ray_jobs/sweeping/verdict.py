"""The conclusion from a sweep's losses, in words: the best rate, and whether a method is worth more than plain LoRA."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from components.handover.serve_manifest import ServableAs
from components.records.sweep import Forgotten, MethodComparison, Trial, Tuned
from components.shared.errors import FineloopError
from components.shared.protocol import duration


def interval(nll_KN: npt.ArrayLike, tokens_N: npt.ArrayLike) -> tuple[float, float, float]:
    """Mean per token of K seeds on N records, and the two ends of its 95 % interval.

    Its variance is the sum of that over records and that over seeds, as for two crossed samples; the residual variance
    is part of both, so that the interval tends to be too wide. Degrees of freedom are Satterthwaite's. With one seed it
    covers only the variation over records: another seed could have given a different result.
    """
    from scipy import stats

    nll, tokens = np.asarray(nll_KN, dtype=np.float64), np.asarray(tokens_N, dtype=np.float64)
    num_seeds, num_records = nll.shape
    of_seeds = nll.sum(axis=1) / tokens.sum()
    mean = float(of_seeds.mean())
    # Variance of a ratio of two sums, linearised.
    residuals = (nll.mean(axis=0) - mean * tokens) / tokens.mean()
    parts = [(residuals.var(ddof=1) / num_records, num_records - 1)]
    if num_seeds > 1:
        parts.append((of_seeds.var(ddof=1) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    if variance <= 0:
        return mean, mean, mean
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return mean, mean - reach, mean + reach


def forgotten_by(ours: Sequence[Trial], trials: Iterable[Trial]) -> Forgotten | None:
    """How much the trainings `ours` of one method forget: the rise of the loss on general text from the base to the
    trained models, paired by passage and seed; None with fewer than two passages.

    The base's loss may come from any of the sweep's `trials`. A method's own base (LoftQ's) is no reference for
    forgetting, so the original in the same format is used; where no trial used that, the original in another.
    """
    after = [trial.general_text for trial in ours if trial.general_text]
    before = [trial.general_text for trial in trials if trial.general_text and "base" in trial.general_text.nll]
    if not after or not before or len(after[0].tokens) < 2:
        return None
    base = min(before, key=lambda text: text.base_format != after[0].base_format)
    tokens, base_nll_N = base.tokens, np.asarray(base.nll["base"])
    nll_KN = np.asarray([text.nll["candidate"] for text in after])
    rise, *ends = interval(nll_KN - base_nll_N, tokens)
    return Forgotten(
        base_format=base.base_format,
        base_loss=float(base_nll_N.sum() / sum(tokens)),
        losses=(nll_KN.sum(axis=1) / sum(tokens)).tolist(),
        rise=rise,
        ci95=(ends[0], ends[1]),
        passages=len(tokens),
    )


def reference_of(methods: Sequence[str]) -> str:
    """The method that the others are compared with: a plain one, which is advised unless another is clearly better."""
    return next((name for name in ("lora", "qlora") if name in methods), methods[0])


SERVED = {
    "lora": "",
    "lora-export": "; servers load it after `adapters export --lora`",
    "merged": "; servers load it merged into its base alone",
}


def compare(
    tuned: Tuned, ours: Sequence[Trial], plain: Tuned, theirs: Sequence[Trial], servable_as: ServableAs = "lora"
) -> MethodComparison | None:
    """Compare a method with the reference on the seeds that finished with both; None for fewer than two, or records."""
    by_seed = {trial.seed: trial for trial in theirs}
    pairs = [(trial, by_seed[trial.seed]) for trial in ours if trial.seed in by_seed]
    if len(pairs) < 2 or len(tokens := pairs[0][0].record_tokens) < 2:
        return None
    gains = np.asarray([b.record_nll for _, b in pairs]) - np.asarray([a.record_nll for a, _ in pairs])
    gain, *ends = interval(gains, tokens)
    return MethodComparison(
        method=tuned.method,
        reference=plain.method,
        gain=gain,
        ci95=(ends[0], ends[1]),
        seeds=len(pairs),
        records=len(tokens),
        time_ratio=tuned.step_s / plain.step_s if tuned.step_s and plain.step_s else None,
        memory_ratio=tuned.memory_bytes / plain.memory_bytes if tuned.memory_bytes and plain.memory_bytes else None,
        servable_as=servable_as,
    )


MARGIN = 0.01
"""A method is advised in place of plain LoRA only if the 95 % interval of its gain, in nats a token, lies above it."""


def advised(comparisons: Sequence[MethodComparison], reference: str) -> str:
    """The advised method: the largest gain of those whose whole interval lies above the margin; else the reference."""
    clearly = [compared for compared in comparisons if compared.ci95[0] > MARGIN]
    return max(clearly, key=lambda compared: compared.gain).method if clearly else reference


def rate_sentence(tuned: Tuned) -> str:
    """One sentence on an arm's best rate."""
    where = "inside the grid" if tuned.is_inside else "at the end of the grid, so that a better one may lie beyond"
    text = f"{tuned.method}: best rate {tuned.learning_rate:.3g}, validation loss {tuned.loss:.4f}, {where}"
    if tuned.learning_rate == tuned.prior:
        return f"{text}; it is the rate in force"
    if tuned.gain_over_prior is None:
        return f"{text}; {tuned.prior:.3g}, the rate in force, diverged or was not tried"
    return f"{text}; {tuned.gain_over_prior:.4f} better than {tuned.prior:.3g}, the rate in force"


def comparison_sentence(arm: MethodComparison) -> str:
    """One sentence on a method against the reference."""
    low, high = arm.ci95
    direction = "better" if arm.gain > 0 else "worse"
    certain = "which is more than chance" if low > 0 or high < 0 else "which may be chance"
    cost = ", ".join(
        f"{ratio:.2f} times the {what}"
        for ratio, what in ((arm.time_ratio, "time of a step"), (arm.memory_ratio, "memory"))
        if ratio
    )
    return (
        f"{arm.method} is {abs(arm.gain):.4f} nats per answer token {direction} than {arm.reference} "
        f"(95 % interval of the gain {low:+.4f} to {high:+.4f}, {arm.seeds} seeds, {arm.records} records), {certain}"
        + (f"; it takes {cost}" if cost else "")
        + SERVED[arm.servable_as]
    )


def forgotten_sentence(tuned: Sequence[Tuned]) -> str:
    """One sentence on what the methods forget; empty where it was not measured."""
    measured = [(arm.method, arm.forgotten) for arm in tuned if arm.forgotten]
    if not measured:
        return ""
    rises = ", ".join(
        f"{forgotten.rise:+.4f} with {method} (95 % interval {forgotten.ci95[0]:+.4f} to {forgotten.ci95[1]:+.4f})"
        for method, forgotten in measured
    )
    num_passages = measured[0][1].passages
    return f" What is forgotten: on {num_passages} passages of general text, the loss less the base's is {rises}."


def verdict(best: Tuned, tuned: Sequence[Tuned], comparisons: Sequence[MethodComparison], reference: str) -> str:
    """The whole conclusion of the sweep."""
    if not comparisons:
        return f"{rate_sentence(best)}."
    chosen = advised(comparisons, reference)
    others = ". ".join(map(comparison_sentence, comparisons)) + f".{forgotten_sentence(tuned)}"
    if chosen == reference:
        least = f"no method's interval lies above the margin of {MARGIN:g} nats"
        return f"Keep {reference}: tuned alike, {least}. {others}"
    (gained,) = (compared for compared in comparisons if compared.method == chosen)
    return (
        f"Take {chosen}: its gain over {reference} is at least {gained.ci95[0]:.4f} nats per answer token, more than "
        f"the margin of {MARGIN:g}. {others}"
    )


HEADER = "| method rank batch rate seed loss steps outcome"
_ERROR = re.compile(r"^(?P<module>([a-z_]\w*\.)*)(?P<whole>[A-Z]\w+: (?P<text>.+))$")


def row(trial: Trial) -> str:
    """The row of a trial that has ended; only its last column may contain spaces."""
    loss = f"{trial.loss:.4f}" if trial.loss is not None else "-"
    took = f" in {duration(trial.seconds)}" if trial.seconds is not None else ""
    why = f": {trial.why}" if trial.why else ""
    text = trial.general_text
    if text and (after := text.loss("candidate")) is not None:
        before = text.loss("base")
        why += f", general text {after:.4f}" + (f" (its base {before:.4f})" if before is not None else "")
    return (
        f"| {trial.method} {trial.rank} {trial.batch_size} {trial.learning_rate:.3g} {trial.seed} {loss} "
        f"{trial.steps}/{trial.num_steps} {trial.status}{took}{why}"
    )


def cause(message: str) -> str:
    """The cause of a failure in one line, from Ray's report: a traceback, or a message that a process died."""
    _, *lines = [line for line in message.splitlines() if line.strip()] or [""]
    errors = [error for line in lines if (error := _ERROR.match(line))]
    if errors:
        return errors[-1]["text"] if errors[-1]["module"] == f"{FineloopError.__module__}." else errors[-1]["whole"]
    return lines[0] if lines else "it said nothing"
