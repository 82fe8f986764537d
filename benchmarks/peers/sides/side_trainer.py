"""transformers' Trainer with peft: padded batches."""

import measured
import torch
from peft import LoraConfig, get_peft_model

given = measured.task()
torch.set_num_threads(given["threads"])
lora = LoraConfig(r=given["rank"], lora_alpha=given["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
measured.train(given, get_peft_model(measured.base(given), lora))
