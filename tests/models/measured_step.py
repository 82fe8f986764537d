"""What a training step here really allocates, measured by PyTorch's own allocator through its profiler."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from components.config.schema import MethodConfig, ModelConfig
from ray_jobs.adapters import build
from ray_jobs.base import base_model
from ray_jobs.kernels.door import PLAIN
from ray_jobs.text.answer_loss import answer_nll


@dataclass(frozen=True)
class Measured:
    kept: int
    """Bytes alive between forward and backward pass, beyond what was there before."""
    peak: int
    weights: int
    adapter: int


def load(base: base_model.Base, method: MethodConfig, *, checkpointing: bool) -> Any:
    """As a worker has it: the adapter in bfloat16, in train mode."""
    model = base_model.load_model(base, ModelConfig(base=base.reference), method.row.base, use_gpu=False)
    adapted = PLAIN.adopt(build.attach(model, method, base_reference=base.reference, seed=0))
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    build.to_training(adapted, torch.bfloat16)
    return adapted.train()


def measure(adapted: Any, *, batch: int, length: int, answers: int) -> Measured:
    """One step on `batch` records of `length` tokens, the last `answers` of each labelled."""
    input_ids = torch.randint(0, adapted.config.vocab_size, (batch, length))
    labels = torch.full_like(input_ids, -100)
    labels[:, -answers:] = input_ids[:, -answers:]

    def step() -> None:
        loss = answer_nll(adapted, input_ids, labels).sum()
        with record_function("between the passes"):
            pass
        loss.backward()

    step()  # gradients, and what is made once, exist from here on
    kept, peak = _traced(step)
    tensors = {name: tensor for name, tensor in [*adapted.named_parameters(), *adapted.named_buffers()]}
    in_adapter = {name for name in tensors if "lora" in name or "vera" in name}
    quantised = [tensor for name, tensor in tensors.items() if name not in in_adapter]
    return Measured(
        kept,
        peak,
        weights=sum(tensor.nbytes for tensor in quantised) + sum(_constants(adapted)),
        adapter=sum(tensors[name].nbytes for name in in_adapter),
    )


@torch.no_grad()
def measure_reading(adapted: Any, *, batch: int, length: int) -> int:
    """Bytes that a pass through the layers, in training mode or not, takes at its peak where nothing is kept."""
    decoder = adapted.get_base_model().get_decoder()
    input_ids = torch.randint(0, adapted.config.vocab_size, (batch, length))
    decoder(input_ids=input_ids, use_cache=False)
    return _traced(lambda: decoder(input_ids=input_ids, use_cache=False))[1]


def _traced(step: Callable[[], object]) -> tuple[int, int]:
    """Bytes alive between the passes, and at the peak."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    kept = alive = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
        elif event.name() == "between the passes":
            kept = alive
    return kept, peak


def _constants(adapted: Any):
    for module in adapted.modules():
        if isinstance(module, torch.nn.Linear):
            state = getattr(module.weight, "quant_state", None)
            if state is not None:
                held = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
                yield sum(tensor.nbytes for tensor in held)
            scales = getattr(getattr(module, "state", None), "SCB", None)
            if scales is not None:
                yield scales.nbytes
