"""When two answers count as the same, in the metrics and in the report."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from components.shared.counted import counted

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
