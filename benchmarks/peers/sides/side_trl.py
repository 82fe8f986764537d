"""TRL's SFTTrainer."""

import tempfile

import measured
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

given = measured.task()
torch.set_num_threads(given["threads"])
rows = [{name: row[name] for name in ("input_ids", "labels")} for row in measured.rows(given)]
clock = measured.Clock()
with tempfile.TemporaryDirectory() as scratch:
    arguments = SFTConfig(
        output_dir=scratch,
        max_length=given["max_length"],
        packing=bool(given["packs"]),
        gradient_checkpointing=False,
        **{**measured.arguments(given), "per_device_train_batch_size": given["packs"] or given["batch_size"]},
    )
    trainer = SFTTrainer(
        model=measured.base(given),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given["base"]),
        peft_config=LoraConfig(
            r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    if given["dtype"] == "float32":  # it makes a quantised base's adapters bfloat16, slow where this is
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
measured.show(given, clock.ended, clock.losses)
