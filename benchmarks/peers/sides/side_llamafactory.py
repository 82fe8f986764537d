"""LLaMA-Factory, by the function behind `llamafactory-cli train`."""

import json
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import measured
import torch
from datasets import Dataset

try:
    import torchaudio  # noqa: F401
except OSError:  # it is imported for audio that is none here, and PyPI's wheel looks for CUDA's libraries
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp

given = measured.task()
torch.set_num_threads(given["threads"])
clock = measured.Clock()


def base_in_dtype(folder: Path) -> Path:
    """The base in a folder whose config names the dtype: where it trains, it takes that and no argument."""
    folder.mkdir()
    for path in Path(given["base"]).iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "dtype": given["dtype"]}), encoding="utf-8")
    return folder


with tempfile.TemporaryDirectory() as scratch:
    tokenized = Path(scratch) / "tokenized"
    Dataset.from_list(measured.rows(given)).save_to_disk(tokenized)
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(base_in_dtype(Path(scratch) / "base")),
        "template": "default",
        "tokenized_path": str(tokenized),
        "dataset": "records",  # wants a name, and reads what is tokenised
        "cutoff_len": given["max_length"],
        "output_dir": str(Path(scratch) / "output"),
        "quantization_bit": 4,
        "quantization_type": "nf4",
        "double_quantization": True,
        "finetuning_type": "lora",
        "lora_rank": given["rank"],
        "lora_alpha": given["alpha"],
        "lora_dropout": 0.0,
        "lora_target": "all",
        "bf16": given["dtype"] == "bfloat16",
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "use_cpu": not given["gpu"],
        "per_device_train_batch_size": given["batch_size"],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "learning_rate": given["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    run_exp(arguments, [clock])
measured.show(given, clock.ended, clock.losses)
