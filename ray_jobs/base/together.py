"""What the workers of a process group tell each other, beside the tensors of their training.

Only JSON and tensors cross between ranks. torch's collectives of Python objects (`all_gather_object` and its like)
unpickle what arrives, so that whoever gets onto one of these sockets runs code as the user who trains.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from components.shared import errors
from components.shared.errors import FineloopError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(hours=6)
"""How long workers wait for one that downloads, quantises or uploads a large base. The loss of a worker's process ends
their wait at once."""


def all_gather(value: Any, group: "ProcessGroup | None" = None) -> list[Any]:
    """The value of each rank, as JSON gives it back, on every rank; all of the group must call this."""
    body = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    rank, num_workers = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(num_workers, dtype=torch.int64, device=device)
    sizes[rank] = len(body)
    dist.all_reduce(sizes, group=group)
    bodies = torch.zeros(num_workers, int(sizes.max()), dtype=torch.uint8, device=device)
    bodies[rank, : len(body)] = body.to(device)
    dist.all_reduce(bodies, group=group)  # a sum of one rank's bytes and zeros
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(bodies.cpu(), sizes.tolist(), strict=True)]


def from_rank_0(value: Any, group: "ProcessGroup | None") -> Any:
    """Rank 0's `value`, which JSON can hold, on every worker; without a group, the value itself."""
    if group is None:
        return value
    return all_gather(value if dist.get_rank(group) == 0 else None, group)[0]


def send(tensors: Mapping[str, torch.Tensor], rank: int, group: "ProcessGroup") -> None:
    """Send tensors in host memory to another rank of a gloo group, which must call `receive`."""
    import safetensors.torch

    body = torch.frombuffer(bytearray(safetensors.torch.save(dict(tensors))), dtype=torch.uint8)
    dist.send(torch.tensor(len(body)), rank, group)
    dist.send(body, rank, group)


def receive(rank: int, group: "ProcessGroup") -> dict[str, torch.Tensor]:
    """The tensors that another rank sends."""
    import safetensors.torch

    size = torch.tensor(0)
    dist.recv(size, rank, group)
    body = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(body, rank, group)
    return safetensors.torch.load(body.numpy().tobytes())


def on_rank_0(work: Callable[[], None], *, rank: int, group: "ProcessGroup | None") -> None:
    """Do `work` on rank 0 while the other workers wait. Raises FineloopError: on every worker, as `work` raised it."""
    failure: FineloopError | None = None
    try:
        if rank == 0:
            work()
    except FineloopError as exc:  # every worker must end, and for the same reason
        failure = exc
    told = from_rank_0(failure and [type(failure).__name__, str(failure)], group)
    if told is not None:
        raise failure or errors.by_name(*told)


def meet(group: "ProcessGroup | None") -> None:
    """Wait until every worker of a `gloo_group` is here."""
    if group is not None:
        dist.barrier(group)


@contextlib.contextmanager
def gloo_group(num_workers: int) -> Iterator["ProcessGroup | None"]:
    """A gloo process group of all workers, who wait for each other with PATIENCE; None for a single worker."""
    if num_workers == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
