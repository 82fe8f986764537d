"""What a peer's side shares with the others: the task it is given, the clock in its Trainer, the figures it prints.

Runs in a peer's own environment, so nothing of Fineloop is imported here.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def task() -> dict[str, Any]:
    """As benchmarks/peers/task.py wrote it; its `rows` as lists of numbers."""
    given: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return given


def rows(given: dict[str, Any]) -> list[dict[str, list[int]]]:
    """One record each, tokens and labels, in the order in which they are to be trained on."""
    return [json.loads(line) for line in Path(given["rows"]).read_text(encoding="utf-8").splitlines()]


def base(given: dict[str, Any]) -> Any:
    """The task's base in NF4 and its dtype, by transformers."""
    dtype = getattr(torch, given["dtype"])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = {"": 0} if given["gpu"] else None
    return AutoModelForCausalLM.from_pretrained(given["base"], quantization_config=nf4, dtype=dtype, device_map=place)


class Clock(TrainerCallback):
    """When each step ended, and its loss as the Trainer logs it."""

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The task as arguments of transformers' Trainer."""
    return {
        "per_device_train_batch_size": given["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": given["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",
        "use_cpu": not given["gpu"],
        "bf16": given["dtype"] == "bfloat16",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def train(given: dict[str, Any], adapted: Any) -> None:
    """An adapted base in transformers' Trainer, on padded batches; prints the figures."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(output_dir=scratch, **arguments(given)),
            train_dataset=rows(given),
            data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(given["base"])),
            callbacks=[clock],
        )
        trainer.train()
    show(given, clock.ended, clock.losses)


def show(given: dict[str, Any], ended: list[float], losses: list[float]) -> None:
    """Print the figures as the last line: seconds of the steps after the warm-up, losses, memory."""
    first = given["warm_up"]
    if given["gpu"]:
        peak = torch.cuda.max_memory_reserved() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {
        "seconds": ended[-1] - ended[first - 1],
        "steps": len(ended),
        "peak_mb": peak,
        "first_loss": losses[0],
        "loss": sum(losses[-given["last"] :]) / given["last"],
    }
    print("\n" + json.dumps(figures), flush=True)
