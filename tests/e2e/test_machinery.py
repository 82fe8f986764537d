"""The whole machinery on a tiny base: free answers, interruption, repetition, and input that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Tiny

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param("model.base=nobody/no-such-model", "model.base 'nobody/no-such-model'", marks=pytest.mark.full),
        pytest.param("ray.num_workers=16", "ray.num_workers", marks=pytest.mark.slow),
        pytest.param("method.target_modules=['nothing']", "method.target_modules", marks=pytest.mark.full),
    ],
)
def test_a_mistake_found_inside_a_ray_job_is_one_message_and_exit_code_2(tiny: Tiny, up, setting, message):
    changes = ["--set", setting, "--set", "evaluate.max_new_tokens=4", "--set", "adapter.name=wrong"]
    changes += ["--set", "train.batch_size=16", "--set", "train.micro_batch_size=1"]
    done = tiny.home.fineloop("train", *tiny.settings, *changes, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.exit_code == 2, done.screen
    assert message in done.screen
    assert "Traceback" not in done.screen
    assert tiny.home.fineloop("adapters", "list").answer["adapters"].count("wrong") == 0


@pytest.mark.full
def test_a_run_that_goes_on_from_a_version_begins_where_that_ended_and_names_it(tiny: Tiny, up):
    def done(command: str, *changes: str) -> dict[str, Any]:
        settings = [*tiny.settings, "--set", "adapter.name=further", *changes]
        return tiny.home.does(command, *settings, FINELOOP_USER="ann").answer

    def lineage_of(version: str) -> dict[str, Any]:
        return tiny.home.fineloop("adapters", "lineage", f"further@{version}").answer

    first = done("train")
    began = lineage_of(first["version"])
    again = done("run", "--set", f"train.start_from=further@{first['version']}", "--set", "train.seed=1")
    went_on = lineage_of(again["version"])
    assert went_on["parents"] == [first["version_uri"]]
    assert began["parents"] == []
    assert began["dataset"]["tokens"] == went_on["dataset"]["tokens"]
    assert len(began["dataset"]["tokens"]) == 2  # of the training's records, and of those held out
    # Of the same records in another order: the base begins at the loss of guessing, the other at about the first's end.
    losses = [each["training"]["more"]["first_loss"] for each in (began, went_on)]
    assert losses[1] < began["training"]["eval_loss"] + 0.5 < losses[0]
    assert went_on["started"]["user"] == "ann"
    assert again["run_id"] in went_on["started"]["submission_id"]
    assert went_on["hardware"]["workers"] == 2
    assert f"It went on from {first['version']}." in Path(again["report"]).read_text()
