"""The base that an adapter stands on: the original, or one of its own that its start was chosen together with.

`method.init` says which. A start that moves the base is one entry of `STARTS`: a module with the four functions that
are called here, as LoftQ's has them. Nobody else asks for a start by its name.
"""

from typing import TYPE_CHECKING, Any, Protocol

from components.config.methods import Init
from components.config.schema import RunConfig
from components.registry.store import Store
from ray_jobs.adapters.loftq import loftq
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from peft import PeftModel


class Start(Protocol):
    """How adapters of one `method.init` begin, where that is not as the base alone."""

    def prepare(self, config: RunConfig, original: Base, store: Store, *, rank: int = 0, num_workers: int = 1) -> Base:
        """Find the base, or make it, which all workers do together."""

    def find(self, config: RunConfig, original: Base, store: Store) -> Base:
        """The base where it was made already."""

    def begin(self, adapted: "PeftModel", base: Base) -> None:
        """Give a fresh adapter its first weights."""

    def recipe(self, base: Base) -> dict[str, Any]:
        """How the base was made, for the lineage."""


STARTS: dict[Init, Start] = {"loftq": loftq}


def prepare(config: RunConfig, original: Base, store: Store, *, rank: int = 0, num_workers: int = 1) -> Base:
    """The base to train on; with several workers every one of them must call this, in an initialised process group.

    Raises:
        ConfigError: no such base can be made of the original.
    """
    start = STARTS.get(config.method.row.init)
    return start.prepare(config, original, store, rank=rank, num_workers=num_workers) if start else original


def find(config: RunConfig, original: Base, store: Store) -> Base:
    """The base that an adapter of this config was trained on.

    Raises:
        ObjectMissing: it was never made.
    """
    start = STARTS.get(config.method.row.init)
    return start.find(config, original, store) if start else original


def begin(config: RunConfig, adapted: "PeftModel", base: Base) -> None:
    """Give a fresh adapter on `base` its first weights, where those are not peft's own."""
    if start := STARTS.get(config.method.row.init):
        start.begin(adapted, base)


def recipe(config: RunConfig, base: Base) -> dict[str, Any]:
    """For the lineage: how the base was made; nothing for the original."""
    start = STARTS.get(config.method.row.init)
    return start.recipe(base) if start else {}
