"""Resuming from a run's newest intact checkpoint, whatever number of workers wrote it."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from components.config.schema import RunConfig
from components.shared.counted import counted
from components.shared.errors import ConfigError, IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import dora
from ray_jobs.training import checkpoint, optimizer, partitions, zero
from ray_jobs.training.checkpoint import TrainingProgress
from ray_jobs.training.partitions import Part, Piece

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """The verified contents of a checkpoint that this worker needs."""

    progress: TrainingProgress
    adapter: Mapping[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None
    """The best weights; None where none were better than the initial ones."""
    states: list[dict[str, torch.Tensor]]
    """For each of this worker's partitions: its master weights and its optimizer state."""


_Written = tuple[list[Piece] | None, list[dict[str, torch.Tensor]]]
"""The part of a checkpoint that one worker wrote: its pieces (None in checkpoints of release 0.1.0), and the state of
each partition."""


def resume(
    store: Store, run_id: str, engine: Any, fresh: TrainingProgress, config: RunConfig, *, rank: int
) -> tuple[TrainingProgress, dict[str, torch.Tensor]]:
    """Load the newest intact checkpoint into the engine; returns the progress and the best weights.

    Without a checkpoint these are `fresh` and the current weights. Every worker must call it, and reads its own part;
    if another number of workers or another ZeRO stage wrote the checkpoint, it reads as many parts as it takes to cover
    its pieces. A checkpoint that is damaged for any worker is logged, and the one before it is used. Later checkpoints,
    which a lost worker group left, are deleted.

    A new release may hold out other records of a dataset than the one that wrote the checkpoint: then the best loss is
    reset, so that later losses are compared only with each other.

    Raises:
        ConfigError: the checkpoint belongs to another config, or to release 0.1.0, whose checkpoints need the same
            number of workers, and which trained DoRA magnitudes in another form.
    """
    steps = checkpoint.complete(store, run_id) if rank == 0 else []
    found = None
    while step := _sum(steps.pop(0) if steps else 0, engine.device):
        try:
            found = _read(store, run_id, step, engine, fresh, config, rank=rank)
        except (IntegrityError, ObjectMissing) as exc:
            logger.warning("going on from a checkpoint before step %d, which cannot be resumed from: %s", step, exc)
        if not _sum(int(found is None), engine.device):
            break
        found = None
    if rank == 0:
        checkpoint.discard_after(store, run_id, step)
    dist.barrier()
    if found is None:
        return fresh, checkpoint.weights(engine.module)
    best = found.best or checkpoint.weights(engine.module)
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


def _read(
    store: Store, run_id: str, step: int, engine: Any, fresh: TrainingProgress, config: RunConfig, *, rank: int
) -> _Found:
    key = checkpoint.key_of(run_id, step)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        shared = Path(scratch) / "shared"
        folders.pull(store, f"{key}/shared", shared)
        progress = checkpoint.parse_progress((shared / checkpoint.STATE).read_bytes(), store.uri(key))
        uri = store.uri(key)
        if progress.config_digest not in (config.training_digest, config.digest):
            raise ConfigError(f"{uri} was written with another config: start a new run, or use the config of that one")
        if progress.magnitudes != fresh.magnitudes and any(True for _ in dora.magnitudes(engine.module)):
            raise ConfigError(f"{uri} was written by a release that trained magnitudes whole: start a new run")
        parts = _parts(store, key, Path(scratch), progress.num_workers, first=rank)
        return _Found(
            progress,
            load_file(shared / checkpoint.ADAPTER),
            _best(store, run_id, shared, progress),
            _states(engine, parts, progress, fresh, uri),
        )


def _best(store: Store, run_id: str, shared: Path, progress: TrainingProgress) -> dict[str, torch.Tensor] | None:
    path = shared / checkpoint.BEST
    if not path.exists():  # only release 0.1.0 stores it there
        if not progress.best_step:
            return None
        path = shared.parent / "best" / checkpoint.BEST
        folders.pull(store, checkpoint.key_of(run_id, progress.best_step, "best"), path.parent)
    return dict(load_file(path))


def _parts(store: Store, key: str, scratch: Path, num_workers: int, *, first: int) -> Iterator[_Written]:
    """Yield what each worker wrote, starting with rank `first`."""
    for number in range(num_workers):
        folder = scratch / f"rank-{(first + number) % num_workers}"
        folders.pull(store, f"{key}/{folder.name}", folder)
        with safe_open(folder / checkpoint.OPTIMIZER, "pt") as file:
            pieces = (file.metadata() or {}).get(checkpoint.PIECES)
            states: dict[int, dict[str, torch.Tensor]] = {}
            for stored in file.keys():  # noqa: SIM118 - the file is no dict, and has no other way
                index, _, name = stored.partition(".")
                states.setdefault(int(index), {})[name] = file.get_tensor(stored)
        yield (
            None if pieces is None else [Piece(*each) for each in json.loads(pieces)],
            [states[index] for index in sorted(states)],
        )


def _states(
    engine: Any,
    parts: Iterator[_Written],
    progress: TrainingProgress,
    fresh: TrainingProgress,
    uri: str,
) -> list[dict[str, torch.Tensor]]:
    """The state of each of this worker's partitions: as stored, if its pieces are the same, otherwise redistributed."""
    wanted = partitions.here(engine, checkpoint.trainable(engine.module))
    pieces, states = next(parts)
    is_same_number = progress.num_workers == fresh.num_workers
    if pieces is None and not is_same_number:
        raise ConfigError(
            f"{uri} was written by {counted(progress.num_workers, 'worker')} of release 0.1.0 and ray.num_workers is "
            f"{fresh.num_workers}: resume with ray.num_workers={progress.num_workers}, or start a new run"
        )
    if pieces is None or (is_same_number and pieces == wanted):
        return states
    sizes = [master.numel() for master, _ in zero.master_partitions(engine)]
    held = (Part(p or [], [optimizer.in_float32(each) for each in s]) for p, s in chain([(pieces, states)], parts))
    return partitions.deal(held, wanted, sizes)


def _restore(engine: Any, found: _Found) -> None:
    checkpoint.copy_weights(found.adapter, engine.module)
    for (master, _), state in zip(zero.master_partitions(engine), found.states, strict=True):
        held = dict(state)
        master.data.copy_(held.pop("master").view_as(master))
        optimizer.restore(engine.optimizer.optimizer, master, held)
    zero.set_loss_scale(engine, found.progress.loss_scale)
