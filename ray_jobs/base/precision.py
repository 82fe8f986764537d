"""The 16-bit dtype of weights, activations and gradients.

bfloat16 is preferred: it has float32's range and needs no loss scaling. GPUs before compute capability
8.0 (T4, V100) have no matrix units for it: PyTorch emulates it there, many times slower than their float16.
"""

from typing import TYPE_CHECKING

from components.config.train import Dtype

if TYPE_CHECKING:
    import torch

FIRST_WITH_BFLOAT16 = (8, 0)


def dtype_on(wanted: Dtype, capability: tuple[int, int] | None) -> "torch.dtype":
    """The dtype for a GPU of this compute capability, or a CPU where that is None. `wanted` is train.dtype."""
    import torch

    if wanted == "auto":
        return torch.float16 if capability and capability < FIRST_WITH_BFLOAT16 else torch.bfloat16
    return torch.float16 if wanted == "float16" else torch.bfloat16


def dtype_here(wanted: Dtype, *, use_gpu: bool) -> "torch.dtype":
    """The dtype for this process's GPU or CPU."""
    import torch

    return dtype_on(wanted, torch.cuda.get_device_capability() if use_gpu else None)


def agree(dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """The dtype for all workers of a group: float16 where one of them needs it. Every worker must call this."""
    import torch

    needs = torch.tensor(int(dtype is torch.float16), device=device)
    torch.distributed.all_reduce(needs, torch.distributed.ReduceOp.MAX)
    return torch.float16 if needs.item() else torch.bfloat16
