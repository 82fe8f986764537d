"""The learning rates that sweeps have found, stored for later runs.

adapters/<name>/rates/<key>.json is the newest rate for one base, recipe and data source; the sweep that found it stays
in its run's folder. The key is made of all that a rate depends on and that stays the same from one night to the next:
the data's source, not the records that it holds today.
"""

import hashlib
from typing import ClassVar

from components.config.schema import RunConfig
from components.records.steps import Record
from components.registry.identity import adapter_key
from components.store.store import JSON, Store, encode_json


class FoundRate(Record):
    """A learning rate that a sweep found."""

    FILE: ClassVar[str] = "rates/<key>.json"

    learning_rate: float
    loss: float
    """Validation loss of the sweep's training at this rate."""
    is_inside: bool
    """Whether the neighbouring rates that were tried were worse."""
    method: str
    run_id: str
    """The id of the sweep's run."""
    dataset_id: str
    """The id of the dataset that the rate was found on."""
    base: str = ""
    """The base model's name in the config; empty for a rate of release 0.1.0, whose three fields below are None."""
    rank: int | None = None
    batch_size: int | None = None
    train_records: int | None = None


def remember(store: Store, config: RunConfig, found: FoundRate) -> None:
    """Store the rate for runs of this config, replacing an earlier one."""
    store.put(_key(config), found.as_json(), content_type=JSON)


def recall(store: Store, config: RunConfig) -> FoundRate | None:
    """Return what the newest sweep found for runs of this config; None if there was no sweep.

    Raises:
        IntegrityError: the record is malformed.
    """
    key = _key(config)
    found = store.read(key)
    return FoundRate.from_json(found[0], store.uri(key)) if found else None


def similar(store: Store, config: RunConfig) -> list[FoundRate]:
    """Return what sweeps found for the adapter's base and method, at any rank, batch size and data.

    Raises:
        IntegrityError: a record is malformed.
    """
    keys = [entry.key for entry in store.list(adapter_key(config.adapter.name, "rates/"))]
    found = [FoundRate.from_json(store.get(key), store.uri(key)) for key in keys]
    return [each for each in found if (each.base, each.method) == (config.model.base, config.method.name)]


def _key(config: RunConfig) -> str:
    row = config.method.row
    depends_on = {
        "base": [config.model.base, config.model.revision],
        "source": config.data.source,
        "method": [row.adapter, row.scaling, row.init, row.base, config.method.r, config.method.lora_alpha],
        "target_modules": config.method.target_modules,
        "batch_size": config.train.batch_size,
        "loss_on": config.data.loss_on,
    }
    digest = hashlib.sha256(encode_json(depends_on)).hexdigest()[:16]
    return adapter_key(config.adapter.name, f"rates/{digest}.json")
