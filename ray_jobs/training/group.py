"""A worker's place in its group."""

from dataclasses import dataclass

import torch

from components.config.ray import MatmulDtype


@dataclass(frozen=True)
class Worker:
    """Where this process stands in the group."""

    rank: int
    num_workers: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """What weights, activations and gradients are in, the same for all of the group."""
    matmul_dtype: MatmulDtype = "bfloat16"
    """What its products are taken in, the same for all of the group."""
