from typing import Any

import pytest

from components.config.methods import METHODS
from components.config.schema import MethodConfig
from components.handover.serve_manifest import Serving, max_lora_rank, recorded, serving

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def of(name: str, *, targets: list[str] = TARGETS, **settings: object) -> Serving:
    method = MethodConfig.model_validate({"name": name, **settings})
    return serving(method.row, rank=method.r, target_modules=targets)


@pytest.mark.parametrize(
    ("name", "servable_as"),
    [
        ("lora", "lora"),
        ("qlora", "lora"),
        ("rslora", "lora"),
        ("loftq", "lora"),
        ("vera", "lora-export"),
        ("dora", "merged"),
        ("qdora", "merged"),
        ("dvora", "merged"),
    ],
)
def test_every_method_says_how_it_is_served(name: str, servable_as: str) -> None:
    found = of(name)
    assert found.servable_as == servable_as
    assert found.notes
    assert set(METHODS) == {"lora", "qlora", "rslora", "loftq", "vera", "dora", "qdora", "dvora"}


@pytest.mark.parametrize(
    ("rank", "choice"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (512, 512), (513, None)]
)
def test_the_smallest_rank_of_vllm_that_holds_the_adapter_is_named(rank: int, choice: int | None) -> None:
    assert max_lora_rank(rank) == choice
    note = "merged" if choice is None else f"--max-lora-rank {choice}"
    assert any(note in each for each in of("lora", rank=rank).notes)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("lora", {"rank": 513}, "rank 513 is above vLLM's largest --max-lora-rank, 512"),
        ("vera", {"rank": 513}, "rank 513 is above vLLM's largest --max-lora-rank, 512"),
        ("qlora", {"targets": [*TARGETS, "router", "conv"]}, "vLLM is not known to wrap conv, router"),
        ("qdora", {}, "its magnitudes make it no LoRA, and vLLM does not load DoRA"),
    ],
)
def test_what_vllm_does_not_load_is_merged_and_the_reason_named(name: str, settings: Any, reason: str) -> None:
    found = of(name, **settings)
    assert (found.servable_as, found.notes[0]) == ("merged", reason)


@pytest.mark.parametrize(
    ("name", "base", "word"),
    [
        ("lora", "nf4", "--quantization bitsandbytes"),
        ("vera", "nf4", "--quantization bitsandbytes"),
        ("lora", "int8", "int8 weights"),
        ("loftq", "nf4", "belongs to the base of its own that adapter_config.json names"),
    ],
)
def test_a_quantised_base_is_told(name: str, base: str, word: str) -> None:
    assert any(word in note for note in of(name, base=base).notes)
    assert not any(word in note for note in of("lora").notes)


def test_a_lineage_tells_the_kind() -> None:
    kept = {"servable_as": "lora-export", "notes": ["a"]}
    assert recorded({"recipe": {"adapter": "vera", "serving": kept}}) == Serving("lora-export", ["a"])
