"""What every section of the config is, and what makes two configs the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict about types, and closed: a key nobody reads is a mistake, not a comment."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Added:
    """Marks a key that came after release 0.1.0: `Annotated[int, Added("0.2.0")] = 1`.

    At its default it says nothing that configs from before it did not say, so it is no part of their digest.
    """

    release: str


@dataclass(frozen=True)
class Removed:
    """A key that is gone: configs may hold it for one release, and its value counts for nothing."""

    default: Any
    """The value that is in force now, and that a digest keeps."""
    instead: str
    """What holds now, in words."""
    in_digest: bool = True
    """Whether each digest that its section is in holds it: not where it was `Added` to a section of release 0.1.0."""


FORMER_SPACE: Mapping[str, list[Any]] = {"learning_rates": [], "ranks": [], "batch_sizes": []}
REMOVED = {
    "evaluate.suites": Removed([], "evaluate.lm_eval names their tasks", in_digest=False),
    "gate.much_worse_by": Removed(1.5, "a record is much worse by 1.5 nats per token", in_digest=False),
    "gate.slice_worse_by": Removed(None, "slices may be as much worse as gate.worse_than_best_by", in_digest=False),
    "gate.suite_worse_by": Removed(None, "gate.lm_eval_worse_by has a margin for each task", in_digest=False),
    "model.keep_nf4": Removed(False, "whoever may write to the bucket chose the weights for everyone", in_digest=False),
    "train.group_by_length": Removed(True, "records of like length share a batch"),
    "train.keep_checkpoints": Removed(2, "the newest two checkpoints are kept"),
    "train.store_patience_s": Removed(1_800, "a training waits half an hour for a store that is away", in_digest=False),
    "ray.collective_timeout_s": Removed(1_800, "workers that lose each other fail after half an hour", in_digest=False),
    "ray.max_preemption_failures": Removed(-1, "workers restart after every preemption", in_digest=False),
    "tune.points": Removed(5, "it is the same in every sweep"),
    "tune.widen": Removed(4, "it is the same in every sweep"),
    "tune.refine": Removed(True, "it is the same in every sweep"),
    "tune.compare_seeds": Removed(3, "it is the same in every sweep"),
    "tune.margin": Removed(0.01, "it is the same in every sweep"),
    "tune.scheduler": Removed("asha", "it is the same in every sweep"),
    "tune.space": Removed(FORMER_SPACE, "tune.learning_rates has its rates, and a sweep tries nothing else"),
    "data.timeout_s": Removed(3_600, "ray.timeout_s bounds the preparing of data too", in_digest=False),
    "data.max_near_share": Removed(0.05, "data.max_reject_share bounds near-duplicates too", in_digest=False),
    "data.replay_least": Removed(1, "an answer of production is right from 0.5 of the metric on", in_digest=False),
    "evaluate.folds": Removed(1, "all held-out records judge at each decision", in_digest=False),
    "evaluate.decisions_per_fold": Removed(20, "there is one test set, evaluate.folds is gone", in_digest=False),
    "gate.too_few_records": Removed("refuse", "a run that lacks records ends before it trains", in_digest=False),
    "ray.cluster.evaluation_service_account": Removed("fineloop-evaluator", "it has that name", in_digest=False),
    "ray.cluster.queue_timeout_s": Removed(86_400, "a job waits in the queue for a day"),
    "ray.cluster.shared_memory_gib": Removed(8, "/dev/shm is a third of a worker's memory, 8 GiB at most"),
    "ray.cluster.gpu_resource": Removed("nvidia.com/gpu", "that is the resource that pods ask for"),
    "ray.cluster.ttl_s": Removed(600, "the cluster of a failed job is kept for ten minutes"),
    "ray.cluster.backoff_limit": Removed(1, "a job that died without a reason gets one new cluster"),
    "ray.cluster.pre_running_timeout_s": Removed(1_800, "pods have half an hour to become ready"),
    "ray.cluster.head.cpu": Removed(2, "the head has as many cores as a worker, 2 at most"),
    "ray.cluster.data": Removed(
        {"pods": 2, "cpu": 4, "memory_gib": 16}, "as many pods prepare data as train, 2 to 8", in_digest=False
    ),
    "train.packing": Removed(True, "records are packed wherever that gives the same losses", in_digest=False),
    "train.dense_base": Removed(None, "the plan decides by the memory that there is", in_digest=False),
    "train.max_grad_norm": Removed(1.0, "gradients are scaled down to norm 1"),
}
"""Each removed key. The rows that are in a digest stay."""


def put_removed(values: dict[str, Any]) -> None:
    """Add what digests keep of the removed keys to a config's JSON values, where their sections are."""
    is_rayjob = values["ray"]["cluster"]["kind"] == "rayjob"
    for path, removed in REMOVED.items():
        *sections, key = path.split(".")
        table: Any = values
        for section in sections:
            table = table.get(section) if table is not None else None
        if removed.in_digest and table is not None and (is_rayjob or "cluster" not in sections):
            table[key] = removed.default


def without_removed(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """A section's values as another release recorded them, without keys that are gone."""
    return {key: value for key, value in values.items() if f"{section}.{key}" not in REMOVED}


def identity(section: BaseModel) -> dict[str, Any]:
    """The section as JSON values, without keys that were added since and are at their defaults."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if any(isinstance(mark, Added) for mark in field.metadata) and value == field.get_default():
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = identity(value)
    return values
