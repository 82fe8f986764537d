"""transformers' Trainer with peft: padded batches."""

import tempfile

import measured
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

given = measured.task()
torch.set_num_threads(given["threads"])
dtype = getattr(torch, given["dtype"])
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(
    given["base"], quantization_config=nf4 if given["format"] == "nf4" else None, dtype=dtype
)
lora = LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
clock = measured.Clock()
with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=given["batch_size"],
        num_train_epochs=1,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=given["warmup_steps"],
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=given["dtype"] == "bfloat16",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=measured.rows(given),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(given["base"])),
        callbacks=[clock],
    )
    trainer.train()
measured.show(given, clock.ended, clock.losses)
