"""DeepSpeed as Fineloop uses it: ZeRO over the adapter's parameters, the same on GPUs and on CPU processes."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from components.shared.config import RunConfig

# Bucket for reducing gradients, in elements. DeepSpeed's default of 5e8 would allocate a gigabyte for any adapter.
BUCKET_ELEMENTS = 20_000_000


def prepare_environment(*, use_gpu: bool) -> None:
    """Keep DeepSpeed from compiling a kernel at its first use on CPU, before anything imports it.

    That takes a C++ compiler and 40 s; gloo does the kernel's work as fast.
    """
    if use_gpu:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def accumulation(config: RunConfig) -> int:
    """Forward passes of each worker in one optimizer step."""
    return config.train.batch_size // (config.train.micro_batch_size * config.ray.num_workers)


def settings(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration, spelled as DeepSpeed spells it."""
    train = config.train
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation(config),
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": config.ray.use_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW; DeepSpeed's own would be compiled at first use
        "steps_per_print": 2**31,  # the loop does the reporting
    }


def initialize(model: torch.nn.Module, config: RunConfig) -> Any:
    """Wrap a model with an attached adapter. What trains becomes bfloat16, with float32 masters in the optimizer.

    Needs an initialised process group.
    """
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The learning rate is set before every step.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=config.train.weight_decay)
    deepspeed.init_distributed(dist_backend="nccl" if config.ray.use_gpu else "gloo", verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(config))
    for _, state in master_partitions(engine):
        if "step" in state:  # without ZeRO, DeepSpeed has taken an empty step, which would spoil Adam's bias correction
            state["step"].zero_()
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def master_partitions(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """This worker's float32 master weights, flat, each with its optimizer state (empty before the first step)."""
    inner = engine.optimizer.optimizer
    for group in inner.param_groups:
        for partition in group["params"]:
            yield partition, inner.state[partition]
