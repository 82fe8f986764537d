"""How much less memory an adapter needs than full fine-tuning: `python -m benchmarks.memory`.

First as planned for Llama-2-7B, part by part, for every method. Then measured here on a small model of the same kind:
the bytes of weights, gradients, float32 masters and moments that are alive between two steps, and what PyTorch's own
allocator says that a step takes beyond them. No GPU, no download; about a minute.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from components.config.methods import METHODS
from components.config.schema import MethodConfig
from ray_jobs import entry
from ray_jobs.base.base_model import Base
from ray_jobs.planning.memory import GIB, Layout, Parts, plan
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal
from ray_jobs.training import zero
from tests.models.measured_step import Measured, load, measure
from tests.models.shapes import LLAMA_2_7B, llama

ALONE = Layout(num_workers=1, zero_stage=0)
MIB = 2**20
# Narrow against its depth, and a small vocabulary: what a 7B's layers are to its embeddings.
MEASURED = llama(24, 512, 1376, 2000, 8, 8)
RANK = 4  # the share of a 7B that rank 16 is
BATCH, LENGTH, ANSWERS = 1, 128, 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of the one record of a planned step")
    options = parser.parse_args()
    entry.quiet_libraries()
    zero.prepare_environment(use_gpu=False)

    print(f"Llama-2-7B, planned: one record of {options.length} tokens, gradient checkpointing, GiB")
    print(f"{'':<10}{'trained':>14}{'share':>9}" + "".join(f"{part:>12}" for part in _names()) + f"{'less':>8}")
    full = _planned(None, options.length)
    print(_row("full", *full, full[1].total))
    for name in METHODS:
        print(_row(name, *_planned(MethodConfig(name=name), options.length), full[1].total))

    print(f"\nA model of 24 layers, measured: one record of {LENGTH} tokens, gradient checkpointing, MiB")
    with tempfile.TemporaryDirectory(prefix="fineloop-memory-") as scratch:
        LlamaForCausalLM(MEASURED).to(torch.bfloat16).save_pretrained(scratch)
        base = Base(scratch, Path(scratch), {})
        whole = _measured(base, None)
        for name in ("full", "lora", "qlora", "qdora"):
            states, step = whole if name == "full" else _measured(base, MethodConfig(name=name, rank=RANK))
            total = states + step.peak
            less = f"{(whole[0] + whole[1].peak) / total:.1f} times less" if name != "full" else ""
            print(f"{name:<10} between steps {states / MIB:7.1f}   in a step {step.peak / MIB:6.1f} more   {less}")


def _names() -> list[str]:
    return list(Parts(0, 0, 0, 0, 0, 0, 0).as_json())


def _planned(method: MethodConfig | None, length: int) -> tuple[ModelStats, Parts]:
    rehearsal = Rehearsal(LLAMA_2_7B, method, reference="llama-2-7b")
    step = rehearsal.step(1, length, checkpointing=True)
    base = method.row.base if method else "bf16"
    parts = plan(rehearsal.stats, step, base=base, answers=length, layout=ALONE, trains_base=method is None)
    return rehearsal.stats, parts


def _row(name: str, stats: ModelStats, parts: Parts, full: int) -> str:
    share = (
        "" if name == "full" else f"{stats.trainable / (stats.parameters + stats.trainable + stats.frozen_adapter):.3%}"
    )
    sizes = "".join(f"{size / GIB:>12.2f}" for size in parts.as_json().values())
    return f"{name:<10}{stats.trainable:>14,}{share:>9}{sizes}{full / parts.total:>7.1f}x"


def _measured(base: Base, method: MethodConfig | None) -> tuple[int, Measured]:
    """Bytes alive between two steps of AdamW with float32 masters, and one step beyond them."""
    if method is None:
        model = LlamaForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    else:
        model = load(base, method, checkpointing=True)
    step = measure(model, batch=BATCH, length=LENGTH, answers=ANSWERS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in trained]
    optimizer = torch.optim.AdamW(masters)
    for master, parameter in zip(masters, trained, strict=True):
        master.grad = parameter.grad.float()
    optimizer.step()
    optimizer.zero_grad()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = [*masters, *moments, *(parameter.grad for parameter in trained)]
    return step.weights + step.adapter + sum(tensor.nbytes for tensor in held), step


if __name__ == "__main__":
    main()
