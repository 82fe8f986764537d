"""Shapes of published models, as configurations without weights."""

from transformers import LlamaConfig, MixtralConfig


def llama(layers: int, width: int, mlp: int, vocabulary: int, heads: int, kv_heads: int, *, tied: bool = False):
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**sizes, **attention, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)


def small(layers: int = 6):
    return llama(layers, 128, 320, 1000, 4, 2, tied=True)


# Each from its model card's config.json. Qwen's first generation is a Llama but for the names and three biases.
LLAMA_2_7B = llama(32, 4096, 11008, 32000, 32, 32)
LLAMA_2_13B = llama(40, 5120, 13824, 32000, 40, 40)
LLAMA_1_33B = llama(60, 6656, 17920, 32000, 52, 52)
LLAMA_31_405B = llama(126, 16384, 53248, 128256, 128, 8)
MISTRAL_7B = llama(32, 4096, 14336, 32000, 32, 8)
LLAMA_2_70B = llama(80, 8192, 28672, 32000, 64, 8)
LLAMA_1_65B = llama(80, 8192, 22016, 32000, 64, 64)
LLAMA_3_8B = llama(32, 4096, 14336, 128256, 32, 8)
LLAMA_3_70B = llama(80, 8192, 28672, 128256, 64, 8)
LLAMA_32_1B = llama(16, 2048, 8192, 128256, 32, 8, tied=True)
LLAMA_32_3B = llama(28, 3072, 8192, 128256, 24, 8, tied=True)
QWEN_7B = llama(32, 4096, 11008, 151936, 32, 32)
QWEN_14B = llama(40, 5120, 13696, 152064, 40, 40)
QWEN_25_32B = llama(64, 5120, 27648, 152064, 40, 8)
QWEN_3_14B = llama(40, 5120, 17408, 151936, 40, 8)
QWEN_72B = llama(80, 8192, 24576, 152064, 64, 64)
MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
