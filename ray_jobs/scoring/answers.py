"""What an answer is worth: pure functions over texts and log-likelihoods."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.registry.records import PairedDifference
from components.shared.metrics import METRICS, Metric
from components.shared.paired import Pairs, bounds

MAX_CLASSES = 30
PUNCTUATION = str.maketrans("", "", string.punctuation)
OTHER = "(another answer)"
NEW_TOKENS = range(8, 257)
"""What the longest answer may be where the config leaves it to the references."""


def exact_match(answer: str, reference: str) -> bool:
    """Equal up to Unicode form and white space."""
    return _normal(answer) == _normal(reference)


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over a bag of words, in 0..1, as SQuAD's evaluate-v1.1.py counts it
    (arXiv:1606.05250, section 6.1): in lower case, ASCII punctuation taken out, English articles left out.

    Of two texts without any such word, as A and A, that script makes 0 and its successor for SQuAD 2.0 makes 1: here it
    is whether they are equal.
    """
    ours, theirs = Counter(_words(answer)), Counter(_words(reference))
    if not ours and not theirs:
        return float(exact_match(answer, reference))
    common = (ours & theirs).total()
    if not common:
        return 0.0
    precision, recall = common / ours.total(), common / theirs.total()
    return 2 * precision * recall / (precision + recall)


MARKS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "token_f1": token_f1}
"""What an answer may be worth against its reference, in 0..1; the metric is the mean over all records."""


@dataclass(frozen=True)
class Score:
    """One model on one record."""

    nll: float
    """-log p(answer | prompt) in nats, the end of the answer included."""
    other_prompt_nll: float | None
    """The same given another record's prompt; None where it was not measured."""
    text: str
    """The greedy answer, without reasoning before it."""
    marks: Mapping[str, float]
    """What the answer is worth against the reference, by the keys of MARKS."""


def marks(answer: str, reference: str) -> dict[str, float]:
    """Every mark of one answer."""
    return {key: float(mark(answer, reference)) for key, mark in MARKS.items()}


def metrics(scores: Sequence[Score], num_answer_tokens: Sequence[int]) -> dict[str, float | None]:
    """A model's metrics over all records. Losses are per answer token; every model is divided by the same counts."""
    tokens = sum(num_answer_tokens)
    loss = sum(score.nll for score in scores) / tokens
    others = [score.other_prompt_nll for score in scores if score.other_prompt_nll is not None]
    prompt_gain = sum(others) / tokens - loss if len(others) == len(scores) else None
    tokens_per_answer = tokens / len(scores)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "answer_loss": loss * tokens_per_answer,
        **{key: sum(score.marks[key] for score in scores) / len(scores) for key in MARKS},
        "prompt_gain": prompt_gain,
        "answer_prompt_gain": None if prompt_gain is None else prompt_gain * tokens_per_answer,
    }


def confusion(references: Sequence[str], answers: Sequence[str]) -> dict[str, list[Any]] | None:
    """How often each reference was answered by which: labels, and counts[reference][answer].

    None where the answers are no classes: more than MAX_CLASSES distinct references, or hardly any said twice.
    """
    expected, given = [_normal(each) for each in references], [_normal(each) for each in answers]
    classes = [label for label, _ in Counter(expected).most_common()]
    if not 2 <= len(classes) <= min(MAX_CLASSES, len(expected) // 2):
        return None
    labels = [*classes, OTHER]
    index = {label: row for row, label in enumerate(labels)}
    counts = [[0] * len(labels) for _ in labels]
    for reference, answer in zip(expected, given, strict=True):
        counts[index[reference]][index.get(answer, len(classes))] += 1
    return {"labels": labels, "counts": counts}


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
    row = METRICS[metric]
    ours, theirs = (np.array([_of_record(each, row) for each in scores]) for scores in (candidate, other))
    weights = np.array(num_answer_tokens, dtype=np.float64) if row.per_token else np.ones(len(ours))
    numbered = np.unique(groups, return_inverse=True)[1] if any(groups) else None
    pairs = Pairs(ours, theirs, weights, numbered, row.lower_is_better, row.exponential)
    found = bounds(pairs, confidence=0.975)
    if found is None:
        return None
    return PairedDifference(
        metric=metric, difference=found.gain, ci95=(found.lower, found.upper), records=found.records
    )


def _of_record(score: Score, metric: Metric) -> float:
    """What a record adds to the metric, as a column of evaluation_records.parquet has it."""
    return score.nll if metric.column == "nll" else score.marks[metric.key]


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _words(text: str) -> list[str]:
    without_punctuation = _normal(text).lower().translate(PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split()


def as_columns(role: str, scores: Sequence[Score]) -> Mapping[str, list[object]]:
    """Per-record results as columns of a table."""
    others = [score.other_prompt_nll for score in scores]
    return {
        f"{role}_answer": [score.text for score in scores],
        f"{role}_nll": [score.nll for score in scores],
        **({} if None in others else {f"{role}_other_prompt_nll": [*others]}),
        **{f"{role}_{key}": [score.marks[key] for score in scores] for key in MARKS},
    }
