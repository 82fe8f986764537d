"""The model to be trained: the base with its adapter, with the kernels that all workers agreed on."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from components.config.schema import RunConfig
from ray_jobs.adapters import build, own_base
from ray_jobs.base import base_model
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.training import starting

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LoadModel = Callable[..., "PreTrainedModel"]
"""A function with the signature of `door.load_model`."""


def assemble(
    config: RunConfig,
    base: base_model.Base,
    *,
    use_gpu: bool,
    kernels: Kernels = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    load: LoadModel = door.load_model,
    start: Mapping[str, torch.Tensor] | None = None,
) -> "PeftModel":
    """The base with a fresh adapter, or with the weights `start`, to train in `dtype`. The same on every worker."""
    model = load(
        base,
        config.model,
        config.method.row.base,
        kernels,
        use_gpu=use_gpu,
        in_host_memory=config.train.zero_stage == 3,
        dtype=dtype,
    )
    adapted = build.attach(model, config.method, base_reference=base.reference, seed=config.train.seed)
    kernels.adopt(adapted)
    own_base.begin(config, adapted, base)
    if start is not None:
        starting.begin(adapted, start)
    build.to_training(adapted, dtype)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=config.train.activation_offloading)
        # For most models the call above has done this already; calling it again would lose the old hooks' handles.
        model.disable_input_require_grads()
        model.enable_input_require_grads()
    return adapted.train()
