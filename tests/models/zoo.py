"""Tiny models of the architectures that people fine-tune, with random weights, from transformers' own configurations.

Each has what sets its family apart: tied and biased layers, windows, experts, a vision tower, layers of several kinds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.models.tiny import SPECIAL, write_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EOS = 256
"""Of `tests.tiny`'s tokenizer: 256 bytes, then the special tokens."""
TEXT = {
    "vocab_size": EOS + len(SPECIAL),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Kind:
    """One architecture: the class of its configuration, and what it sets apart from `TEXT`."""

    config_class: str
    text: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)
    """Of a model that also sees: what its configuration holds beside the text's."""

    def config(self) -> "PretrainedConfig":
        """The configuration, which alone makes the model."""
        import transformers

        config_class = getattr(transformers, self.config_class)
        if not self.around:
            return config_class(**{**TEXT, **self.text})
        text = {**TEXT, **self.text}
        return config_class(text_config=text, tie_word_embeddings=text["tie_word_embeddings"], **self.around)


KINDS = {
    "Llama, tied": Kind("LlamaConfig", {"tie_word_embeddings": True}),
    "Llama, untied": Kind("LlamaConfig"),
    "Llama, biased": Kind("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": Kind("MistralConfig", {"sliding_window": 16}),
    "Ministral 3": Kind("Ministral3Config", {"head_dim": 16}),
    "Qwen2": Kind("Qwen2Config"),
    "Qwen3": Kind("Qwen3Config", {"head_dim": 16}),
    "Qwen3-MoE": Kind("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "Qwen3.5": Kind(
        "Qwen3_5TextConfig",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            **{f"linear_{name}": 16 for name in ("key_head_dim", "value_head_dim")},
            **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
        },
    ),
    "Gemma 2": Kind("Gemma2Config", {"head_dim": 16, "tie_word_embeddings": True, **WINDOWED}),
    "Gemma 3, text": Kind("Gemma3TextConfig", {"head_dim": 16, "tie_word_embeddings": True, **WINDOWED}),
    "Gemma 3, with vision": Kind(
        "Gemma3Config",
        {"head_dim": 16, "tie_word_embeddings": True, **WINDOWED},
        {"vision_config": VISION, "mm_tokens_per_image": 1},
    ),
    "Gemma 4": Kind(
        "Gemma4TextConfig",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "tie_word_embeddings": True,
            "vocab_size_per_layer_input": TEXT["vocab_size"],
            "hidden_size_per_layer_input": 16,
            **WINDOWED,
        },
    ),
    "Phi-3": Kind("Phi3Config"),
    "gpt-oss": Kind("GptOssConfig", {"head_dim": 16, **EXPERTS, **WINDOWED}),
    "Mixtral": Kind("MixtralConfig", EXPERTS),
    "Llama 4, text": Kind(
        "Llama4TextConfig", {"head_dim": 16, "intermediate_size_mlp": 128, **EXPERTS, "num_experts_per_tok": 1}
    ),
    "SmolLM3": Kind("SmolLM3Config", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "OLMo 2": Kind("Olmo2Config"),
    "Granite": Kind("GraniteConfig", {"tie_word_embeddings": True, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Cohere 2": Kind("Cohere2Config", {"tie_word_embeddings": True, **WINDOWED}),
    "GLM-4": Kind("Glm4Config", {"head_dim": 16}),
    "Falcon": Kind("FalconConfig", {"tie_word_embeddings": True}),
    "BLOOM": Kind("BloomConfig", {"n_head": 4, "tie_word_embeddings": True}),
    "OPT": Kind(
        "OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.15, "tie_word_embeddings": True}
    ),
    "StarCoder2": Kind("Starcoder2Config", {"tie_word_embeddings": True}),
    "GPT-2": Kind("GPT2Config", {"n_inner": 128, "tie_word_embeddings": True}),
}


def build(name: str, directory: Path) -> Path:
    """Write the tiny model of a row of `KINDS`, with a tokenizer; the same name gives the same bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    write_tokenizer(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[name].config(), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 3:  # experts, which some architectures leave as they find them in memory
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory
