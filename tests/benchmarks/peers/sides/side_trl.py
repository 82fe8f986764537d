"""TRL's SFTTrainer."""

import tempfile

import measured
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

given = measured.task()
torch.set_num_threads(given["threads"])
dtype = getattr(torch, given["dtype"])
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(
    given["base"], quantization_config=nf4 if given["format"] == "nf4" else None, dtype=dtype
)
rows = [{name: row[name] for name in ("input_ids", "labels")} for row in measured.rows(given)]
clock = measured.Clock()
with tempfile.TemporaryDirectory() as scratch:
    arguments = SFTConfig(
        output_dir=scratch,
        max_length=given["max_length"],
        per_device_train_batch_size=given["packs"] or given["batch_size"],
        packing=bool(given["packs"]),
        num_train_epochs=1,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=given["warmup_steps"],
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=given["dtype"] == "bfloat16",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given["base"]),
        peft_config=LoraConfig(
            r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    if dtype is torch.float32:  # it makes a quantised base's adapters bfloat16, whose products are slow where this is
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
measured.show(given, clock.ended, clock.losses)
