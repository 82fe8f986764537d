"""What production answered to the earlier records of a dataset."""

from typing import ClassVar

from components.records.steps import Record


class Replayed(Record):
    """Where a training finds production's answers beside the prepared records."""

    FILE: ClassVar[str] = "replayed.json"

    prepared_uri: str
    """Of the dataset with the records that were to be answered."""
    dataset_uri: str
    """Of the one that is trained on."""
    version: str | None
    """Who was asked; None where nothing was in production, and the records' own answers were taken."""
    asked: int
    kept: int
    """Of the answers, those that were right; where none was, the records' own were taken."""
