"""DeepSpeed as Fineloop uses it: ZeRO shards the adapter's optimizer state, gradients and, at stage 3, every weight.

It works the same on GPUs and on CPU processes. At stage 3 a weight is gathered only while a layer that reads it runs
(DoRA's norm reads its layer's base weight: DeepSpeed notices and gathers it again); vectors are never sharded. To read
a weight elsewhere, use `gathered`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from components.config.train import TrainConfig
from components.shared.errors import JobError
from components.shared.machine import in_environment, replaced
from ray_jobs.adapters import dora
from ray_jobs.base import architecture
from ray_jobs.base.four_bits import dequantize_4bit, gathered
from ray_jobs.kernels.door import PLAIN, Kernels
from ray_jobs.training.spec import TrainingConfig

# Bucket for reducing gradients, in elements. DeepSpeed's default of 5e8 would allocate a gigabyte for any adapter.
BUCKET_ELEMENTS = 20_000_000
# Stage 3: weights, in elements, that may stay gathered because a layer needs them again soon.
LIVE_ELEMENTS = 100_000_000
MAX_GRAD_NORM = 1.0
# A training has few steps, so none is spent on seeing the same overflow twice (hysteresis 1).
LOSS_SCALING = {
    "enabled": True,
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 200,
    "hysteresis": 1,
    "min_loss_scale": 1,
}
# Tolerated ratio of a worker's sharded weights to its exact share: shards are padded to equal sizes.
PADDING = 1.05


@dataclass(frozen=True)
class Worker:
    """This process's rank, device and dtypes in its process group."""

    rank: int
    num_workers: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    """The dtype of weights, activations and gradients, the same for the whole group."""
    kernels: Kernels = PLAIN
    """The kernels of the worker's products, the same for the whole group."""


def prepare_environment(*, use_gpu: bool, attention: str = "auto") -> None:
    """Keep DeepSpeed from compiling a kernel at its first use on CPU, which takes a C++ compiler and 40 s; gloo is as
    fast. Call this before anything imports DeepSpeed. A GPU that PyTorch or `attention` has no kernels for is a
    ConfigError."""
    if use_gpu:
        architecture.require_kernels(attention)
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def accumulation(config: TrainingConfig) -> int:
    """Gradient accumulation steps: forward passes per worker and optimizer step; with train.max_tokens the maximum."""
    return math.ceil(config.train.batch_size / (_micro_batch_size(config) * config.ray.max_workers))


def _micro_batch_size(config: TrainingConfig) -> int:
    return 1 if config.train.max_tokens else config.train.micro_batch_size


def settings(config: TrainingConfig, dtype: torch.dtype = torch.bfloat16, *, longest_vector: int = 0) -> dict[str, Any]:
    """The DeepSpeed configuration, with DeepSpeed's own keys.

    `longest_vector`: at stage 3, weights of up to this number of elements stay whole on every worker.
    """
    train, micro_batch_size, rounds = config.train, _micro_batch_size(config), accumulation(config)
    host = {"device": "cpu", "pin_memory": config.ray.use_gpu}
    zero: dict[str, Any] = {
        # Without ZeRO, DeepSpeed 0.19 divides float16 gradients by a loss scale that it has not multiplied the loss by
        # (runtime/engine.py, backward). Stage 1 takes the same steps.
        "stage": max(1, train.zero_stage) if dtype is torch.float16 else train.zero_stage,
        "overlap_comm": config.ray.use_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if train.cpu_offload:
        zero["offload_optimizer"] = host
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = longest_vector
        zero["stage3_prefetch_bucket_size"] = min(BUCKET_ELEMENTS, LIVE_ELEMENTS)
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
        if train.cpu_offload:
            zero["offload_param"] = host
    return {
        "train_batch_size": rounds * micro_batch_size * config.ray.max_workers,  # some places may be empty
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": MAX_GRAD_NORM,
        **({"fp16": LOSS_SCALING} if dtype is torch.float16 else {"bf16": {"enabled": True}}),
        "zero_optimization": zero,
        # Use the given optimizer, in host memory too: DeepSpeed's own would be compiled at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # the loop does the reporting
    }


@contextmanager
def sharding(config: TrainingConfig, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Context in which a model is loaded, adapted and trained in shards, if the config says so. Needs a process group.

    transformers and peft read a global setting for it, and DeepSpeed replaces `torch.nn.functional.linear`; both are
    restored afterwards. transformers cannot load a quantised base in shards, so its weights are sharded one by one.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(dist_backend="nccl" if config.ray.use_gpu else "gloo", verbose=False)
    linear = torch.nn.functional.linear
    is_sharded, base = config.train.zero_stage == 3, config.method.row.base
    # transformers keeps only a weak reference to it.
    shared_config = HfDeepSpeedConfig(settings(config, dtype)) if is_sharded and base == "bf16" else None
    try:
        with ExitStack() as quantised:
            if is_sharded and base == "nf4":
                quantised.enter_context(share_out_as_loaded(settings(config, dtype)))
                quantised.enter_context(regather_for_backward())
            yield
    finally:
        unset_hf_deepspeed_config()
        del shared_config
        torch.nn.functional.linear = linear


def initialize(model: torch.nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Wrap a model with an adapter in a DeepSpeed engine. Its weights, in `dtype`, get float32 master weights."""
    import deepspeed

    if config.train.zero_stage == 3:
        _share_out(model, config, dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make(model, config.train),
        config=settings(config, dtype, longest_vector=_longest_vector(model)),
    )
    if getattr(engine.optimizer, "compute_grad_norm", False):
        # Stages 1 and 2 check each gradient for values that are not finite, which takes four times as long as AdamW on
        # a CPU and thousands of kernel launches on a GPU. The global norm is then not finite either, and the step is
        # skipped just the same (DeepSpeed 0.19, runtime/zero/stage_1_and_2.py, step).
        nothing = torch.zeros(1, dtype=torch.bool, device=engine.optimizer.device)
        engine.optimizer.has_overflow_partitioned_grads_serial = lambda: nothing
    for _, state in master_partitions(engine):
        if "step" in state:  # without ZeRO DeepSpeed takes one, which would spoil Adam's bias correction
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
    if config.train.zero_stage == 3:
        require_shared(engine.module, num_workers=config.ray.max_workers)
    return engine


@contextmanager
def for_inference(
    model: torch.nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.bfloat16
) -> Iterator[torch.nn.Module]:
    """Context in which the frozen model is sharded over the workers, as at stage 3; to be used within `sharding`."""
    import deepspeed

    model.requires_grad_(False)
    _share_out(model, config, dtype)
    wanted = settings(config, dtype, longest_vector=_longest_vector(model))
    wanted["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=wanted)
    try:
        require_shared(engine.module, num_workers=config.ray.max_workers)
        yield engine.module
    finally:
        engine.destroy()


def loss_scale(engine: Any) -> float | None:
    """The current loss scale; None in bfloat16, where the loss is not scaled."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def finish_forward(engine: Any) -> None:
    """Release gathered weights; every worker must call it after forward passes that no backward pass follows. At stage
    3 DeepSpeed is by then prefetching weights for a next pass, and in flight they can be neither read nor sharded."""
    engine.empty_partition_cache()


def master_partitions(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Yield this worker's flat float32 master weights, each with its optimizer state (empty before the first step)."""
    inner = engine.optimizer.optimizer
    # Stage 3 puts them into the optimizer's groups only during a step.
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or [
        partition for group in inner.param_groups for partition in group["params"]
    ]
    for partition in masters:
        yield partition, inner.state[partition]


def require_shared(module: torch.nn.Module, *, num_workers: int) -> None:
    """Check that at stage 3 this worker holds only its share of the sharded weights; more would train correctly, but
    not in the planned memory, and is a JobError."""
    longest_vector = _longest_vector(module)
    sharded = [parameter for parameter in module.parameters() if _shape(parameter).numel() > longest_vector]
    total = sum(_shape(parameter).numel() * parameter.element_size() for parameter in sharded)
    tensors = [tensor for p in sharded for tensor in (p.data, getattr(p, "ds_tensor", None)) if tensor is not None]
    num_bytes = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
    limit = PADDING * total / num_workers
    if num_bytes > limit:
        raise JobError(
            f"ZeRO-3 did not share out the weights: this worker holds {num_bytes:,} of their {total:,} bytes and its "
            f"share is {limit:,.0f}; use train.zero_stage=2, which does not promise that"
        )


def _share_out(model: torch.nn.Module, config: TrainingConfig, dtype: torch.dtype) -> None:
    """Shard the weights that are still whole, one by one: DeepSpeed would first move the whole model to the GPU."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    for tensor in model.buffers():
        tensor.data = tensor.data.to(device)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings(config, dtype))


def _longest_vector(model: torch.nn.Module) -> int:
    return max((_shape(p).numel() for p in model.parameters() if len(_shape(p)) == 1), default=0)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def share_out_as_loaded(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Context in which each weight of a base is sharded before the next one is read: no process ever holds the whole
    base.

    On every worker transformers reads the weights one after the other, in the order of their names, and quantises them
    on its device, where what they are dequantised with stays whole (5.24, core_model_loading.py,
    convert_and_load_state_dict_in_model); weights that are already quantised would be read ahead. As the workers share
    each weight out together, a node reads its files once, and from the page cache for its other workers. peft's DoRA
    reads a layer's whole weight when it wraps the layer.
    """
    import deepspeed
    from peft.tuners.lora import dora as peft_dora
    from transformers import core_model_loading, modeling_utils

    init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=deepspeed_config)

    def set_and_share_out(model: torch.nn.Module, name: str, *others: Any) -> None:
        set_param(model, name, *others)
        place, _, last = name.rpartition(".")
        if isinstance(parameter := getattr(model.get_submodule(place), last), torch.nn.Parameter):
            init._convert_to_zero_parameters([parameter])

    set_param = core_model_loading.set_param_for_module
    in_turn = in_environment({"HF_DEACTIVATE_ASYNC_LOAD": "1"})
    sharing = replaced(core_model_loading, set_param_for_module=set_and_share_out)
    # It would take memory for the whole base at once.
    no_warmup = replaced(modeling_utils, caching_allocator_warmup=lambda *_: None)
    with in_turn, sharing, no_warmup, replaced(peft_dora, gather_params_ctx=gathered):
        yield


@contextmanager
def regather_for_backward() -> Iterator[None]:
    """Context in which a sharded 4-bit weight is gathered again for its backward pass.

    bitsandbytes keeps the gathered weight from the forward to the backward pass, so that every worker would hold the
    whole base in each step (0.50, autograd/_functions.py, MatMul4Bit). Gradient checkpointing would not help, since the
    weight is kept where autograd does not see it.
    """
    import bitsandbytes

    keeping = bitsandbytes.matmul_4bit

    def matmul_4bit(x: torch.Tensor, weight: Any, quant_state: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = _Product4bit.apply(x, weight, quant_state, keeping)
        return product if bias is None else product + bias

    with replaced(bitsandbytes, matmul_4bit=matmul_4bit):
        yield


class _Product4bit(torch.autograd.Function):
    """x W^T for a frozen 4-bit W: x (..., I) to (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, quant_state: Any, matmul_4bit: Any) -> torch.Tensor:
        ctx.weight, ctx.quant_state = weight, quant_state  # the parameter, whose data is gathered and released
        product: torch.Tensor = matmul_4bit(x, weight, quant_state=quant_state)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        with gathered([ctx.weight] if not ctx.weight.numel() else []):
            weight = dequantize_4bit(ctx.weight, ctx.quant_state)
        return gradient @ weight.to(gradient.dtype), None, None, None


# The AdamW variants of `train.optimizer`, and their state in a checkpoint.
#
# adamw              PyTorch's: two moments in float32, 12 bytes per parameter with the float32 master weight
# adamw_8bit         bitsandbytes': moments in 8 bits, in blocks of 256 with a float32 scale each (arXiv:2110.02861)
# paged_adamw_8bit   the same in CUDA's unified memory, which can be paged out while the GPU memory is needed otherwise
#                    (arXiv:2305.14314, section 3)
#
# In every case DeepSpeed holds the master weights.

BLOCK = 256


def make(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of all trained parameters; DoRA magnitudes are a group without weight decay. The caller must
    set its learning rate before every step."""
    magnitudes = list(dora.magnitudes(model))
    of_magnitudes = {id(parameter) for parameter in magnitudes}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in of_magnitudes]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((others, train.weight_decay), (magnitudes, 0.0))
        if parameters
    ]
    if train.optimizer == "adamw":
        # The fused kernel takes a third of the time on CPUs; on GPUs it would keep its step counts there. DeepSpeed's
        # master weights are in host memory with train.cpu_offload, wherever the parameters are.
        is_on_cpu = all(parameter.device.type == "cpu" for parameter in [*others, *magnitudes])
        return torch.optim.AdamW(groups, lr=0.0, fused=is_on_cpu or train.cpu_offload or None)
    from bitsandbytes import optim

    kind = optim.AdamW8bit if train.optimizer == "adamw_8bit" else optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0)
    return optimizer


def saved(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A parameter's optimizer state as tensors for a checkpoint; the step count is float32."""
    code_books = ("qmap1", "qmap2")  # bitsandbytes' own, of its two 8-bit data types
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    tensors["step"] = torch.as_tensor(float(state["step"]))
    return {name: value for name, value in tensors.items() if name not in code_books}


def in_float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state from `saved` as flat tensors with one number per parameter element, so that it can be split anywhere;
    `restore` quantises 8-bit moments again, in possibly different blocks."""
    from bitsandbytes import functional

    state = {name: tensor.flatten() for name, tensor in tensors.items() if not name.startswith("absmax")}
    for number in ("1", "2"):
        name = f"state{number}"
        if name in state and state[name].dtype is torch.uint8:
            state[name] = functional.dequantize_blockwise(
                state[name],
                absmax=tensors[f"absmax{number}"],
                code=functional.create_dynamic_map(signed=number == "1"),
                blocksize=BLOCK,
            )
    return {**state, "step": tensors["step"]}


def restore(optimizer: torch.optim.Optimizer, master: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the optimizer state of a master weight from the result of `saved` or `in_float32`."""
    state = optimizer.state[master]
    step = tensors["step"]
    if hasattr(optimizer, "init_state"):  # bitsandbytes allocates its (paged) state by itself
        from bitsandbytes import functional

        if not state:
            # It reads the parameter from its group, where ZeRO-3 puts parameters only during a step.
            group = optimizer.param_groups[0]
            parameters, group["params"] = group["params"], [master]
            optimizer.init_state(group, master, 0, 0)
            group["params"] = parameters
        state["step"] = int(step)
        for name in tensors.keys() - {"step"}:
            tensor = tensors[name]
            if state[name].dtype is torch.uint8 and tensor.is_floating_point():
                number = name.removeprefix("state")
                codes, how = functional.quantize_blockwise(
                    tensor.to(state[name].device), code=state[f"qmap{number}"], blocksize=BLOCK
                )
                state[f"absmax{number}"].copy_(how.absmax)
                tensor = codes
            state[name].copy_(tensor.view_as(state[name]))
        return
    state["step"] = step.clone()  # AdamW keeps its count on the CPU
    state.update({name: tensors[name].to(master.device).view_as(master) for name in tensors.keys() - {"step"}})
