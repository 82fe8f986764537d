"""Resumable checkpoints in the store: the adapter and the optimizer, never the base.

    runs/<run_id>/checkpoints/step-000100/rank-0/     this worker's shard of the optimizer state: float32 master weights
                                                      and moments, and the pieces of the parameters they belong to
                                          rank-1/
                                          shared/     adapter weights, state.json
                              best-000040/            best weights so far, from the step that state.json names; without
                                                      this folder they are the initial weights

Each of these is a folder with a manifest. `shared` is written after all others, so a checkpoint exists when `shared`
does: a partial upload is never resumed from.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from components.config.ray import COLLECTIVE_TIMEOUT_S, MatmulDtype
from components.records import runs
from components.shared.errors import ConfigError, IntegrityError, ObjectMissing, StoreError
from components.shared.protocol import counted
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import dora
from ray_jobs.base.four_bits import gathered
from ray_jobs.training import zero

STATE, ADAPTER, BEST, OPTIMIZER = "state.json", "adapter.safetensors", "best.safetensors", "optimizer.safetensors"
KEPT = 2
"""Newest checkpoints that stay."""
PIECES = "pieces"
"""Metadata key of the list of pieces in an optimizer file."""


@dataclass
class TrainingProgress:
    """The state of a training without its tensors."""

    config_digest: str
    """The config's `training_digest`."""
    num_workers: int
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    evals_without_gain: int = 0
    # Older checkpoints lack the following fields.
    matmul_dtype: MatmulDtype = "bfloat16"
    loss_scale: float | None = None
    """Of a training in float16; None in bfloat16."""
    magnitudes: str = "whole"
    """How DoRA magnitudes are stored, if there are any: "whole", or as the "change" from their start."""
    held_out: str = ""
    """Digest of the records that `best_loss` was measured on."""
    base: dict[str, str] = field(default_factory=dict)
    """Identity of the base that was trained on."""

    def measured(self, loss: float) -> bool:
        """Record a held-out loss; returns whether it is the best so far."""
        if not loss < self.best_loss:  # written so that NaN is no gain
            self.evals_without_gain += 1
            return False
        self.best_loss, self.best_step, self.evals_without_gain = loss, self.step, 0
        return True


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name: the adapter's."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A full copy of the adapter's weights in host memory. Under ZeRO-3 every worker must call it."""
    parameters = trainable(module)
    with gathered(parameters.values()):
        return _copied(parameters)


def copy_weights(source: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Set the adapter's weights in place. Under ZeRO-3 every worker must call it, with the same weights."""
    parameters = trainable(module)
    with gathered(parameters.values(), changes=True):
        for name, parameter in parameters.items():
            parameter.data.copy_(source[name])


def newest(store: Store, run_id: str) -> TrainingProgress | None:
    """The progress in the newest readable checkpoint: resuming uses its base and its dtype of products."""
    for step in complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            return progress_of(store, run_id, step)
    return None


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the `count` newest checkpoints; what other workers may be writing after the newest one stays."""
    kept = complete(store, run_id)[:count]
    for key, step in _steps(store, run_id):
        if kept and step < kept[0] and step not in kept:
            _delete(store, key)
    best = _steps(store, run_id, "best")
    if len(best) > 1:
        used = {progress_of(store, run_id, step).best_step for step in kept}
        for key, step in best:
            if step not in used:
                _delete(store, key)


def optimizer_tensors(engine: Any) -> dict[str, torch.Tensor]:
    """A copy in host memory of this worker's master weights and the optimizer state of each."""
    return _copied(
        {
            f"{index}.{name}": tensor
            for index, (master, state) in enumerate(zero.master_partitions(engine))
            for name, tensor in {"master": master, **zero.saved(state)}.items()
        }
    )


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def key_of(run_id: str, step: int, kind: str = "step") -> str:
    """Key in the store of a checkpoint's folder, or with `kind` "best" of the folder with the best weights."""
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}{kind}-{step:06d}")


def progress_of(store: Store, run_id: str, step: int) -> TrainingProgress:
    """The progress in a checkpoint, without its tensors."""
    key = f"{key_of(run_id, step)}/shared/{STATE}"
    return _parsed(store.get(key), store.uri(key))


def _parsed(state: bytes, uri: str) -> TrainingProgress:
    try:
        return TrainingProgress(**json.loads(state))  # the best loss is Infinity until one is measured
    except (TypeError, ValueError) as exc:
        raise IntegrityError(f"{uri} is no state of a training: {exc}") from exc


def complete(store: Store, run_id: str) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    steps = reversed(_steps(store, run_id))
    return [step for key, step in steps if store.exists(f"{key}/shared/{folders.MANIFEST}")]


def _steps(store: Store, run_id: str, kind: str = "step") -> list[tuple[str, int]]:
    """Keys and steps of the folders of one kind, oldest first."""
    names = store.folders(runs.run_key(run_id, runs.CHECKPOINTS))
    steps = sorted(int(name.removeprefix(f"{kind}-")) for name in names if name.startswith(f"{kind}-"))
    return [(key_of(run_id, step, kind), step) for step in steps]


def _delete(store: Store, key: str) -> None:
    # The manifest first: without it the checkpoint does not exist, even if the deletion is interrupted.
    store.delete([f"{key}/shared/{folders.MANIFEST}", f"{key}/{folders.MANIFEST}"])
    store.delete(item.key for item in list(store.list(f"{key}/")))


# Which pieces of which parameters a worker's optimizer partitions hold, so that their state can be redistributed.
#
# DeepSpeed keeps float32 master weights, each with its optimizer state, in flat partitions (0.19):
#
#     ZeRO 1 and 2   the concatenated parameters of a group, divided into one equal part per worker
#                    (utils/tensor_fragment.py has, for each parameter, the fragment on this worker)
#     ZeRO 3         an equal part of each parameter, concatenated (runtime/zero/stage3.py, set_grad_positions)
#     none           each parameter whole, on every worker (runtime/fp16/unfused_optimizer.py)


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
    if hasattr(wrapped, "fp32_partitioned_groups_flat"):  # with cpu_offload the others have a grad_position as well
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

    Elements that belong to no piece, such as the padding at a partition's end, are zero. Parts that lack some of the
    elements are an IntegrityError.
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


# Retrying while the store is unreachable, so that a training of days survives some minutes without it.

T = TypeVar("T")
AGAIN_S = 10.0


def is_away(exc: StoreError) -> bool:
    """Whether the store could not be reached, or refused the request; false where its content is wrong."""
    return type(exc) is StoreError


STORE_PATIENCE_S = 1_800
"""How long a training continues without the store: it writes no checkpoints, and at its end waits to publish."""


class Patience:
    """How long the store has been unreachable."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.since: float | None = None

    def lose(self, exc: StoreError, then: str) -> None:
        """Record that the store is unreachable; `then` says what continues meanwhile, for the log. Raises `exc` where
        retrying would not help, or the time is up."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        left = self.since + self._seconds - now
        if not is_away(exc) or left <= 0:
            raise exc
        logger.warning("%s, for another %.0f s at most: %s", then, left, exc)


def patiently(seconds: float, act: Callable[[], T], then: str) -> T:
    """Call `act`, and retry while the store is unreachable, for so many seconds at most."""
    patience = Patience(seconds)
    while True:
        try:
            return act()
        except StoreError as exc:
            patience.lose(exc, then)
        time.sleep(min(AGAIN_S, seconds))


# Asynchronous checkpoints: training waits only while the state is copied to host memory.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    """This worker's part of a checkpoint: a copy in host memory that further steps do not change."""

    progress: TrainingProgress
    pieces: list[Piece]
    optimizer: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]
    best: Mapping[str, torch.Tensor]


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread on each worker; every worker calls it at the same steps.

    As a context manager it waits at the end for the checkpoint that is being written, except after an error.
    """

    def __init__(self, store: Store, run_id: str, *, rank: int) -> None:
        self._store, self._run_id, self._rank = store, run_id, rank
        self._patience = Patience(STORE_PATIENCE_S)
        self._group: dist.ProcessGroup | None = None
        """Process group of the writer threads alone: the collectives of one group must come in the same order on all
        workers."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        self._best_step = 0
        """Step of the best weights that are already written; 0 for none."""

    def write(self, engine: Any, progress: TrainingProgress, best: Mapping[str, torch.Tensor]) -> None:
        """Start to write a checkpoint of the current state, after waiting for the previous one as `finish` does."""
        self.finish()
        self._group = self._group or dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        progress.loss_scale = zero.loss_scale(engine)
        snapshot = _Snapshot(
            dataclasses.replace(progress),
            here(engine, trainable(engine.module)),
            optimizer_tensors(engine),
            weights(engine.module),
            best,
        )
        self._writing = progress.step, self._thread.submit(self._write, snapshot)

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written; False, on every worker, if the store is unavailable, and a
        StoreError if it has been so for too long."""
        if self._writing is None:
            return True
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except StoreError as exc:
            self._patience.lose(exc, f"training goes on without a checkpoint of step {step}")
            return False
        self._patience.since = None
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            try:
                self.finish()
            except StoreError as exc:  # the weights are in memory, and publishing them waits for the store by itself
                logger.warning("the training ends without its newest checkpoint: %s", exc)
        self._thread.shutdown(wait=error is None)
        if self._group is not None and self._writing is None:
            dist.destroy_process_group(self._group)

    def _write(self, taken: _Snapshot) -> None:
        """Write the checkpoint; returns once it is complete on every worker. A StoreError is raised on all of them."""
        progress, key = taken.progress, key_of(self._run_id, taken.progress.step)
        state = json.dumps(asdict(progress)).encode()

        def write_part() -> None:
            pieces = {PIECES: json.dumps(taken.pieces)}
            self._publish(f"{key}/rank-{self._rank}", OPTIMIZER, taken.optimizer, metadata=pieces)
            if self._rank == 0 and progress.best_step != self._best_step:
                self._publish(key_of(self._run_id, progress.best_step, "best"), BEST, taken.best)

        self._together(key, write_part)
        self._best_step = progress.best_step
        shared = partial(self._publish, f"{key}/shared", ADAPTER, taken.adapter, {STATE: state})
        self._together(key, shared if self._rank == 0 else lambda: None)
        if self._rank == 0:
            try:
                keep_newest(self._store, self._run_id, KEPT)
            except StoreError as exc:
                logger.warning("older checkpoints are deleted later: %s", exc)

    def _publish(
        self,
        key: str,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        beside: Mapping[str, bytes] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
            path = Path(scratch) / name
            save_file(dict(tensors), path, metadata=metadata)
            folders.publish(self._store, key, {name: path, **(beside or {})}, about={"kind": "checkpoint"})

    def _together(self, key: str, act: Callable[[], None]) -> None:
        """Call `act`, and return when all workers have; a store that is unavailable to one is so to all."""
        failure: StoreError | None = None
        try:
            act()
        except StoreError as exc:
            if not is_away(exc):
                raise
            failure = exc
        if _sum(int(failure is not None), self._group):
            raise failure or StoreError(f"another worker could not write its part of {self._store.uri(key)}")


# Resuming from a run's newest intact checkpoint, whatever number of workers wrote it.


def resume(
    store: Store, run_id: str, engine: Any, fresh: TrainingProgress, *, rank: int
) -> tuple[TrainingProgress, dict[str, torch.Tensor]]:
    """Load the newest intact checkpoint into the engine; returns the progress and the best weights.

    Without a checkpoint these are `fresh` and the current weights. Every worker must call it, and reads its own part,
    or as many as cover its pieces where another number of workers or ZeRO stage wrote them. If it is damaged for any
    worker, the checkpoint before it is used. Later ones, which a lost worker group left, are deleted. Raises
    ConfigError: the checkpoint belongs to another config, or has DoRA magnitudes in another form.
    """
    stored: _Stored | None = None
    steps = complete(store, run_id) if rank == 0 else []
    while step := _sum(steps.pop(0) if steps else 0, device=engine.device):
        try:
            stored = _read(store, run_id, step, engine, fresh, rank=rank)
        except (IntegrityError, ObjectMissing) as exc:
            logger.warning("going on from a checkpoint before step %d, which cannot be resumed from: %s", step, exc)
        if not _sum(int(stored is None), device=engine.device):
            break
        stored = None
    if rank == 0:
        for key, left in [*_steps(store, run_id), *_steps(store, run_id, "best")]:
            if left > step:
                _delete(store, key)
    dist.barrier()
    if stored is None:
        return fresh, weights(engine.module)
    progress, adapter, best, states = stored
    best = best or weights(engine.module)
    copy_weights(adapter, engine.module)
    for (master, _), state in zip(zero.master_partitions(engine), states, strict=True):
        master.data.copy_(state["master"].view_as(master))
        zero.restore(engine.optimizer.optimizer, master, {n: tensor for n, tensor in state.items() if n != "master"})
    if progress.loss_scale is not None and engine.fp16_enabled():
        engine.optimizer.loss_scale = progress.loss_scale
    by = f" of {counted(progress.num_workers, 'worker')}" if progress.num_workers != fresh.num_workers else ""
    logger.info("resumed from step %d%s", step, by)
    progress.config_digest, progress.num_workers, progress.base = fresh.config_digest, fresh.num_workers, fresh.base
    if progress.held_out != fresh.held_out:  # a new release may hold out other records of a dataset
        logger.info("step %d was judged on other held-out records: the best weights are sought from here on", step)
        progress.best_loss, progress.evals_without_gain = float("inf"), 0
        progress.held_out = fresh.held_out
    return progress, best


def _sum(number: int, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> int:
    """Sum a number over all workers (an all-reduce)."""
    total = torch.tensor([number], device=device)
    dist.all_reduce(total, group=group)
    return int(total.item())


_Stored = tuple[
    TrainingProgress, dict[str, torch.Tensor], dict[str, torch.Tensor] | None, Sequence[Mapping[str, torch.Tensor]]
]
"""Of a checkpoint: the progress, the adapter's weights, the best ones, or None where none were better than the initial
ones, and for each of this worker's partitions its master weights and its optimizer state."""


def _read(store: Store, run_id: str, step: int, engine: Any, fresh: TrainingProgress, *, rank: int) -> _Stored:
    key = key_of(run_id, step)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        folder = Path(scratch)
        folders.pull(store, f"{key}/shared", folder / "shared")
        progress = _parsed((folder / "shared" / STATE).read_bytes(), store.uri(key))
        if progress.config_digest != fresh.config_digest:
            raise ConfigError(
                f"{store.uri(key)} was written with another config: start a new run, or use the config of that one"
            )
        if progress.magnitudes != fresh.magnitudes and any(True for _ in dora.magnitudes(engine.module)):
            raise ConfigError(
                f"{store.uri(key)} was written by a release that trained magnitudes whole: start a new run"
            )
        best = None
        if progress.best_step:
            folders.pull(store, key_of(run_id, progress.best_step, "best"), folder / "best")
            best = load_file(folder / "best" / BEST)
        pieces, parts = here(engine, trainable(engine.module)), _parts(store, key, folder, progress.num_workers, rank)
        first = next(parts)
        if progress.num_workers == fresh.num_workers and first.pieces == pieces:
            states = first.states
        else:
            sizes = [master.numel() for master, _ in zero.master_partitions(engine)]
            every = (Part(p, [zero.in_float32(state) for state in of]) for p, of in chain([first], parts))
            states = deal(every, pieces, sizes)
        return progress, load_file(folder / "shared" / ADAPTER), best, states


def _parts(store: Store, key: str, scratch: Path, num_workers: int, first: int) -> Iterator[Part]:
    """Yield what each worker wrote, starting with rank `first`."""
    for number in range(num_workers):
        folder = scratch / f"rank-{(first + number) % num_workers}"
        folders.pull(store, f"{key}/{folder.name}", folder)
        with safe_open(folder / OPTIMIZER, "pt") as file:
            pieces = json.loads(file.metadata()[PIECES])
            states: dict[int, dict[str, torch.Tensor]] = {}
            for stored in file.keys():  # noqa: SIM118 - the file is no dict, and has no other way
                index, _, name = stored.partition(".")
                states.setdefault(int(index), {})[name] = file.get_tensor(stored)
        yield Part([Piece(*fields) for fields in pieces], [states[index] for index in sorted(states)])
