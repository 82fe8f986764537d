"""The speed of this processor, measured: a few layers of the base train and read for a second or two.

A processor's data sheet says little about a step: how fast weights are dequantised and widened, what memory keeps up
with and what an adapter costs differ by more than arithmetic does. Layers repeat, so a few of them are enough.
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
"""Of the few layers' own model: its head must cost next to nothing beside them."""
FEWEST_TOKENS = 16
SECONDS = 0.5
"""What one pass should take, about; a micro-batch is cut to that where a layer is large or the processor slow."""
REPEATS = 2


@dataclass(frozen=True)
class MeanBatch:
    """What is read at once, in mean records."""

    records: int
    """Of a micro-batch."""
    length: int
    """Tokens of a record."""
    answers: int
    """Labelled tokens of a record."""
    generated: int
    """Records that are answered together in evaluation."""


@dataclass(frozen=True)
class Pace:
    """Seconds that one worker takes here."""

    train_s: float
    """For a token, forward and backward."""
    read_s: float
    """For a token, forward alone."""
    write_s: float
    """For one more token of every answer that is generated together."""
    kernels: Kernels


def measure(config: RunConfig, base: "PretrainedConfig", batch: MeanBatch) -> Pace:
    """Measure on the threads of one worker.

    Raises:
        Exception: whatever a model of this architecture with random weights and few layers stumbles over.
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
    # The head alone is not among the few layers' own: two operations for each weight forward, and as many backward.
    head_s = 2 * text.vocab_size * text.hidden_size / rate
    share = batch.answers / batch.length
    return Pace(
        train_s=times * train_s / tokens.numel() + 2 * share * head_s,
        read_s=times * read_s / tokens.numel() + share * head_s,
        write_s=times * write_s + batch.generated * head_s,
        kernels=kernels,
    )


def _holds_dense(config: RunConfig, num_weights: int, kernels: Kernels) -> bool:
    """Whether a training here would hold so many weights dense; its evaluation does where memory allows."""
    if config.train.dense_base is not None:
        return config.train.dense_base
    return config.train.zero_stage < 3 and kernels.has_room(num_weights, sharers=config.ray.max_workers)


def _few_layers(config: RunConfig, base: "PretrainedConfig", scratch: Path, kernels: Kernels) -> tuple[Any, int]:
    """A model of the base's shape with its first layers alone and random weights, adapted, and how many those are."""
    from ray_jobs.adapters import build
    from ray_jobs.planning.rehearsal import period

    few = copy.deepcopy(base)
    if hasattr(few, "quantization_config"):  # these weights are new ones, of 16 bits until they are loaded
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
    """The best of a few, after one that warms up."""
    work()
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
