"""Tiny models of the architectures that people fine-tune, with random weights, from transformers' own configurations.

Each has what sets its family apart: tied and biased layers, windows, experts, a vision tower, layers of several kinds.
`python -m tests.models.zoo` writes the table of what goes with what, every cell of which `test_zoo.py` trains.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from components.config.methods import METHODS
from components.config.schema import AdapterConfig, DataConfig, MethodConfig, ModelConfig, RunConfig
from components.shared.errors import ConfigError
from tests.models.tiny import SHAPE, SPECIAL, write_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EOS = 256
"""The end-of-sequence token of `tests.tiny`'s tokenizer: 256 bytes, then the special tokens."""
VOCABULARY = EOS + len(SPECIAL)
TEXT = {**SHAPE, "vocab_size": VOCABULARY, "initializer_range": 0.15, "tie_word_embeddings": False}
TEXT |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
TIED = {"tie_word_embeddings": True}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWENS_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
QWENS_VISION |= {"out_hidden_size": TEXT["hidden_size"], "deepstack_visual_indexes": []}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**TIED, **WINDOWED, "head_dim": 16}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
GEMMA_3N = {**GEMMA, **PER_LAYER_INPUT, "intermediate_size": [128, 128], "num_kv_shared_layers": 0, "laurel_rank": 8}
GEMMA_3N |= {"activation_sparsity_pattern": [0.5, 0.0], "altup_num_inputs": 2}
GEMMA_4 = {**GEMMA, **PER_LAYER_INPUT, "global_head_dim": 32}


@dataclass(frozen=True)
class Kind:
    """One architecture: the class of its configuration, and what it sets apart from `TEXT`."""

    config_class: str
    text: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)
    """For a model that also sees images: what its configuration holds besides the text model's."""

    def config(self) -> "PretrainedConfig":
        """The configuration, which alone makes the model."""
        import transformers

        config_class, text = getattr(transformers, self.config_class), TEXT | self.text
        if not self.around:
            return config_class(**text)
        return config_class(text_config=text, tie_word_embeddings=text["tie_word_embeddings"], **self.around)


KINDS = {
    "Llama, tied": Kind("LlamaConfig", TIED),
    "Llama, untied": Kind("LlamaConfig"),
    "Llama, biased": Kind("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": Kind("MistralConfig", {"sliding_window": 16}),
    "Ministral 3": Kind("Ministral3Config", {"head_dim": 16}),
    "Ministral 3, with vision": Kind(
        "Mistral3Config",
        {"model_type": "ministral3", "head_dim": 16},
        {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}, "spatial_merge_size": 1},
    ),
    "Qwen2": Kind("Qwen2Config"),
    "Qwen3": Kind("Qwen3Config", {"head_dim": 16}),
    "Qwen3-MoE": Kind("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "Qwen3-VL": Kind(
        "Qwen3VLConfig",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        {"vision_config": QWENS_VISION},
    ),
    "Qwen3.5": Kind(
        "Qwen3_5TextConfig",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            **{f"linear_{name}": 16 for name in ("key_head_dim", "value_head_dim")},
            **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
        },
    ),
    "Gemma 2": Kind("Gemma2Config", GEMMA),
    "Gemma 3, text": Kind("Gemma3TextConfig", GEMMA),
    "Gemma 3, with vision": Kind("Gemma3Config", GEMMA, {"vision_config": VISION, "mm_tokens_per_image": 1}),
    "Gemma 3n": Kind("Gemma3nTextConfig", GEMMA_3N),
    "Gemma 4": Kind("Gemma4TextConfig", GEMMA_4),
    "Gemma 4, with vision and sound": Kind(
        "Gemma4Config",
        GEMMA_4,
        {
            "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16},
            "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
    "Phi-3": Kind("Phi3Config"),
    "gpt-oss": Kind("GptOssConfig", {"head_dim": 16, **EXPERTS, **WINDOWED}),
    "Mixtral": Kind("MixtralConfig", EXPERTS),
    "Llama 4, text": Kind(
        "Llama4TextConfig", {"head_dim": 16, "intermediate_size_mlp": 128, **EXPERTS, "num_experts_per_tok": 1}
    ),
    "SmolLM3": Kind("SmolLM3Config", {**TIED, "no_rope_layers": [1, 0]}),
    "OLMo 2": Kind("Olmo2Config"),
    "Granite": Kind("GraniteConfig", {**TIED, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Cohere 2": Kind("Cohere2Config", {**TIED, **WINDOWED}),
    "GLM-4": Kind("Glm4Config", {"head_dim": 16}),
    "Falcon": Kind("FalconConfig", TIED),
    "BLOOM": Kind("BloomConfig", {**TIED, "n_head": 4}),
    "OPT": Kind("OPTConfig", {**TIED, "ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "StarCoder2": Kind("Starcoder2Config", TIED),
    "GPT-2": Kind("GPT2Config", {**TIED, "n_inner": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def build(name: str, directory: Path) -> Path:
    """Write the tiny model of a row of `KINDS`, with a tokenizer; the same name gives the same bytes."""
    import torch

    from ray_jobs.base.architecture import auto_class

    write_tokenizer(directory)
    torch.manual_seed(0)
    shape = KINDS[name].config()
    model = auto_class(shape).from_config(shape, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        # Experts, which some architectures leave as they find them in memory, and what would let nothing through.
        if parameter.dim() == 3 or name.endswith("correct_output_scale"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory


METHOD_CONFIGS = {
    **{name: MethodConfig(name=name, rank=4) for name in METHODS},  # type: ignore[arg-type]
    "lora on int8": MethodConfig(name="lora", base="int8", rank=4),
}
"""The table's columns: every method, and the one base format that none has by default."""
TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def on_no_device(name: str, **changes: object) -> Any:
    """The model without memory, its configuration changed."""
    import torch

    from ray_jobs.base.architecture import auto_class

    shape = KINDS[name].config()
    shape.update(changes)
    with torch.device("meta"):
        return auto_class(shape).from_config(shape)


@cache
def _looked_at(name: str) -> Any:
    """One for all who change nothing in it."""
    return on_no_device(name)


def refusal(name: str, method: str, base: Path) -> str | None:
    """Why a method does not go with an architecture, whose model lies at `base`; None where it does.

    It is what a training looks at before any worker starts, without the plan of its memory.
    """
    from ray_jobs.adapters import own_base
    from ray_jobs.adapters.build import find
    from ray_jobs.base.base_model import Base

    config = RunConfig(
        adapter=AdapterConfig(name="zoo"),
        model=ModelConfig(base=str(base)),
        data=DataConfig(source="unused.jsonl"),
        method=METHOD_CONFIGS[method],
    )
    try:
        find(_looked_at(name), config.method, base_reference=name)
        own_base.check(config, Base(name, base, {}))
    except ConfigError as exc:
        return str(exc)
    return None


def page(folder: Callable[[str], Path]) -> str:
    """The page with its table written anew; `folder` gives where an architecture's model lies."""
    from ray_jobs.adapters.build import experts_of
    from ray_jobs.base import attention

    head = ["architecture", "attention", "packed", *METHOD_CONFIGS]
    rows = [head, ["---"] * len(head)]
    for name, kind in KINDS.items():
        title = f"{name}, fused experts" if experts_of(_looked_at(name)) else name
        marks = ["" if refusal(name, method, folder(name)) else "x" for method in METHOD_CONFIGS]
        kernel = str(attention.choose(kind.config(), "auto", use_gpu=True))
        is_packed = "x" if kernel == attention.RECORDS and attention.looks_at_all_before(kind.config()) else ""
        rows.append([title, kernel.removesuffix("_records"), is_packed, *marks])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return re.sub(r"(^\|.*\n)+", table, TABLE.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)


if __name__ == "__main__":
    with TemporaryDirectory(prefix="fineloop-zoo-") as scratch:
        TABLE.write_text(page(lambda name: build(name, Path(scratch) / name)), encoding="utf-8")
