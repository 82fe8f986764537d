"""The learning rates that sweeps have found, remembered for the runs that come after.

adapters/<name>/rates/<key>.json is the newest for one base, recipe and data source; the sweep that found it stays in
its run's folder. The key is made of all that a rate depends on and that stays the same from one night to the next: the
data's source, not the records that it holds today.
"""

import hashlib
from typing import ClassVar

from components.config.schema import RunConfig
from components.records.steps import Record
from components.registry.names import adapter_key
from components.store.store import JSON, Store, encode_json


class FoundRate(Record):
    """A rate that a sweep found."""

    FILE: ClassVar[str] = "rates/<key>.json"

    learning_rate: float
    loss: float
    """Validation loss of the sweep's training at it."""
    is_inside: bool
    """Whether the rates tried beside it were worse."""
    method: str
    run_id: str
    """Of the sweep."""
    dataset_id: str
    """What it was found on."""
    base: str = ""
    """As the config names it; empty of a rate that release 0.1.0 found, as the three below are None."""
    rank: int | None = None
    batch_size: int | None = None
    train_records: int | None = None


def remember(store: Store, config: RunConfig, found: FoundRate) -> None:
    """Keep the rate for runs of this config, in the place of an earlier one."""
    store.put(_key(config), found.as_json(), content_type=JSON)


def recall(store: Store, config: RunConfig) -> FoundRate | None:
    """What the newest sweep found for runs of this config; None where there was none.

    Raises:
        IntegrityError: the record is not what it should be.
    """
    key = _key(config)
    found = store.read(key)
    return FoundRate.from_json(found[0], store.uri(key)) if found else None


def similar(store: Store, config: RunConfig) -> list[FoundRate]:
    """What sweeps found for the adapter's base and method at whatever rank, batch size and data.

    Raises:
        IntegrityError: a record is not what it should be.
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
