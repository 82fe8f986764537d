"""The server double itself: it refuses what the real one refuses, as the real kfp.Client sees it."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import pytest
import yaml

from components.config import config_file
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.compile import compile_pipeline
from tests.doubles.kfp_server.server import KfpServer, serving
from tests.pipelines.kubeflow.small_pipeline import compile_small

pytestmark = [pytest.mark.usefixtures("no_kubeflow"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def running() -> Iterator[KfpServer]:
    with serving() as server:
        yield server


@pytest.fixture
def client(running: KfpServer) -> kfp.Client:
    return kfp.Client(host=running.url)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "small.yaml"
    written.write_text(compile_small(config_file.load(DEFAULT_CONFIG)))
    return written


def refusal(call: Any, *arguments: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(kfp_server_api.ApiException) as caught:
        call(*arguments, **options)
    body = json.loads(caught.value.body)
    assert body["error"] == body["message"]
    assert {400: 3, 401: 16, 404: 5, 409: 6}[caught.value.status] == body["code"]
    return caught.value.status, body["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {}, "nonsense": 1}, "not required by pipeline: nonsense"),
        ({"config": 1}, "config requires type struct"),
        ({"config": {}, "rows": "3"}, "rows requires type double or integer"),
        ({"config": {}, "rows": True}, "rows requires type double or integer"),
        ({"config": {}, "mode": "slow"}, "not one of"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    client: kfp.Client, path: Path, arguments: dict[str, Any], message: str
) -> None:
    status, said = refusal(client.create_run_from_pipeline_package, str(path), arguments, run_name="r")
    assert status == 400
    assert message in said


def test_a_pipeline_that_is_none_is_refused_and_the_real_one_is_not(client: kfp.Client, path: Path) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "surprise": 1}))
    status, said = refusal(client.upload_pipeline, str(path), pipeline_name="p")
    assert (status, 'no field named "surprise"' in said) == (400, True)
    path.write_text(compile_pipeline(config_file.load(DEFAULT_CONFIG)))
    assert client.upload_pipeline(str(path)).display_name == "fineloop-retrain"


def test_a_second_pipeline_or_version_of_a_name_is_refused(client: kfp.Client, path: Path) -> None:
    made = client.upload_pipeline(str(path), pipeline_name="p")
    assert refusal(client.upload_pipeline, str(path), pipeline_name="p")[0] == 409
    client.upload_pipeline_version(str(path), "v", pipeline_id=made.pipeline_id)
    assert refusal(client.upload_pipeline_version, str(path), "v", pipeline_id=made.pipeline_id)[0] == 409


def test_unknown_ids_are_404(client: kfp.Client) -> None:
    calls = (client.get_run, client.terminate_run, client.get_recurring_run, client.delete_recurring_run)
    assert {refusal(call, "x")[0] for call in calls} == {404}


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"max_concurrency": 11}, "Support 1-10"),
        ({"cron_expression": "0 0 0 * * 7"}, "above maximum (6)"),
        ({"cron_expression": "0 0 2 *"}, "Expected 5 to 6 fields"),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    client: kfp.Client, path: Path, trigger: dict[str, Any], message: str
) -> None:
    experiment_id = client.create_experiment("e").experiment_id
    wanted = {"cron_expression": "0 0 2 * * *", "pipeline_package_path": str(path), **trigger}
    status, said = refusal(client.create_recurring_run, experiment_id, "s", **wanted)
    assert status == 400
    assert message in said


def test_an_adapter_written_elsewhere_fails_the_run(client: kfp.Client, running: KfpServer, path: Path) -> None:
    started = client.create_run_from_pipeline_package(str(path), {"uri": "s3://elsewhere/adapter"}, run_name="r")
    assert running.run(started.run_id).wait() == "FAILED"
    assert "does not have expected bucket prefix" in running.run(started.run_id).reason
    kept = client.create_run_from_pipeline_package(str(path), {}, run_name="r")
    assert running.run(kept.run_id).wait() == "SUCCEEDED"


def test_deleting_a_schedule_ends_what_it_started_unless_orphaned(
    client: kfp.Client, running: KfpServer, path: Path
) -> None:
    experiment_id = client.create_experiment("e").experiment_id
    made = [
        client.create_recurring_run(
            experiment_id, name, cron_expression="0 0 2 * * *", pipeline_package_path=str(path), params={"seconds": 60}
        ).recurring_run_id
        for name in ("plain", "orphaning")
    ]
    plain, orphan = running.tick(datetime.now(UTC) + timedelta(days=1))
    client.delete_recurring_run(made[0])
    client.recurring_runs.recurring_run_service_delete_recurring_run(made[1], propagation_policy="ORPHAN")
    assert plain.is_over
    assert not orphan.is_over
