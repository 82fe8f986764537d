"""Fineloop's own training steps, as ray_jobs.training takes them, for the benchmarks to measure."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from components.config.schema import RunConfig
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels import door, float32_layers
from ray_jobs.kernels.door import Kernels
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.training import train_loop, zero
from ray_jobs.training.train_loop import Pace
from ray_jobs.training.zero import Worker
from tests.models.spec import spec_of


def join(backend: str) -> None:
    """A group of one, or the one that the environment names."""
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # which DeepSpeed asks for
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def make(config: RunConfig, base: base_model.Base, kernels: Kernels, *, dense_base: bool) -> Any:
    """The base with its adapter in DeepSpeed."""
    use_gpu = config.ray.use_gpu
    zero.prepare_environment(use_gpu=use_gpu)
    if not use_gpu:
        door.keep_freed_memory()
    join("nccl" if use_gpu else "gloo")
    model = door.load_model(base, config.model, config.method.row.base, kernels, use_gpu=use_gpu)
    adapted = kernels.adopt(build.attach(model, config.method, base_reference="bench", seed=config.train.seed))
    engine = zero.initialize(adapted.train(), config)
    if dense_base:
        float32_layers.widen(adapted, kernels.dtype)
    return engine


def steps(
    engine: Any, config: RunConfig, split: TokenizedSplit, pad: int, plan: Sequence[npt.NDArray[np.int64]]
) -> Iterator[tuple[float, int]]:
    """Take one step for each batch of the plan; gives each one's loss and tokens."""
    device = torch.device("cuda", torch.cuda.current_device()) if config.ray.use_gpu else torch.device("cpu")
    worker = Worker(dist.get_rank(), dist.get_world_size(), device)
    pace = Pace(worker, zero_stage=config.train.zero_stage)
    spec = spec_of(config, pad=pad)
    for step, batch in enumerate(plan):
        loss, _, seen = train_loop.take_step(
            engine, batch, spec=spec, worker=worker, split=split, step=step, total=len(plan), pace=pace
        )
        yield loss, seen
