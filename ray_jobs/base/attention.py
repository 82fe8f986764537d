"""Choosing a base's attention kernel from `model.attention`, what the base's code supports, and the worker's device.

sdpa_float32        PyTorch's fused kernel in float32, for CPUs, whose bfloat16 one is slower backward, and less precise
sdpa_records        the same kernel in the base's dtype, for GPU workers
sdpa                the same kernel as transformers ships it, for bases that take no other kernels
flash_attention_2   the kernel of the flash-attn package, on GPUs
eager               the formula written out, which every base supports

The first two and flash_attention_2 handle the records of a packed row: see `packing`. sdpa_records takes PyTorch's own
flash attention for them where the GPU has it.
"""

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from components.config.ray import FIRST_WITH_FLASH
from components.config.schema import Attention
from components.shared.errors import ConfigError
from ray_jobs.base.architecture import model_class, require_cuda

if TYPE_CHECKING:
    from transformers import PretrainedConfig


FLOAT32 = "sdpa_float32"
RECORDS = "sdpa_records"
FLASH = "flash_attention_2"
MOST_TOKENS = 8192
"""Maximum length of a packed row."""
REHEARSED = "rehearsed_"
"""Prefix of the names of kernels that a plan runs on fake tensors, without a mask."""


def choose(base: "PretrainedConfig", wanted: Attention, *, use_gpu: bool) -> str | None:
    """The attention implementation to load the base with, as transformers spells it; None leaves the choice to a base
    that brings its own code.

    `wanted` is model.attention. CPUs have no flash attention: there it means the same as auto. Raises ConfigError: the
    base does not support what is wanted.
    """
    if wanted == "eager":
        return "eager"
    model = model_class(base)
    if model is None:
        return None if wanted == "auto" else wanted
    if wanted == FLASH and use_gpu:
        # For a class that lists its own compatible kernels, transformers would fetch one of them from the hub.
        own = model._compatible_flash_implementations
        if not model._supports_flash_attn or (own is not None and FLASH not in own):
            raise ConfigError(
                f"model.attention {FLASH}: {model.__name__} has no attention through flash-attn: set model.attention "
                "to auto, which takes the fastest that it has"
            )
        return register(FLASH)
    if model._supports_sdpa:
        return register(RECORDS if use_gpu else FLOAT32) if takes_kernels(base) else "sdpa"
    if wanted == "sdpa":
        raise ConfigError(
            f"model.attention sdpa: {model.__name__} has no attention through PyTorch's fused kernel: set "
            "model.attention to eager, or to auto, which takes it"
        )
    return "eager"


def require_installed(wanted: Attention, *, use_gpu: bool) -> None:
    """Check that this process's image has what workers on GPUs need; workers have their driver's image. Raises
    ConfigError: flash-attn is wanted, and is not installed; or PyTorch is not built for NVIDIA's GPUs."""
    if use_gpu:
        require_cuda()
    if wanted == FLASH and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"model.attention {FLASH}: the package flash-attn is not installed where the workers run: build it into "
            "their image, or set model.attention to auto"
        )


def for_text(base: "PretrainedConfig", chosen: str | None) -> str | dict[str, str] | None:
    """The result of `choose` as a value for `attn_implementation` that applies to the text model alone.

    Vision and audio towers keep their own implementation: Gemma 4's audio tower, for example, supports no fused kernel.
    """
    text = base.get_text_config()
    if chosen is None or text is base:
        return chosen
    return {"": chosen} | {key: chosen for key in base.sub_configs if getattr(base, key, None) is text}


def takes_kernels(base: "PretrainedConfig") -> bool:
    """Whether the base's architecture takes attention kernels that transformers does not ship."""
    model = model_class(base)
    return model is not None and model.is_backend_compatible()


def looks_at_all_before(base: "PretrainedConfig", within: int = 0) -> bool:
    """Whether each token attends to exactly the tokens before it, through keys and values that never change: no sliding
    windows, chunks or recurrent states, no images in between, no rotary embedding that depends on the text's length.

    A window or chunk of at least `within` tokens does not count, as it hides nothing in texts of that length.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if base.get_text_config() is not base or not takes_kernels(base):
        return False
    if (getattr(base, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return False
    # Llama 4 scales queries by their position in the row, in steps of `floor_scale` tokens.
    if getattr(base, "attn_temperature_tuning", False) and base.floor_scale < MOST_TOKENS:
        return False
    layers = DynamicCache(config=base).layers
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    hides = bool(windows) and not 0 < within <= min(windows)
    return not hides and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def is_float32(config: "PretrainedConfig") -> bool:
    """Whether a model uses the float32 attention kernel, or its rehearsed variant."""
    name: str = config._attn_implementation
    return name.removeprefix(REHEARSED) == FLOAT32


def register(name: str = FLOAT32) -> str:
    """Register FLOAT32, RECORDS or FLASH with transformers; returns the name to load a model with."""
    from torch.nn.attention import varlen
    from transformers import AttentionInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from ray_jobs.base.packing import is_placeholder

    kernel = flash_attention_forward if name == FLASH else sdpa_attention_forward

    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, packing: Any = None, **options: Any
    ) -> tuple[Any, None]:
        attend, dtype = partial(kernel, module, **options), query.dtype
        if name == FLOAT32:
            query, key, value = query.float(), key.float(), value.float()
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.float()
        packing = packing and packing.on(query.device)
        if packing is None:
            assert not is_placeholder(attention_mask), f"{type(module).__name__} is not told how its row is packed"
            output, _ = attend(query, key, value, attention_mask)
        elif name == FLASH:
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            lengths = dict(zip(names, packing.lengths, strict=True))
            output, _ = attend(query, packing.repeated(key), packing.repeated(value), None, **lengths)
        elif has_flash(query, value, options):
            # query (1, heads, T, D) and its like as (T, heads, D)
            q, k, v = (states[0].transpose(0, 1) for states in (query, packing.repeated(key), packing.repeated(value)))
            how = {"scale": options.get("scaling"), "window_size": (-1, 0), "enable_gqa": True}
            output = varlen.varlen_attn(q, k, v, *packing.lengths, **how)[None]
        else:  # query, key and value (1, heads, T, D), output (1, T, heads, D)
            q, k, v = (packing.apart(states[0].transpose(0, 1)) for states in (query, key, value))
            rest, _ = attend(q[1], packing.behind(*k), packing.behind(*v), packing.bias.to(query.dtype))
            beginning = attend(q[0], k[0], v[0], None)[0] if packing.common else rest[:1, :0]
            output = packing.together(beginning.transpose(1, 2), rest.transpose(1, 2))[None]
        return output.to(dtype), None

    AttentionInterface.register(name, forward)
    if name != FLASH:
        AttentionMaskInterface.register(name, sdpa_mask)
    return name


def has_flash(query: Any, value: Any, options: Mapping[str, Any]) -> bool:
    """Whether PyTorch's flash attention takes such sequences, backward too, on every GPU that has it."""
    import torch

    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= FIRST_WITH_FLASH
        and width == value.shape[-1] <= 192
        and width % 8 == 0
        and not options.get("dropout")
        and options.get("softcap") is None
    )
