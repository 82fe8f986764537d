"""Tiny bases whose conversations read as those of published models: the parts of each public template that matter here.

Each template is written anew from what the model's tokenizer_config.json renders for plain turns; tools are left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.schema import ModelConfig
from components.registry.versions import Version
from tests.models.tiny import SHAPE, byte_level

if TYPE_CHECKING:
    from ray_jobs.text.chat_format import ChatFormat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen/Qwen2.5-7B-Instruct: tools in the system's turn, calls in the assistant's, results in the user's
TOOLS = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}{{ '\n' }}"
    "</tools><|im_end|>{{ '\n' }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>{{ '\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# meta-llama/Llama-3.1-8B-Instruct
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# google/gemma-2-9b-it: no system turn, and the assistant's role is called model
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Qwen/Qwen3-8B: the last answer carries a block of reasoning, be it empty; earlier ones lose theirs
QWEN_3 = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% else %}{% set thought = '' %}{% set content = m.content %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > last.user and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Qwen/Qwen3-4B-Thinking-2507: reasons in any case, so that its prompt opens the block
QWEN_3_THINKING = QWEN_3.rpartition("{% if enable_thinking is defined")[0] + "<think>\n{% endif %}"
# microsoft/Phi-3.5-mini-instruct
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# mistralai/Mistral-7B-Instruct-v0.3
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
# HuggingFaceTB/SmolVLM-Instruct: a turn is a list of texts and images, and of a text alone nothing is written
SMOL_VLM = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}"
    "{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What decides how a published model is prompted and where its answers end."""

    template: str | None
    eos: str
    """The tokenizer's end-of-sequence token."""
    stops: tuple[str, ...] = ()
    """generation_config.json's list."""
    bos: str | None = None
    markers: tuple[str, ...] = ()
    """Other added tokens."""
    dummy_prefix: bool = False
    """SentencePiece's: a text that starts with no space is read as if it did."""


REASONING = ("<think>", "</think>")
"""Added tokens that are text, and stay when special tokens are left out (special: false in their tokenizer_config)."""
CHATMLS = ("<|im_start|>", "<|im_end|>")
QWENS = ("<|im_end|>", ("<|im_end|>", "<|endoftext|>"), None, ("<|im_start|>", "<|endoftext|>", *REASONING))
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", ("<|im_end|>",), markers=("<|im_start|>",)),
    "chatml on a base's tokenizer": Family(CHATML, "<|endoftext|>", ("<|endoftext|>",), markers=CHATMLS),
    "chatml with tools": Family(TOOLS, "<|im_end|>", ("<|im_end|>",), markers=("<|im_start|>",)),
    "llama-3": Family(
        LLAMA_3,
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    "gemma": Family(GEMMA, "<eos>", ("<eos>", "<end_of_turn>"), "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "qwen-3": Family(QWEN_3, *QWENS),
    "qwen-3-thinking": Family(QWEN_3_THINKING, *QWENS),
    "phi-3": Family(
        PHI_3,
        "<|endoftext|>",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        markers=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "mistral": Family(MISTRAL, "</s>", ("</s>",), "<s>", ("[INST]", "[/INST]"), dummy_prefix=True),
    "smol-vlm": Family(
        SMOL_VLM, "<|im_end|>", ("<end_of_utterance>",), markers=("<|im_start|>", "<image>", "<end_of_utterance>")
    ),
    "none": Family(None, "</s>", ("</s>",), "<s>", dummy_prefix=True),
    "none, without a beginning": Family(None, "<|endoftext|>", ("<|endoftext|>",)),
}


def build(directory: Path, family: Family) -> Path:
    """Write a tiny Llama of this family to `directory`."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = [token for token in (family.bos, family.eos, *family.markers) if token and token not in REASONING]
    if family.dummy_prefix:
        letters = ["<unk>", *special, "▁", "\n", *(chr(code) for code in range(33, 127))]
        tokenizer = Tokenizer(
            models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>")
        )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.markers if token in REASONING])
    if family.bos:
        pair = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[pair])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos)
    fast.chat_template = family.template
    fast.save_pretrained(directory)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SHAPE, vocab_size=len(fast), eos_token_id=None, bos_token_id=None, tie_word_embeddings=True)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=fast.convert_tokens_to_ids(list(family.stops)), repetition_penalty=1.3, no_repeat_ngram_size=2
    )
    model.save_pretrained(directory)
    return directory


def chat_of(folder: Path, *, version: Path | None = None, **settings: Any) -> "ChatFormat":
    """The chat format of the base at `folder`, or of a version on it, whose files are in another folder."""
    from ray_jobs.base.base_model import Base
    from ray_jobs.text import chat_format

    base, config = Base("base", folder, {}), ModelConfig(base=str(folder), **settings)
    if version is None:
        return chat_format.load(base, config)
    published = Version("colours", "v1", "s3://registry/colours/v1", created_at="", manifest_sha256="", run_id="")
    return chat_format.of_version(published, version, base, config)
