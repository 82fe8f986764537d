"""Every value of every axis of a method and its training, legal together or not."""

from typing import Any, get_args, get_type_hints

from components.config.methods import Cell

AXES: dict[str, tuple[Any, ...]] = {
    name: get_args(kind) or {int: range(4), bool: (False, True)}[kind] for name, kind in get_type_hints(Cell).items()
}
