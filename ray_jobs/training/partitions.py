"""Which pieces of which parameters a worker's optimizer partitions hold, so that their state can be redistributed.

DeepSpeed keeps float32 master weights, each with its optimizer state, in flat partitions (0.19):

    ZeRO 1 and 2   the concatenated parameters of a group, divided into one equal part per worker
                   (utils/tensor_fragment.py has, for each parameter, the fragment on this worker)
    ZeRO 3         an equal part of each parameter, concatenated (runtime/zero/stage3.py, set_grad_positions)
    none           each parameter whole, on every worker (runtime/fp16/unfused_optimizer.py)
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from components.shared.errors import IntegrityError


class Piece(NamedTuple):
    """`size` elements of a flattened parameter, from `start` on; they lie in a partition from `offset` on."""

    name: str
    start: int
    size: int
    partition: int
    """Index of the partition in `zero.master_partitions`."""
    offset: int


class Part(NamedTuple):
    """The pieces and optimizer states of one worker."""

    pieces: Sequence[Piece]
    states: Sequence[Mapping[str, torch.Tensor]]
    """The state of each partition by name: `step`, and flat tensors with one number per element of the partition."""


def here(engine: Any, parameters: Mapping[str, torch.nn.Parameter]) -> list[Piece]:
    """The pieces of the trained `parameters` in this worker's partitions."""
    return [piece for piece in _pieces(engine.optimizer, parameters) if piece.size]


def _pieces(wrapped: Any, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[Piece]:
    if hasattr(wrapped, "grad_position"):
        for name, parameter in parameters.items():
            partition, offset, most = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = dist.get_rank() * most
            yield Piece(name, start, max(0, min(most, parameter.ds_numel - start)), partition, offset)
        return
    if hasattr(wrapped, "fp16_groups"):
        names = {id(parameter): name for name, parameter in parameters.items()}
        whole = [parameter for group in wrapped.fp16_groups for parameter in group]
        for number, parameter in enumerate(whole):
            yield Piece(names[id(parameter)], 0, parameter.numel(), number, 0)
        return
    for name, parameter in parameters.items():
        if (mapping := parameter._hp_mapping) is not None:
            of, at = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(name, of.start, of.numel, mapping.param_group_index, at.start)


def deal(parts: Iterable[Part], pieces: Sequence[Piece], sizes: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Redistribute optimizer states: from the `parts` of other workers to partitions of `sizes` that hold `pieces`.

    Elements that belong to no piece, such as the padding at a partition's end, are zero.

    Raises:
        IntegrityError: the parts lack some of the elements.
    """
    states: list[dict[str, torch.Tensor]] = [{} for _ in sizes]
    wanted: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        wanted[piece.name].append(piece)
    left = sum(piece.size for piece in pieces)
    for part in parts:
        if not left:
            break  # without ZeRO the first part holds everything
        for theirs in part.pieces:
            for ours in wanted[theirs.name]:
                start, end = max(theirs.start, ours.start), min(theirs.start + theirs.size, ours.start + ours.size)
                if start >= end:
                    continue
                left -= end - start
                state = states[ours.partition]
                for name, tensor in part.states[theirs.partition].items():
                    if name == "step":
                        state[name] = tensor
                        continue
                    flat = state.setdefault(name, torch.zeros(sizes[ours.partition], dtype=tensor.dtype))
                    at, of = ours.offset + start - ours.start, theirs.offset + start - theirs.start
                    flat[at : at + end - start] = tensor[of : of + end - start]
    if left:
        raise IntegrityError(
            f"the workers' parts lack {left:,} of the optimizer's elements that this worker is to hold"
        )
    return states
