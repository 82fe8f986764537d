"""What every section of the config is, and what makes two configs the same."""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict about types, and closed: a key nobody reads is a mistake, not a comment."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Added:
    """Marks a key that came after release 0.1.0: `Annotated[int, Added("0.2.0")] = 1`.

    At its default it says nothing that configs from before it did not say, so it is no part of their digest.
    """

    release: str


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Each key's docstring, read from the source.

    pydantic's `use_attribute_docstrings` reads all of them at import, a fifth of a command's start.
    """
    found = {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    for above, below in pairwise(definition.body):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                found[key] = inspect.cleandoc(text)
    return found


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
