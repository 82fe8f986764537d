"""How a base's weights are stored, and how they are loaded in the format of `method.base`.

A base folder holds 16-bit weights; weights in one of our formats (bitsandbytes' NF4 or int8), which are loaded as they
are; or weights in a format used for storage alone, MXFP4 (as in gpt-oss) or FP8, which are dequantised to bfloat16. Any
other format is refused: treated as one of these, it would make plan, lineage and serving wrong.
"""

from typing import TYPE_CHECKING, Any

from components.config.methods import BaseFormat
from components.shared.errors import ConfigError
from ray_jobs.base.architecture import read_by_the_model

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

WIDENED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Storage formats that are dequantised to bfloat16, with the transformers configuration class that does it."""


def quantization(
    shape: "PretrainedConfig", base_format: BaseFormat, dtype: "torch.dtype", *, reference: str
) -> dict[str, Any]:
    """Extra keyword arguments of `from_pretrained` that load the weights in `base_format`.

    `dtype` is the 16-bit compute dtype of NF4.

    Raises:
        ConfigError: the weights are already quantised, in a format that cannot become `base_format`.
    """
    import transformers

    stored = _stored(shape)
    if base_format not in (possible := formats(shape)):
        mend = f"set method.base={possible[0]}, or name" if possible else "name"
        raise ConfigError(
            f"method.base {base_format}: the weights of {reference} are quantised already, as {_named(stored)}: {mend} "
            "the unquantised model that they were made from"
        )
    if not stored:
        return {"quantization_config": _config_of(base_format, dtype, never=read_by_the_model(shape))}
    if base_format == "bf16":
        return {"quantization_config": getattr(transformers, WIDENED[stored["quant_method"]])(dequantize=True)}
    return {}  # passing quantization_config=None would drop the folder's own configuration


def formats(shape: "PretrainedConfig") -> tuple[BaseFormat, ...]:
    """The possible values of `method.base`; empty where the weights' quantisation cannot be trained on."""
    stored = _stored(shape)
    if not stored:
        return ("bf16", "nf4", "int8")
    if ours := stored_as(shape):
        return (ours,)
    return ("bf16",) if stored.get("quant_method") in WIDENED else ()


def stored_as(shape: "PretrainedConfig") -> BaseFormat | None:
    """The format of ours that the weights are stored in; None for 16-bit weights and for any other format."""
    stored = _stored(shape)
    if stored.get("load_in_8bit"):
        return "int8"
    return "nf4" if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4" else None


def _stored(shape: "PretrainedConfig") -> dict[str, Any]:
    found = getattr(shape, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def _named(stored: dict[str, Any]) -> str:
    kind = stored.get("quant_method", "a kind that it does not name")
    if kind != "bitsandbytes":
        return str(kind)
    return "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))


def _config_of(base_format: BaseFormat, dtype: "torch.dtype", *, never: tuple[str, ...]) -> Any:
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *never] if never else None  # by default transformers skips the head alone
    if base_format == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # what ZeRO-3 needs to shard 4-bit weights
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped) if base_format == "int8" else None
