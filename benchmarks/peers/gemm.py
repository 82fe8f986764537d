"""How much of what this processor multiplies a training step reaches.

A step's work is counted by formula. A product of a token with N weights takes 2 N operations, and so does each of its
two gradients (arXiv:2001.08361, section 2.1: 6 N in all). A frozen weight has no gradient of its own: 4 N. So the
base's layers count 4 N per token, the adapters' 6 N, the head 4 N per token with a label, as logits elsewhere serve
nothing. Attention counts 2 L t d per token forward (there, table 1: L layers, t tokens before it, width d), which is
half of what products without a causal mask take, and twice that backward. What else a step does (norms, rotary
positions, activations, softmax, the loss, AdamW) is not counted: it is what keeps the share from 1.
"""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from components.config.ray import GPUS

ROUNDS = 5


def shapes(base: str) -> dict[tuple[int, int], int]:
    """Outputs and inputs of a decoder's linear layers, and how many there are of each; its head is not among them."""
    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return {shape: count * config["num_hidden_layers"] for shape, count in Counter(layer).items()}


def step_flops(given: dict[str, Any], *, tokens: int, labelled: int, squares: int) -> float:
    """Operations of a training on so many tokens; `squares` is the sum of the records' lengths squared."""
    config = json.loads((Path(given["base"]) / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    linear = shapes(given["base"])
    frozen = sum(count * outputs * inputs for (outputs, inputs), count in linear.items())
    adapter = sum(count * given["rank"] * (outputs + inputs) for (outputs, inputs), count in linear.items())
    head = config["vocab_size"] * hidden
    attention = 3 * 2 * hidden * layers * squares
    return float((4 * frozen + 6 * adapter) * tokens + 4 * head * labelled + attention)


def rate(given: dict[str, Any], tokens: int) -> float:
    """FLOP/s of torch.mm over a forward pass's products of so many tokens with the layers, best of a few."""
    import torch

    torch.set_num_threads(given["threads"])
    device, wait = ("cuda", torch.cuda.synchronize) if given["gpu"] else ("cpu", lambda: None)
    dtype = getattr(torch, given["dtype"])
    best = math.inf
    linear = shapes(given["base"])
    operands = {
        (outputs, inputs): [torch.randn(rows, inputs, dtype=dtype, device=device) for rows in (tokens, outputs)]
        for outputs, inputs in linear
    }
    for _ in range(ROUNDS):
        seconds = 0.0
        for shape, (x, weight) in operands.items():
            torch.mm(x, weight.T)
            wait()
            started = time.perf_counter()
            for _ in range(4):
                torch.mm(x, weight.T)
            wait()
            seconds += (time.perf_counter() - started) / 4 * linear[shape]
        best = min(best, seconds)
    return 2 * tokens * sum(count * outputs * inputs for (outputs, inputs), count in linear.items()) / best


def data_sheet(given: dict[str, Any]) -> float | None:
    """FLOP/s in 16 bits of the GPU that is here, where it is one that can be planned for."""
    if not given["gpu"]:
        return None
    import torch

    label = torch.cuda.get_device_name().replace(" ", "-")  # as NVIDIA's GPU feature discovery does
    return next((gpu.tflops * 1e12 for gpu in GPUS.values() if gpu.product == label), None)
