"""The metrics of an evaluation: the one table that config, evaluation, gate, report and command line read.

A new metric is a row here and its computation in `ray_jobs/scoring/` or `ray_jobs/probes/`. A config may name a
custom function as `module:function`, which is used like a row of the table.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

from components.shared.protocol import counted

SAME = 1e-9  # two numbers closer than this are the same: 0.30 - 0.25 is not 0.05 in binary floating point
LARGE = ((10, 3), (100, 2), (10_000, 1))  # (limit, decimals): numbers below the limit have that many decimals


@dataclass(frozen=True)
class Metric:
    """One metric: what people call it, which way is better, and how its numbers are written."""

    key: str
    label: str
    meaning: str
    lower_is_better: bool
    unit: str = ""
    """Unit of the numbers; empty if they need none."""
    is_share: bool = False
    """A value in 0..1, shown in per cent; differences are shown in points."""
    may_compare: bool = True
    """Whether the gate may compare models on it. Other metrics are measured on adapters only, and can be limited."""
    repeats: str = ""
    """Key of the metric that this one restates, so that one picture serves for both; empty if there is none."""
    column: str = ""
    """Name of the value stored per record for the metric; empty if it is the metric's own key."""
    per_token: bool = False
    """Whether the metric is a mean over answer tokens, and not over records."""
    exponential: bool = False
    """Whether it is the exponential of that mean."""
    of_prompts: bool = False
    """Whether it says how much answers depend on their prompts."""
    differs_in_points: bool = True
    """Whether differences of a share are shown in points, and not in per cent."""
    on_request: bool = False
    """Whether it is measured only if the config names it."""
    probe: str = ""
    """Key in ray_jobs/probes of the probe that measures it; empty if it is measured on held-out records."""

    @property
    def title(self) -> str:
        """The label with a capital letter, to begin a line."""
        return self.label[0].upper() + self.label[1:]

    def text(self, value: float, *beside: float) -> str:
        """Format a value in its usual precision, or with enough digits to differ from the values `beside` it."""
        for decimals in range(1 if self.is_share else usual_decimals(value), 10):
            shown = self._digits(value, decimals)
            if all(abs(value - other) < SAME or shown != self._digits(other, decimals) for other in beside):
                return shown + (" %" if self.is_share else "")
        return repr(value)

    def with_unit(self, value: float, *beside: float) -> str:
        return f"{self.text(value, *beside)} {self.unit}".rstrip()

    def amount_text(self, amount: float, *beside: float) -> str:
        """Format a difference without its sign: like a value, but for a share in points."""
        return self._difference(self.text(abs(amount), *beside))

    def bound_text(self, bound: float) -> str:
        """Format a bound as stated in the config, shares in per cent."""
        return f"{bound * 100:.10g} %" if self.is_share else f"{bound:.10g}"

    def margin_text(self, margin: float) -> str:
        """Format a margin as stated in the config, shares in points."""
        return self._difference(self.bound_text(margin))

    def gain(self, ours: float, theirs: float) -> float:
        """Return how much better `ours` is: positive if better, whichever way the metric runs."""
        return theirs - ours if self.lower_is_better else ours - theirs

    def better_by(self, value: float, gain: float) -> float:
        return value - gain if self.lower_is_better else value + gain

    def gain_text(self, gain: float) -> str:
        amount = self.amount_text(gain)
        if float(amount.split()[0].replace(",", "")) == 0:
            return "no difference"
        return f"{amount} {'better' if gain > 0 else 'worse'}"

    def signed_text(self, gain: float, *beside: float) -> str:
        return f"{'−' if gain < 0 else '+'}{self.amount_text(gain, *map(abs, beside))}"  # noqa: RUF001 - a true minus sign, for people

    def range_text(
        self, lower: float | None, upper: float | None, *beside: float, confidence: float | None = None
    ) -> str:
        """Format where a difference lies: between two bounds, or on one side of the only finite one.

        `confidence`, from 0 to 1, is that of each bound.
        """
        low = self.signed_text(lower, *beside) if lower is not None and math.isfinite(lower) else None
        high = self.signed_text(upper, *beside) if upper is not None and math.isfinite(upper) else None
        if low and high:
            where, sure = f"between {low} and {high}", ", each with"
        elif low or high:
            where, sure = f"above {low}" if low else f"below {high}", ", with"
        else:
            return "anywhere"
        return where if confidence is None else f"{where}{sure} {confidence * 100:.6g} % confidence"

    def _difference(self, text: str) -> str:
        return text.replace(" %", " points") if self.differs_in_points else text

    def _digits(self, value: float, decimals: int) -> str:
        return f"{value * 100 if self.is_share else value:,.{decimals}f}"


def usual_decimals(value: float) -> int:
    """Return the usual number of decimals: three for a small number, none for a large one."""
    return next((decimals for below, decimals in LARGE if abs(value) < below), 0)


_share = partial(Metric, lower_is_better=False, is_share=True)
_gain = partial(Metric, lower_is_better=False, may_compare=False, of_prompts=True)
_nll = partial(Metric, lower_is_better=True, column="nll")
NATS, OF_TOKENS, OF_ANSWERS = "nats per token", "nats per answer token", "nats per answer"

METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        _share("exact_match", "exact match", "answers that equal the reference"),
        _share("token_f1", "token F1", "words shared with the reference"),
        _share("rouge_l", "ROUGE-L", "words shared with the reference in the same order", on_request=True),
        _share("json_valid", "valid JSON", "answers that are JSON", on_request=True),
        _share(
            "label_accuracy",
            "label accuracy",
            "answers with the reference's label, but for case, quotes and a full stop",
            on_request=True,
        ),
        _nll("loss", "loss", "surprise at the reference answer", unit=OF_TOKENS, per_token=True),
        _nll(
            "perplexity",
            "perplexity",
            "the same surprise, as a count of choices",
            repeats="loss",
            per_token=True,
            exponential=True,
        ),
        _nll("answer_loss", "answer loss", "the same surprise, at a whole answer", unit=OF_ANSWERS, repeats="loss"),
        _gain(
            "prompt_gain", "prompt gain", "how much the answer depends on its prompt", unit=OF_TOKENS, per_token=True
        ),
        _gain(
            "answer_prompt_gain",
            "prompt gain of an answer",
            "the same, of a whole answer",
            unit=OF_ANSWERS,
            repeats="prompt_gain",
        ),
        _nll(
            "general_loss",
            "loss on general text",
            "surprise at text of no domain: what the base knows, and may forget",
            unit=NATS,
            per_token=True,
            probe="general_text",
        ),
        _nll(
            "kl_from_base",
            "KL divergence from the base",
            "how far it has moved from what the base itself answers to prompts of no domain",
            unit=OF_TOKENS,
            per_token=True,
            probe="own_answers",
        ),
    )
}
RELATIVE = Metric(
    "relative",
    "relative difference",
    "a difference as a share of the other model's number",
    lower_is_better=True,
    is_share=True,
    differs_in_points=False,
)
"""The unit of differences where margins are relative."""
OWN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
"""Pattern of a custom metric's name in a config: the function's import path."""


def is_metric(key: str | None) -> TypeGuard[str]:
    """Whether `key` is in the table, or is the import path of a function."""
    return key is not None and (key in METRICS or re.fullmatch(OWN, key) is not None)


def metric_of(key: str) -> Metric:
    """Return the metric of this key. Raises KeyError: there is no such metric."""
    if key in METRICS or not is_metric(key):
        return METRICS[key]
    name = key.rpartition(":")[2].replace("_", " ")
    return Metric(key, name, f"what {key} gives", lower_is_better=False, is_share=True)


def metrics_of(keys: Iterable[str]) -> list[Metric]:
    """Return the metrics of these keys, in the table's order, then custom ones; other keys are left out."""
    wanted_keys = set(keys)
    own = sorted(key for key in wanted_keys - METRICS.keys() if is_metric(key))
    return [metric for key, metric in METRICS.items() if key in wanted_keys] + [metric_of(key) for key in own]


MARKS = tuple(metric.key for metric in METRICS.values() if metric.is_share and not metric.probe)
"""Keys of the metrics on held-out records that are the mean of a score of each answer."""
COMPARED = tuple(metric.key for metric in METRICS.values() if metric.may_compare and not metric.probe)
"""Keys of the metrics on held-out records by which base and champion can be compared."""


# When two answers count as the same, in the metrics and in the report.

MOST_LABELS = 30
"""Maximum number of distinct references that count as labels; each also has to occur twice on average."""

LABELS_SHOWN = 3

ENCLOSING = dict(zip("\"'`*([{\u201c\u2018\u201e\u00ab\u300c", "\"'`*)]}\u201d\u2019\u201c\u00bb\u300d", strict=True))
ENDING = " .,;:!?\u2026\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
"""Punctuation of a sentence, East Asian too. Other signs at the end of a label are part of it: C#, A+, 5 %."""


def are_labels(distinct: int, of: int) -> bool:
    """Whether `distinct` different answers to `of` records are the names of classes."""
    return 2 <= distinct <= min(MOST_LABELS, of // 2)


def never_trained_text(records: Mapping[str, int]) -> str:
    """Return a note on held-out records whose label no training record has; `records` counts them by label."""
    names = ", ".join(map(repr, list(records)[:LABELS_SHOWN])) + (", ..." if len(records) > LABELS_SHOWN else "")
    return f"{counted(sum(records.values()), 'held-out record')} with labels that are never trained on: {names}"


def normal(text: str) -> str:
    """Normalise a text: Unicode NFC, single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def label(text: str, alike: Collection[str] = ()) -> str:
    """Return an answer's class: the text without case, what encloses it, and the punctuation of a sentence at its end.

    A text that would then be in `alike` is returned as it is: only this tells it from another class.
    """
    plain, inside = "", normal(text)
    while plain != inside and re.search(r"\w", inside):  # what is left has to name something
        plain = inside
        inside = (plain[1:-1] if ENCLOSING.get(plain[0]) == plain[-1] else plain).lstrip().rstrip(ENDING)
    name = (plain or inside).casefold()
    return normal(text) if name in alike else name


def alike(references: Iterable[str]) -> frozenset[str]:
    """Return the labels that different references of the same data would have in common, such as "us" and "US"."""
    counts = Counter(map(label, set(map(normal, references))))
    return frozenset(name for name, count in counts.items() if count > 1)
