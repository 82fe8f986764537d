"""Marks of one answer against its reference, in 0..1; a metric is the mean of its marks over all records."""

import importlib
import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NoReturn

import regex

from components.shared.answers import label, normal
from components.shared.errors import ConfigError, DataError

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
        found = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    try:
        wanted = json.loads(reference)
    except (ValueError, RecursionError):
        return 1.0
    return float(not isinstance(wanted, (dict, list)) or type(found) is type(wanted))


MARKS: Mapping[str, Mark] = {
    mark.__name__: mark for mark in (exact_match, token_f1, rouge_l, json_valid, label_accuracy)
}


def named(keys: Iterable[str], alike: Collection[str] = ()) -> dict[str, Mark]:
    """The marks by their keys; a key `module:function` imports the module, which runs its code. `alike` are the labels
    that only their writing tells apart.

    Raises:
        ConfigError: there is no such function on this machine.
    """
    marks: dict[str, Mark] = {**MARKS, label_accuracy.__name__: partial(label_accuracy, alike=alike)}
    return {key: marks.get(key) or _own(key) for key in keys if key in marks or ":" in key}


def _own(key: str) -> Mark:
    module, _, function = key.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise AttributeError(f"{found!r} is no function")
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"the config names the metric {key}, which is not there: {exc}. Put {module} on the PYTHONPATH of the "
            "workers that evaluate, or into their image"
        ) from exc

    def mark(answer: str, reference: str) -> float:
        try:
            value = float(found(answer, reference))
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


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
