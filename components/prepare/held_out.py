"""Of the records that are held out, which choose the weights and which judge them; pure."""

import hashlib
from collections.abc import Sequence

from components.prepare.dataset import Record
from components.prepare.split import position


def validation_and_test(records: Sequence[Record], *, validation_share: float) -> tuple[list[Record], list[Record]]:
    """Records to choose a checkpoint on, and those that the gate decides on; each stays where it is for good.

    Decided by a hash of the record's id, or its group's name, so that no refresh moves one. Of so few records that
    either side would be empty, both hold all.
    """
    validation = [each for each in records if is_validation(each, validation_share)]
    test = [each for each in records if not is_validation(each, validation_share)]
    return (validation, test) if validation and test else (list(records), list(records))


def is_validation(record: Record, validation_share: float) -> bool:
    """Whether a record is on the side of `validation_and_test` that chooses, where neither is empty."""
    return _position(record, "validation") < validation_share


def folds(records: Sequence[Record], *, number: int) -> list[list[Record]]:
    """Records that judge, in as many parts; each stays in its part for good, by another hash of what it belongs to."""
    parts: list[list[Record]] = [[] for _ in range(number)]
    for record in records:
        parts[int(number * _position(record, "fold"))].append(record)
    return parts


def _position(record: Record, purpose: str) -> float:
    belongs_to = f"group:{record.group}" if record.group else record.id
    return position(hashlib.sha256(f"{purpose}:{belongs_to}".encode()).digest())
