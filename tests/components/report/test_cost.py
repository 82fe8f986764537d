"""What a training cost, beside figures worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from components.config import config_file
from components.report.run_files import RunFiles
from components.report.sections import cost, costs
from tests.components.report import example_runs

# Four workers for an hour and a half are 6 hours; 4,050 of 5,400 s are three quarters.
TIMES = {
    "began_at": "2026-11-24T01:00:00+00:00",
    "trained_at": "2026-11-24T02:30:00+00:00",
    "train_seconds": 4050.0,
    "tokens": 12_000_000,
}


def run_on(gpu: str, *settings: str, **result: Any) -> RunFiles:
    run = example_runs.promoted_run()
    assert run.lineage is not None
    steps = [
        step.model_copy(update={"result": {**step.result, **TIMES, **result}}) if step.step == "finetune" else step
        for step in run.steps
    ]
    hardware = {**run.lineage["hardware"], "workers": 4, "gpu": gpu}
    toml = config_file.dumps(config_file.loads(run.config_toml, settings))
    return replace(run, steps=steps, lineage={**run.lineage, "hardware": hardware}, config_toml=toml)


@pytest.mark.parametrize(
    ("gpu", "settings", "text"),
    [
        (
            "NVIDIA H100 80GB HBM3",
            [],
            "6.00 GPU-hours until the last step, 75% of them in steps; 2,000,000 tokens a GPU-hour; "
            "$41.28 at $6.88 (AWS p5.48xlarge / 8, November 2026)",
        ),
        ("NVIDIA H100 80GB HBM3", ["ray.gpu_price_per_hour=2"], "; $12.00 at ray.gpu_price_per_hour"),
        ("An unknown GPU", [], "2,000,000 tokens a GPU-hour"),
        ("", [], "6.00 worker-hours until the last step, 75% of them in steps; 2,000,000 tokens a worker-hour"),
    ],
)
def test_a_training_says_what_it_cost(gpu: str, settings: list[str], text: str) -> None:
    run = run_on(gpu, *settings)
    assert cost(run).endswith(text)
    assert ("Training cost", cost(run)) in costs(run)


def test_a_run_that_went_on_from_a_checkpoint_counts_its_own_job_alone() -> None:
    assert cost(run_on("", resumed_from_step=100)) == "6.00 worker-hours of the job that took the last step"


def test_what_was_lost_computed_and_asked_of_the_store_is_part_of_it() -> None:
    used = {
        "workers": 4, "gpu": "", "held_s": 21600.0, "in_steps_s": 16200.0, "tokens": 12_000_000, "restarts": 1,
        "steps_repeated": 40, "flops": 2e18, "flops_with_parents": 5e18, "s3_requests": 1, "s3_read_bytes": 2_500_000,
        "s3_written_bytes": 0, "price": None, "price_source": "",
    }  # fmt: skip
    assert cost(run_on("", usage=used)).endswith(
        "a worker-hour; 1 restart, 40 steps taken twice; 2e+18 FLOPs, 5e+18 with what it went on from; "
        "1 S3 request of the workers, 2.5 MB read, 0.0 MB written"
    )


@pytest.mark.parametrize("missing", ["began_at", "trained_at", "train_seconds", "tokens"])
def test_a_run_of_a_release_that_did_not_record_it_says_nothing(missing: str) -> None:
    assert cost(run_on("", **{missing: None})) == ""
