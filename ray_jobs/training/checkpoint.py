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
from itertools import chain
from pathlib import Path
from types import TracebackType
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
from ray_jobs.training.spec import TrainSpec

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
    matmul_dtype: MatmulDtype = "bfloat16"
    """The dtype of the matrix products; older checkpoints lack it, and were trained in bfloat16."""
    loss_scale: float | None = None
    """The loss scale of a training in float16; None in bfloat16."""
    magnitudes: str = "whole"
    """How DoRA magnitudes are stored, if there are any: "change" from their start, or "whole", as in older checkpoints,
    which lack this field."""
    held_out: str = ""
    """Digest of the records that `best_loss` was measured on; older checkpoints lack it, and used other records."""
    base: dict[str, str] = field(default_factory=dict)
    """Identity of the base that was trained on; empty in older checkpoints."""

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
        return _contiguous(parameters)


def copy_weights(source: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Set the adapter's weights in place. Under ZeRO-3 every worker must call it, with the same weights."""
    parameters = trainable(module)
    with gathered(parameters.values(), changes=True):
        for name, parameter in parameters.items():
            parameter.data.copy_(source[name])


def newest(store: Store, run_id: str) -> TrainingProgress | None:
    """The progress in the newest readable checkpoint: resuming uses the same base and the same dtype of products. None
    where there is no such checkpoint."""
    for step in complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            return progress_of(store, run_id, step)
    return None


def discard_after(store: Store, run_id: str, step: int) -> None:
    """Delete the checkpoints that a lost worker group wrote, or began to write, after `step`."""
    for key, found in [*_steps(store, run_id), *_steps(store, run_id, "best")]:
        if found > step:
            _delete(store, key)


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the `count` newest checkpoints, including older incomplete ones.

    Anything after the newest complete one stays: other workers may be writing it, as they do not wait for deletions.
    """
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
    tensors = {}
    for index, (master, state) in enumerate(zero.master_partitions(engine)):
        held = {"master": master.detach(), **zero.saved(state)}
        tensors.update({f"{index}.{name}": tensor for name, tensor in held.items()})
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def key_of(run_id: str, step: int, kind: str = "step") -> str:
    """Key in the store of a checkpoint's folder, or with `kind` "best" of the folder with the best weights."""
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}{kind}-{step:06d}")


def progress_of(store: Store, run_id: str, step: int) -> TrainingProgress:
    """The progress in a checkpoint, without its tensors.

    Raises:
        IntegrityError: its state.json cannot be parsed.
    """
    key = f"{key_of(run_id, step)}/shared/{STATE}"
    return parse_progress(store.get(key), store.uri(key))


def parse_progress(body: bytes, uri: str) -> TrainingProgress:
    """Parse a checkpoint's state.json.

    Raises:
        IntegrityError: it is not valid.
    """
    try:
        return TrainingProgress(**json.loads(body))  # the best loss is Infinity until one is measured
    except (TypeError, ValueError) as exc:
        raise IntegrityError(f"{uri} is no state of a training: {exc}") from exc


def complete(store: Store, run_id: str) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    found = _steps(store, run_id)
    return [step for key, step in reversed(found) if store.exists(f"{key}/shared/{folders.MANIFEST}")]


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


# Retrying while the store is unreachable, so that a training of days survives some minutes without it.

T = TypeVar("T")
AGAIN_S = 10.0


def is_away(exc: StoreError) -> bool:
    """Whether the store could not be reached, or refused the request; false where its content is wrong."""
    return type(exc) is StoreError


STORE_PATIENCE_S = 1_800
"""How long a training continues without the store: it writes no checkpoints, and at its end waits to publish."""


class Patience:
    """Tracks how long the store has been unreachable."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None

    def lose(self, exc: StoreError, then: str) -> None:
        """Record that the store is unreachable; `then` says what continues meanwhile, for the log.

        Raises:
            StoreError: `exc`, where retrying would not help, or the time is up.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left = self._since + self._seconds - now
        if not is_away(exc) or left <= 0:
            raise exc
        logger.warning("%s, for another %.0f s at most: %s", then, left, exc)

    def regain(self) -> None:
        """Record that the store is reachable again."""
        self._since = None


def patiently(seconds: float, act: Callable[[], T], then: str) -> T:
    """Call `act`, and retry while the store is unreachable; returns its result.

    Raises:
        StoreError: the store was unreachable for too long, or its content is wrong.
    """
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

    def __init__(self, store: Store, spec: TrainSpec, *, rank: int) -> None:
        self._store, self._run_id, self._rank = store, spec.run_id, rank
        self._patience = Patience(STORE_PATIENCE_S)
        self._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        self._group: dist.ProcessGroup | None = None
        """Process group of the writer threads alone: the collectives of one group must come in the same order on all
        workers."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        self._best_step = 0
        """Step of the best weights that are already written; 0 for none."""

    def write(self, engine: Any, progress: TrainingProgress, best: Mapping[str, torch.Tensor]) -> None:
        """Start to write a checkpoint of the current state, after waiting for the previous one.

        Raises:
            StoreError: as `finish`.
        """
        self.finish()
        self._group = self._group or dist.new_group(backend="gloo", timeout=self._timeout)
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
        """Wait for the checkpoint that is being written; returns False, on every worker, if the store is unavailable.

        Raises:
            StoreError: it has been unavailable for too long.
        """
        if self._writing is None:
            return True
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except StoreError as exc:
            self._patience.lose(exc, f"training goes on without a checkpoint of step {step}")
            return False
        self._patience.regain()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.finish()
            except StoreError as exc:  # the weights are in memory, and publishing them waits for the store by itself
                logger.warning("the training ends without its newest checkpoint: %s", exc)
        self._thread.shutdown(wait=error is None)
        if self._group is not None and self._writing is None:
            dist.destroy_process_group(self._group)

    def _write(self, taken: _Snapshot) -> None:
        """Write the checkpoint; returns once it is complete on every worker.

        Raises:
            StoreError: the store was unavailable to one of the workers; raised on all of them.
        """
        key = key_of(self._run_id, taken.progress.step)
        self._together(key, lambda: self._write_part(key, taken))
        self._best_step = taken.progress.best_step
        self._together(key, lambda: self._write_shared(key, taken))
        if self._rank == 0:
            try:
                keep_newest(self._store, self._run_id, KEPT)
            except StoreError as exc:
                logger.warning("older checkpoints are deleted later: %s", exc)

    def _write_part(self, key: str, taken: _Snapshot) -> None:
        with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
            path = Path(scratch) / OPTIMIZER
            save_file(taken.optimizer, path, metadata={PIECES: json.dumps(taken.pieces)})
            self._publish(f"{key}/rank-{self._rank}", path)
            if self._rank == 0 and taken.progress.best_step != self._best_step:
                path = Path(scratch) / BEST
                save_file(dict(taken.best), path)
                self._publish(key_of(self._run_id, taken.progress.best_step, "best"), path)

    def _write_shared(self, key: str, taken: _Snapshot) -> None:
        if self._rank > 0:
            return
        with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
            adapter, state = Path(scratch) / ADAPTER, Path(scratch) / STATE
            save_file(taken.adapter, adapter)
            state.write_text(json.dumps(asdict(taken.progress)), encoding="utf-8")
            self._publish(f"{key}/shared", adapter, state)

    def _publish(self, key: str, *paths: Path) -> None:
        folders.publish(self._store, key, {path.name: path for path in paths}, about={"kind": "checkpoint"})

    def _together(self, key: str, act: Callable[[], None]) -> None:
        """Call `act`, and return when all workers have.

        Raises:
            StoreError: the store is unavailable to this worker or to another.
        """
        failure: StoreError | None = None
        try:
            act()
        except StoreError as exc:
            if not is_away(exc):
                raise
            failure = exc
        has_failed = torch.tensor([int(failure is not None)])
        dist.all_reduce(has_failed, group=self._group)
        if has_failed.item():
            raise failure or StoreError(f"another worker could not write its part of {self._store.uri(key)}")


# Resuming from a run's newest intact checkpoint, whatever number of workers wrote it.


@dataclass(frozen=True)
class _Found:
    """The verified contents of a checkpoint that this worker needs."""

    progress: TrainingProgress
    adapter: Mapping[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None
    """The best weights; None where none were better than the initial ones."""
    states: list[dict[str, torch.Tensor]]
    """For each of this worker's partitions: its master weights and its optimizer state."""


_Written = tuple[list[Piece], list[dict[str, torch.Tensor]]]
"""The part of a checkpoint that one worker wrote: its pieces, and the state of each partition."""


def resume(
    store: Store, spec: TrainSpec, engine: Any, fresh: TrainingProgress, *, rank: int
) -> tuple[TrainingProgress, dict[str, torch.Tensor]]:
    """Load the newest intact checkpoint into the engine; returns the progress and the best weights.

    Without a checkpoint these are `fresh` and the current weights. Every worker must call it, and reads its own part;
    if another number of workers or another ZeRO stage wrote the checkpoint, it reads as many parts as it takes to cover
    its pieces. A checkpoint that is damaged for any worker is logged, and the one before it is used. Later checkpoints,
    which a lost worker group left, are deleted.

    A new release may hold out other records of a dataset than the one that wrote the checkpoint: then the best loss is
    reset, so that later losses are compared only with each other.

    Raises:
        ConfigError: the checkpoint belongs to another config, or has DoRA magnitudes in another form.
    """
    run_id = spec.run_id
    steps = complete(store, run_id) if rank == 0 else []
    found = None
    while step := _sum(steps.pop(0) if steps else 0, engine.device):
        try:
            found = _read(store, spec, step, engine, fresh, rank=rank)
        except (IntegrityError, ObjectMissing) as exc:
            logger.warning("going on from a checkpoint before step %d, which cannot be resumed from: %s", step, exc)
        if not _sum(int(found is None), engine.device):
            break
        found = None
    if rank == 0:
        discard_after(store, run_id, step)
    dist.barrier()
    if found is None:
        return fresh, weights(engine.module)
    best = found.best or weights(engine.module)
    _restore(engine, found)
    progress = found.progress
    by = f" of {counted(progress.num_workers, 'worker')}" if progress.num_workers != fresh.num_workers else ""
    logger.info("resumed from step %d%s", step, by)
    progress.config_digest, progress.num_workers, progress.base = fresh.config_digest, fresh.num_workers, fresh.base
    if progress.held_out != fresh.held_out:
        logger.info("step %d was judged on other held-out records: the best weights are sought from here on", step)
        progress.best_loss, progress.evals_without_gain = float("inf"), 0
        progress.held_out = fresh.held_out
    return progress, best


def _sum(number: int, device: torch.device) -> int:
    """Sum a number over all workers (an all-reduce)."""
    total = torch.tensor([number], device=device)
    dist.all_reduce(total)
    return int(total.item())


def _read(store: Store, spec: TrainSpec, step: int, engine: Any, fresh: TrainingProgress, *, rank: int) -> _Found:
    key = key_of(spec.run_id, step)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        shared = Path(scratch) / "shared"
        folders.pull(store, f"{key}/shared", shared)
        progress = parse_progress((shared / STATE).read_bytes(), store.uri(key))
        uri = store.uri(key)
        if progress.config_digest != spec.training_digest:
            raise ConfigError(f"{uri} was written with another config: start a new run, or use the config of that one")
        if progress.magnitudes != fresh.magnitudes and any(True for _ in dora.magnitudes(engine.module)):
            raise ConfigError(f"{uri} was written by a release that trained magnitudes whole: start a new run")
        parts = _parts(store, key, Path(scratch), progress.num_workers, first=rank)
        return _Found(
            progress,
            load_file(shared / ADAPTER),
            _best(store, spec.run_id, Path(scratch) / "best", progress),
            _states(engine, parts, progress, fresh),
        )


def _best(store: Store, run_id: str, target: Path, progress: TrainingProgress) -> dict[str, torch.Tensor] | None:
    if not progress.best_step:
        return None
    folders.pull(store, key_of(run_id, progress.best_step, "best"), target)
    return dict(load_file(target / BEST))


def _parts(store: Store, key: str, scratch: Path, num_workers: int, *, first: int) -> Iterator[_Written]:
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
        yield [Piece(*each) for each in pieces], [states[index] for index in sorted(states)]


def _states(
    engine: Any, parts: Iterator[_Written], progress: TrainingProgress, fresh: TrainingProgress
) -> list[dict[str, torch.Tensor]]:
    """The state of each of this worker's partitions: as stored, if its pieces are the same, otherwise redistributed."""
    wanted = here(engine, trainable(engine.module))
    pieces, states = next(parts)
    if progress.num_workers == fresh.num_workers and pieces == wanted:
        return states
    sizes = [master.numel() for master, _ in zero.master_partitions(engine)]
    held = (Part(p, [zero.in_float32(each) for each in s]) for p, s in chain([(pieces, states)], parts))
    return deal(held, wanted, sizes)


def _restore(engine: Any, found: _Found) -> None:
    copy_weights(found.adapter, engine.module)
    for (master, _), state in zip(zero.master_partitions(engine), found.states, strict=True):
        held = dict(state)
        master.data.copy_(held.pop("master").view_as(master))
        zero.restore(engine.optimizer.optimizer, master, held)
    zero.set_loss_scale(engine, found.progress.loss_scale)
