"""Asynchronous checkpoints: training waits only while the state is copied to host memory."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from components.config.schema import RunConfig
from components.shared.errors import StoreError
from components.store import folders
from components.store.store import Store
from ray_jobs.training import checkpoint, partitions, zero
from ray_jobs.training.checkpoint import ADAPTER, BEST, OPTIMIZER, PIECES, STATE, TrainingProgress
from ray_jobs.training.partitions import Piece
from ray_jobs.training.patience import Patience, is_away

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

    def __init__(self, store: Store, run_id: str, config: RunConfig, *, rank: int) -> None:
        self._store, self._run_id, self._rank = store, run_id, rank
        self._keep = config.train.keep_checkpoints
        self._patience = Patience(config.train.store_patience_s)
        self._timeout = timedelta(seconds=config.ray.collective_timeout_s)
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
            partitions.here(engine, checkpoint.trainable(engine.module)),
            checkpoint.optimizer_tensors(engine),
            checkpoint.weights(engine.module),
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
        key = checkpoint.key_of(self._run_id, taken.progress.step)
        self._together(key, lambda: self._write_part(key, taken))
        self._best_step = taken.progress.best_step
        self._together(key, lambda: self._write_shared(key, taken))
        if self._rank == 0:
            try:
                checkpoint.keep_newest(self._store, self._run_id, self._keep)
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
                self._publish(checkpoint.key_of(self._run_id, taken.progress.best_step, "best"), path)

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
