"""Well-known bases of the hub, and those of which a GPU holds a training: planned by their shapes, no hub is asked."""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from components.config.schema import RunConfig
from ray_jobs.planning import capacity
from ray_jobs.planning.capacity import Device, WorstBatch
from ray_jobs.planning.rehearsal import Rehearsal

LICENCE = "apache-2.0"
"""Of each of them: Llama and Gemma ask for an account and for consent before they may be fetched."""
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
BASES = {
    "Qwen/Qwen3-32B": ("qwen3", (64, 5120, 25600, 64, 8), 151_936, False),
    "Qwen/Qwen3-14B": ("qwen3", (40, 5120, 17408, 40, 8), 151_936, False),
    "Qwen/Qwen3-8B": ("qwen3", (36, 4096, 12288, 32, 8), 151_936, False),
    "Qwen/Qwen3-4B": ("qwen3", (36, 2560, 9728, 32, 8), 151_936, True),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", (36, 2048, 11008, 16, 4), 128_256, True),
    "Qwen/Qwen3-1.7B": ("qwen3", (28, 2048, 6144, 16, 8), 151_936, True),
    "Qwen/Qwen3-0.6B": ("qwen3", (28, 1024, 3072, 16, 8), 151_936, True),
}
"""From the largest on, of their config.json: architecture, SHAPE, vocabulary, whether the head is the embedding."""
HEAD = 128
"""The width of a head of each."""


def fitting(config: RunConfig, device: Device) -> Iterator[dict[str, Any]]:
    """The bases of which the device holds this training, from the largest on; memory in bytes per worker."""
    for name, (architecture, shape, vocabulary, is_tied) in BASES.items():
        sizes = dict(zip(SHAPE, shape, strict=True)) | {"head_dim": HEAD, "vocab_size": vocabulary}
        base = AutoConfig.for_model(architecture, **sizes, tie_word_embeddings=is_tied)
        of_it = config.model_copy(update={"model": config.model.model_copy(update={"base": name})})
        rehearsal = Rehearsal.of(of_it, base)
        needed = capacity.chosen(of_it, rehearsal, WorstBatch.planned(of_it)).parts.total
        if device.holds(needed):
            counted = rehearsal.stats.parameters
            yield {"base": name, "licence": LICENCE, "parameters": counted, "memory_bytes": needed}
