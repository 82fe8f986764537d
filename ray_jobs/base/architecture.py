"""Which transformers class loads a base: always one that generates text causally, from left to right.

Most bases are causal language models. For a few, such as Mistral 3 and Qwen3-VL, transformers has only classes that
also take images: without an image these are language models too.
"""

from typing import TYPE_CHECKING, Any

from components.config.methods import BaseFormat
from components.config.ray import dtype_on, without_flash
from components.config.train import Dtype
from components.shared.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def _class_and_mapping(base: "PretrainedConfig") -> tuple[Any, Any]:
    """The Auto class, and its classes by configuration; the one for images only where there is no other."""
    import transformers as theirs

    if (
        type(base) in theirs.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(base) not in theirs.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return theirs.AutoModelForImageTextToText, theirs.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return theirs.AutoModelForCausalLM, theirs.MODEL_FOR_CAUSAL_LM_MAPPING


def auto_class(base: "PretrainedConfig") -> Any:
    """The transformers Auto class that creates and loads the base."""
    return _class_and_mapping(base)[0]


def model_class(base: "PretrainedConfig") -> "type[PreTrainedModel] | None":
    """The transformers class that the base is loaded as; None where the base brings its own class."""
    own_class: type[PreTrainedModel] | None = _class_and_mapping(base)[1].get(type(base), None)
    return own_class


def from_config(config: "PretrainedConfig", **how: Any) -> Any:
    """A model with this config and new weights.

    Where the config comes from the base's own code, the user has allowed that code, so the model may use it too:
    without `trust_remote_code` transformers would ask on the terminal.
    """
    allowed = type(config).__module__.startswith("transformers_modules.")
    return auto_class(config).from_config(config, trust_remote_code=allowed, **how)


def read_by_the_model(base: "PretrainedConfig") -> tuple[str, ...]:
    """Last parts of the names of linear layers whose weights the model reads and clamps by itself during training.

    An adapter around such a layer would be bypassed, and clamping would damage a quantised weight
    (transformers 5.24, modeling_gemma3n.py, Gemma3nTextAltUp).
    """
    is_gemma_3n = base.get_text_config().model_type == "gemma3n_text"
    return ("correction_coefs", "prediction_coefs") if is_gemma_3n else ()


def require_causal(base: "PretrainedConfig", *, reference: str) -> None:
    """Raise ConfigError for a base that generates no text, attends to later tokens, or attends to padding."""
    if base.model_type == "doge":
        raise ConfigError(
            f"model.base {reference} is of the type doge, which chooses the tokens that it looks at, padding among "
            "them: in a batch its losses would be wrong. Name another, such as a Llama, Qwen or Mistral"
        )
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    brings_its_own = "AutoModelForCausalLM" in (getattr(base, "auto_map", None) or {})
    # transformers has causal classes for encoders too, and for pairs of encoder and decoder.
    is_encoder = type(base) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(base, "is_decoder", False)
    sees_ahead = is_encoder or getattr(base, "is_encoder_decoder", False)
    if not brings_its_own and (model_class(base) is None or sees_ahead):
        raise ConfigError(
            f"model.base {reference} is of the type {base.model_type}, which is no language model that writes from "
            "left to right: name one that is, such as a Llama, Qwen or Mistral"
        )


# How a base's weights are stored, and how they are loaded in the format of `method.base`.
#
# A base folder holds 16-bit weights; weights in one of our formats (bitsandbytes' NF4 or int8), which are loaded as
# they are; or weights in a format used for storage alone, MXFP4 (as in gpt-oss) or FP8, which are dequantised to
# bfloat16. Any other format is refused: treated as one of these, it would make plan, lineage and serving wrong.

WIDENED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Storage formats that are dequantised to bfloat16, with the transformers configuration class that does it."""


def quantization(
    shape: "PretrainedConfig", base_format: BaseFormat, dtype: "torch.dtype", *, reference: str
) -> dict[str, Any]:
    """Extra keyword arguments of `from_pretrained` that load the weights in `base_format`.

    `dtype` is the 16-bit compute dtype of NF4. Raises ConfigError: the weights are already quantised, in a format that
    cannot become `base_format`.
    """
    import transformers

    stored = _stored(shape)
    if base_format not in (possible := formats(shape)):
        kind = stored.get("quant_method", "a kind that it does not name")
        if kind == "bitsandbytes":
            kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")
        mend = f"set method.base={possible[0]}, or name" if possible else "name"
        raise ConfigError(
            f"method.base {base_format}: the weights of {reference} are quantised already, as {kind}: {mend} "
            "the unquantised model that they were made from"
        )
    if stored and base_format != "bf16":
        return {}  # passing quantization_config=None would drop the folder's own configuration
    if stored:
        return {"quantization_config": getattr(transformers, WIDENED[stored["quant_method"]])(dequantize=True)}
    if base_format == "bf16":
        return {}
    never = read_by_the_model(shape)
    skipped = ["lm_head", *never] if never else None  # by default transformers skips the head alone
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": dtype,  # what ZeRO-3 needs to shard 4-bit weights
    }
    how = four_bits if base_format == "nf4" else {"load_in_8bit": True}
    return {"quantization_config": transformers.BitsAndBytesConfig(**how, llm_int8_skip_modules=skipped)}


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
    quantization = getattr(shape, "quantization_config", None) or {}
    return quantization if isinstance(quantization, dict) else quantization.to_dict()


# What this process's GPU and PyTorch can do: components.config.ray has the table by compute capability.


def dtype_here(wanted: Dtype, *, use_gpu: bool) -> "torch.dtype":
    """The dtype for this process's GPU or CPU."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_on(wanted, torch.cuda.get_device_capability() if use_gpu else None))
    return dtype


def agree_on_dtype(dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """The dtype for all workers of a group: float16 where one of them needs it. Every worker must call this."""
    import torch

    needs = torch.tensor(int(dtype is torch.float16), device=device)
    torch.distributed.all_reduce(needs, torch.distributed.ReduceOp.MAX)
    return torch.float16 if needs.item() else torch.bfloat16


def require_unquantised(shape: "PretrainedConfig", *, reference: str) -> None:
    """Raise ConfigError for a base that a training in float16 cannot take, as it is stored in few bits for bfloat16."""
    if _stored(shape):
        raise ConfigError(
            f"{reference} is stored in few bits for bfloat16, and train.dtype is float16 here: take "
            "method.name=qlora on a base that is not quantised, or GPUs that know bfloat16"
        )


def require_cuda() -> None:
    """Raise ConfigError where this process's PyTorch runs on no GPU of NVIDIA's, whichever the machine has."""
    import torch

    if torch.version.cuda is None:
        kind = "AMD's GPUs (ROCm)" if torch.version.hip else "processors alone"
        raise ConfigError(
            f"ray.use_gpu trains on NVIDIA's GPUs, and torch {torch.__version__} here is built for {kind}: take an "
            "image whose torch is built for CUDA"
        )


def require_kernels(attention: str) -> None:
    """Check that PyTorch can run on this process's GPU. Raises ConfigError: PyTorch, or the attention that
    model.attention names, has no kernels for the GPU's architecture."""
    import torch

    require_cuda()
    try:
        torch.ones(1, device="cuda").add_(1)
    except RuntimeError as exc:
        raise ConfigError(
            f"torch {torch.__version__} does not run on {torch.cuda.get_device_name()} ({exc}): take a newer ray.gpu, "
            "or an image whose torch is built for it"
        ) from exc
    if attention == "flash_attention_2" and (why := without_flash(torch.cuda.get_device_capability())):
        raise ConfigError(why)
