"""Train a candidate and compare it, in one job: `python -m ray_jobs.candidate --config ... --run-id ID --dataset URI`.

The cluster starts once and admits one job, so that no other runs between training and comparison. Workers start while
this driver imports and plans, and where each holds a whole base, they go straight on from training to compare on it. A
job that is run again reuses the version that the run has already published.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from components.config.schema import RunConfig
from components.records import runs
from components.records.runs import Replayed
from components.records.steps import TrainResult
from components.shared import garbage
from components.shared.protocol import TRAINED, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs.scoring import STEP as COMPARING
from ray_jobs.scoring import answers
from ray_jobs.training import STEP, trainer

if TYPE_CHECKING:
    from ray_jobs.evaluate import Planned
    from ray_jobs.scoring.measure import ShardResult

    Measured = tuple[Planned, ShardResult] | None


def main() -> None:
    """Run the job of this command line, and exit with its code."""
    parser = entry.parser("ray_jobs.candidate", __doc__)
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--dataset", required=True, help="s3:// address of the prepared dataset")
    parser.add_argument("--train-only", action="store_true", help="another job compares it, with an account of its own")
    arguments = parser.parse_args()
    run_id, dataset_uri = arguments.run_id, arguments.dataset

    config: RunConfig | None = None
    measured: Measured = None

    def train() -> None:
        nonlocal config, measured
        config = entry.load_config(arguments.config, arguments.set)
        answers.named(config.metrics)  # metrics that cannot be measured are reported before the training
        measured = trained(config, run_id=run_id, dataset_uri=dataset_uri, only=arguments.train_only)

    def compare() -> None:
        from ray_jobs import evaluate

        assert config is not None
        version_uri = runs.read(Store.open(config.registry), run_id, TrainResult).version_uri
        evaluate.run(config, run_id=run_id, dataset_uri=dataset_uri, version_uri=version_uri, before=measured)

    entry.run(STEP, train)
    if not arguments.train_only:
        entry.run(COMPARING, compare)


def trained(config: RunConfig, *, run_id: str, dataset_uri: str, only: bool = False) -> "Measured":
    """Train on the dataset, unless the run has published a version trained on it, and unless `only` that, measure it on
    the same workers where they can; returns the plan and what they measured. Raises as `ray_jobs.finetune.run`."""
    store = Store.open(config.registry)
    published, replayed = runs.find(store, run_id, TrainResult), runs.find(store, run_id, Replayed)
    trained_on = [dataset_uri, *([replayed.dataset_uri] if replayed and replayed.prepared_uri == dataset_uri else [])]
    planned = result = None
    if published is None or published.dataset_uri not in trained_on:
        starts_now = config.data.replay_from == "records"  # else production answers first, on the same GPUs
        with trainer.started(config.ray, store, run_id) if starts_now else nullcontext() as work:
            with garbage.importing():
                from ray_jobs import evaluate, finetune
                from ray_jobs.probes import PROBES

            for probe in PROBES.values():
                if probe.check:
                    probe.check(config)
            planned = None if only else evaluate.plan(config, store, run_id=run_id, dataset_uri=dataset_uri)
            task = planned.task if planned else None
            _, result = finetune.run(config, run_id=run_id, dataset_uri=dataset_uri, task=task, work=work)
    else:
        say(STEP, f"published {published.version} as {published.version_uri}")
    if planned is None and not only:
        say(STEP, TRAINED)
    return (planned, result) if planned and result else None


if __name__ == "__main__":
    main()
