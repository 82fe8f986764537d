"""What every section of the config is, and what makes two configs the same."""

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
