"""A worker in its process group."""

from dataclasses import dataclass

import torch

from ray_jobs.kernels.door import PLAIN, Kernels


@dataclass(frozen=True)
class Worker:
    """This process's rank, device and dtypes in its process group."""

    rank: int
    num_workers: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """The dtype of weights, activations and gradients, the same for the whole group."""
    kernels: Kernels = PLAIN
    """The kernels of the worker's products, the same for the whole group."""
