"""Which process is given which secret; the journey test_signed.py sees it of a whole run."""

import os
from pathlib import Path

import pytest

from pipelines.kubeflow import task_settings
from pipelines.local.job import Job, answer
from pipelines.local.service import ROOT
from pipelines.local.step_secrets import of_step, without_secrets

TELLS = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize(("step", "keys"), [(step, keys) for step, (_, keys) in task_settings.OF_ITS_OWN.items()])
def test_what_a_cluster_gives_to_one_step_alone_no_other_is_given_here(step: str, keys: tuple[str, ...]) -> None:
    shell = dict.fromkeys([*keys, "AWS_ACCESS_KEY_ID"], "x")
    assert without_secrets(shell) == {"AWS_ACCESS_KEY_ID": "x"}
    if step != "move-by-hand":  # which is a command here
        assert of_step(step, shell) == dict.fromkeys(keys, "x")
    assert of_step("finetune", shell) == {}


def test_a_job_on_this_machine_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tells.py").write_text(TELLS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    secrets = {"FINELOOP_SIGNING_KEY", "FINELOOP_SIGNING_KEY_FILE", "FINELOOP_SIGNER"}
    for name in (*secrets, "FINELOOP_USER"):
        monkeypatch.setenv(name, "x")
    held = answer(Job("tells", "config.toml"))
    assert held["FINELOOP_USER"] == "x"
    assert not secrets & set(held)
