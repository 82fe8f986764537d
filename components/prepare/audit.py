"""Audits: logged answers that a hash draws, whoever liked them, for people to label. By these a log may judge; pure.

Ratings and edits choose answers by how good they were. A version that is compared on what people corrected is compared
on its own failures, and any other version looks better there.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from components.shared.protocol import counted

SALT = "audit:"
"""Put before an answer's id, so that the draw has nothing to do with the hash by which records are held out."""
MAY_BE_OPEN = 0.1
"""Largest share of an audit's answers without a label: some requests have no right answer."""
NAME_DIGITS = 12


@dataclass
class Audit:
    """What the rows of one draw, in data.feedback, come to."""

    name: str
    """As `name_of_draw` makes it, in each of its rows."""
    drawn: set[str] = field(default_factory=set)
    """The ids of the answers that its rows name."""
    labelled: set[str] = field(default_factory=set)

    @property
    def flaw(self) -> str:
        """Why its labels may not judge yet; empty where they may."""
        if self.name != name_of_draw(self.drawn):
            return (
                f"audit {self.name} is not the draw that it was: {len(self.drawn):,} of its rows are here, and none "
                "may be left out or added"
            )
        if (still_open := len(self.drawn - self.labelled)) > MAY_BE_OPEN * len(self.drawn):
            return (
                f"audit {self.name} lacks {counted(still_open, 'label')}: at most {MAY_BE_OPEN:.0%} of "
                f"{len(self.drawn):,} may stay without one"
            )
        return ""


def name_of_draw(ids: Collection[str]) -> str:
    """The name of a draw: how many answers, and a hash of their ids, so that it shows when rows go missing."""
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    return f"{len(ids)}-{digest[:NAME_DIGITS]}"


def draw(ids: Collection[str], count: int) -> list[str]:
    """The `count` ids whose hashes are the smallest, in that order; all where there are no more."""
    by_hash = sorted(ids, key=lambda each: hashlib.sha256(f"{SALT}{each}".encode()).digest())
    return by_hash[:count]


def labels_for(records: int, *, validation_share: float) -> int:
    """How many answers to draw so that as many records judge, although some stay without a label and others choose the
    checkpoint."""
    return math.ceil(max(records, 1) / (1 - validation_share) / (1 - MAY_BE_OPEN))
