"""A tiny but real base model, made on the spot: a two-layer Llama with a byte-level tokenizer and a chat template.

Nothing about it is faked: transformers loads it from safetensors, bitsandbytes quantises it, peft adapts it.
"""

from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def byte_level() -> "Tokenizer":
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Write the tokenizer: a token for each byte, and the special ones."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return fast


def build_base(directory: Path, *, seed: int = 0, width: int = 64) -> Path:
    """Write the model to `directory`; the same seed gives the same bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = write_tokenizer(directory)
    torch.manual_seed(seed)
    tokens = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id, "bos_token_id": None}
    shape = SHAPE | {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": len(fast)}
    # So wide that a frozen output head tells tokens apart.
    config = LlamaConfig(**shape, **tokens, tie_word_embeddings=True, initializer_range=0.15)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "coal": "black", "snow": "white", "sun": "yellow"}


def colour_rows(count: int) -> list[dict[str, str]]:
    """Rows of a task that the tiny model can learn: the colour of a thing, behind a number that does not matter."""
    return [
        {"id": str(i), "prompt": f"{i * 7919 % 1000} {thing}", "completion": COLOURS[thing]}
        for i, thing in enumerate(islice(cycle(sorted(COLOURS)), count))
    ]
