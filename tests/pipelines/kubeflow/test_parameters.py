import json
import re
from typing import Any

import pytest

from components.config import config_file
from components.shared.errors import UserError
from pipelines.configs import DEFAULT_CONFIG
from pipelines.kubeflow.compile import resolve_parameters

CONFIG = config_file.load(DEFAULT_CONFIG)
TYPES = {"config": "STRUCT", "name": "STRING", "rows": "NUMBER_INTEGER", "share": "NUMBER_DOUBLE", "dry": "BOOLEAN"}
TYPES |= {"tags": "LIST", "marks": "STRUCT"}
SPEC = {"root": {"inputDefinitions": {"parameters": {key: {"parameterType": of} for key, of in TYPES.items()}}}}


def test_the_resolved_config_alone_is_sent_when_nothing_else_is_given() -> None:
    (sent,) = resolve_parameters(SPEC, CONFIG, []).values()
    assert config_file.validate(json.loads(json.dumps(sent))) == CONFIG
    assert sent["train"]["epochs"] == 1  # a default: what it is may change with the release that runs it


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("name=a=b", "a=b"),
        ("rows=7", 7),
        ("share=1", 1),
        ("dry=true", True),
        ('tags=["a", 1]', ["a", 1]),
        ('marks={"a": [1]}', {"a": [1]}),
    ],
)
def test_a_value_becomes_what_the_pipeline_wants(given: str, value: Any) -> None:
    sent = resolve_parameters(SPEC, CONFIG, [given])[given.partition("=")[0]]
    assert sent == value
    assert type(sent) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rows", "expected NAME=VALUE"),
        ("colour=1", "it takes dry, marks, name, rows, share, tags"),
        ("config=x", "-c FILE and --set"),
        ("rows=many", "expected a whole number"),
        ("share=true", "expected a number"),
        ("dry=yes", "expected true or false"),
        ("tags={}", "expected a JSON list"),
        ("marks=[]", "expected a JSON object"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--param {given.partition('=')[0]}.*{re.escape(message)}"):
        resolve_parameters(SPEC, CONFIG, [given])


def test_values_of_before_stay_unless_the_pipeline_has_lost_them_or_others_are_given() -> None:
    kept = {"config": {}, "rows": 5, "name": "before", "gone": 1}
    config = config_file.as_table(CONFIG)
    assert resolve_parameters(SPEC, CONFIG, ["name=now"], kept=kept) == {"config": config, "rows": 5, "name": "now"}
