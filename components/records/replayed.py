"""Record of a replay: the production version's answers to earlier records of a dataset."""

from typing import ClassVar

from components.records.steps import Record


class Replayed(Record):
    """Where a training finds the dataset that holds production's answers beside the prepared records."""

    FILE: ClassVar[str] = "replayed.json"

    prepared_uri: str
    """URI of the dataset with the records to be answered."""
    dataset_uri: str
    """URI of the dataset that is trained on."""
    version: str | None
    """The version that was asked; None if nothing was in production."""
    asked: int
    """Number of earlier records that are replayed."""
    kept: int
    """Number of them that are trained on with the version's answers, as these were right; the others have their own."""
