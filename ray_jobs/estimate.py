"""How long a run takes on this machine's CPU: `python -m ray_jobs.estimate --config FILE`.

The run's records are read and counted as `prepare` will, some of them are tokenised, and a few layers of the base are
really trained. Nothing is started, and nothing fetched but the base's configuration and tokenizer. Nothing is written
either, unless the base is converted. One JSON object is the last line of stdout.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from components.config.schema import RunConfig, TrainConfig
from components.prepare.prepare import preview
from components.prepare.sources import find_sources
from components.shared import garbage
from components.shared.cpus import Cpu, this_cpu
from components.shared.errors import FineloopError, UserError
from components.shared.protocol import say
from ray_jobs import entry

with garbage.importing():
    from ray_jobs.base import attention, base_config, base_model, reference
    from ray_jobs.planning.capacity import records_at_once
    from ray_jobs.scoring.answers import longest_answer
    from ray_jobs.text import chat_format, packed
    from ray_jobs.text.batching import TokenizedSplit, by_length, tokenize

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ray_jobs.planning.pace import MeanBatch, Pace

STEP = "estimate"
SAMPLE = 256
LARGEST_BYTES = 200_000_000
"""Data beyond this is not read twice for an estimate."""
OVERHEAD = 1.4
"""Ratio of a training step's time to that of the layers' forward and backward passes: padding, the optimizer, reducing
gradients, and workers that share a machine's memory and caches. Measured on the example with and without fast bfloat16.
"""
# Seconds that do not depend on the data: starting servers and processes, imports, loading the model. Measured with the
# example.
START_S, START_TRAINING_S, START_EVALUATION_S = 7.0, 18.0, 4.0


@dataclass(frozen=True)
class Work:
    """The work of a run: numbers of records, and mean lengths."""

    train_records: int
    eval_records: int
    length: float
    """Mean number of tokens per record."""
    answers: float
    """Mean number of labelled tokens per record."""
    new_tokens: int
    """Tokens of the longest answer that is generated."""
    computed: float = 1.0
    """Share of the tokens that training computes: less than 1 where records are packed, as they share a prefix."""

    def train_tokens(self, train: TrainConfig) -> float:
        """Tokens of the whole training, over all its steps."""
        steps = math.ceil(self.train_records / train.batch_size) * train.epochs
        return min(steps, train.max_steps or steps) * train.batch_size * self.length


@dataclass(frozen=True)
class Estimate:
    """Estimated times of a run without a champion, whose evaluation therefore compares only base and candidate."""

    tokens_per_s: float
    """Tokens per second in training, summed over all workers."""
    train_s: float
    evaluate_s: float
    run_s: float
    """Seconds of the whole run, not counting the installation of packages."""


def main() -> None:
    """Parse the command line and run the job; the process ends with the exit code of `entry.run`."""
    parser = entry.parser(
        "ray_jobs.estimate",
        "Estimate how long a run takes on this machine's CPU.",
        "python -m ray_jobs.estimate --config pipelines/configs/icd10.toml",
    )
    parser.add_argument(
        "--convert", action="store_true", help="first convert a base that a package ships, which a run needs anyway"
    )
    arguments = parser.parse_args()

    def job() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        if arguments.convert and isinstance(reference.parse(config.model.base), reference.PackagedGguf):
            base_model.resolve(config.model)
        print(json.dumps(estimated(config)), flush=True)  # noqa: T201 - stdout is the answer

    entry.run(STEP, job)


def estimated(config: RunConfig, base: "PretrainedConfig | None" = None) -> dict[str, Any]:
    """The processor, its matmul dtype and the estimate; unknown values are None, and `unknown_because` says why."""
    from ray_jobs.planning import pace  # its imports take seconds, and converting a base does not need them

    cpu = this_cpu()
    body: dict[str, Any] = {
        "processor": asdict(cpu),
        "processor_told": cpu.summary,
        "matmul_dtype": None,
        **dict.fromkeys(Estimate.__dataclass_fields__),
        "unknown_because": None,
    }
    try:
        base = base or base_config.read(config.model)
        config = base_config.fitted(config, base, lambda line: say(STEP, line))
    except FineloopError as exc:
        return {**body, "unknown_because": str(exc)}
    try:
        work = counted(config)
    except UserError as exc:
        work, body["unknown_because"] = None, str(exc)
    try:
        found = pace.measure(config, base, _mean_batch(config, work))
    except (RuntimeError, TypeError, ValueError, AttributeError, OSError) as exc:  # a run does not need an estimate
        return {**body, "unknown_because": str(exc)}
    speed = tokens_per_s(config, found, cpu, work.computed if work else 1.0)
    body |= {"matmul_dtype": found.kernels.dtype, "tokens_per_s": speed}
    return body if work is None else {**body, **asdict(estimate_of(config, work, found, cpu))}


def counted(config: RunConfig) -> Work:
    """Count the run's records, and tokenize a sample of them.

    Raises:
        UserError: the data cannot be used, are in S3, or are too large for an estimate.
    """
    named = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    if any(source.startswith("s3://") for source in named):
        raise UserError("the data are in S3, where an estimate does not read them")
    sources = find_sources(config.data.source)
    if sum(source.size_bytes for source in sources) > LARGEST_BYTES:
        raise UserError(f"the data are larger than the {LARGEST_BYTES:,} bytes that an estimate reads")
    path = base_config.locate(config.model)
    with preview(config, sources) as (_, split):
        train, evaluation = split.train.head(SAMPLE), split.evaluation.head(SAMPLE)
    chat = chat_format.load(base_model.Base(config.model.base, path, {}), config.model)
    # Records are sorted by a hash, so the first ones are a random sample.
    sample = tokenize(train, chat, config.model.max_length, config.data.loss_on)
    held_out = tokenize(evaluation, chat, config.model.max_length)
    return Work(
        train_records=len(split.train) + len(split.parts.replay or ()),
        eval_records=len(split.evaluation),
        length=float(sample.lengths.mean()),
        answers=float(sample.num_answer_tokens.mean()),
        new_tokens=config.evaluate.max_new_tokens or longest_answer(held_out.num_answer_tokens),
        computed=_computed(config, sample),
    )


def estimate_of(config: RunConfig, work: Work, found: "Pace", cpu: Cpu) -> Estimate:
    """Compute the estimate from the amount of work and the measured pace."""
    train, evaluate = config.train, config.evaluate
    at_once, speed = _at_once(config, cpu), tokens_per_s(config, found, cpu, work.computed)
    measured = (train.evals_per_epoch * train.epochs + 1) * min(train.eval_records, work.eval_records) * work.length
    train_s = work.train_tokens(train) / speed + measured * found.read_s / at_once
    records = min(evaluate.records, work.eval_records)
    # The base reads each record twice: to score its answer and to generate one. The candidate reads it a third time, to
    # score the answer behind another record's prompt.
    read = 5 * records * work.length * found.read_s / at_once
    batches = (
        math.ceil(math.ceil(records / config.ray.min_workers) / evaluate.batch_size) * config.ray.min_workers / at_once
    )
    evaluate_s = read + 2 * batches * work.new_tokens * found.write_s
    return Estimate(
        tokens_per_s=speed,
        train_s=train_s,
        evaluate_s=evaluate_s,
        run_s=START_S + START_TRAINING_S + train_s + START_EVALUATION_S + evaluate_s,
    )


def tokens_per_s(config: RunConfig, found: "Pace", cpu: Cpu, computed: float) -> float:
    """Training tokens per second, summed over all workers; `computed` is `Work.computed`."""
    return _at_once(config, cpu) / (OVERHEAD * found.train_s * computed)


def _at_once(config: RunConfig, cpu: Cpu) -> float:
    """Number of workers that effectively run in parallel: workers beyond the number of cores share them."""
    return min(config.ray.min_workers, max(1.0, cpu.cores / config.ray.cpus_per_worker))


def _mean_batch(config: RunConfig, work: Work | None) -> "MeanBatch":
    """The mean micro-batch of the run; without known records, of records with model.max_length tokens."""
    from ray_jobs.planning.pace import MeanBatch

    length, answers = (work.length, work.answers) if work else (config.model.max_length, config.model.max_length)
    records = records_at_once(config, round(length))
    return MeanBatch(records, round(length), math.ceil(answers), config.evaluate.batch_size)


def _computed(config: RunConfig, sample: TokenizedSplit) -> float:
    """Share of the sample's tokens that is computed when records of similar length are packed; 1 without packing."""
    base = base_config.read(config.model)
    kernel = attention.choose(base, config.model.attention, use_gpu=False)
    longest = int(sample.lengths.max(initial=0))
    if not packed.wanted(config) or kernel != attention.FLOAT32 or not attention.looks_at_all_before(base, longest):
        return 1.0
    passes = list(by_length(sample.lengths, config.train.micro_batch_size))
    rows = [packed.pack(sample, indices) for indices in passes]
    computed = [
        sample.lengths[indices].sum() if row is None else row.input_ids.shape[1]
        for indices, row in zip(passes, rows, strict=True)
    ]
    return float(sum(computed) / sample.lengths.sum())


if __name__ == "__main__":
    main()
