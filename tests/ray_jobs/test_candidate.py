"""The job that trains and compares; the whole of it runs in tests/e2e."""

from contextlib import nullcontext
from unittest import mock

import pytest

from components.config.schema import RegistryConfig, RunConfig
from components.records import runs
from components.records.steps import TrainResult
from components.store.store import Store
from ray_jobs import candidate, finetune
from ray_jobs.training import trainer

PUBLISHED = TrainResult(version="v1", version_uri="s3://b/adapters/a/versions/v1", dataset_uri="s3://b/datasets/d1")


@pytest.mark.parametrize(("dataset_uri", "trains"), [("s3://b/datasets/d1", False), ("s3://b/datasets/d2", True)])
def test_what_the_run_has_published_of_a_dataset_is_not_trained_again(
    config: RunConfig, store: Store, monkeypatch: pytest.MonkeyPatch, dataset_uri: str, trains: bool
) -> None:
    run = mock.create_autospec(finetune.run, return_value=(PUBLISHED, None))
    monkeypatch.setattr(finetune, "run", run)
    monkeypatch.setattr(trainer, "started", lambda *_: nullcontext())
    config = config.model_copy(update={"registry": RegistryConfig(bucket=store.bucket, prefix=store.prefix)})
    runs.write(store, "again", PUBLISHED)
    assert candidate.trained(config, run_id="again", dataset_uri=dataset_uri, only=True) is None
    assert [call.kwargs["dataset_uri"] for call in run.call_args_list] == [dataset_uri] * trains


@pytest.mark.parametrize("replay_from", ["records", "production"])
def test_workers_start_early_unless_production_has_to_answer_on_the_same_gpus(placed, monkeypatch, replay_from):
    started = mock.Mock(return_value=nullcontext("early"))
    run = mock.create_autospec(finetune.run, return_value=(PUBLISHED, None))
    monkeypatch.setattr(trainer, "started", started)
    monkeypatch.setattr(finetune, "run", run)
    config = placed("data.replay_share=0.2", "data.window_days=7", f"data.replay_from={replay_from}")
    candidate.trained(config, run_id="r", dataset_uri="s3://b/datasets/d1", only=True)
    assert run.call_args.kwargs["work"] == ("early" if replay_from == "records" else None)
    assert started.called is (replay_from == "records")
