"""LoftQ: a base whose NF4 weights are chosen together with the adapter's initial A and B (arXiv:2310.08659).

With more than one step the NF4 weights differ from those of the quantised original. For each layer, the adapter's
initial A and B are the R and L of W = Q + L R; the results include NF4's error in each kind of layer, with and without
LoftQ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import MethodConfig, RunConfig
from components.shared.protocol import say
from ray_jobs.adapters.loftq import make
from ray_jobs.adapters.loftq.make import NF4, Split
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT = 1  # version of the folder's layout and of the arithmetic: part of the base's identity


def check(config: RunConfig, original: Base) -> None:
    """Raise ConfigError where a layer to be adapted cannot be split."""
    make.find_layers(config, original)


def made_from(method: MethodConfig, original: Base) -> dict[str, Any]:
    """The inputs that determine Q, L and R; the adapter's scaling and alpha are not among them."""
    targets = method.target_modules
    return {
        "format": FORMAT,
        "original": original.identity,
        "target_modules": targets if isinstance(targets, str) else sorted(set(targets)),
        "rank": method.r,
        "steps": method.loftq_steps,
        "quantization": {setting: str(value) for setting, value in NF4.items()},
    }


def compute(
    config: RunConfig, original: Base, *, rank: int, num_workers: int, group: "ProcessGroup | None"
) -> dict[str, Split]:
    """Split every layer that gets an adapter.

    Raises:
        ConfigError: on every worker, if the layers cannot be split.
    """
    return make.split_together(config, original, rank=rank, num_workers=num_workers, group=group)


def write(
    config: RunConfig, original: Base, splits: Mapping[str, Split], folder: Path, init_path: Path
) -> dict[str, Any]:
    """Write the model and the adapter's initial weights; returns the relative error in the weights' norm.

    Raises:
        ConfigError: LoftQ does not reduce the error.
    """
    lost = make.lost_shares(splits)
    changes = ", ".join(f"{kind} {each['nf4']:.4f} -> {each['loftq']:.4f}" for kind, each in lost.items())
    say("finetune", f"LoftQ: share of the weights' norm that is lost, NF4 -> LoftQ: {changes}")
    make.write(config, original, splits, folder, init_path)
    return {"lost_shares": lost}
