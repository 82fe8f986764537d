"""DeepSpeed as Fineloop uses it: ZeRO over the adapter's optimizer, gradients and, at stage 3, every weight.

The same on GPUs and on CPU processes. At stage 3 a weight is whole only while a layer that reads it runs (DoRA's norm
reads its layer's base: DeepSpeed sees that and gathers it once more); vectors stay whole. `gathered` makes the rest so.
"""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from components.config.schema import RunConfig
from components.shared.environment import in_environment
from components.shared.errors import JobError
from ray_jobs.base import cuda
from ray_jobs.base.gathered import gathered
from ray_jobs.training import optimizer

# Bucket for reducing gradients, in elements. DeepSpeed's default of 5e8 would allocate a gigabyte for any adapter.
BUCKET_ELEMENTS = 20_000_000
# Stage 3: weights, in elements, that may stay gathered because a layer needs them again soon.
LIVE_ELEMENTS = 100_000_000
# From a high scale down: an overflow halves it at once, and so many steps without one double it. Steps are few here, so
# none is spent on seeing the same overflow twice.
LOSS_SCALING = {
    "enabled": True,
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 200,
    "hysteresis": 1,
    "min_loss_scale": 1,
}
# Keeps transformers from reading weights before their turn.
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
# Of a worker's part of the sharded weights, beyond its share: padding to equal parts.
PADDING = 1.05


def prepare_environment(*, use_gpu: bool) -> None:
    """Keep DeepSpeed from compiling a kernel at its first use on CPU, before anything imports it.

    That takes a C++ compiler and 40 s; gloo does the kernel's work as fast.

    Raises:
        ConfigError: PyTorch has no kernels for this worker's GPU.
    """
    if use_gpu:
        cuda.require_kernels()
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def accumulation(config: RunConfig) -> int:
    """Forward passes of each worker in one optimizer step; with train.max_tokens the most that there can be."""
    return math.ceil(config.train.batch_size / _records_at_once(config))


def _records_at_once(config: RunConfig) -> int:
    """Of all workers, in each of them."""
    return _micro_batch_size(config) * config.ray.max_workers


def _micro_batch_size(config: RunConfig) -> int:
    """Records in each of them, as DeepSpeed is to know."""
    return 1 if config.train.max_tokens else config.train.micro_batch_size


def settings(config: RunConfig, dtype: torch.dtype = torch.bfloat16, *, longest_vector: int = 0) -> dict[str, Any]:
    """The DeepSpeed configuration, spelled as DeepSpeed spells it.

    float16 has the loss scaled by what the gradients allow, found anew at each overflow, whose step is left out.
    `longest_vector`: stage 3 leaves weights of up to so many elements whole on every worker.
    """
    train = config.train
    host = {"device": "cpu", "pin_memory": config.ray.use_gpu}
    zero: dict[str, Any] = {
        # Without ZeRO, DeepSpeed 0.19 divides float16 gradients by a scale that it has not multiplied the loss by
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
        zero["stage3_max_live_parameters"] = LIVE_ELEMENTS
        zero["stage3_max_reuse_distance"] = LIVE_ELEMENTS
        if train.cpu_offload:
            zero["offload_param"] = host
    return {
        "train_batch_size": accumulation(config) * _records_at_once(config),  # places; some may be empty
        "train_micro_batch_size_per_gpu": _micro_batch_size(config),
        "gradient_accumulation_steps": accumulation(config),
        "gradient_clipping": train.max_grad_norm,
        **({"fp16": LOSS_SCALING} if dtype is torch.float16 else {"bf16": {"enabled": True}}),
        "zero_optimization": zero,
        # The optimizer that it is given, in host memory too; DeepSpeed's own would be compiled at first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # the loop does the reporting
    }


@contextmanager
def sharding(config: RunConfig, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within, a model is loaded, adapted and trained in shards, if this config says so. Needs a process group.

    transformers and peft learn of it from a global, and DeepSpeed replaces `torch.nn.functional.linear`; both are as
    they were afterwards. transformers cannot read a quantised base in shards: its weights are shared out one by one.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(dist_backend="nccl" if config.ray.use_gpu else "gloo", verbose=False)
    linear = torch.nn.functional.linear
    is_sharded, base = config.train.zero_stage == 3, config.method.row.base
    # transformers holds it by a weak reference.
    held = HfDeepSpeedConfig(settings(config, dtype)) if is_sharded and base == "bf16" else None
    try:
        with ExitStack() as quantised:
            if is_sharded and base == "nf4":
                quantised.enter_context(share_out_as_loaded(settings(config, dtype)))
                quantised.enter_context(regather_for_backward())
            yield
    finally:
        unset_hf_deepspeed_config()
        del held
        torch.nn.functional.linear = linear


def initialize(model: torch.nn.Module, config: RunConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Wrap a model with an attached adapter. Its weights, in `dtype`, get float32 masters in the optimizer.

    Raises:
        JobError: at stage 3, this worker holds more than its share of the weights.
    """
    import deepspeed

    if config.train.zero_stage == 3:
        _share_out(model, config, dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer.make(model, config.train),
        config=settings(config, dtype, longest_vector=_longest_vector(model)),
    )
    _leave_overflow_to_the_norm(engine.optimizer)
    for _, state in master_partitions(engine):
        optimizer.forget_steps(state)  # without ZeRO there is one, which would spoil Adam's bias correction
    if config.train.zero_stage == 3:
        require_shared(engine.module, num_workers=config.ray.max_workers)
    return engine


def _leave_overflow_to_the_norm(wrapped: Any) -> None:
    """Keep stages 1 and 2 from looking at each gradient by itself for what is not finite.

    The norm of all of them is not finite either then, and leaves the step out just so (DeepSpeed 0.19,
    runtime/zero/stage_1_and_2.py, step). The look takes eight small operations for each of an adapter's hundreds of
    factors: as long as AdamW itself four times over on a CPU, and thousands of launches on a GPU.
    """
    if getattr(wrapped, "compute_grad_norm", False) and hasattr(wrapped, "has_overflow_partitioned_grads_serial"):
        nothing = torch.zeros(1, dtype=torch.bool, device=wrapped.device)
        wrapped.has_overflow_partitioned_grads_serial = lambda: nothing


@contextmanager
def for_inference(
    model: torch.nn.Module, config: RunConfig, dtype: torch.dtype = torch.bfloat16
) -> Iterator[torch.nn.Module]:
    """Within, the frozen model is shared out among the workers, as at stage 3; to be used within `sharding`.

    Raises:
        JobError: this worker holds more than its share of the weights.
    """
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


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def loss_scale(engine: Any) -> float | None:
    """What the loss is multiplied by at present; None where it is not scaled, in bfloat16."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def set_loss_scale(engine: Any, scale: float | None) -> None:
    """What the loss is multiplied by in the next step, where it is scaled."""
    if scale is not None and engine.fp16_enabled():
        engine.optimizer.loss_scale = scale


def finish_forward(engine: Any) -> None:
    """To be called by every worker after forward passes that no backward pass follows.

    At stage 3 DeepSpeed is by then gathering what that would need next, and weights in flight can be neither read nor
    shared out.
    """
    engine.empty_partition_cache()


def master_partitions(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """This worker's float32 master weights, flat, each with its optimizer state (empty before the first step)."""
    inner = engine.optimizer.optimizer
    # Stage 3 puts them into the optimizer's groups only while it steps.
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or [
        partition for group in inner.param_groups for partition in group["params"]
    ]
    for partition in masters:
        yield partition, inner.state[partition]


def require_shared(module: torch.nn.Module, *, num_workers: int) -> None:
    """Stage 3's promise, checked: this worker holds its share of the sharded weights and no more.

    Raises:
        JobError: it holds more, which trains as well, but not in the memory that was planned for.
    """
    longest_vector = _longest_vector(module)
    sharded = [parameter for parameter in module.parameters() if _shape(parameter).numel() > longest_vector]
    total = sum(_shape(parameter).numel() * parameter.element_size() for parameter in sharded)
    tensors = [tensor for p in sharded for tensor in (p.data, getattr(p, "ds_tensor", None)) if tensor is not None]
    held = sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())
    limit = PADDING * total / num_workers
    if held > limit:
        raise JobError(
            f"ZeRO-3 did not share out the weights: this worker holds {held:,} of their {total:,} bytes and its share "
            f"is {limit:,.0f}; use train.zero_stage=2, which does not promise that"
        )


def _share_out(model: torch.nn.Module, config: RunConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Shard what is still whole, weight by weight: DeepSpeed would first move the model to the GPU in one piece."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name()
    for tensor in model.buffers():
        tensor.data = tensor.data.to(device)
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            state.to(device)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings(config, dtype))


def _longest_vector(model: torch.nn.Module) -> int:
    return max((_shape(p).numel() for p in model.parameters() if len(_shape(p)) == 1), default=0)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def share_out_as_loaded(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Within, each weight of a base is sharded before the next one is read: no process ever holds the whole base.

    transformers reads and quantises them one after the other, in the order of their names, and every worker does
    (5.24, core_model_loading.py, convert_and_load_state_dict_in_model); what is quantised already it would read ahead.
    peft's DoRA reads the whole weight of a layer when it is put around it.
    """
    import deepspeed
    from peft.tuners.lora import dora
    from transformers import core_model_loading

    init = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=deepspeed_config)

    def set_and_share_out(model: torch.nn.Module, name: str, *others: Any) -> None:
        set_param(model, name, *others)
        if isinstance(parameter := _at(model, name), torch.nn.Parameter):
            init._convert_to_zero_parameters([parameter])

    set_param = core_model_loading.set_param_for_module
    gather = dora.gather_params_ctx
    core_model_loading.set_param_for_module, dora.gather_params_ctx = set_and_share_out, gathered
    try:
        with in_environment({ONE_BY_ONE: "1"}):
            yield
    finally:
        core_model_loading.set_param_for_module, dora.gather_params_ctx = set_param, gather


def _at(model: torch.nn.Module, name: str) -> Any:
    place, _, last = name.rpartition(".")
    return getattr(model.get_submodule(place), last)


@contextmanager
def regather_for_backward() -> Iterator[None]:
    """Within, a sharded 4-bit weight is gathered once more for its backward pass.

    bitsandbytes keeps the gathered weight from the forward to the backward pass, so that every worker would hold the
    whole base once in each step (0.50, autograd/_functions.py, MatMul4Bit), and checkpointing activations would not
    help: it is kept where autograd does not see it.
    """
    import bitsandbytes

    keeping = bitsandbytes.matmul_4bit

    def matmul_4bit(x: torch.Tensor, weight: Any, quant_state: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = _Product4bit.apply(x, weight, quant_state, keeping)
        return product if bias is None else product + bias

    bitsandbytes.matmul_4bit = matmul_4bit
    try:
        yield
    finally:
        bitsandbytes.matmul_4bit = keeping


class _Product4bit(torch.autograd.Function):
    """x W^T for a frozen 4-bit W: x (..., I) to (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, quant_state: Any, matmul_4bit: Any) -> torch.Tensor:
        ctx.weight, ctx.quant_state = weight, quant_state  # the parameter: its data come and go
        product: torch.Tensor = matmul_4bit(x, weight, quant_state=quant_state)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        with gathered([ctx.weight] if not ctx.weight.numel() else []):
            weight = dequantize_4bit(ctx.weight.data, ctx.quant_state)
        return gradient @ weight.to(gradient.dtype), None, None, None
