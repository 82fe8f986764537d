"""transformers' Trainer with peft: padded batches."""

import tempfile

import measured
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

given = measured.task()
torch.set_num_threads(given["threads"])
lora = LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
clock = measured.Clock()
with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=given["batch_size"],
        num_train_epochs=1,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=given["dtype"] == "bfloat16",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=get_peft_model(measured.base(given), lora),
        args=arguments,
        train_dataset=measured.rows(given),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(given["base"])),
        callbacks=[clock],
    )
    trainer.train()
measured.show(given, clock.ended, clock.losses)
