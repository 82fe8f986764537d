"""Divides the held-out records into those that choose the weights and those that judge them; pure."""

import hashlib
from collections.abc import Sequence

from components.prepare.dataset import Record
from components.prepare.split import position


def validation_and_test(records: Sequence[Record], *, validation_share: float) -> tuple[list[Record], list[Record]]:
    """The records that a checkpoint is chosen on (validation), and those that the gate decides on (test).

    A hash of the record's id, or of its group's name, decides, so that no refresh moves a record to the other side.
    Where there are so few records that either side would be empty, both hold all of them.
    """
    validation = [each for each in records if is_validation(each, validation_share)]
    test = [each for each in records if not is_validation(each, validation_share)]
    return (validation, test) if validation and test else (list(records), list(records))


def is_validation(record: Record, validation_share: float) -> bool:
    """Whether `validation_and_test` puts the record on the validation side, where neither side is empty."""
    return _position(record, "validation") < validation_share


def folds(records: Sequence[Record], *, number: int) -> list[list[Record]]:
    """Divide test records into `number` parts. Another hash of the group's name or the id keeps each in its part."""
    parts: list[list[Record]] = [[] for _ in range(number)]
    for record in records:
        parts[int(number * _position(record, "fold"))].append(record)
    return parts


def _position(record: Record, purpose: str) -> float:
    belongs_to = f"group:{record.group}" if record.group else record.id
    return position(hashlib.sha256(f"{purpose}:{belongs_to}".encode()).digest())
