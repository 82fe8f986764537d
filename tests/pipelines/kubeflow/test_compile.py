import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import components

from components.shared import config_file
from components.shared.config import RunConfig
from components.shared.errors import UserError
from pipelines.commands.arguments import DEFAULT_CONFIG
from pipelines.kubeflow.compile import compile_pipeline, write_pipeline

STEPS = {"prepare", "finetune", "evaluate", "gate", "promote", "hold", "report"}


@pytest.fixture(scope="module")
def text() -> str:
    return compile_pipeline(config_file.load(DEFAULT_CONFIG))


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def executors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name.removeprefix("exec-"): e["container"] for name, e in spec["deploymentSpec"]["executors"].items()}


def test_the_pipeline_has_every_step_and_kfp_reads_it_back(text: str, spec: dict[str, Any]) -> None:
    assert executors(spec).keys() == STEPS
    loaded = components.load_component_from_text(text)
    assert loaded.pipeline_spec.pipeline_info.name == "fineloop-retrain"


def test_no_step_installs_anything(spec: dict[str, Any]) -> None:
    for name, container in executors(spec).items():
        command = " ".join([*container["command"], *container.get("args", [])])
        assert "pip" not in command.replace("pipeline", ""), name


def test_no_step_moves_an_artifact_out_of_the_runs_folder(spec: dict[str, Any]) -> None:
    for name, container in executors(spec).items():
        assert ".uri =" not in " ".join(container["command"]), name


def test_the_gate_has_both_branches_and_the_report_follows_either(spec: dict[str, Any]) -> None:
    branches = spec["components"]["comp-condition-branches-1"]["dag"]["tasks"]
    conditions = {task["taskInfo"]["name"]: task["triggerPolicy"]["condition"] for task in branches.values()}
    assert conditions.keys() == {"passed", "refused"}
    assert conditions["refused"] == f"!({conditions['passed']})"
    assert "gate-Output" in conditions["passed"]
    assert spec["root"]["dag"]["tasks"]["report"]["dependentTasks"] == ["condition-branches-1", "prepare"]


def test_no_step_is_cached(spec: dict[str, Any]) -> None:
    dags = [spec["root"]["dag"], *[c["dag"] for c in spec["components"].values() if "dag" in c]]
    tasks = [task for dag in dags for task in dag["tasks"].values() if "triggerPolicy" not in task]
    steps = [task for task in tasks if task["componentRef"]["name"].removeprefix("comp-") in STEPS]
    assert len(steps) == len(STEPS)
    assert all(not task["cachingOptions"].get("enableCache") for task in steps)


def test_a_config_with_quotes_and_lines_is_the_default_unharmed(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    compiled = yaml.safe_load(compile_pipeline(config))
    default = compiled["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
    assert config_file.loads(default) == config


def test_the_same_config_gives_the_same_bytes_in_another_process(text: str) -> None:
    code = (
        "import sys\nfrom components.shared import config_file\n"
        "from pipelines.commands.arguments import DEFAULT_CONFIG\n"
        "from pipelines.kubeflow.compile import compile_pipeline\n"
        "sys.stdout.write(compile_pipeline(config_file.load(DEFAULT_CONFIG)))"
    )
    again = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout == text


def test_an_image_replaces_that_of_every_step(tmp_path: Path, make_config: Callable[..., RunConfig]) -> None:
    image = f"registry.example/fineloop@sha256:{'0' * 64}"
    written = write_pipeline(tmp_path / "p.yaml", make_config(), image=image)
    body = (tmp_path / "p.yaml").read_bytes()
    assert {container["image"] for container in executors(yaml.safe_load(body)).values()} == {image}
    assert written["sha256"] == hashlib.sha256(body).hexdigest()
    assert written["image"] == image


def test_a_file_that_cannot_be_written_is_a_users_mistake(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(UserError, match="--output"):
        write_pipeline(tmp_path / "none" / "p.yaml", make_config())
