"""A worker's place in its group."""

from dataclasses import dataclass

import torch

from ray_jobs.kernels.door import PLAIN, Kernels


@dataclass(frozen=True)
class Worker:
    """Where this process stands in the group."""

    rank: int
    num_workers: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """What weights, activations and gradients are in, the same for all of the group."""
    kernels: Kernels = PLAIN
    """What takes its products, the same for all of the group."""
