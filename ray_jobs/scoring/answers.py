"""Statistics over a model's answers: pure functions of marks and log-likelihoods."""

import importlib
import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import regex

from components.records.steps import PairedDifference
from components.shared.errors import ConfigError, DataError
from components.shared.metrics import alike, label, metric_of, normal
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
    differs: bool | None = None
    """Whether the engine of training answers otherwise than vLLM; None where not both were asked."""


def cut_short(num_reference_tokens: Sequence[int], max_new_tokens: int | None) -> str | None:
    """A warning that some references are longer than any answer can be; None if there are none."""
    longer = 0 if max_new_tokens is None else sum(count > max_new_tokens for count in num_reference_tokens)
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
    expected, actual = ([label(text, shared) for text in texts] for texts in (references, answers))
    classes = [name for name, _ in Counter(expected).most_common()]
    if not 2 <= len(classes) <= min(MAX_CLASSES, len(expected) // 2):
        return None
    index = {name: place for place, name in enumerate(classes)}
    counts = [[0] * (len(classes) + 1) for _ in range(len(classes) + 1)]
    for reference, answer in zip(expected, actual, strict=True):
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
    ours, theirs = (
        np.array([score.nll if chosen.column == "nll" else score.marks[chosen.key] for score in scores])
        for scores in (candidate, other)
    )
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
    estimate = bounds(pairs_of(candidate, other, num_answer_tokens, metric, groups), confidence=0.975)
    if estimate is None:
        return None
    ends = (estimate.lower, estimate.upper)
    is_bounded = all(map(math.isfinite, ends))  # false where the models differ on hardly any record
    return PairedDifference(
        metric=metric, difference=estimate.gain, ci95=ends if is_bounded else None, records=estimate.records
    )


def as_columns(role: str, scores: Sequence[Score]) -> Mapping[str, list[object]]:
    """Per-record results as columns of a table."""
    others = [score.other_prompt_nll for score in scores]
    return {
        f"{role}_answer": [score.text for score in scores],
        f"{role}_nll": [score.nll for score in scores],
        **({} if None in others else {f"{role}_other_prompt_nll": [*others]}),
        **{f"{role}_{key}": [score.marks[key] for score in scores] for key in scores[0].marks},
    }


# Marks of one answer against its reference, in 0..1; a metric is the mean of its marks over all records.

Mark = Callable[[str, str], float]
PUNCTUATION = str.maketrans("", "", string.punctuation)
UNSPACED = r"[\p{L}&&[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]\p{M}*"
"""A letter with its combining marks, in scripts without spaces between words: each such letter counts as a word."""
EAST_ASIAN = r"[\p{P}&&[\u3000-\u303F\uFF00-\uFFEF]]"
"""East Asian punctuation."""
ROUGE_WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*)+", regex.V1)
SQUAD_WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED}|{EAST_ASIAN})\S)+", regex.V1)


def exact_match(answer: str, reference: str) -> float:
    """Whether both are equal up to Unicode normalisation and white space."""
    return float(normal(answer) == normal(reference))


def label_accuracy(answer: str, reference: str, alike: Collection[str] = ()) -> float:
    """Whether both are the same label; those in `alike` have to be written the same."""
    return float(label(answer, alike) == label(reference, alike))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over a bag of words, as SQuAD's evaluate-v2.0.py counts it
    (arXiv:1806.03822): in lower case, without ASCII punctuation and English articles. In scripts without spaces each
    letter is a word, as for Chinese in MLQA's script (arXiv:1910.07475).

    Where either text has no words, it is 1 if neither has any, else 0.
    """
    ours, theirs = _squad_words(answer), _squad_words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1), as rouge-score counts it without stemming.

    Words are runs of letters and digits with their combining marks, in lower case: in any alphabet, while rouge-score
    only handles a to z. In scripts without spaces each letter is a word.
    """
    ours, theirs = (ROUGE_WORD.findall(unicodedata.normalize("NFC", text.lower())) for text in (answer, reference))
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def json_valid(answer: str, reference: str) -> float:
    """Whether the answer is JSON by RFC 8259 and nothing else: an object or an array where the reference is one.

    A single number is JSON too, but no valid answer where an object is asked for.
    """
    try:
        parsed = json.loads(answer, parse_constant=int)  # NaN and Infinity are no JSON, nor integers
    except (ValueError, RecursionError):
        return 0.0
    try:
        expected = json.loads(reference)
    except (ValueError, RecursionError):
        return 1.0
    return float(not isinstance(expected, (dict, list)) or type(parsed) is type(expected))


MARKS: Mapping[str, Mark] = {
    mark.__name__: mark for mark in (exact_match, token_f1, rouge_l, json_valid, label_accuracy)
}


def named(keys: Iterable[str], alike: Collection[str] = ()) -> dict[str, Mark]:
    """The marks by their keys; a key `module:function` imports the module, which runs its code. `alike` are the labels
    that only their writing tells apart. Raises ConfigError: there is no such function on this machine."""
    marks: dict[str, Mark] = {**MARKS, label_accuracy.__name__: partial(label_accuracy, alike=alike)}
    return {key: marks.get(key) or _own(key) for key in keys if key in marks or ":" in key}


def _own(key: str) -> Mark:
    module, _, function = key.partition(":")
    try:
        metric = getattr(importlib.import_module(module), function)
        if not callable(metric):
            raise AttributeError(f"{metric!r} is no function")
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"the config names the metric {key}, which is not there: {exc}. Put {module} on the PYTHONPATH of the "
            "workers that evaluate, or into their image"
        ) from exc

    def mark(answer: str, reference: str) -> float:
        try:
            value = float(metric(answer, reference))
        except Exception as exc:  # the user's code, which may raise anything
            raise DataError(f"{key}({answer!r}, {reference!r}) failed: {type(exc).__name__}: {exc}") from exc
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise DataError(f"{key}({answer!r}, {reference!r}) is {value}: a metric's function gives a number in 0..1")
        return value

    return mark


def _f1(common: int, ours: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over `ours` (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited")."""
    places: dict[str, int] = {}
    for place, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(ours)) - 1
    unmatched = whole
    for word in theirs:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & whole
    return len(ours) - unmatched.bit_count()


def _squad_words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFC", text.lower()).translate(PUNCTUATION)
    return SQUAD_WORD.findall(re.sub(r"\b(a|an|the)\b", " ", plain))
