"""Which of transformers' classes a base is: one that reads text from left to right, and writes it.

Most are causal language models. A few, such as Mistral 3 and Qwen3-VL, transformers has only as models that take
images: without an image they are language models too.
"""

from typing import TYPE_CHECKING, Any

from components.shared.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def auto_class(base: "PretrainedConfig") -> Any:
    """Of transformers' Auto classes, the one that makes and loads the base."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _is_known_by_images_alone(base) else AutoModelForCausalLM


def from_config(config: "PretrainedConfig", **how: Any) -> Any:
    """A model of this shape with weights of its own; by the base's code where that made the config, which was allowed.

    Left to itself, transformers would ask on the terminal.
    """
    allowed = type(config).__module__.startswith("transformers_modules.")
    return auto_class(config).from_config(config, trust_remote_code=allowed, **how)


def model_class(base: "PretrainedConfig") -> "type[PreTrainedModel] | None":
    """The class that the base is loaded as; None for one that it brings itself."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if _is_known_by_images_alone(base) else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(base), None)


def read_by_the_model(base: "PretrainedConfig") -> tuple[str, ...]:
    """Linear layers, by the last part of their names, whose weights the model itself reads and clamps while it trains.

    An adapter around one would take no part in that, and packed into few bits its weight would be damaged
    (transformers 5.24, modeling_gemma3n.py, Gemma3nTextAltUp).
    """
    is_gemma_3n = base.get_text_config().model_type == "gemma3n_text"
    return ("correction_coefs", "prediction_coefs") if is_gemma_3n else ()


def require_causal(base: "PretrainedConfig", *, reference: str) -> None:
    """Raises ConfigError for a base that writes no text, sees what it is to write, or looks at padding."""
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
    """Whether it is an encoder, or has one: transformers has a causal class for those too."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder = type(base) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(base, "is_decoder", False)
    return bool(getattr(base, "is_encoder_decoder", False)) or is_encoder
