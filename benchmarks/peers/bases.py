"""Bases with random weights in the shapes of published ones: as fast and as large as those, and no download."""

from pathlib import Path

from tests.models import shapes

SHAPES = {
    "tiny": shapes.llama(2, 128, 320, 49152, 4, 2, tied=True),
    "1B": shapes.LLAMA_32_1B,
    "3B": shapes.LLAMA_32_3B,
    "8B": shapes.LLAMA_3_8B,
}


def write(folder: Path, shape: str, tokenizer: Path) -> Path:
    """A base of that shape in bfloat16, with the tokenizer of the base in another folder."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM._from_config(SHAPES[shape], dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
