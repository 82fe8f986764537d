"""Statistics over a model's answers: pure functions of marks and log-likelihoods."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from components.records.steps import PairedDifference
from components.shared.answers import alike, label, normal
from components.shared.metrics import Metric, metric_of
from components.shared.paired import Pairs, bounds

MAX_CLASSES = 30
OTHER = "(another answer)"
LEAST_NEW_TOKENS = 8
"""Minimum of the answer length in tokens, where it is derived from the references."""
USUAL_NEW_TOKENS = 256
"""Answer length in tokens where no references are known."""


@dataclass(frozen=True)
class Score:
    """The result of one model on one record."""

    nll: float
    """-log p(answer | prompt) in nats, including the end of the answer."""
    other_prompt_nll: float | None
    """-log p(answer | another record's prompt) in nats; None where it was not measured."""
    text: str
    """The greedy answer, without reasoning before it."""
    marks: Mapping[str, float]
    """The answer's marks against the reference, by the keys of the metrics that are means of marks."""


def longest_answer(num_answer_tokens: npt.NDArray[np.int64]) -> int:
    """The answer length in tokens that lets a model reproduce every reference; counts include the end of the answer."""
    return int(num_answer_tokens.max(initial=LEAST_NEW_TOKENS))


def cut_short(num_reference_tokens: Sequence[int], max_new_tokens: int | None) -> str | None:
    """A warning that some references are longer than any answer can be; None if there are none."""
    longer = 0 if max_new_tokens is None else sum(each > max_new_tokens for each in num_reference_tokens)
    if not longer:
        return None
    return (
        f"{longer} of {len(num_reference_tokens)} references are longer than evaluate.max_new_tokens {max_new_tokens}: "
        "no answer to them is an exact match, and F1 and ROUGE-L lack what is cut off. Raise it, or leave it unset"
    )


def metrics(scores: Sequence[Score], num_answer_tokens: Sequence[int]) -> dict[str, float | None]:
    """A model's metrics over all records. Losses are per answer token, with the same token counts for every model."""
    tokens = sum(num_answer_tokens)
    loss = sum(score.nll for score in scores) / tokens
    others = [score.other_prompt_nll for score in scores if score.other_prompt_nll is not None]
    prompt_gain = sum(others) / tokens - loss if len(others) == len(scores) else None
    tokens_per_answer = tokens / len(scores)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "answer_loss": loss * tokens_per_answer,
        **{key: sum(score.marks[key] for score in scores) / len(scores) for key in scores[0].marks},
        "prompt_gain": prompt_gain,
        "answer_prompt_gain": None if prompt_gain is None else prompt_gain * tokens_per_answer,
    }


def changed_share(before: Sequence[Score], after: Sequence[Score]) -> float:
    """Share of the records whose answers differ in wording, in 0..1."""
    return float(np.mean([normal(a.text) != normal(b.text) for a, b in zip(before, after, strict=True)]))


def confusion(references: Sequence[str], answers: Sequence[str]) -> dict[str, list[Any]] | None:
    """Confusion matrix of labels: the labels, and counts[reference][answer].

    A label is shown in its most frequent spelling in the references. None where the answers are not classes: more than
    MAX_CLASSES distinct references, or fewer than two records per class on average.
    """
    shared = alike(references)
    expected, given = ([label(each, shared) for each in texts] for texts in (references, answers))
    classes = [name for name, _ in Counter(expected).most_common()]
    if not 2 <= len(classes) <= min(MAX_CLASSES, len(expected) // 2):
        return None
    index = {name: place for place, name in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in range(len(classes) + 1)]
    for reference, answer in zip(expected, given, strict=True):
        counts[index[reference]][index.get(answer, len(classes))] += 1
    spellings = Counter(map(normal, references)).most_common()
    written = {label(text, shared): text for text, _ in reversed(spellings)}
    return {"labels": [*(written[name] for name in classes), OTHER], "counts": counts}


def pairs_of(
    candidate: Sequence[Score],
    other: Sequence[Score],
    num_answer_tokens: Sequence[int],
    metric: str,
    groups: Sequence[str] = (),
    *,
    relative: bool = False,
) -> Pairs:
    """Paired results of two models on the same records in one metric; `groups` names each record's group, if any."""
    chosen = metric_of(metric)
    ours, theirs = (np.array([_of_record(each, chosen) for each in scores]) for scores in (candidate, other))
    weights = np.array(num_answer_tokens, dtype=np.float64) if chosen.per_token else np.ones(len(ours))
    numbered = np.unique(groups, return_inverse=True)[1] if any(groups) else None
    return Pairs(ours, theirs, weights, numbered, chosen.lower_is_better, chosen.exponential, relative)


def paired_difference(
    candidate: Sequence[Score],
    other: Sequence[Score],
    num_answer_tokens: Sequence[int],
    metric: str,
    groups: Sequence[str] = (),
) -> PairedDifference | None:
    """How much better the candidate is than another model on the same records, with a 95 % interval.

    Positive means that the candidate is better, whichever way the metric points. None where a number is not finite.
    """
    found = bounds(pairs_of(candidate, other, num_answer_tokens, metric, groups), confidence=0.975)
    if found is None:
        return None
    ends = (found.lower, found.upper)
    is_bounded = all(map(math.isfinite, ends))  # false where the models differ on hardly any record
    return PairedDifference(
        metric=metric, difference=found.gain, ci95=ends if is_bounded else None, records=found.records
    )


def _of_record(score: Score, metric: Metric) -> float:
    """A record's contribution to the metric, as in the columns of evaluation_records.parquet."""
    return score.nll if metric.column == "nll" else score.marks[metric.key]


def as_columns(role: str, scores: Sequence[Score]) -> Mapping[str, list[object]]:
    """Per-record results as columns of a table."""
    others = [score.other_prompt_nll for score in scores]
    return {
        f"{role}_answer": [score.text for score in scores],
        f"{role}_nll": [score.nll for score in scores],
        **({} if None in others else {f"{role}_other_prompt_nll": [*others]}),
        **{f"{role}_{key}": [score.marks[key] for score in scores] for key in scores[0].marks},
    }
