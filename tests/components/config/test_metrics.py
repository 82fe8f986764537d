"""Which metrics a config may name, and where."""

import pytest

from components.config import config_file
from components.shared.errors import ConfigError
from tests.components.config.loading import GOOD


@pytest.mark.parametrize(
    "where", ["gate.metric='{}'", "gate.limits=[{{metric='{}',min=0.1}}]", "evaluate.metrics=['{}']"]
)
@pytest.mark.parametrize("metric", ["rouge_l", "json_valid", "acme.scores:house_style"])
def test_what_the_gate_or_the_evaluation_names_is_measured(where: str, metric: str) -> None:
    assert metric not in config_file.loads(GOOD).metrics
    assert metric in config_file.loads(GOOD, [where.format(metric)]).metrics


@pytest.mark.parametrize("metric", ["rouge", "acme.scores", "acme:a.b", "os; x:y", "general_loss"])
def test_what_is_no_metric_is_refused_where_the_config_is_read(metric: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.metrics.*nor a function of your own as module:function"):
        config_file.loads(GOOD, [f"evaluate.metrics=['{metric}']"])
    with pytest.raises(ConfigError, match=r"gate\.metric.*nor a function of your own as module:function"):
        config_file.loads(GOOD, [f"gate.metric='{metric}'"])


def test_general_text_that_decides_has_to_be_read() -> None:
    asked = ["gate.worse_on_general_text_by=0.5"]
    assert config_file.loads(GOOD, asked).gate.worse_on_general_text_by == 0.5
    with pytest.raises(ConfigError, match=r"gate\.worse_on_general_text_by asks for what evaluate\.general_passages 0"):
        config_file.loads(GOOD, [*asked, "evaluate.general_passages=0"])


def test_tasks_that_decide_have_to_be_run() -> None:
    asked = ["gate.lm_eval_worse_by={arc_easy=0.1}"]
    with pytest.raises(
        ConfigError, match=r"gate\.lm_eval_worse_by asks for arc_easy, which evaluate\.lm_eval does not"
    ):
        config_file.loads(GOOD, asked)
    assert config_file.loads(GOOD, [*asked, 'evaluate.lm_eval=["arc_easy"]']).gate.lm_eval_worse_by == {"arc_easy": 0.1}


def test_suites_are_read_as_tasks_for_one_release(caplog: pytest.LogCaptureFixture) -> None:
    old = config_file.loads(GOOD, ['evaluate.suites=["json"]', "gate.suite_worse_by=0.1", 'evaluate.lm_eval=["a"]'])
    assert "evaluate.suites is gone, and read as evaluate.lm_eval ['fineloop_json']" in caplog.text
    assert (old.evaluate.lm_eval, old.gate.lm_eval_worse_by) == (["a", "fineloop_json"], {"fineloop_json": 0.1})
    config_file.loads(GOOD, ["gate.suite_worse_by=0.2"])
    assert "gate.suite_worse_by is gone, and 0.2 is not used: gate.lm_eval_worse_by has a margin" in caplog.text


def test_suites_at_their_default_change_no_digest() -> None:
    whole = config_file.loads(GOOD)
    assert config_file.loads(GOOD, ["evaluate.suites=[]"]).digest == whole.digest
    assert config_file.loads(GOOD, ['evaluate.lm_eval=["a"]']).digest != whole.digest


def test_tasks_of_lm_eval_at_their_default_change_no_digest() -> None:
    whole = config_file.loads(GOOD)
    assert config_file.loads(GOOD, ["evaluate.lm_eval=[]", "evaluate.lm_eval_include=''"]).digest == whole.digest
    assert config_file.loads(GOOD, ["evaluate.lm_eval=['arc_easy']"]).digest != whole.digest
    for wrong in ("evaluate.lm_eval=['']", "evaluate.lm_eval_limit=0"):
        with pytest.raises(ConfigError, match=r"evaluate\.lm_eval"):
            config_file.loads(GOOD, [wrong])
