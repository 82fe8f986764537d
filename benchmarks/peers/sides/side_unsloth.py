"""Unsloth's FastLanguageModel, in the Trainer that it patches."""

import unsloth  # first, as it asks: it changes what transformers gives

# isort: split
import measured
import torch

given = measured.task()
model, _ = unsloth.FastLanguageModel.from_pretrained(
    model_name=given["base"],
    max_seq_length=given["max_length"],
    dtype=getattr(torch, given["dtype"]),
    load_in_4bit=True,
)
adapted = unsloth.FastLanguageModel.get_peft_model(
    model,
    r=given["rank"],
    lora_alpha=given["alpha"],
    lora_dropout=0,
    bias="none",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing=False,
)
measured.train(given, adapted)
