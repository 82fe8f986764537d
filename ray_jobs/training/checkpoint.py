"""Resumable checkpoints in the store: the adapter and the optimizer, never the base.

    runs/<run_id>/checkpoints/step-000100/rank-0/     this worker's part of the optimizer: float32 masters and moments
                                          rank-1/
                                          shared/     adapter weights, best weights so far, state.json

Each of these is a folder with a manifest. `shared` is written after every rank's, so a checkpoint exists when `shared`
does: a half-uploaded one is never resumed from.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from components.config.ray import MatmulDtype
from components.records import runs
from components.shared.errors import ConfigError, IntegrityError, ObjectMissing, StoreError
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import dora
from ray_jobs.base.gathered import gathered
from ray_jobs.kernels.door import Kernels
from ray_jobs.training import optimizer, zero
from ray_jobs.training.patience import is_away

logger = logging.getLogger(__name__)


@dataclass
class TrainingProgress:
    """Where a training stands, beyond its tensors."""

    config_digest: str
    num_workers: int
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_step: int = 0
    best_loss: float = float("inf")
    evals_without_gain: int = 0
    matmul_dtype: MatmulDtype = "bfloat16"
    """What its products were taken in; a checkpoint that does not say was trained in bfloat16."""
    loss_scale: float | None = None
    """Of a training in float16."""
    magnitudes: str = "whole"
    """What is held of magnitudes, where there are any; a checkpoint that does not say holds them, not their change."""
    held_out: str = ""
    """Names the records that `best_loss` was measured on; a checkpoint that does not say measured on others."""

    def measured(self, loss: float) -> bool:
        """Note a held-out loss, and whether it is the best so far."""
        if not loss < self.best_loss:  # as no number is
            self.evals_without_gain += 1
            return False
        self.best_loss, self.best_step, self.evals_without_gain = loss, self.step, 0
        return True


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights in host memory, whole. Under ZeRO-3 every worker must call it."""
    parameters = trainable(module)
    with gathered(parameters.values()):
        return _contiguous(parameters)


def copy_weights(source: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Set the adapter's weights in place. Under ZeRO-3 every worker must call it, with the same weights."""
    parameters = trainable(module)
    with gathered(parameters.values(), changes=True):
        for name, parameter in parameters.items():
            parameter.data.copy_(source[name])


def save(
    store: Store, run_id: str, engine: Any, progress: TrainingProgress, best: Mapping[str, torch.Tensor], *, rank: int
) -> None:
    """Write a checkpoint, which is complete on return; every worker calls it at the same step.

    Raises:
        StoreError: on every worker, where one of them found the store away.
    """
    key = _key(run_id, progress.step)
    progress.loss_scale = zero.loss_scale(engine)
    adapter = weights(engine.module)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        folder = Path(scratch)
        save_file(_optimizer_tensors(engine), folder / "optimizer.safetensors")
        _publish_together(store, f"{key}/rank-{rank}", folder, engine.device)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        folder = Path(scratch)
        if rank == 0:
            save_file(adapter, folder / "adapter.safetensors")
            save_file(_contiguous(best), folder / "best.safetensors")
            (folder / "state.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        _publish_together(store, f"{key}/shared", folder if rank == 0 else None, engine.device)


def _publish_together(store: Store, key: str, folder: Path | None, device: torch.device) -> None:
    """Publish a folder, or nothing, and return when all workers have done so.

    Raises:
        StoreError: the store is away, as this worker or another found.
    """
    failure: StoreError | None = None
    try:
        if folder is not None:
            folders.publish(store, key, {path.name: path for path in folder.iterdir()}, about={"kind": "checkpoint"})
    except StoreError as exc:
        if not is_away(exc):
            raise
        failure = exc
    has_failed = torch.tensor([int(failure is not None)], device=device)
    torch.distributed.all_reduce(has_failed)
    if has_failed.item():
        raise failure or StoreError(f"another worker could not write its part of {store.uri(key)}")


def newest(store: Store, run_id: str) -> int:
    """The step of the newest checkpoint that is whole, every worker's part read; 0 without one.

    One that is damaged is named in the log, and the one before it taken.
    """
    for step in _complete(store, run_id):
        key = _key(run_id, step)
        try:
            folders.verify(store, f"{key}/shared")
            for rank in range(_progress(store, run_id, step).num_workers):
                folders.verify(store, f"{key}/rank-{rank}")
        except (IntegrityError, ObjectMissing) as exc:
            logger.warning("going on from a checkpoint before step %d, which cannot be resumed from: %s", step, exc)
            continue
        return step
    return 0


def resume(
    store: Store, run_id: str, step: int, engine: Any, expected: TrainingProgress, *, rank: int
) -> tuple[TrainingProgress, dict[str, torch.Tensor]]:
    """Put an engine into the state that the checkpoint holds; gives the progress and the best weights.

    A release may hold out other records of a dataset than the one that wrote the checkpoint: then what comes competes
    only with what comes.

    Raises:
        ConfigError: the checkpoint belongs to another config, another number of workers, or a release that trained
            magnitudes otherwise.
        IntegrityError: a file is not what its manifest lists.
    """
    key = _key(run_id, step)
    with tempfile.TemporaryDirectory(prefix="fineloop-checkpoint-") as scratch:
        shared = Path(scratch) / "shared"
        folders.pull(store, f"{key}/shared", shared)
        progress = TrainingProgress(**json.loads((shared / "state.json").read_text(encoding="utf-8")))
        _require_same(progress, expected, store.uri(key))
        if progress.magnitudes != expected.magnitudes and any(True for _ in dora.magnitudes(engine.module)):
            raise ConfigError(
                f"{store.uri(key)} was written by a release that trained magnitudes whole: start a new run"
            )
        folders.pull(store, f"{key}/rank-{rank}", Path(scratch) / "rank")
        copy_weights(load_file(shared / "adapter.safetensors"), engine.module)
        _restore_optimizer(engine, load_file(Path(scratch) / "rank" / "optimizer.safetensors"))
        zero.set_loss_scale(engine, progress.loss_scale)
        best = load_file(shared / "best.safetensors")
    if progress.held_out != expected.held_out:
        logger.info("step %d was judged on other held-out records: the best weights are sought from here on", step)
        progress.best_loss, progress.evals_without_gain = float("inf"), 0
        progress.held_out = expected.held_out
    return progress, best


def kernels(store: Store, run_id: str) -> Kernels | None:
    """What the run's checkpoints were trained with, and so must go on with; None without one that can be read."""
    for step in _complete(store, run_id):
        with contextlib.suppress(IntegrityError, ObjectMissing):
            return Kernels(_progress(store, run_id, step).matmul_dtype)
    return None


def discard_after(store: Store, run_id: str, step: int) -> None:
    """Delete what a lost worker group left of checkpoints beyond `step`."""
    for found in _steps(store, run_id):
        if found > step:
            _delete(store, run_id, found)


def keep_newest(store: Store, run_id: str, count: int) -> None:
    """Delete all but the newest checkpoints, and what is left of those that were never complete."""
    kept = _complete(store, run_id)[:count]
    for step in _steps(store, run_id):
        if step not in kept:
            _delete(store, run_id, step)


def _require_same(found: TrainingProgress, expected: TrainingProgress, uri: str) -> None:
    if found.config_digest != expected.config_digest:
        raise ConfigError(f"{uri} was written with another config: start a new run, or use the config of that one")
    if found.num_workers != expected.num_workers:
        raise ConfigError(
            f"{uri} was written by {found.num_workers} workers and ray.num_workers is {expected.num_workers}: "
            f"resume with ray.num_workers={found.num_workers}, or start a new run"
        )


def _optimizer_tensors(engine: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (master, state) in enumerate(zero.master_partitions(engine)):
        held = {"master": master.detach(), **optimizer.saved(state)}
        tensors.update({f"{index}.{name}": tensor for name, tensor in held.items()})
    return _contiguous(tensors)


def _restore_optimizer(engine: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    for index, (master, _) in enumerate(zero.master_partitions(engine)):
        held = {name.removeprefix(f"{index}."): tensors[name] for name in tensors if name.startswith(f"{index}.")}
        master.data.copy_(held.pop("master"))
        optimizer.restore(engine.optimizer.optimizer, master, held)


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _key(run_id: str, step: int) -> str:
    return runs.run_key(run_id, f"{runs.CHECKPOINTS}step-{step:06d}")


def _progress(store: Store, run_id: str, step: int) -> TrainingProgress:
    key = f"{_key(run_id, step)}/shared/state.json"
    try:
        return TrainingProgress(**json.loads(store.get(key)))  # the best loss is Infinity until one is measured
    except (TypeError, ValueError) as exc:
        raise IntegrityError(f"{store.uri(key)} is no state of a training: {exc}") from exc


def _complete(store: Store, run_id: str) -> list[int]:
    """Steps of the checkpoints that were written to the end, newest first."""
    found = sorted(_steps(store, run_id), reverse=True)
    return [step for step in found if store.exists(f"{_key(run_id, step)}/shared/{folders.MANIFEST}")]


def _steps(store: Store, run_id: str) -> list[int]:
    names = store.folders(runs.run_key(run_id, runs.CHECKPOINTS))
    return [int(name.removeprefix("step-")) for name in names if name.startswith("step-")]


def _delete(store: Store, run_id: str, step: int) -> None:
    # The manifest first: from then on it does not exist, however far the deletion gets.
    key = _key(run_id, step)
    store.delete([f"{key}/shared/{folders.MANIFEST}"])
    store.delete(item.key for item in list(store.list(f"{key}/")))
