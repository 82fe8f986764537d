"""The steps of each Ray Train worker: load the base, attach the adapter, train, and on rank 0 publish the version."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from components.records import runs
from components.records.steps import TrainResult
from components.registry import lineage
from components.registry.event_log import require_published
from components.registry.identity import WEIGHTS, require_identity, version_key
from components.registry.signing import require_signed
from components.registry.versions import Version
from components.shared.errors import ConfigError, IntegrityError
from components.shared.protocol import counted, say
from components.store import folders
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.adapters import build, dora, own_base
from ray_jobs.base import architecture, base_model, together
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.text import token_store
from ray_jobs.text.token_store import StoredTokens
from ray_jobs.training import checkpoint, publishing, step_zero, train_loop, zero
from ray_jobs.training.checkpoint import STORE_PATIENCE_S, patiently
from ray_jobs.training.metrics_log import MetricsLog, Trackers
from ray_jobs.training.publishing import Fitted
from ray_jobs.training.spec import Stopwatch, TrainingConfig, TrainSpec
from ray_jobs.training.train_loop import Report, Splits
from ray_jobs.training.zero import Worker

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


LoadModel = Callable[..., "PreTrainedModel"]
"""A function with the signature of `door.load_model`."""


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
    metrics = None
    if worker.rank == 0:
        entry.log_as("finetune")
        every = spec.train.checkpoint_every_steps
        metrics = MetricsLog(
            store, spec.run_id, checkpoint_every_steps=every, patience_s=STORE_PATIENCE_S, trackers=Trackers(spec)
        )
    else:
        entry.log_warnings()
    started_at = datetime.now(UTC)
    train_split, eval_split = (token_store.load(store, each) for each in tokens)
    with metrics or contextlib.nullcontext():
        fitted = fit(
            spec,
            worker,
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
    worker: Worker,
    store: Store,
    splits: Splits,
    *,
    report: Report,
    load: LoadModel = door.load_model,
    watch: train_loop.Watch | None = None,
    stopwatch: Stopwatch | None = None,
) -> Fitted:
    """Train in an initialised process group; returns the model with its final weights, and how it came about.

    Training ends if `report` raises, which it must do on every worker at the same record. `load` reads the base into
    memory; `watch` detects that a node is about to be preempted; `stopwatch` takes the time of the parts.
    """
    stopwatch = stopwatch or Stopwatch()
    zero.prepare_environment(use_gpu=spec.ray.use_gpu)
    torch.set_num_threads(spec.ray.cpus_per_worker)  # of GPU workers for rank 0's pass over the whole base
    if not spec.ray.use_gpu:
        door.keep_freed_memory()
    if worker.rank == 0:
        say("finetune", f"loading {spec.model.base}")
    with together.gloo_group(worker.num_workers) as group:  # each node fetches the base at its own pace
        wanted = architecture.dtype_here(spec.train.dtype, use_gpu=spec.ray.use_gpu)
        dtype = architecture.agree_on_dtype(wanted, worker.device)
        # A hub branch may have moved since, and the objects of an S3 folder may have changed.
        original = base_model.resolve(spec.model, recorded=spec.base.identity, registry=store)
        spec = spec.model_copy(update={"base": lineage.Base(spec.base.reference, original.identity)})
        place = {"rank": worker.rank, "num_workers": worker.num_workers}
        base = own_base.prepare(spec, original, store, sha256=spec.stands_on_sha256, **place)
        if dtype is torch.float16 and base_model.is_quantised(base):
            raise ConfigError(
                f"{base.reference} is stored in few bits for bfloat16, and train.dtype is float16 here: take "
                "method.name=qlora on a base that is not quantised, or GPUs that know bfloat16"
            )
        start = start_weights(store, spec.start) if spec.start else None
        together.meet(group)
        on_cpu = _kernels(spec, original, store)
        worker = replace(worker, dtype=dtype, kernels=worker.kernels if spec.ray.use_gpu else on_cpu)
        # For the first check, the losses of the unsharded model (see `step_zero`), on rank 0.
        probe, is_sharded = step_zero.probe(splits[0], spec.pad), spec.train.zero_stage == 3
        losses: torch.Tensor | None = None
        reads_base_alone = is_sharded and not base_model.is_quantised(base)
        if is_sharded and worker.rank == 0:
            if reads_base_alone:
                losses = step_zero.known_base_nll(store, spec, base, probe, on_cpu, dtype)
            else:
                whole = assemble(spec, base, use_gpu=False, kernels=on_cpu, dtype=dtype, start=start)
                losses = step_zero.probe_nll(whole, probe, torch.device("cpu"))
                del whole
        together.meet(group)
    with zero.sharding(spec, dtype), contextlib.ExitStack() as ends:
        adapted = assemble(
            spec, base, use_gpu=spec.ray.use_gpu, kernels=worker.kernels, dtype=dtype, load=load, start=start
        )
        stopwatch.lap("base and adapter")
        if not is_sharded:
            losses = step_zero.probe_nll(adapted, probe, worker.device)
        recipe = publishing.recipe_of(spec, adapted, original, base, worker)
        engine = zero.initialize(adapted, spec, dtype)
        ends.callback(engine.destroy)
        # By now DeepSpeed has converted everything wider than 16 bits to 16 bits, and the recipe has counted the base.
        if spec.train.dense_base:
            worker.kernels.hold_dense(adapted)
        elif spec.dense_base:
            worker.kernels.hold_dense_if_room(adapted, sharers=worker.num_workers)
        # A fresh adapter does not change the loss; the initial weights of LoftQ or of an earlier version do.
        with_adapter = not reads_base_alone or (start is None and spec.method.row.init == "default")
        found = step_zero.probe_nll(engine.module, probe, worker.device, with_adapter=with_adapter)
        zero.finish_forward(engine)
        step_zero.require_same(
            found, losses if worker.rank == 0 else None, worker=worker, zero_stage=spec.train.zero_stage
        )
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
    return Fitted(adapted, trained, recipe, original)


def _kernels(spec: TrainSpec, original: base_model.Base, store: Store) -> Kernels:
    """The kernels of CPU workers: those of the checkpoint that they resume from, else the fastest for the whole group.

    GPU workers choose separately, as the kernels only concern what runs on their CPUs.
    """
    shape = base_model.load_config(original.path, spec.model)
    if spec.ray.use_gpu:
        return door.choose(spec, shape)
    found = checkpoint.newest(store, spec.run_id)
    return Kernels(found.matmul_dtype) if found else door.agree(spec, shape)


def assemble(
    config: TrainingConfig,
    base: base_model.Base,
    *,
    use_gpu: bool,
    kernels: Kernels = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    load: LoadModel = door.load_model,
    start: Mapping[str, torch.Tensor] | None = None,
) -> "PeftModel":
    """The base with a fresh adapter, or with the weights `start`, to train in `dtype`. The same on every worker."""
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
        load_start(adapted, start)
    build.to_training(adapted, dtype)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=config.train.activation_offloading)
        # For most models the call above has done this already; calling it again would lose the old hooks' handles.
        model.disable_input_require_grads()
        model.enable_input_require_grads()
    return adapted.train()


def start_weights(store: Store, version: Version) -> dict[str, torch.Tensor]:
    """Load a version's adapter weights, with the same verification of digests and signatures as `pull_version`."""
    from safetensors.torch import load

    key = version_key(version.name, version.version)
    manifest = require_identity(store, key, folders.read_manifest(store, key))
    require_published(store, version.name, version.version, manifest)
    require_signed(store, version.name, version.version, manifest.sha256)
    body = store.get(f"{key}/{WEIGHTS}")
    if folders.digest_of(body) != manifest.files[WEIGHTS]:
        raise IntegrityError(f"{store.uri(key)}/{WEIGHTS} is not the one that the manifest lists")
    return dict(load(body))


def load_start(adapted: "PeftModel", start: Mapping[str, torch.Tensor]) -> None:
    """Load a version's weights into a fresh adapter, including DoRA's magnitudes and VeRA's matrices; those of other
    layers or shapes are a ConfigError."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if differing := sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name)):
        raise ConfigError(
            f"train.start_from: the version adapts other layers than this run, such as {differing[0]} "
            f"({theirs.get(differing[0])}, here {shapes.get(differing[0])}): set method.target_modules as it had them"
        )
    set_peft_model_state_dict(adapted, dict(start))
