"""The steps of each Ray Train worker: open the base, attach the adapter, train, and on rank 0 publish the version."""

import contextlib
from datetime import UTC, datetime
from typing import Any

import torch

from components.records import runs
from components.records.steps import TrainResult
from components.registry import lineage
from components.shared.protocol import counted, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import dora
from ray_jobs.kernels import door
from ray_jobs.text import token_store
from ray_jobs.text.token_store import StoredTokens
from ray_jobs.training import checkpoint, opening, publishing, step_zero, train_loop, zero
from ray_jobs.training.checkpoint import STORE_PATIENCE_S, patiently
from ray_jobs.training.metrics_log import MetricsLog, Trackers
from ray_jobs.training.opening import LoadModel, Opened
from ray_jobs.training.publishing import Fitted
from ray_jobs.training.spec import Stopwatch, TrainSpec
from ray_jobs.training.train_loop import Report, Splits
from ray_jobs.training.zero import Worker


def train(
    spec: TrainSpec,
    tokens: tuple[StoredTokens, StoredTokens],
    stopwatch: Stopwatch,
    *,
    load: LoadModel = door.load_model,
) -> dict[str, Any]:
    """Train and publish a version; on rank 0, its TrainResult, which the run has then. `load` reads the base."""
    import ray.train

    context = ray.train.get_context()
    device = ray.train.torch.get_device() if spec.ray.use_gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    spec, store = spec.on(worker.num_workers), Store.open(spec.registry)
    entry.log_as("finetune", rank=worker.rank)
    metrics = None
    if worker.rank == 0:
        every = spec.train.checkpoint_every_steps
        metrics = MetricsLog(
            store, spec.run_id, checkpoint_every_steps=every, patience_s=STORE_PATIENCE_S, trackers=Trackers(spec)
        )
    started_at = datetime.now(UTC)
    train_split, eval_split = (token_store.load(store, stored) for stored in tokens)
    with metrics or contextlib.nullcontext():
        opened = opening.open_base(spec, worker, store, train_split)
        fitted = fit(
            spec,
            opened,
            store,
            (train_split, eval_split),
            report=metrics.add if metrics else lambda _: None,
            load=load,
            watch=train_loop.Watch(worker),
            stopwatch=stopwatch,
        )
        trained, progress, trained_at = fitted.trained, fitted.trained.progress, datetime.now(UTC)
        seconds = trained_at.timestamp() - stopwatch.began
        usage = publishing.usage_of(spec, worker, progress, metrics, seconds=seconds)
    if usage is None:
        return {}

    def publish() -> TrainResult:
        version = publishing.publish(spec, store, fitted, worker, started_at=started_at, usage=usage)
        result = TrainResult(
            version=version.version,
            version_uri=version.uri,
            manifest_sha256=version.manifest_sha256,
            dataset_uri=spec.dataset.uri,
            train_seconds=round(progress.elapsed_s, 3),
            steps=progress.step,
            tokens=progress.tokens,
            eval_loss=trained.eval_loss,
            stopped_early=trained.stopped_early,
            resumed_from_step=trained.resumed_from,
            trained_at=trained_at.isoformat(),
            began_at=stopwatch.began_at,
            until_first_step=stopwatch.parts,
            usage=usage,
        )
        runs.write(store, spec.run_id, result)
        return result

    return patiently(STORE_PATIENCE_S, publish, "trained, and waiting to publish").model_dump(mode="json")


def fit(
    spec: TrainSpec,
    opened: Opened,
    store: Store,
    splits: Splits,
    *,
    report: Report,
    load: LoadModel = door.load_model,
    watch: train_loop.Watch | None = None,
    stopwatch: Stopwatch | None = None,
) -> Fitted:
    """Train on the base that `open_base` gave; returns the model with its final weights, and how it came about.

    Training ends if `report` raises, which it must do on every worker at the same record. `load` reads the base into
    memory; `watch` detects that a node is about to be preempted; `stopwatch` takes the time of the parts.
    """
    stopwatch = stopwatch or Stopwatch()
    worker, base, start, check = opened.worker, opened.base, opened.start, opened.check
    dtype, plain_nll = worker.dtype, check.plain_nll
    # The base as its weights were read: the driver may have known its listing alone.
    spec = spec.model_copy(update={"base": lineage.Base(spec.base.reference, opened.original.identity)})
    with zero.sharding(spec, dtype), contextlib.ExitStack() as ends:
        adapted = opening.assemble(
            spec, base, use_gpu=spec.ray.use_gpu, kernels=worker.kernels, dtype=dtype, load=load, start=start
        )
        stopwatch.lap("base and adapter")
        if worker.rank == 0 and spec.train.zero_stage < 3:
            plain_nll = step_zero.probe_nll(adapted, check.batch, worker.device)
        recipe = publishing.recipe_of(spec, adapted, opened.original, base, worker)
        engine = zero.initialize(adapted, spec, dtype)
        ends.callback(engine.destroy)
        # By now DeepSpeed has converted everything wider than 16 bits to 16 bits, and the recipe has counted the base.
        if spec.dense_base:
            worker.kernels.hold_dense_if_room(adapted, sharers=worker.num_workers)
        nll = step_zero.probe_nll(engine.module, check.batch, worker.device, with_adapter=check.with_adapter)
        zero.finish_forward(engine)
        step_zero.require_same(nll, plain_nll, worker=worker, zero_stage=spec.train.zero_stage)
        if worker.rank == 0:
            how = ", products in float32" if worker.kernels.dtype == "float32" else ""
            how += ", in float16" if worker.dtype is torch.float16 else ""
            say("finetune", f"training on {counted(worker.num_workers, f'{worker.device.type} worker')}{how}")
        stopwatch.lap("optimizer and first check")
        began = checkpoint.weights(engine.module) if start is not None and spec.train.start_share else None
        trained = train_loop.run(engine, spec, store, worker, splits, report=report, watch=watch, start=began)
    # Whole on every worker, even if sharded: publishing reads the final weights from the model.
    for name, parameter in checkpoint.trainable(adapted).items():
        parameter.data = trained.weights[name].to(parameter.device)
    dora.settle(adapted)
    return Fitted(adapted, trained, recipe, opened.original)
