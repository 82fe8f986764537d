"""One training step rehearsed on fake tensors: real model code, adapter and shapes, but no memory allocated.

What a step keeps for its backward pass depends on the architecture, the adapter and the versions of three libraries.
So the model's layers run forward and backward on PyTorch's fake tensors, in a second and at any size, and every storage
that is created or freed is counted. Shapes: B records of a micro-batch, T tokens of each.
"""

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.config.schema import Attention, MethodConfig, RunConfig
from components.shared.errors import ConfigError
from components.shared.machine import replaced
from ray_jobs.adapters import build
from ray_jobs.adapters.build import experts_of, left_dense
from ray_jobs.base import architecture
from ray_jobs.base.architecture import from_config, require_causal
from ray_jobs.base.attention import FLASH, REHEARSED, choose, for_text, takes_kernels
from ray_jobs.kernels.door import PLAIN

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


class CannotRehearse(Exception):
    """The model's own code does not run on fake tensors."""


@contextmanager
def rehearsing() -> Iterator[None]:
    """Turn errors in a model's code into CannotRehearse; the traceback is logged, in case the fault is ours."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as exc:
        logger.info("this architecture cannot be rehearsed", exc_info=True)
        raise CannotRehearse(str(exc)) from exc


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created within that are alive, also of fake tensors: in `now`, at most in `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "prim":  # a query, such as a tensor's device: two of three operations
            return function(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in self._alive and id(storage) not in inputs:
                self._alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= num_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# Bytes of activations that a transformer layer keeps per token and unit of its width: arXiv:2205.05198, equation 2,
# without the attention matrix, which fused kernels never store. Used only where fake tensors do not work.
LAYER_BYTES = 34
BF16 = 2


@dataclass(frozen=True)
class ModelStats:
    """Sizes of a base and its adapter, counted on the model itself."""

    parameters: int  # of the base; tied weights count once
    matrices: tuple[tuple[int, int], ...]
    """(outputs, inputs) of each weight that a quantised base stores in fewer bits: every linear layer but the head."""
    active: int  # number of weights that one token is multiplied with in the base's layers, without the head
    vocabulary: int
    width: int  # width of the residual stream
    attention_width: int  # number of heads times head size
    num_layers: int
    experts: int  # number of weights of experts that are stacked in one tensor, which bitsandbytes leaves in 16 bits
    cached: int  # elements of the KV cache per token, over all layers
    trainable: int  # trained adapter parameters; for full fine-tuning, all of the base's
    frozen_adapter: int  # veRA's shared random matrices
    applied: int  # adapter weights that one token is multiplied with; shared matrices count once per layer


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward pass through the layers, the output head left out."""

    kept: int  # between the forward and the backward pass
    workspace: int  # what the passes need in addition, at their peak
    is_estimate: bool = False  # by a formula, because the architecture does not run on fake tensors
    inputs: int = 0
    """The part of `kept` that is the layers' inputs, which checkpointing recomputes the rest from; 0 without it."""


class Rehearsal:
    """A base with a fresh adapter, on the meta device; with method None, the base for full fine-tuning."""

    def __init__(
        self,
        base: "PretrainedConfig",
        method: MethodConfig | None,
        *,
        reference: str,
        use_gpu: bool = True,
        attention: Attention = "auto",
    ) -> None:
        """Raises ConfigError where the base is no causal language model, needs a package that is not installed, is
        already quantised in another format, or lacks the attention or the layers that are asked for."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds

        require_causal(base, reference=reference)
        if method is not None:
            architecture.quantization(base, method.row.base, torch.bfloat16, reference=reference)
        try:
            rehearsed = for_text(base, _rehearsed(base, choose(base, attention, use_gpu=use_gpu)))
            with torch.device("meta"):
                self._model: PreTrainedModel = from_config(base, dtype=torch.bfloat16, attn_implementation=rehearsed)
        except ImportError as exc:
            message = " ".join(str(exc).split())
            raise ConfigError(f"model.base {reference} wants what is not installed where this runs: {message}") from exc
        self.formats = tuple(
            base_format
            for base_format in architecture.formats(base)
            if base_format == "bf16" or not left_dense(self._model)
        )
        """The values of method.base that this base allows."""
        base = base.get_text_config()  # the language model of a multimodal one
        matrices = tuple((outputs, inputs) for _, outputs, inputs in _linear_layers(self._model))
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        active = _active(self._model, base)
        self._model.requires_grad_(method is None)
        self.adapts_experts = False  # whether the adapter targets fused experts, whose weights ZeRO-3 cannot shard then
        adapted = None
        if method is not None:
            if method.row.base == "int8":
                for layer, _, _ in _linear_layers(self._model):
                    _as_int8(layer)
            with torch.device("meta"):
                plain = method.model_copy(update={"init": "default"})  # there are no weights to start from
                adapted = PLAIN.adopt(build.attach(self._model, plain, base_reference=reference, seed=0))
            self.adapts_experts = bool(adapted.targeted_parameter_names)
        shared = (getattr(adapted.base_model, name, None) for name in ("vera_A", "vera_B")) if adapted else ()
        frozen = sum(matrix.numel() for matrices in shared if matrices is not None for matrix in matrices.values())
        layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)] if adapted else []
        self.above_full_rank = build.above_full_rank(adapted, method.r) if adapted and method else (0, 0)
        self.stats = ModelStats(
            parameters=parameters,
            matrices=matrices,
            active=active,
            vocabulary=self._model.get_output_embeddings().weight.shape[0],
            width=base.hidden_size,
            attention_width=_heads_width(base, "num_attention_heads"),
            num_layers=base.num_hidden_layers,
            experts=sum(tensor.numel() for tensor in experts_of(self._model).values()),
            cached=2 * base.num_hidden_layers * _heads_width(base, "num_key_value_heads", "num_attention_heads"),
            trainable=adapted.get_nb_trainable_parameters()[0] if adapted else parameters,
            frozen_adapter=frozen,
            # For all low-rank methods: r x inputs + outputs x r per adapted layer.
            applied=sum(method.r * (layer.in_features + layer.out_features) for layer in layers) if method else 0,
        )
        self._period = period(getattr(base, "layer_types", None) or [], base.num_hidden_layers)
        self._steps: dict[tuple[int, int, bool, bool], StepMemory] = {}
        self._read: dict[tuple[int, int], int] = {}

    @classmethod
    def of(cls, config: RunConfig, base: "PretrainedConfig") -> "Rehearsal":
        """The rehearsal of what a config trains; raises ConfigError where the base does not fit it."""
        use_gpu, attention = config.ray.use_gpu, config.model.attention
        rehearsal = cls(base, config.method, reference=config.model.base, use_gpu=use_gpu, attention=attention)
        if rehearsal.adapts_experts and config.train.zero_stage == 3:
            raise ConfigError(
                f"train.zero_stage 3 shards the experts of {config.model.base}, and peft adapts them whole: "
                "set train.zero_stage=2, or adapt the other layers alone with method.target_modules"
            )
        return rehearsal

    def step(self, batch: int, length: int, *, checkpointing: bool, sharded: bool = False) -> StepMemory:
        """Memory of one step over B x T tokens, extrapolated from the first layers; `sharded` are weights at ZeRO-3."""
        key = (batch, length, checkpointing, sharded)
        if key not in self._steps:
            try:
                with rehearsing():
                    self._steps[key] = self._extrapolated(*key)
            except (CannotRehearse, ConfigError) as exc:
                logger.warning("this architecture cannot be rehearsed (%s): its activations are a rough estimate", exc)
                layer = LAYER_BYTES * batch * length * self.stats.width
                kept = 2 * batch * length * self.stats.width if checkpointing else layer
                self._steps[key] = StepMemory(self.stats.num_layers * kept, layer, is_estimate=True)
            if checkpointing:
                inputs = self.stats.num_layers * BF16 * batch * length * self.stats.width
                self._steps[key] = replace(self._steps[key], inputs=min(inputs, self._steps[key].kept))
        return self._steps[key]

    def reading(self, batch: int, length: int) -> int:
        """Peak bytes of a forward pass over B x T tokens without gradients."""
        key = (batch, length)
        if key not in self._read:
            try:
                with rehearsing(), torch.no_grad():
                    self._read[key] = self._run(batch, length, False, min(self._period, self.stats.num_layers))[1]
            except (CannotRehearse, ConfigError):
                self._read[key] = LAYER_BYTES * batch * length * self.stats.width
        return self._read[key]

    def _extrapolated(self, batch: int, length: int, checkpointing: bool, sharded: bool) -> StepMemory:
        num_layers, few, more = self.stats.num_layers, self._period, 2 * self._period
        with _hooked(self._decoder) if sharded else nullcontext():
            if num_layers <= more:
                kept, workspace = self._run(batch, length, checkpointing, num_layers)
                return StepMemory(kept, workspace)
            fewer, _ = self._run(batch, length, checkpointing, few, backward=False)
            kept, workspace = self._run(batch, length, checkpointing, more)
        return StepMemory(kept + (num_layers - more) * (kept - fewer) // (more - few), workspace)

    def _run(
        self, batch: int, length: int, checkpointing: bool, num_layers: int, *, backward: bool = True
    ) -> tuple[int, int]:
        with self._fake, _first_layers(self._decoder, num_layers), _checkpointing(self._model, on=checkpointing):
            input_ids = torch.zeros(batch, length, dtype=torch.long)
            with LiveBytes() as live:
                # As in `answer_loss`: no mask, no cache.
                hidden = self._decoder(input_ids=input_ids, use_cache=False).last_hidden_state
                kept = live.now if torch.is_grad_enabled() else 0
                if torch.is_grad_enabled() and backward:
                    hidden.backward(torch.ones_like(hidden))
                del hidden
        return kept, live.peak - kept

    @cached_property
    def _fake(self) -> FakeTensorMode:
        return FakeTensorMode()

    @cached_property
    def _decoder(self) -> torch.nn.Module:
        self._model.train()
        with self._fake:
            _replace_tensors(self._model)
        # For Llama 4 get_decoder returns the whole model, with its head.
        decoders = (module for module in self._model.get_decoder().modules() if _layers(module))
        decoder = next(decoders, self._model)
        with self._fake, torch.enable_grad(), _first_layers(decoder, 2 * self._period):
            decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)  # creates the layers' lazy tensors
        return decoder


def _rehearsed(base: "PretrainedConfig", attention: str | None) -> str | None:
    """The same attention without a mask, since transformers cannot tell from fake tensors that there is no padding.
    Flash attention, which does not run on fake tensors, is replaced by PyTorch's fused kernel, which keeps the same."""
    from transformers import AttentionInterface, AttentionMaskInterface

    kernel = "sdpa" if attention == FLASH else attention
    if kernel is None or kernel == "eager" or not takes_kernels(base):
        return kernel
    name = REHEARSED + kernel
    AttentionInterface.register(name, AttentionInterface()[kernel])
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


class _Int8Product(torch.autograd.Function):
    """Stand-in for bitsandbytes' product, which keeps its input as an attribute: checkpointing does not free it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.x, ctx.weight = x, weight
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ ctx.weight, None, None


def _as_int8(layer: Any) -> None:
    def forward(x: torch.Tensor) -> Any:
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T  # Conv1D
        return _Int8Product.apply(x, weight, layer.bias)

    layer.forward = forward


def _replace_tensors(model: torch.nn.Module) -> None:
    """Replace each meta tensor by a fake tensor; trained parameters become bfloat16, as in DeepSpeed. Gradients are
    freed as soon as they are accumulated: they are counted elsewhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.bfloat16 if parameter.requires_grad else parameter.dtype
                fake = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                if fake.requires_grad:
                    fake.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _layers(module: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """The list of decoder layers among a module's direct children, with its name, if there is one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [(name, child) for name, child in module.named_children() if isinstance(child, torch.nn.ModuleList)]
    return [(name, child) for name, child in lists if len(child) and isinstance(child[0], GradientCheckpointingLayer)]


def _first_layers(decoder: torch.nn.Module, count: int) -> AbstractContextManager[None]:
    ((name, layers),) = _layers(decoder)
    return replaced(decoder, **{name: layers[:count]})


@contextmanager
def _checkpointing(model: "PreTrainedModel", *, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()


@contextmanager
def _hooked(model: torch.nn.Module) -> Iterator[None]:
    """Put hooks on every module, as ZeRO-3 does, so that no layer uses the fused function of `fused_layer`."""
    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_: None))
        yield


def _linear_layers(model: "PreTrainedModel") -> Iterator[tuple[Any, int, int]]:
    """Yield each linear layer but the head, with its numbers of outputs and inputs."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, Conv1D):
            yield module, module.weight.shape[1], module.weight.shape[0]
        elif isinstance(module, torch.nn.Linear) and module is not head:
            yield module, module.out_features, module.in_features


def _active(model: "PreTrainedModel", base: "PretrainedConfig") -> int:
    """Weights per token, in each tensor of stacked experts (experts, ., .) only those that the token is routed to."""
    dense = sum(outputs * inputs for _, outputs, inputs in _linear_layers(model))
    chosen = getattr(base, "num_experts_per_tok", None) or 1
    experts = experts_of(model).values()
    return dense + sum(tensor.numel() // tensor.shape[0] * min(chosen, tensor.shape[0]) for tensor in experts)


def _heads_width(base: "PretrainedConfig", *counts: str) -> int:
    """Number of heads times head size, averaged over layers, as they may differ; `counts` are tried in order."""
    layers = list(base.per_layer_config) if base.is_heterogeneous else [base]
    widths = []
    for layer in layers:
        head = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        widths.append(head * next(number for name in counts if (number := getattr(layer, name, None))))
    return int(sum(widths) / len(widths))


def period(layer_types: list[str], num_layers: int) -> int:
    """Number of layers after which the layer types repeat; at least two, since the first layer may differ a little."""
    periods = (n for n in range(2, num_layers) if layer_types[n:] == layer_types[: len(layer_types) - n])
    return next(periods, num_layers)
