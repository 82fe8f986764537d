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
    """Whether release 0.1.0 had it, whose digests hold every key."""


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
}
"""Each removed key. The rows that are in a digest stay."""


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
        elif isinstance(value, list):
            values[name] = [
                identity(each) if isinstance(each, BaseModel) else values[name][i] for i, each in enumerate(value)
            ]
    return values
