"""`fineloop plan` as a person calls it: a process, its two streams and its exit code."""

import json
from pathlib import Path

import pytest

from components.config import config_file
from pipelines import cli
from pipelines.commands import run
from tests.models.zoo import TEXT
from tests.pipelines.command_line import fineloop

pytestmark = pytest.mark.usefixtures("forked")

CONFIG = """
[adapter]
name = "sums"
[model]
base = "base"
max_length = 64
[data]
source = "rows.jsonl"
max_records = 1000
[ray]
use_gpu = true
gpu = "L4"
"""


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A config, and the configuration of a base: no weights, no data."""
    (tmp_path / "plan.toml").write_text(CONFIG)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA | TEXT))
    return tmp_path


def test_a_plan_is_a_table_for_people_and_one_object_for_scripts(here: Path) -> None:
    done = fineloop("plan", "-c", "plan.toml", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert (body["method"], body["device"], body["fits"]) == ("qlora", "L4", True)
    assert done.stderr.startswith("rehearsing a training step of ")
    for line in ("qlora on", "weights", "total", "fits: 22.5 on L4", "full fine-tuning", "$0.805", "advised"):
        assert line in done.stderr
    for part, size in body["memory_bytes"].items():
        assert f"  {part:<12} {size / 2**30:7.2f}" in done.stderr
    elastic = "\n".join(run.plan_lines(config_file.load(here / "plan.toml"), {**body, "max_workers": 3}))
    assert ("planned are the fewest" in elastic, "planned are the fewest" in done.stderr) == (True, False)


@pytest.mark.slow
def test_a_plan_of_all_methods_has_a_line_for_each_and_the_reason_why_one_is_refused(here: Path) -> None:
    kept = ("--set", "method.base=bf16", "--set", "method.name=lora")
    done = fineloop("plan", "-c", "plan.toml", *kept, "--json", "--all-methods", cwd=here)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["methods"]) == 8
    refused = {row["method"]: row["refused"] for row in json.loads(done.stdout)["methods"] if "refused" in row}
    for method, why in refused.items():
        assert any(line.startswith(method) and line.endswith(f"refused: {why}") for line in done.stderr.splitlines())
    assert "dvora" in done.stderr


@pytest.mark.parametrize(
    ("kind", "fits", "gib", "exit_code"),
    [("rayjob", True, 129, 1), ("rayjob", True, 100, 0), ("jobs-api", True, 129, 0), ("jobs-api", False, 1, 1)],
)
def test_a_plan_that_does_not_fit_and_a_base_that_no_pods_disk_holds_are_exit_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fits: bool, gib: int, exit_code: int
) -> None:
    monkeypatch.setattr(run, "answer_of", lambda *_: {"fits": fits, "disk_bytes": gib * 2**30})
    monkeypatch.setattr(run, "plan_lines", lambda *_: [])
    arguments = ["plan", "-c", str(here / "plan.toml"), "--set", f"ray.cluster.kind={kind}"]
    assert run.plan(cli.parser().parse_args(arguments)).exit_code == exit_code
