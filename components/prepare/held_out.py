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
    validation = [each for each in records if _position(each) < validation_share]
    test = [each for each in records if _position(each) >= validation_share]
    return (validation, test) if validation and test else (list(records), list(records))


def _position(record: Record) -> float:
    belongs_to = f"group:{record.group}" if record.group else record.id
    return position(hashlib.sha256(f"validation:{belongs_to}".encode()).digest())
