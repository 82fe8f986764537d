"""The prepare step: `data.source` in, `datasets/<dataset_id>/` out."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.prepare import dataset, intake
from components.prepare.profile import build_profile
from components.prepare.sources import find_sources
from components.prepare.split import deduplicate, split
from components.shared.config import RunConfig

if TYPE_CHECKING:
    from components.registry.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedDataset:
    """What the later steps need to know."""

    dataset_id: str
    uri: str
    train_records: int
    eval_records: int
    rejected: int
    """Unusable rows of this run's sources."""
    created: bool
    """False when the store already held these records: nothing was written."""


def prepare(config: RunConfig, store: "Store") -> PreparedDataset:
    """Read, validate, deduplicate, split and publish the run's data. Running it again on the same data writes nothing.

    Raises:
        DataError: the data is missing, malformed beyond data.max_reject_share, or too little to split.
        StoreError: an s3:// source or the registry cannot be reached.
    """
    data = config.data
    read = intake.read(find_sources(data.source))
    intake.require_usable(read, max_reject_share=data.max_reject_share)
    unique = deduplicate(read.accepted)
    parts = split(unique.records, eval_share=data.eval_share, max_records=data.max_records)
    folder = dataset.publish(
        store,
        train=parts.train,
        evaluation=parts.evaluation,
        rejects=read.rejects,
        profile=build_profile(read, unique, parts),
    )
    logger.info(
        "%s %s: %d records in train, %d in eval; left out: %d duplicates, %d outdated, %d beyond data.max_records",
        "published" if folder.created else "already there:",
        folder.uri,
        len(parts.train),
        len(parts.evaluation),
        unique.duplicates,
        unique.superseded,
        parts.over_max_records,
    )
    return PreparedDataset(
        dataset_id=folder.dataset_id,
        uri=folder.uri,
        train_records=len(parts.train),
        eval_records=len(parts.evaluation),
        rejected=len(read.rejects),
        created=folder.created,
    )
