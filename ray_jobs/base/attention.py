"""How a base computes attention: what `model.attention` asks for, what the base's code knows, what the worker runs on.

sdpa_float32        PyTorch's fused kernel in float32, for CPU workers
sdpa_records        the same kernel in the base's dtype, for GPU workers
sdpa                that one as transformers ships it, for bases that take no other
flash_attention_2   the flash-attn package's, on GPUs
eager               the formula written out, which every base knows

On CPU the backward pass of the fused bfloat16 kernel is two and a half times slower than the float32 one at the lengths
of short records (8.4 ms against 3.4 ms for 8 x 9 x 49 x 64, one AMX core), and less precise. The first two know of the
records of a packed row: see `packed`.
"""

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any

from components.config.schema import Attention
from components.shared.errors import ConfigError
from ray_jobs.base.architecture import model_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ray_jobs.base.packing import Packing

FLOAT32 = "sdpa_float32"
RECORDS = "sdpa_records"
FLASH = "flash_attention_2"
MOST_TOKENS = 8192
"""Of a packed row: a kernel that does not know of records gets a mask of the row's length squared."""
REHEARSED = "rehearsed_"
"""Begins the name of a kernel that a plan runs on no device, without its mask."""


def choose(base: "PretrainedConfig", wanted: Attention, *, use_gpu: bool) -> str | None:
    """What to load the base with, as transformers spells it; None leaves it to a base that brings its own code.

    `wanted` is model.attention. A CPU has no flash attention: what was trained with it runs there as with auto.

    Raises:
        ConfigError: the base does not know what is wanted, or flash-attn is not installed.
    """
    if wanted == "eager":
        return "eager"
    model = model_class(base)
    if model is None:
        return None if wanted == "auto" else wanted
    if wanted == FLASH and use_gpu:
        return _flash(model)
    if model._supports_sdpa:
        return register(RECORDS if use_gpu else FLOAT32) if takes_kernels(base) else "sdpa"
    if wanted == "sdpa":
        raise ConfigError(
            f"model.attention sdpa: {model.__name__} has no attention through PyTorch's fused kernel: set "
            "model.attention to eager, or to auto, which takes it"
        )
    return "eager"


def for_text(base: "PretrainedConfig", chosen: str | None) -> str | dict[str, str] | None:
    """What `choose` gave, as `attn_implementation` takes it: for what reads and writes text alone.

    A tower that sees or hears keeps its own, as Gemma 4's for sound knows no fused kernel.
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
    """Whether a token looks at every token before it, by keys and values that stay as they are, and at nothing else:
    no windows, chunks or recurrent states, no picture between them, and no turning by the length of the whole text.

    A text of `within` tokens sees nothing of a window or a chunk that holds as many.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if base.get_text_config() is not base or not takes_kernels(base):
        return False
    if (getattr(base, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return False
    # Llama 4's queries grow with their place in the row, by steps of so many tokens.
    if getattr(base, "attn_temperature_tuning", False) and base.floor_scale < MOST_TOKENS:
        return False
    layers = DynamicCache(config=base).layers
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    hides = bool(windows) and not 0 < within <= min(windows)
    return not hides and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def is_float32(config: "PretrainedConfig") -> bool:
    """Whether a model's attention is the float32 kernel, or a rehearsal of it."""
    name: str = config._attn_implementation
    return name.removeprefix(REHEARSED) == FLOAT32


def register(name: str = FLOAT32) -> str:
    """Make FLOAT32 or RECORDS known to transformers; returns the name to load a model with."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, packing: Any = None, **options: Any
    ) -> tuple[Any, None]:
        attend, dtype = partial(sdpa_attention_forward, module, **options), query.dtype
        if name == FLOAT32:
            query, key, value = query.float(), key.float(), value.float()
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.float()
        if packing is None:
            output, _ = attend(query, key, value, attention_mask)
        else:
            output = _attend_packed(attend, query, key, value, packing.on(query.device))
        return output.to(dtype), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attend_packed(attend: Any, query: Any, key: Any, value: Any, packing: "Packing") -> Any:
    """Attention of `packed`'s row: (1, heads, T, D) each, to (1, T, heads, D)."""
    q, k, v = (packing.apart(each[0].transpose(0, 1)) for each in (query, key, value))
    rest, _ = attend(q[1], packing.behind(*k), packing.behind(*v), packing.bias.to(query.dtype))
    beginning = attend(q[0], k[0], v[0], None)[0] if packing.common else rest[:1, :0]
    return packing.together(beginning.transpose(1, 2), rest.transpose(1, 2))[None]


def _flash(model: "type[PreTrainedModel]") -> str:
    # Of a class that names its own kernels transformers would fetch one of those, from the hub.
    own = model._compatible_flash_implementations
    if not model._supports_flash_attn or (own is not None and FLASH not in own):
        raise ConfigError(
            f"model.attention {FLASH}: {model.__name__} has no attention through flash-attn: set model.attention to "
            "auto, which takes the fastest that it has"
        )
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            f"model.attention {FLASH}: the package flash-attn is not installed where the workers run: build it into "
            "their image, or set model.attention to auto"
        )
    return FLASH
