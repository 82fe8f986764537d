"""Train a candidate and compare it, in one job: `python -m ray_jobs.candidate --config ... --run-id ID --dataset URI`.

The cluster has to admit only one job: no other job runs between training and comparison, and the cluster starts only
once. The training's workers start while the data are read. Where each of them holds a whole base, they stay and compare
on the base that they hold. A job that is run again reuses the version that the run has already published.
"""

from components.config.schema import RunConfig
from components.records import runs
from components.records.runs import Replayed
from components.records.steps import TrainResult
from components.shared import garbage
from components.shared.protocol import TRAINED, say
from components.store.store import Store
from ray_jobs import entry
from ray_jobs import finetune as training
from ray_jobs.probes import PROBES
from ray_jobs.scoring import STEP as COMPARING
from ray_jobs.scoring import answers
from ray_jobs.training.job import Standby


def main() -> None:
    """Parse the command line and run the job; the process ends with the exit code of `entry.run`."""
    parser = entry.parser(
        "ray_jobs.candidate",
        "Fine-tune one adapter, publish it as a version, and compare it with base and champion.",
        "ray job submit --working-dir . -- python -m ray_jobs.candidate --config pipelines/configs/icd10.toml "
        "--run-id ID --dataset s3://...",
    )
    parser.add_argument("--run-id", required=True, help="name of the run in the store")
    parser.add_argument("--dataset", required=True, help="s3:// address of the prepared dataset")
    parser.add_argument("--train-only", action="store_true", help="another job compares it, with an account of its own")
    arguments = parser.parse_args()
    run_id, dataset_uri = arguments.run_id, arguments.dataset

    def train() -> None:
        config = entry.load_config(arguments.config, arguments.set)
        answers.named(config.metrics)  # metrics that cannot be measured are reported before the training
        for probe in PROBES.values():
            if probe.check:
                probe.check(config)
        result = trained(config, run_id=run_id, dataset_uri=dataset_uri, standby=stays)
        say(training.STEP, f"published {result.version} as {result.version_uri}")

    def compare() -> None:
        with garbage.importing():  # takes seconds, in which the training's workers can already start
            from ray_jobs import evaluate as comparing

        config = entry.load_config(arguments.config, arguments.set)
        version_uri = runs.read(Store.open(config.registry), run_id, TrainResult).version_uri
        comparing.evaluate(config, run_id=run_id, dataset_uri=dataset_uri, version_uri=version_uri, standby=standby)

    with Standby() as standby:
        stays = None if arguments.train_only else standby
        entry.run(training.STEP, train)
        if arguments.train_only:
            return
        say(training.STEP, TRAINED)
        entry.run(COMPARING, compare)


def trained(config: RunConfig, *, run_id: str, dataset_uri: str, standby: Standby | None = None) -> TrainResult:
    """Train on the dataset, unless the run has already published a version trained on it.

    Raises:
        FineloopError: as in `ray_jobs.finetune.finetune`.
    """
    store = Store.open(config.registry)
    found, replayed = runs.find(store, run_id, TrainResult), runs.find(store, run_id, Replayed)
    trained_on = [dataset_uri, *([replayed.dataset_uri] if replayed and replayed.prepared_uri == dataset_uri else [])]
    if found is not None and found.dataset_uri in trained_on:
        return found
    if standby is not None and config.data.replay_from == "records":  # else production answers first, on these GPUs
        training.begin(config, run_id=run_id, standby=standby)
    return training.finetune(config, run_id=run_id, dataset_uri=dataset_uri, standby=standby)


if __name__ == "__main__":
    main()
