"""Gathering weights that ZeRO-3 shards, for as long as they are read."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch


def gathered(parameters: Iterable[torch.nn.Parameter], *, changes: bool = False) -> AbstractContextManager[None]:
    """Gather the whole weights on every worker, all of which must enter. With `changes`, rank 0's changes are kept."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        sharded, modifier_rank=0 if changes else None
    )
    return context
