"""Measuring the speed of this processor: a few layers of the base run forward and backward for a second or two.

A processor's data sheet says little about a step: the speed of dequantising and converting weights, memory bandwidth
and the cost of an adapter differ by more than arithmetic does. Layers repeat, so a few of them are enough.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components.config.schema import RunConfig
from ray_jobs.base.architecture import from_config
from ray_jobs.base.base_model import Base
from ray_jobs.kernels import door, processor
from ray_jobs.kernels.door import Kernels

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 2048
"""Vocabulary size of the measured model: small, so that its output head costs next to nothing."""
FEWEST_TOKENS = 16
SECONDS = 0.5
"""Approximate upper limit of one pass; the micro-batch is cut to it where a layer is large or the processor slow."""
REPEATS = 2


@dataclass(frozen=True)
class MeanBatch:
    """A micro-batch of records of mean length."""

    records: int
    """Number of records in a micro-batch."""
    length: int
    """Mean number of tokens per record."""
    answers: int
    """Mean number of labelled tokens per record."""
    generated: int
    """Number of records whose answers are generated together in evaluation."""


@dataclass(frozen=True)
class Pace:
    """Seconds that one worker takes on this processor."""

    train_s: float
    """Seconds per token of a forward and backward pass."""
    read_s: float
    """Seconds per token of a forward pass alone."""
    write_s: float
    """Seconds per decoding step, which generates one token of every answer in the batch."""
    kernels: Kernels


def measure(config: RunConfig, base: "PretrainedConfig", batch: MeanBatch) -> Pace:
    """Measure with the number of threads of one worker.

    Raises:
        Exception: anything that a model of this architecture with few layers and random weights may raise.
    """
    torch.set_num_threads(config.ray.cpus_per_worker)
    rates = processor.measure(processor.typical_shape(base))
    kernels = door.fixed(config) or Kernels(rates.faster)
    rate: float = getattr(rates, kernels.dtype)
    text = base.get_text_config()
    with tempfile.TemporaryDirectory(prefix="fineloop-pace-") as scratch:
        adapted, num_layers = _few_layers(config, base, Path(scratch), kernels)
    times = text.num_hidden_layers / num_layers
    weights = sum(layer.in_features * layer.out_features for layer in _linear_layers(adapted))
    if _holds_dense(config, round(times * weights), kernels):
        kernels.hold_dense(adapted)
    affordable = int(SECONDS * rate / (4 * weights))
    length = max(FEWEST_TOKENS, min(batch.length, affordable))
    records = max(1, min(batch.records, affordable // length))
    tokens = torch.randint(VOCABULARY, (records, length))
    labels = tokens.clone()
    labels[:, : -min(batch.answers, length - 1)] = -100
    next_tokens = torch.randint(VOCABULARY, (batch.generated, 1))

    from ray_jobs.text.answer_loss import answer_nll

    def train() -> None:
        answer_nll(adapted, tokens, labels).sum().backward()

    def read() -> None:
        answer_nll(adapted, tokens, labels)

    def write() -> None:
        adapted(input_ids=next_tokens, use_cache=False)

    train_s = _seconds(train)
    adapted.eval()
    with torch.inference_mode():
        read_s, write_s = _seconds(read), _seconds(write)
    # The real output head was not measured: two operations per weight in the forward pass, and as many backward.
    head_s = 2 * text.vocab_size * text.hidden_size / rate
    share = batch.answers / batch.length
    return Pace(
        train_s=times * train_s / tokens.numel() + 2 * share * head_s,
        read_s=times * read_s / tokens.numel() + share * head_s,
        write_s=times * write_s + batch.generated * head_s,
        kernels=kernels,
    )


def _holds_dense(config: RunConfig, num_weights: int, kernels: Kernels) -> bool:
    """Whether a training here would hold `num_weights` weights dense; in its evaluation, memory alone decides."""
    if config.train.dense_base is not None:
        return config.train.dense_base
    return config.train.zero_stage < 3 and kernels.has_room(num_weights, sharers=config.ray.max_workers)


def _few_layers(config: RunConfig, base: "PretrainedConfig", scratch: Path, kernels: Kernels) -> tuple[Any, int]:
    """An adapted model with only the base's first layers and random weights, and the number of these layers."""
    from ray_jobs.adapters import build
    from ray_jobs.planning.rehearsal import period

    few = copy.deepcopy(base)
    if hasattr(few, "quantization_config"):  # the new weights have 16 bits until they are loaded
        del few.quantization_config
    text = few.get_text_config()
    num_layers = min(text.num_hidden_layers, period(getattr(text, "layer_types", None) or [], text.num_hidden_layers))
    text.num_hidden_layers, text.vocab_size = num_layers, VOCABULARY
    if hasattr(text, "vocab_size_per_layer_input"):  # Gemma 4's embeddings of each layer
        text.vocab_size_per_layer_input = VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, 0)
    from_config(few, dtype=torch.bfloat16).save_pretrained(scratch)
    files = Base("a few layers", scratch, {})
    method = config.method
    model = door.load_model(files, config.model, method.row.base, kernels, use_gpu=False)
    adapted = kernels.adopt(build.attach(model, method, base_reference="", seed=0))
    build.to_training(adapted, torch.bfloat16)
    return adapted.train(), num_layers


def _linear_layers(adapted: Any) -> list[Any]:
    head = adapted.get_output_embeddings()
    return [module for module in adapted.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _seconds(work: Callable[[], None]) -> float:
    """The shortest time of REPEATS runs, after one warm-up run."""
    work()
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
