"""When two answers count as the same, in the metrics and in the report."""

import string
import unicodedata
from collections.abc import Mapping

from components.shared.counted import counted

MOST_LABELS = 30
"""Maximum number of distinct references that count as labels; each also has to occur twice on average."""

LABELS_SHOWN = 3


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


def label(text: str) -> str:
    """Return an answer's class: the normalised text without case, and without punctuation and white space around it."""
    return normal(text).strip(string.punctuation + " ").casefold()
