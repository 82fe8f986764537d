"""Which process is given which secret; the journey test_signed.py sees it of a whole run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from components.config.schema import RunConfig
from components.handover.announce import NOTIFIERS, Notifier
from pipelines.kubeflow.compile import compile_pipeline, compile_promotion
from pipelines.local.job import Job, answer
from pipelines.local.server import ROOT
from pipelines.step_secrets import of_step, without_secrets


def on_a_cluster(config: RunConfig) -> dict[str, set[str]]:
    """The variables that each step of the compiled pipelines takes from secrets."""
    found: dict[str, set[str]] = {}
    for text in (compile_pipeline(config), compile_promotion(config)):
        platform = list(yaml.safe_load_all(text))[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for name, each in platform.items():
            keys = {pair["envVar"] for entry in each["secretAsEnv"] for pair in entry["keyToEnv"]}
            found[name.removeprefix("exec-")] = keys
    return found


def test_what_a_cluster_gives_to_one_step_alone_no_other_is_given_here(make_config: Callable[..., RunConfig]) -> None:
    steps = on_a_cluster(make_config())
    for_all = set.intersection(*steps.values())
    assert {name for name, keys in steps.items() if keys > for_all} == {"promote", "move-by-hand", "evaluate", "report"}
    for step in ("promote", "evaluate", "report"):
        shell = dict.fromkeys([*steps[step] - for_all, "AWS_ACCESS_KEY_ID"], "x")
        assert without_secrets(shell) == {"AWS_ACCESS_KEY_ID": "x"}
        assert of_step(step, shell) == dict.fromkeys(steps[step] - for_all, "x")
        assert of_step("finetune", shell) == {}


def test_a_look_at_production_signs_as_an_evaluation_does_and_going_back_as_a_promotion(make_config):
    steps = on_a_cluster(make_config("check.when_skipped=true"))
    assert (steps["check"], steps["roll-back"]) == (steps["evaluate"], steps["promote"])
    assert steps["newer"] == set.intersection(*steps.values())


def test_the_secret_of_a_notifier_that_is_added_goes_to_what_moves_an_alias_alone(make_config, monkeypatch):
    monkeypatch.setitem(NOTIFIERS, "other", Notifier(lambda *_: None, ("FINELOOP_OTHER_TOKEN",)))
    shell = {"FINELOOP_OTHER_TOKEN": "x"}
    assert without_secrets(shell) == {}
    steps = on_a_cluster(make_config())
    moving = {"promote", "move-by-hand"}
    assert {step for step in steps if of_step(step, shell)} == moving
    assert {step for step, keys in steps.items() if "FINELOOP_OTHER_TOKEN" in keys} == moving
    of_nights = {step for step, keys in steps.items() if "FINELOOP_WEBHOOK_SECRET" in keys}
    assert of_nights == {step for step in steps if of_step(step, {"FINELOOP_WEBHOOK_SECRET": "x"})}
    assert of_nights == {*moving, "report"}


def test_no_step_is_given_the_secret_of_a_tracker(make_config: Callable[..., RunConfig]) -> None:
    shell = {"WANDB_API_KEY": "x", "WANDB_BASE_URL": "https://wandb.example"}
    assert without_secrets(shell) == {"WANDB_BASE_URL": "https://wandb.example"}
    assert not any(of_step(step, shell) for step in on_a_cluster(make_config()))


def test_a_job_on_this_machine_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    secrets = {"FINELOOP_SIGNING_KEY", "FINELOOP_SIGNING_KEY_FILE", "FINELOOP_SIGNER"}
    for name in (*secrets, "FINELOOP_USER"):
        monkeypatch.setenv(name, "x")
    held = answer(Job("tells", "config.toml"))
    assert held["FINELOOP_USER"] == "x"
    assert not secrets & set(held)
