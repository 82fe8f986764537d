"""What each Ray Train worker does: load the base, attach the adapter, train, and, on rank 0, publish the version."""

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.config import config_file
from components.config.schema import RunConfig
from components.handover.serving import serving
from components.records.steps import TrainResult
from components.records.usage import Usage
from components.registry import lineage, watermark
from components.registry.versions import Version, publish_version
from components.shared.counted import counted
from components.shared.errors import ConfigError
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, dora, own_base
from ray_jobs.base import architecture, base_config, base_model, precision
from ray_jobs.kernels import allocator, door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.text import chat_format, token_store
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.text.token_store import StoredTokens
from ray_jobs.training import checkpoint, preemption, starting, step_zero, train_loop, using, zero
from ray_jobs.training.group import Worker
from ray_jobs.training.metrics_log import MetricsLog
from ray_jobs.training.model_card import model_card
from ray_jobs.training.patience import patiently
from ray_jobs.training.trackers import Trackers
from ray_jobs.training.train_job import TrainJob
from ray_jobs.training.train_loop import Report, TrainedAdapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LoadModel = Callable[..., "PreTrainedModel"]
"""As `door.load_model`."""


def train(
    job: TrainJob, train_tokens: StoredTokens, eval_tokens: StoredTokens, *, load: LoadModel = door.load_model
) -> dict[str, Any]:
    """Gives, on rank 0, the published version. `load` reads the base into memory.

    Raises:
        UserError: the user's mistake, which one worker alone may meet.
        JobError: the model cannot be held or sharded as it must be.
    """
    import ray.train

    entry.quiet_libraries()
    context = ray.train.get_context()
    config = config_file.loads(job.config_toml)
    device = ray.train.torch.get_device() if config.ray.use_gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    store = Store.open(config.registry)
    metrics = None
    if worker.rank == 0:
        metrics = MetricsLog(
            store,
            job.run_id,
            checkpoint_every_steps=config.train.checkpoint_every_steps,
            patience_s=config.train.store_patience_s,
            trackers=Trackers(config, job.run_id),
        )
        entry.log_as("finetune")
    started_at = datetime.now(UTC)
    train_split, eval_split = (token_store.load(store, each) for each in (train_tokens, eval_tokens))
    with metrics or contextlib.nullcontext():
        adapted, trained, recipe = fit(
            config.on(worker.num_workers),
            job,
            worker,
            store,
            train_split,
            eval_split,
            report=metrics.add if metrics else lambda _: None,
            load=load,
            watch=preemption.Watch(worker),
        )
        trained_at = datetime.now(UTC)
        usage = using.measured(job, config, worker, trained.progress, metrics, trained_at)
    if usage is None:
        return {}
    version = patiently(
        config.train.store_patience_s,
        lambda: _publish(job, config, store, adapted, trained, recipe, worker, started_at, usage),
        "trained, and waiting to publish",
    )
    return TrainResult(
        version=version.version,
        version_uri=version.uri,
        manifest_sha256=version.manifest_sha256,
        dataset_uri=job.dataset.uri,
        train_seconds=round(trained.progress.elapsed_s, 3),
        steps=trained.progress.step,
        tokens=trained.progress.tokens,
        eval_loss=trained.eval_loss,
        stopped_early=trained.stopped_early,
        resumed_from_step=trained.resumed_from,
        trained_at=trained_at.isoformat(),
        began_at=job.watch.began_at,
        until_first_step=job.watch.parts,
        usage=usage,
    ).model_dump()


def fit(
    config: RunConfig,
    job: TrainJob,
    worker: Worker,
    store: Store,
    train_split: TokenizedSplit,
    eval_split: TokenizedSplit,
    *,
    report: Report,
    load: LoadModel = door.load_model,
    watch: preemption.Watch | None = None,
) -> tuple["PeftModel", TrainedAdapter, dict[str, Any]]:
    """Train in an initialised process group: the model with its final weights, how it went, what was built.

    What `report` raises, on every worker at the same record, ends the training. `load` reads the base into memory;
    `watch` says when a node is about to be taken.
    """
    zero.prepare_environment(use_gpu=config.ray.use_gpu)
    if not config.ray.use_gpu:
        torch.set_num_threads(config.ray.cpus_per_worker)
        allocator.keep_freed_memory()
    if worker.rank == 0:
        say("finetune", f"loading {config.model.base}")
    original = base_model.resolve(config.model, recorded=job.base.identity)  # a branch of the hub may move meanwhile
    base = own_base.prepare(config, original, store, rank=worker.rank, num_workers=worker.num_workers)
    on_cpu = _kernels(config, original, store, job.run_id)
    worker = _agreed(config, worker, base, on_cpu)
    start = starting.weights(store, job.start) if job.start else None
    check = _FirstCheck(config, base, step_zero.probe(train_split, job.pad), start, on_cpu)
    check.measure_whole(worker, store)
    with zero.sharding(config, worker.dtype), contextlib.ExitStack() as ends:
        adapted = _adapted(
            config,
            base,
            use_gpu=config.ray.use_gpu,
            kernels=worker.kernels,
            dtype=worker.dtype,
            load=load,
            start=start,
        )
        job.watch.lap("base and adapter")
        check.measure_unsharded(adapted, worker)
        recipe = _recipe(config, adapted, original, base, worker)
        engine = _engine(config, job, adapted, worker)
        ends.callback(engine.destroy)
        check.require_same(engine, worker)
        if worker.rank == 0:
            say("finetune", _how(worker))
        job.watch.lap("optimizer and first check")
        began = checkpoint.weights(engine.module) if start is not None and config.train.start_share else None
        trained = train_loop.run(
            engine,
            config=config,
            run_id=job.run_id,
            store=store,
            worker=worker,
            train_split=train_split,
            eval_split=eval_split,
            pad=job.pad,
            report=report,
            watch=watch,
            start=began,
        )
    _take_whole(adapted, trained)
    return adapted, trained, recipe


def _take_whole(adapted: "PeftModel", trained: TrainedAdapter) -> None:
    """The final weights, whole on every worker, whatever was sharded: what is published is read from here."""
    for name, parameter in checkpoint.trainable(adapted).items():
        parameter.data = trained.weights[name].to(parameter.device)
    dora.settle(adapted)


def _engine(config: RunConfig, job: TrainJob, adapted: "PeftModel", worker: Worker) -> Any:
    """DeepSpeed's, on a base that is dense where the config or the plan says so."""
    engine = zero.initialize(adapted, config, worker.dtype)
    # DeepSpeed has by now brought what was wider than 16 bits into as many, and the recipe has counted the base.
    if config.train.dense_base:
        worker.kernels.hold_dense(adapted)
    elif job.dense_base:
        worker.kernels.hold_dense_if_room(adapted, sharers=worker.num_workers)
    return engine


def _agreed(config: RunConfig, worker: Worker, base: base_model.Base, on_cpu: Kernels) -> Worker:
    """The worker with the dtypes that all of them compute in.

    Raises:
        ConfigError: the base is quantised for bfloat16, and some GPU has only float16.
    """
    use_gpu = config.ray.use_gpu
    dtype = precision.agree(precision.dtype_here(config.train.dtype, use_gpu=use_gpu), worker.device)
    if dtype is torch.float16 and base_model.is_quantised(base):
        raise ConfigError(
            f"{base.reference} is stored in few bits for bfloat16, and train.dtype is float16 here: take "
            "method.name=qlora on a base that is not quantised, or GPUs that know bfloat16"
        )
    return replace(worker, dtype=dtype, kernels=worker.kernels if use_gpu else on_cpu)


def _how(worker: Worker) -> str:
    products = ", products in float32" if worker.kernels.dtype == "float32" else ""
    products += ", in float16" if worker.dtype is torch.float16 else ""
    return f"training on {counted(worker.num_workers, f'{worker.device.type} worker')}{products}"


@dataclass
class _FirstCheck:
    """Whether the sharded model gives the loss of the unsharded one before its first step; see `step_zero`."""

    config: RunConfig
    base: base_model.Base
    probe: dict[str, torch.Tensor]
    start: Mapping[str, torch.Tensor] | None
    on_cpu: Kernels
    """What takes the products of the whole model on a CPU."""
    expected: float = math.nan

    @property
    def is_read_alone(self) -> bool:
        """Whether the base's loss is read layer by layer from its files, without an adapter."""
        return self.config.train.zero_stage == 3 and not base_model.is_quantised(self.base)

    def measure_whole(self, worker: Worker, store: Store) -> None:
        """Under ZeRO-3, on rank 0, before anything is sharded."""
        if self.config.train.zero_stage < 3 or worker.rank > 0:
            return
        if self.is_read_alone:
            self.expected = step_zero.known_base_loss(store, self.config, self.base, self.probe, self.on_cpu)
        else:
            whole = _adapted(self.config, self.base, use_gpu=False, kernels=self.on_cpu, start=self.start)
            self.expected = step_zero.probe_loss(whole, self.probe, torch.device("cpu"))

    def measure_unsharded(self, adapted: "PeftModel", worker: Worker) -> None:
        """Below ZeRO-3, where every worker holds the whole model."""
        if self.config.train.zero_stage < 3:
            self.expected = step_zero.probe_loss(adapted, self.probe, worker.device)

    def require_same(self, engine: Any, worker: Worker) -> None:
        """Compare; raises as `step_zero.require_same_loss`."""
        # A fresh adapter changes nothing yet; what LoftQ or an earlier version begins with does.
        is_fresh = self.start is None and self.config.method.row.init == "default"
        with_adapter = is_fresh or not self.is_read_alone
        loss = step_zero.probe_loss(engine.module, self.probe, worker.device, with_adapter=with_adapter)
        zero.finish_forward(engine)
        expected = self.expected if worker.rank == 0 else math.nan
        step_zero.require_same_loss(loss, expected, worker=worker, zero_stage=self.config.train.zero_stage)


def _kernels(config: RunConfig, original: base_model.Base, store: Store, run_id: str) -> Kernels:
    """What CPU workers multiply in: as the checkpoint that they go on from, or what all of them are fastest with.

    Of GPU workers each asks for itself alone: only what it computes on its CPU is meant.
    """
    shape = base_config.load(original.path, config.model)
    if config.ray.use_gpu:
        return door.choose(config, shape)
    return checkpoint.kernels(store, run_id) or door.agree(config, shape)


def _adapted(
    config: RunConfig,
    base: base_model.Base,
    *,
    use_gpu: bool,
    kernels: Kernels = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    load: LoadModel = door.load_model,
    start: Mapping[str, torch.Tensor] | None = None,
) -> "PeftModel":
    """The base with a fresh adapter, or one with the weights `start`, to train in `dtype`. The same on every worker."""
    model = load(
        base,
        config.model,
        config.method.row.base,
        kernels,
        use_gpu=use_gpu,
        in_host_memory=config.train.zero_stage == 3,
        dtype=dtype,
    )
    adapted = build.attach(model, config.method, base_reference=base.reference, seed=config.train.seed)
    kernels.adopt(adapted)
    own_base.begin(config, adapted, base)
    if start is not None:
        starting.begin(adapted, start)
    build.to_training(adapted, dtype)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=config.train.activation_offloading)
        # Of most models it has done that, and would forget its hooks, which someone takes off, for the next ones.
        model.disable_input_require_grads()
        model.enable_input_require_grads()
    return adapted.train()


def _recipe(
    config: RunConfig, adapted: Any, original: base_model.Base, base: base_model.Base, worker: Worker
) -> dict[str, Any]:
    """What was built, for the lineage. Counted before training: an NF4 layer holds two weights in each stored byte."""
    trainable, total = adapted.get_nb_trainable_parameters()
    modules = sorted({name.rpartition(".")[2] for name in adapted.targeted_module_names})
    parameters = sorted({".".join(name.split(".")[-2:]) for name in adapted.targeted_parameter_names})
    return {
        **{axis: getattr(config.method.row, axis) for axis in ("adapter", "scaling", "init", "base")},
        "rank": config.method.r,
        **({"alpha": config.method.lora_alpha} if config.method.row.has_alpha else {}),
        "trainable_parameters": trainable,
        "parameters": total,
        "trainable_share": trainable / total,
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        "serving": asdict(serving(config.method.row, rank=config.method.r, target_modules=modules + parameters)),
        "stands_on": base.reference,
        "auto_class": architecture.auto_class(adapted.config).__name__,
        "dtype": str(worker.dtype).removeprefix("torch."),
        "matmul_dtype": worker.kernels.dtype,
        "chat": chat_format.load(original, config.model).recipe(),
        **own_base.recipe(config, base),
    }


def _publish(
    job: TrainJob,
    config: RunConfig,
    store: Store,
    adapted: Any,
    trained: TrainedAdapter,
    recipe: Mapping[str, Any],
    worker: Worker,
    started_at: datetime,
    usage: Usage | None = None,
) -> Version:
    progress = trained.progress
    record = lineage.build_lineage(
        config,
        run_id=job.run_id,
        base=job.base,
        dataset=job.dataset,
        environment=lineage.environment(
            Path(__file__).parent,
            image=os.environ.get("FINELOOP_IMAGE", ""),
            revision=os.environ.get("FINELOOP_REVISION", ""),
        ),
        hardware=lineage.Hardware(
            lineage.cpu_model(),
            cpus_per_worker=config.ray.cpus_per_worker,
            workers=worker.num_workers,
            gpu=torch.cuda.get_device_name(worker.device) if worker.device.type == "cuda" else "",
        ),
        started=job.started,
        recipe=recipe,
        parents=[job.start.uri] if job.start else [],
        sources=read.sources if (read := watermark.noted(store, job.run_id)) else {},
        training=lineage.Training(
            steps=progress.step,
            tokens=progress.tokens,
            train_loss=trained.last_loss,
            eval_loss=trained.eval_loss,
            wall_s=round(progress.elapsed_s, 3),
            world_size=worker.num_workers,
            started_at=started_at.isoformat(),
            resumed_from=f"step {trained.resumed_from}" if trained.resumed_from else "",
            more={
                "first_loss": trained.first_loss,
                "best_step": progress.best_step,
                "stopped_early": trained.stopped_early,
                **({"usage": usage.model_dump()} if usage else {}),
            },
        ),
    )
    with tempfile.TemporaryDirectory(prefix="fineloop-version-") as scratch:
        folder = Path(scratch)
        build.save(adapted, folder)
        # A server must prompt the adapter as it was trained: a base may have no chat template, or change its own.
        base = base_model.resolve(config.model, recorded=job.base.identity)
        chat_format.load(base, config.model).tokenizer.save_pretrained(folder)
        files: dict[str, bytes | Path] = {path.name: path for path in folder.iterdir()}
        files["README.md"] = model_card(config, record).encode()
        return publish_version(store, config.adapter.name, files, lineage=record)
