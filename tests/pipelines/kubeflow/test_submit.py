"""`fineloop submit` against the server double, with the real kfp.Client between them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.config import config_file
from components.shared.errors import KubeflowAway, KubeflowError
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow import runs
from pipelines.kubeflow.client import connect
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.command_line import ROOT
from tests.pipelines.kubeflow.conftest import Fineloop
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.usefixtures("small")


def test_a_run_that_succeeds_is_exit_0_and_tells_each_step(server: KfpServer, fineloop: Fineloop) -> None:
    named = ("--run-name", "first", "--experiment", "tries")
    answered = fineloop("submit", "-c", str(DEFAULT_CONFIG), "--set", "adapter.name=mine", *named)
    body = answered.body
    assert answered.exit_code == 0
    assert (body["run_name"], body["state"], body["adapter"]) == ("first", "SUCCEEDED", "mine")
    assert body["url"] == f"{server.url}/#/runs/details/{body['run_id']}"
    done = dict.fromkeys(("prepare", "finetune", "gate", "promote"), "SUCCEEDED")
    assert body["steps"] == {**done, "hold": "SKIPPED"}
    lines = answered.stderr.splitlines()
    assert any(line.startswith("[gate] succeeded after") for line in lines), lines
    assert body["url"] in lines[0]

    record = server.run(body["run_id"]).record
    config = config_file.load(DEFAULT_CONFIG, ["adapter.name=mine"])
    assert body["config_digest"] == config.digest
    assert record["runtime_config"]["parameters"] == {"config": config_file.as_table(config)}
    assert record["service_account"] == "fineloop-pipeline"
    assert server.state.experiments[record["experiment_id"]]["display_name"] == "tries"


def test_a_run_that_fails_is_exit_1_and_says_which_step(server: KfpServer, fineloop: Fineloop) -> None:
    answered = fineloop("submit", "--param", "fails=true")
    assert answered.exit_code == 1
    assert answered.body["state"] == "FAILED"
    assert answered.body["steps"]["prepare"] == "FAILED"
    assert "[prepare] failed after" in answered.stderr
    logs = f"kubectl -n fineloop logs -l pipeline/runid={answered.body['run_id']} -c main"
    assert logs in answered.body["message"]


def test_the_wait_ends_when_the_run_is_canceled(server, start, tmp_path):
    run = start(seconds=60.0, folder=str(tmp_path))
    (pid_path,) = wait_until(lambda: list(tmp_path.glob("*.pid")))
    run.kubeflow.client.terminate_run(run.run_id)
    ended = runs.follow(run, lambda _: None, sleep=lambda _: time.sleep(0.05))
    assert (ended.state, ended.succeeded) == ("CANCELED", False)
    wait_until(lambda: not Path(f"/proc/{pid_path.read_text()}").exists())


SUBMIT_SMALL = """
import sys
from pipelines import cli
from pipelines.kubeflow import compile
from tests.pipelines.kubeflow.small_pipeline import compile_small
compile.compile_pipeline = compile_small
sys.exit(cli.main(["submit", *sys.argv[1:]]))
"""


def test_an_interrupted_wait_leaves_the_run_and_says_how_to_stop_it(server: KfpServer, tmp_path: Path) -> None:
    arguments = ["--param", "seconds=60", "--param", f"folder={tmp_path}", "--json"]
    submitted = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SUBMIT_SMALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    (pid_path,) = wait_until(lambda: list(tmp_path.glob("*.pid")))
    submitted.send_signal(signal.SIGINT)
    out, err = submitted.communicate(timeout=PATIENCE_S)
    assert submitted.returncode == 130
    assert f"fineloop runs stop {pid_path.stem}" in err
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
    assert server.run(pid_path.stem).record["state"] == "RUNNING"


@pytest.mark.parametrize(
    "arguments", [("--param", "rows=many"), ("--set", "train.learning_rat=1"), ("-c", "none.toml")]
)
def test_a_mistake_is_told_before_anything_is_sent(server, fineloop, arguments):
    assert fineloop("submit", *arguments).exit_code == 2
    assert server.requests == []


def test_an_image_and_another_account_reach_the_server(server: KfpServer, fineloop: Fineloop) -> None:
    image = f"registry.example/python@sha256:{'0' * 64}"
    answered = fineloop("submit", "--no-wait", "--image", image, "--service-account", "")
    assert "service_account" not in server.run(answered.body["run_id"]).record
    (version,) = server.state.versions.values()
    assert image in json.dumps(version["pipeline_spec"])


def test_a_server_that_is_away_for_a_while_is_asked_again(server, start):
    run, lines = start(), []
    server.num_outages = 2
    ended = runs.follow(run, lines.append, sleep=lambda _: time.sleep(0.05))
    assert ended.state == "SUCCEEDED"
    assert [line for line in lines if "asking again" in line] == [lines[0]]


def test_a_server_that_stays_away_ends_the_wait_and_says_that_the_run_goes_on(server, start):
    run = start()
    server.num_outages = 1000
    clock = iter(range(0, 100_000, 60))
    with pytest.raises(KubeflowAway) as caught:
        runs.follow(run, lambda _: None, sleep=lambda _: None, clock=lambda: float(next(clock)))
    assert f"fineloop runs show {run.run_id}" in caught.value.__notes__[0]


def test_what_only_the_server_can_know_is_told_in_its_words(server, start):
    with pytest.raises(Exception, match="mode has value 'slow', which is not one of") as caught:
        start(mode="slow")
    assert caught.value.exit_code == 2
    server.num_outages = 1
    with pytest.raises(KubeflowError, match="503"):
        runs.listed(connect({}, host=server.url))
