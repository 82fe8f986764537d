"""What a worker has before it trains: the base's files, and the dtype, kernels and first weights of the whole group."""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.registry.identity import WEIGHTS
from components.registry.versions import Version, pull_version
from components.shared.errors import ConfigError
from components.shared.protocol import say
from components.store.store import Store
from ray_jobs.adapters import build, own_base
from ray_jobs.base import architecture, base_model, together
from ray_jobs.kernels import door
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.text.batching import TokenizedSplit
from ray_jobs.training import checkpoint, step_zero, zero
from ray_jobs.training.spec import TrainingConfig, TrainSpec
from ray_jobs.training.zero import Worker

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


LoadModel = Callable[..., "PreTrainedModel"]
"""A function with the signature of `door.load_model`."""


@dataclass(frozen=True)
class Opened:
    """What a training begins from, as each worker of the group has it."""

    worker: Worker
    """With the dtype and the kernels that the group agreed on."""
    original: base_model.Base
    """The base that `model.base` names, as it was read."""
    base: base_model.Base
    """The base to train on: the original, or the method's own."""
    start: Mapping[str, torch.Tensor] | None
    """The weights that the adapter starts from; None for fresh ones."""
    check: step_zero.FirstCheck


def open_base(spec: TrainSpec, worker: Worker, store: Store, split: TokenizedSplit) -> Opened:
    """Fetch what the training reads to this machine, and agree with the other workers on how to run it.

    Every worker of an initialised process group must call this. `split` are the records to train on. Raises
    ConfigError: the base does not exist, or not in a form that can be trained in this dtype; IntegrityError: the base,
    or the version to start from, has changed.
    """
    zero.prepare_environment(use_gpu=spec.ray.use_gpu, attention=spec.model.attention)
    torch.set_num_threads(spec.ray.cpus_per_worker)
    if not spec.ray.use_gpu:
        door.keep_freed_memory()
    if worker.rank == 0:
        say("finetune", f"loading {spec.model.base}")
    with together.gloo_group(worker.num_workers) as group:  # each node fetches the base at its own pace
        usual = architecture.dtype_here(spec.train.dtype, use_gpu=spec.ray.use_gpu)
        dtype = architecture.agree_on_dtype(usual, worker.device)
        # A hub branch may have moved since, and the objects of an S3 folder may have changed.
        original = base_model.resolve(spec.model, recorded=spec.base.identity, registry=store)
        place = {"rank": worker.rank, "num_workers": worker.num_workers}
        base = own_base.prepare(spec, original, store, sha256=spec.stands_on_sha256, **place)
        if dtype is torch.float16:
            shape = base_model.load_config(base.path, spec.model)
            architecture.require_unquantised(shape, reference=base.reference)
        start = start_weights(store, spec.start) if spec.start else None
        together.meet(group)
        on_cpu = _kernels(spec, original, store)
        probe, plain_nll = step_zero.probe(split, spec.pad), None
        is_sharded = spec.train.zero_stage == 3
        reads_base_alone = is_sharded and not base_model.is_quantised(base)
        if is_sharded and worker.rank == 0:
            # All other workers wait, so those of this node have no use for their threads.
            torch.set_num_threads(spec.ray.cpus_per_worker * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            if reads_base_alone:
                plain_nll = step_zero.known_base_nll(store, spec, base, probe, on_cpu, dtype)
            else:
                whole = assemble(spec, base, use_gpu=False, kernels=on_cpu, dtype=dtype, start=start)
                plain_nll = step_zero.probe_nll(whole, probe, torch.device("cpu"))
                del whole
            torch.set_num_threads(spec.ray.cpus_per_worker)
        together.meet(group)
    # A fresh adapter does not change the loss; the initial weights of LoftQ or of an earlier version do.
    with_adapter = not reads_base_alone or (start is None and spec.method.row.init == "default")
    worker = replace(worker, dtype=dtype, kernels=worker.kernels if spec.ray.use_gpu else on_cpu)
    return Opened(worker, original, base, start, step_zero.FirstCheck(probe, plain_nll, with_adapter))


def _kernels(spec: TrainSpec, original: base_model.Base, store: Store) -> Kernels:
    """The kernels of CPU workers: those of the checkpoint that they resume from, else the fastest for the whole group.

    GPU workers choose separately, as the kernels only concern what runs on their CPUs.
    """
    shape = base_model.load_config(original.path, spec.model)
    if spec.ray.use_gpu:
        return door.choose(spec, shape)
    progress = checkpoint.newest(store, spec.run_id)
    return Kernels(progress.matmul_dtype) if progress else door.agree(spec, shape)


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
    model = load(base, config.model, config.method.row.base, kernels, use_gpu=use_gpu, dtype=dtype)
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
    """A version's adapter weights, verified; raises as `pull_version`."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="fineloop-start-") as scratch:
        folder = Path(scratch) / "adapter"
        pull_version(store, version, folder)
        return load_file(folder / WEIGHTS)


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
