"""Batch sizes for inference: the configured number of records, as far as memory allows."""

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

BF16 = 2  # bytes
CACHE_SHARE = 0.7
"""Share of the free memory that the KV cache may take; the rest is for the activations of the prefill."""


def is_shared(model: torch.nn.Module) -> bool:
    """Whether the model is sharded over the workers (ZeRO-3), so that each forward pass is a collective operation."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def in_batches(
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    work: Callable[[npt.NDArray[np.int64]], None],
    *,
    together: bool = False,
) -> None:
    """Call `work` on all indices in batches of similar length, longest first; halve the batch when out of memory.

    Set `together` where other workers make the same forward passes: then a worker must not make more of them, and
    running out of memory is raised.

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
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps references to tensors


def agreed(batch_size: int, device: torch.device) -> int:
    """The smallest `batch_size` of all workers (an all-reduce)."""
    least = torch.tensor(batch_size, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def with_room(batch_size: int, base: "PretrainedConfig", tokens: int, free_bytes: int | None) -> int:
    """The largest batch size up to `batch_size` whose KV cache fits, with `tokens` tokens per record; at least 1.

    `free_bytes` None means that memory sets no limit.
    """
    if free_bytes is None:
        return batch_size
    return max(1, min(batch_size, int(CACHE_SHARE * free_bytes / (tokens * cache_bytes_per_token(base)))))


def cache_bytes_per_token(base: "PretrainedConfig") -> int:
    """Bytes of the KV cache per token over all layers, in bfloat16; layers with a sliding window end up with less."""
    text = base.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * BF16 * text.num_hidden_layers * heads * width)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the GPU plus what PyTorch's allocator holds in reserve, in bytes; None on CPUs, where other
    processes share the memory."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)
