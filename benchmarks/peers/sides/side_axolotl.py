"""Axolotl, by the functions behind `axolotl train`."""

import os
import tempfile
from pathlib import Path

import clock_plugin
import measured
import torch
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train


def main() -> None:
    given = measured.task()
    torch.set_num_threads(given["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        config = {
            "base_model": given["base"],
            "adapter": "qlora",
            "load_in_4bit": True,
            "lora_r": given["rank"],
            "lora_alpha": given["alpha"],
            "lora_dropout": 0.0,
            "lora_target_linear": True,
            "datasets": [{"path": given["rows"], "ds_type": "json"}],
            "dataset_prepared_path": str(Path(scratch) / "prepared"),
            "dataset_num_proc": 1,
            "shuffle_merged_datasets": False,
            "curriculum_sampling": True,  # one after the other
            "sequence_len": given["max_length"],
            "sample_packing": bool(given["packs"]),
            "pad_to_sequence_len": False,
            "device_map": "auto" if given["gpu"] else "cpu",
            "attn_implementation": "sdpa",
            # On by themselves, and written in Triton.
            **({} if given["gpu"] else {f"lora_{kind}_kernel": False for kind in ("mlp", "qkv", "o", "embedding")}),
            "micro_batch_size": given["packs"] or given["batch_size"],
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "optimizer": "adamw_torch_fused",
            "learning_rate": given["learning_rate"],
            "lr_scheduler": "cosine",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "bf16": given["dtype"] == "bfloat16",
            "fp16": False,
            "tf32": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "output_dir": str(Path(scratch) / "output"),
            "plugins": ["clock_plugin.ClockPlugin"],
        }
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        os.chdir(scratch)
        do_train(load_cfg(str(path)), TrainerCliArgs())
    measured.show(given, clock_plugin.CLOCK.ended, clock_plugin.CLOCK.losses)


if __name__ == "__main__":  # it starts processes by importing this anew
    main()
