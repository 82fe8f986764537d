"""What a run takes beside its training steps and its evaluation: `make bench`.

Runs the built-in example with a few steps in a fresh home, so that store and Ray head are started and every model is
loaded, as `fineloop run` does once it is installed. What it trains and judges is the same work anywhere; the rest,
servers, imports, loading, planning, Ray workers, report, is what this is about.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks import example
from components.config import config_file
from components.records import runs
from components.records.steps import Evaluation, TrainResult
from components.report.run_files import RunFiles
from pipelines.configs import DEFAULT_CONFIG
from pipelines.local.run import Finished, Place, finished

WORK = ("training steps", "evaluation")


def main() -> None:
    parser = example.parser("overhead", __doc__)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    config = config_file.load(DEFAULT_CONFIG, [f"train.max_steps={options.steps}"])
    with (
        tempfile.TemporaryDirectory(prefix="fineloop-overhead-") as home,
        finished(config, Place(Path(home), sys.stderr), what="retrain") as ended,
    ):
        parts = _parts(ended)
    for part, seconds in parts.items():
        print(f"{seconds:7.1f} s  {part}")
    print(f"{parts['total'] - sum(parts[part] for part in WORK):7.1f} s  of the total beside {' and '.join(WORK)}")


def _parts(ended: Finished) -> dict[str, float]:
    """Seconds of what a run consists of, in the order of their beginning; those of a step are within it."""
    store, run_id = ended.store, ended.run_id
    trained, evaluation = runs.read(store, run_id, TrainResult), runs.read(store, run_id, Evaluation)
    records = runs.steps(store, run_id)
    steps = {step.step: step.seconds for step in records}
    waited = {f"  {each.part}": each.seconds for each in RunFiles(run_id, "", steps=records).until_first_step}
    work = dict(zip(WORK, (trained.train_seconds or 0.0, evaluation.seconds["total"]), strict=True))
    return {"store and Ray head": ended.ground_s, **steps, **waited, **work, "total": ended.total_s}


if __name__ == "__main__":
    main()
