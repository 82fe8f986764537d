"""When two answers are the same: what the metrics count, the report shows."""

import string
import unicodedata
from collections.abc import Mapping

from components.shared.counted import counted

MOST_LABELS = 30
"""Of more distinct references, and of ones that are hardly said twice, none is a label."""

LABELS_SHOWN = 3


def are_labels(distinct: int, of: int) -> bool:
    """Whether so many answers, of so many records, are the names of classes."""
    return 2 <= distinct <= min(MOST_LABELS, of // 2)


def never_trained_text(records: Mapping[str, int]) -> str:
    """What to say of held-out records by the label that no record to train on has."""
    names = ", ".join(map(repr, list(records)[:LABELS_SHOWN])) + (", ..." if len(records) > LABELS_SHOWN else "")
    return f"{counted(sum(records.values()), 'held-out record')} with labels that are never trained on: {names}"


def normal(text: str) -> str:
    """One Unicode form, single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def label(text: str) -> str:
    """What makes an answer the same class as another: neither case, nor punctuation and white space around it."""
    return normal(text).strip(string.punctuation + " ").casefold()
