"""How a version can be served: as it is, after `fineloop adapters export --lora`, or merged into its base.

Checked against vLLM, whose rules the other servers of LoRA adapters share or tighten (vllm/config/lora.py and
vllm/lora/peft_helper.py, 2026): ranks up to 512, no DoRA, no other trained modules, no bias, layers that it wraps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.config.methods import Method

ServableAs = Literal["lora", "lora-export", "merged"]

FOLDER_VARIABLE = "FINELOOP_LORA_FOLDER"
"""The environment variable with the folder for the copies of a vLLM that asks the registry: see vllm_resolver."""
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank may take: an adapter is served with the smallest that is no less than its rank."""
VLLM_MODULES = {
    # Llama, Mistral, Qwen, Gemma, SmolLM and most others
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    # Phi-3; GPT-NeoX, Falcon and BLOOM; OPT and Phi; GPT-2 and StarCoder
    *("qkv_proj", "gate_up_proj"),
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("out_proj", "fc1", "fc2"),
    *("c_attn", "c_proj", "c_fc"),
}
"""Layers that vLLM wraps, by the last part of their name: the linear layers of the models that it implements."""


@dataclass(frozen=True)
class Serving:
    """How one version can be served, with notes for whoever serves it."""

    servable_as: ServableAs
    """lora: as published. lora-export: after `export --lora`. merged: only after `export --merged`, which any can."""
    notes: list[str]
    """Reasons and settings, a sentence each."""


def serving(method: Method, *, rank: int, target_modules: Sequence[str]) -> Serving:
    """How an adapter can be served; `target_modules` are the last parts of the adapted layers' names.

    For experts that are adapted as one parameter they are the last two parts, such as experts.down_proj: servers differ
    in how they want LoRA of those.
    """
    if obstacles := _obstacles(method, rank, target_modules):
        return Serving("merged", [*obstacles, "adapters export --merged makes a model that every server loads"])
    notes = [f"with vLLM: --enable-lora --max-lora-rank {max_lora_rank(rank)}", *_base_notes(method)]
    if method.adapter == "vera":
        exact = "adapters export --lora turns VeRA's shared matrices and vectors into plain LoRA, exactly"
        return Serving("lora-export", [exact, *notes])
    if method.scaling == "rslora":
        notes.append("a server that ignores use_rslora scales it wrongly: adapters export --lora folds the scaling in")
    return Serving("lora", notes)


def recorded(lineage: Mapping[str, Any]) -> Serving:
    """How a version can be served, as recorded in its lineage; an older lineage has only the kind of adapter."""
    recipe = lineage["recipe"]
    if "serving" in recipe:
        return Serving(**recipe["serving"])
    return Serving("lora" if recipe["adapter"] == "lora" else "merged", [])


def max_lora_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds an adapter of this rank; None above the largest."""
    return next((choice for choice in VLLM_MAX_LORA_RANKS if rank <= choice), None)


def _obstacles(method: Method, rank: int, target_modules: Sequence[str]) -> list[str]:
    """The reasons why it cannot be served as a LoRA adapter."""
    obstacles = []
    if method.adapter in ("dora", "dvora"):
        obstacles.append("its magnitudes make it no LoRA, and vLLM does not load DoRA")
    if max_lora_rank(rank) is None:
        obstacles.append(f"rank {rank} is above vLLM's largest --max-lora-rank, {VLLM_MAX_LORA_RANKS[-1]}")
    if strange := sorted(set(target_modules) - VLLM_MODULES):
        obstacles.append(f"vLLM is not known to wrap {', '.join(strange)}")
    return obstacles


def _base_notes(method: Method) -> list[str]:
    if method.init != "default":
        return ["it belongs to the base of its own that adapter_config.json names, and to no other"]
    if method.base == "nf4":
        return ["trained on NF4 weights: --quantization bitsandbytes serves the like, a 16-bit base differs slightly"]
    if method.base == "int8":
        return ["trained on int8 weights and activations, which vLLM does not make: measure it on a 16-bit base"]
    return []
