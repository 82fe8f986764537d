"""How many records go through a model at once: the configured number, as far as memory allows."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from components.shared.errors import JobError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

BF16 = 2
CACHE_SHARE = 0.7
"""Of the free memory that keys and values may take: while a prompt is read, its activations stand beside them."""


def is_shared(model: torch.nn.Module) -> bool:
    """Whether workers hold its weights together, so that each pass through it is collective (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def in_batches(
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    work: Callable[[npt.NDArray[np.int64]], None],
    *,
    together: bool = False,
) -> None:
    """Do `work` on all indices in batches of like length, longest first, with half as many whenever memory runs out.

    `together` is set where other workers take the same steps: then none may take more of them, and memory must do.

    Raises:
        JobError: memory does not hold even one record.
    """
    order = np.argsort(-lengths, kind="stable")
    done = 0
    while done < len(order):
        indices = order[done : done + batch_size]
        try:
            work(indices)
        except torch.OutOfMemoryError as exc:
            if together:
                raise
            if len(indices) == 1:
                raise JobError(
                    f"the device's memory does not hold one record of {lengths[indices[0]]} tokens beside the model: "
                    "take a GPU with more memory, a quantised base (method.base), or a shorter model.max_length"
                ) from exc
            batch_size = len(indices) // 2
            logger.warning("out of memory with %d records at once: going on with %d", len(indices), batch_size)
        else:
            done += len(indices)
            continue
        torch.cuda.empty_cache()  # out of the handler, whose traceback holds what did not fit


def agreed(batch_size: int, device: torch.device) -> int:
    """What the least of all workers has room for."""
    least = torch.tensor(batch_size, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def with_room(batch_size: int, base: "PretrainedConfig", tokens: int, free_bytes: int | None) -> int:
    """As many records as their keys and values have room for, at most `batch_size`; each grows to `tokens`."""
    if free_bytes is None:
        return batch_size
    return max(1, min(batch_size, int(CACHE_SHARE * free_bytes / (tokens * cache_bytes_per_token(base)))))


def cache_bytes_per_token(base: "PretrainedConfig") -> int:
    """Keys and values of one token in all layers, in bfloat16; layers with a sliding window hold less in the end."""
    text = base.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * BF16 * text.num_hidden_layers * heads * width)


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU, unused memory and what PyTorch keeps in reserve; None elsewhere, where memory is not ours alone."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)
