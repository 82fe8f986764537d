"""Today's training on a release's registry, as each rank of a group runs it."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from components.config.schema import RunConfig, TrainConfig
from components.config.section import Added


class TrainConfigToCome(TrainConfig):
    """A release to come, as far as the config goes: one key more, with a default."""

    patience: Annotated[int, Added("9.0.0")] = 3


def to_come(config: RunConfig, **keys: int) -> RunConfig:
    """The config as that release reads it, with the new key set or at its default."""
    return config.model_copy(update={"train": TrainConfigToCome(**dict(config.train), **keys)})


@dataclass(frozen=True)
class Done:
    """What rank 0 saw."""

    losses: dict[int, float]
    """By optimizer step."""
    resumed_from: int
    version: str


def train_and_publish(config_toml: str, keys_to_come: dict[str, int] | None, run_id: str, dataset_uri: str) -> Any:
    """Train under the run's name, from its checkpoint where it has one, and publish, as the finetune job does.

    With `keys_to_come` the config is read as by a release that has one key more.
    """
    import torch
    import torch.distributed as dist

    from components.config import config_file
    from components.prepare.dataset import load_split
    from components.registry import lineage
    from components.store.store import Store
    from ray_jobs.base import base_model
    from ray_jobs.text import chat_format
    from ray_jobs.text.batching import tokenize
    from ray_jobs.training import opening, publishing
    from ray_jobs.training import worker as jobs
    from ray_jobs.training.spec import TrainSpec
    from ray_jobs.training.starting import dataset_record
    from ray_jobs.training.zero import Worker

    started_at = datetime.now(UTC)
    config = config_file.loads(config_toml)
    if keys_to_come is not None:
        config = to_come(config, **keys_to_come)
    store, base = Store.open(config.registry), base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    splits = [
        tokenize(load_split(store, dataset_uri, name), chat, config.model.max_length) for name in ("train", "eval")
    ]
    splits[1] = splits[1].take(range(min(config.train.eval_records, len(splits[1]))))
    worker = Worker(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    dataset, base_of_run = dataset_record(store, dataset_uri), lineage.Base(config.model.base, base.identity)
    spec = TrainSpec.of(config, run_id=run_id, dataset=dataset, base=base_of_run, pad=chat.pad)
    records: list[dict[str, Any]] = []
    opened = opening.open_base(spec, worker, store, splits[0])
    fitted = jobs.fit(spec, opened, store, tuple(splits), report=records.append)
    if worker.rank:
        return None
    version = publishing.publish(spec, store, fitted, worker, started_at=started_at)
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    return asdict(Done(losses, fitted.trained.resumed_from, version.version))
