"""Fine-tune one adapter on Ray: `python -m ray_jobs.finetune --config pipelines/configs/icd10.toml`.

The driver prepares the data if no dataset is named, and resolves base, start and tokens once, so that all that can be
refused is refused before a worker trains. Ray Train runs the workers; rank 0 publishes the version.
"""

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.schema import RunConfig, cautions
from components.records import runs
from components.records.steps import TrainResult
from components.records.sweep import TunedRate
from components.registry import lineage
from components.shared import garbage
from components.shared.errors import JobError
from components.shared.protocol import counted, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.base import base_model
from ray_jobs.prepare import prepare
from ray_jobs.replaying import training_data
from ray_jobs.training import STEP, starting, trainer
from ray_jobs.training.spec import Stopwatch, TrainSpec

if TYPE_CHECKING:
    from ray_jobs.planning.capacity import Outlook
    from ray_jobs.scoring.measure import ShardResult
    from ray_jobs.text.token_store import StoredTokens
    from ray_jobs.training.measuring import Task

log = partial(say, STEP)


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.finetune", __doc__)

    def job(config: RunConfig, arguments: argparse.Namespace) -> None:
        run_id = arguments.run_id or entry.new_run_id(config.adapter.name)
        run(config, run_id=run_id, dataset_uri=arguments.dataset or prepare(config, STEP))

    entry.main(STEP, entry.takes_data(parser), job)


def run(
    config: RunConfig, *, run_id: str, dataset_uri: str, task: "Task | None" = None, work: trainer.Work | None = None
) -> "tuple[TrainResult, ShardResult | None]":
    """Train and publish; the result is also written to runs/<run_id>/finetune.json.

    The workers, `work`'s if any, go straight on to measure `task`; None where there is none, or they could not.

    Raises:
        UserError: config or data cannot work; raised before any worker trains where possible.
        JobError: the workers failed for another reason.
    """
    watch, store = Stopwatch(), Store.open(config.registry)
    dataset_uri = training_data(config, store, dataset_uri, log, run_id=run_id)
    say(STEP, f"run {run_id}: {config.method.name} on {config.model.base}, data {dataset_uri}")
    spec, tokens = resolve(config, store, watch, run_id=run_id, dataset_uri=dataset_uri)
    return train(spec, tokens, work or trainer.training(spec.ray, store, run_id), store, watch, task=task)


def resolve(
    config: RunConfig, store: Store, watch: Stopwatch, *, run_id: str, dataset_uri: str
) -> "tuple[TrainSpec, tuple[StoredTokens, StoredTokens]]":
    """The training of this config, and its tokens, once the cluster has room. Raises UserError: it cannot work."""
    import ray

    store.put(runs.run_key(run_id, runs.CONFIG), config_file.dumps(config).encode(), content_type="application/toml")
    if tuned := runs.find(store, run_id, TunedRate):
        tuned_train = config.train.model_copy(update={"learning_rate": tuned.learning_rate})
        config = config.model_copy(update={"train": tuned_train})
    identity = starting.identity_to_keep(config, store, run_id, log)
    config, base, _, chat = resolved = starting.resolve_base(config, store, log, recorded=identity)
    start = starting.choose_start(config, store, run_id, base)
    if start is not None:
        say(STEP, f"going on from {start.version.name} {start.version.version}")
        base = start.base
    train_split, eval_split = starting.read_splits(store, dataset_uri, resolved, log)
    size = f"{counted(len(train_split), 'record')}, {int(train_split.lengths.sum()):,} tokens"
    more = f", or up to {config.ray.max_workers} where they have room" if config.ray.is_elastic else ""
    say(STEP, f"{size}, on {counted(config.ray.min_workers, 'worker')}{more}")
    watch.lap("data")
    outlook = _planned(config, base, train_split)
    watch.lap("plan")
    tokens = train_split.stored, eval_split.stored
    spec = TrainSpec.of(
        config,
        run_id=run_id,
        dataset=starting.dataset_record(store, dataset_uri, *tokens),
        base=lineage.Base(config.model.base, base.identity),
        pad=chat.pad,
        dense_base=outlook.dense_base,
        flops_per_token=outlook.flops_per_token,
        flops_before=starting.flops_of(store, start.version if start else None),
        start=start.version if start else None,
        stands_on_sha256=start.stands_on_sha256 if start else "",
        started=entry.started(os.environ, ray.get_runtime_context().get_job_id()),
    )
    return spec, tokens


def _planned(config: RunConfig, base: base_model.Base, train_split: starting.PlannedSplit) -> "Outlook":
    """Wait until the cluster has room for the training, and estimate what the training will need. Raises ConfigError:
    the training cannot work on this cluster."""
    import ray

    with garbage.importing():
        from ray_jobs.planning.capacity import before_training
        from ray_jobs.training.train_loop import num_steps

    entry.connect()
    # Wait before checking the memory: a cluster that scales up from zero nodes has none.
    trainer.wait_for_room(config.ray.cluster, config.ray.per_worker, config.ray.min_workers, log)
    outlook = before_training(config, base.path, train_split, ray.nodes())
    for line in [*outlook.lines, *cautions(config, num_steps(config.train, len(train_split)))]:
        say(STEP, line)
    return outlook


def train(
    spec: TrainSpec,
    tokens: "tuple[StoredTokens, StoredTokens]",
    work: trainer.Work,
    store: Store,
    watch: Stopwatch,
    task: "Task | None" = None,
) -> "tuple[TrainResult, ShardResult | None]":
    """Have the workers train, and after it measure `task`."""
    import ray

    arguments = {"spec": spec.model_dump_json(), "stopwatch": watch, **({"task": ray.put(task)} if task else {})}
    arguments |= {"train_tokens": ray.put(tokens[0]), "eval_tokens": ray.put(tokens[1])}
    try:
        answer = work(arguments)
    except JobError:
        result = runs.find(store, spec.run_id, TrainResult)
        if task is None or result is None or result.began_at != watch.began_at:
            raise
        return result, None  # the training stands, and others measure it
    from ray_jobs.training.measuring import from_plain

    result = TrainResult.model_validate(answer["trained"])
    return result, from_plain(answer["measured"]) if "measured" in answer else None


if __name__ == "__main__":
    main()
