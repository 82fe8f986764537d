"""LoftQ: a base of the adapter's own, whose NF4 weights and starting A and B were chosen together (arXiv:2310.08659).

With more than one step the NF4 weights are no longer those of the original. The first weights are, for each layer, R
and L of W = Q + L R; what was found is what NF4 loses of each weight, before and after.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import MethodConfig, RunConfig
from components.shared.protocol import say
from ray_jobs.adapters.loftq import make
from ray_jobs.adapters.loftq.split import NF4, Split
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT = 1  # of the folder and of the arithmetic: another one is another base


def check(config: RunConfig, original: Base) -> None:
    """Raises ConfigError where a layer to adapt is not one that can be split."""
    make.find_layers(config, original)


def made_from(method: MethodConfig, original: Base) -> dict[str, Any]:
    """What Q, L and R depend on; scaling and alpha are not among it."""
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
    """Split every layer that will have an adapter.

    Raises:
        ConfigError: on every worker: the layers cannot be split.
    """
    return make.split_together(config, original, rank=rank, num_workers=num_workers, group=group)


def write(
    config: RunConfig, original: Base, splits: Mapping[str, Split], folder: Path, init_path: Path
) -> dict[str, Any]:
    """Write the model and the first weights; gives the share of the weights' norm that is lost.

    Raises:
        ConfigError: splitting gains nothing.
    """
    lost = make.lost_shares(splits)
    changes = ", ".join(f"{kind} {each['nf4']:.4f} -> {each['loftq']:.4f}" for kind, each in lost.items())
    say("finetune", f"LoftQ: share of the weights' norm that is lost, NF4 -> LoftQ: {changes}")
    make.write(config, original, splits, folder, init_path)
    return {"lost_shares": lost}
