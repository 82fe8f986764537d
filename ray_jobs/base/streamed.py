"""Running a base with its weights offloaded to disk: only one layer's weights are in memory at a time."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from components.config.methods import BaseFormat
from components.config.schema import ModelConfig
from ray_jobs.base import architecture, attention, four_bits
from ray_jobs.base.base_model import Base

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def streamed(
    base: Base,
    config: ModelConfig,
    base_format: BaseFormat,
    *,
    linear: Callable[..., torch.Tensor] = linear,
    like_gpu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator["PreTrainedModel"]:
    """The base on the CPU in `dtype`, for forward passes only; for nf4, each weight is quantised and dequantised.

    The folder must hold 16-bit weights. `linear` computes the products of the linear layers; with `like_gpu`, attention
    is that of GPU workers, except for flash attention, of which CPUs have PyTorch's own.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    shape = AutoConfig.from_pretrained(base.path, trust_remote_code=config.trust_remote_code)
    load = architecture.auto_class(shape).from_pretrained
    wanted = "auto" if config.attention == attention.FLASH else config.attention
    kernel = attention.for_text(shape, attention.choose(shape, wanted, use_gpu=like_gpu))
    with tempfile.TemporaryDirectory(prefix="fineloop-streamed-") as scratch:
        model: PreTrainedModel = load(
            base.path,
            dtype=dtype,
            attn_implementation=kernel,
            device_map={"": "disk"},  # accelerate's disk offload: a layer's weights are in memory only while it runs
            offload_folder=scratch,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        ).eval()
        if shape.get_text_config() is not shape:
            _keep(model.get_input_embeddings())  # Gemma 4's model also reads the weight directly
        head = model.get_output_embeddings()
        for module in model.modules():
            if type(module) in (torch.nn.Linear, Conv1D):  # no subclasses: Llama 4's router returns more than a product
                module._old_forward = _Product(module, linear, nf4=base_format == "nf4" and module is not head)
        yield model
        remove_hook_from_submodules(model)


def _keep(module: torch.nn.Module) -> None:
    """Load a layer's weights now and keep them in memory as long as the model exists."""
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

    hook = module._hf_hook
    assert isinstance(hook, AlignDevicesHook)
    hook.pre_forward(module)
    remove_hook_from_module(module)


class _Product:
    """The forward function that accelerate calls between loading a layer's weights and dropping them."""

    def __init__(self, layer: Any, multiply: Any, *, nf4: bool) -> None:
        self._layer, self._multiply, self._nf4 = layer, multiply, nf4

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T  # Conv1D's is transposed
        product: torch.Tensor = self._multiply(x, _there_and_back(weight) if self._nf4 else weight, layer.bias)
        return product


def _there_and_back(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    four_bits.register()
    packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state)
