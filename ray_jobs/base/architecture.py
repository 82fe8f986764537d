"""Which transformers class loads a base: always one that generates text causally, from left to right.

Most bases are causal language models. For a few, such as Mistral 3 and Qwen3-VL, transformers has only classes that
also take images: without an image these are language models too.
"""

from typing import TYPE_CHECKING, Any

from components.shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def auto_class(base: "PretrainedConfig") -> Any:
    """The transformers Auto class that creates and loads the base."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _is_known_by_images_alone(base) else AutoModelForCausalLM


def from_config(config: "PretrainedConfig", **how: Any) -> Any:
    """A model with this config and new weights.

    Where the config comes from the base's own code, the user has allowed that code, so the model may use it too:
    without `trust_remote_code` transformers would ask on the terminal.
    """
    allowed = type(config).__module__.startswith("transformers_modules.")
    return auto_class(config).from_config(config, trust_remote_code=allowed, **how)


def model_class(base: "PretrainedConfig") -> "type[PreTrainedModel] | None":
    """The transformers class that the base is loaded as; None where the base brings its own class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if _is_known_by_images_alone(base) else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(base), None)


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
    brings_its_own = "AutoModelForCausalLM" in (getattr(base, "auto_map", None) or {})
    if not brings_its_own and (model_class(base) is None or _sees_ahead(base)):
        raise ConfigError(
            f"model.base {reference} is of the type {base.model_type}, which is no language model that writes from "
            "left to right: name one that is, such as a Llama, Qwen or Mistral"
        )


def _is_known_by_images_alone(base: "PretrainedConfig") -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(base) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(base) not in MODEL_FOR_CAUSAL_LM_MAPPING


def _sees_ahead(base: "PretrainedConfig") -> bool:
    """Whether the base is an encoder, or has one: transformers has causal classes for those too."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder = type(base) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(base, "is_decoder", False)
    return bool(getattr(base, "is_encoder_decoder", False)) or is_encoder
