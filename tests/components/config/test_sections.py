"""What keys take together, what of them a training depends on, and which keys of earlier configs are read."""

import logging

import pytest

from components.config import config_file
from components.config.tune import FORMER
from tests.components.config.loading import GOOD, message_of, set_in


def test_elastic_workers_are_two_numbers_which_no_training_depends_on() -> None:
    fixed, elastic = (set_in(f"ray.num_workers={n}", "train.micro_batch_size=4") for n in ("1", "[1, 4]"))
    assert (elastic.ray.min_workers, elastic.ray.max_workers, elastic.ray.is_elastic) == (1, 4, True)
    assert (fixed.ray.min_workers, fixed.ray.max_workers, fixed.ray.is_elastic) == (1, 1, False)
    assert elastic.training_digest == fixed.training_digest
    assert elastic.on(1).digest == fixed.digest
    assert config_file.loads(config_file.dumps(elastic)) == elastic


PAGED, OFFLOADED = "train.optimizer=paged_adamw_8bit", "train.activation_offloading=true"
CHECKPOINTED, GPU = "train.gradient_checkpointing=true", "ray.use_gpu=true"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ray.num_workers=0"], "ray.num_workers = 0: expected an integer, at least 1, or two of them"),
        (["ray.num_workers=[1]"], "ray.num_workers = [1]: expected an integer"),
        (["ray.num_workers=[4, 2]"], "put the smaller number first"),
        (["ray.num_workers=[1, 3]"], "train.batch_size 16 is not a multiple of train.micro_batch_size 8 x ray.num_w"),
        ([PAGED], "Nearest to it: train.optimizer=adamw_8bit"),
        ([PAGED, GPU, "train.cpu_offload=true"], "Nearest to it: train.optimizer=adamw_8bit"),
        (["train.dense_base=true", GPU], "hold a whole base each, not with ray.use_gpu: remove train.dense_base"),
        (["train.dense_base=true", "train.zero_stage=3"], "remove train.dense_base"),
        ([OFFLOADED, GPU], "set train.gradient_checkpointing=true, or remove train.activation_offloading"),
        ([OFFLOADED, CHECKPOINTED], "where they lie without ray.use_gpu: remove train.activation_off"),
        (["gate.worse_on_general_text_by=0.5", "evaluate.general_passages=0"], "what evaluate.general_passages 0 does"),
        (["gate.lm_eval_worse_by={arc=0.1}"], "gate.lm_eval_worse_by asks for arc, which evaluate.lm_eval does not"),
        (["evaluate.lm_eval=['']"], "evaluate.lm_eval"),
        (["evaluate.lm_eval_limit=0"], "evaluate.lm_eval_limit = 0"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    refused = message_of(*overrides)
    assert message in refused
    assert "\n" not in refused


@pytest.mark.parametrize(
    "overrides",
    [
        [PAGED, GPU],
        ["train.optimizer=adamw_8bit", "train.cpu_offload=true"],
        ["train.dense_base=true"],
        [OFFLOADED, CHECKPOINTED, GPU],
        ["gate.worse_on_general_text_by=0.5"],
        ["gate.lm_eval_worse_by={arc=0.1}", "evaluate.lm_eval=['arc']"],
    ],
)
def test_what_goes_together_is_taken(overrides: list[str]) -> None:
    assert set_in(*overrides).digest != set_in().digest


@pytest.mark.parametrize(
    ("change", "is_computed"),
    [
        ("ray.num_workers=2", False),
        ("ray.cluster.kind=rayjob", False),
        ("ray.max_failures=9", False),
        ("train.zero_stage=3", False),
        ("train.max_tokens=512", False),
        ("train.batch_size=32", True),
        ("train.seed=1", True),
        ("train.optimizer=adamw_8bit", True),
        ("ray.cpu_matmul_dtype=float32", True),
        ("method.rank=4", True),
    ],
)
def test_what_a_training_computes_is_in_its_digest_and_how_it_is_shared_out_is_not(
    change: str, is_computed: bool
) -> None:
    assert set_in(change).digest != set_in().digest
    assert (set_in(change).training_digest != set_in().training_digest) is is_computed


@pytest.mark.parametrize(
    "where", ["gate.metric='{}'", "gate.limits=[{{metric='{}',min=0.1}}]", "evaluate.metrics=['{}']"]
)
@pytest.mark.parametrize("metric", ["rouge_l", "json_valid", "acme.scores:house_style"])
def test_what_the_gate_or_the_evaluation_names_is_measured(where: str, metric: str) -> None:
    assert metric not in set_in().metrics
    assert metric in set_in(where.format(metric)).metrics


@pytest.mark.parametrize("metric", ["rouge", "acme.scores", "acme:a.b", "os; x:y", "general_loss"])
@pytest.mark.parametrize("where", ["gate.metric='{}'", "evaluate.metrics=['{}']"])
def test_what_is_no_metric_is_refused_where_the_config_is_read(where: str, metric: str) -> None:
    assert "nor a function of your own as module:function" in message_of(where.format(metric))


# Keys of earlier configs: accepted for a release, which says so, and no part of what a config is.


def test_earlier_keys_of_tune_are_accepted_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    changes = ["tune.space.learning_rates=[1e-3]", "tune.refine=false", "tune.scheduler=none", "tune.seeds=2"]
    with caplog.at_level(logging.WARNING):
        tune = set_in(*changes).tune
    assert (tune.learning_rates, tune.seeds) == ([1e-3], 2)
    (line,) = caplog.messages
    assert line.startswith("tune.refine, tune.scheduler, tune.space: no longer read")


def test_a_config_that_holds_earlier_keys_at_their_defaults_says_nothing_and_is_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = set_in("tune.when=always")
    tune = {"when": "always", "learning_rates": [], **FORMER}
    table = {**config_file.as_table(plain), "tune": tune, "evaluate": {"suites": []}}
    whole = config_file.validate(table)
    assert (whole, whole.digest) == (plain, plain.digest)
    assert not caplog.messages


def test_suites_are_read_as_tasks_for_one_release(caplog: pytest.LogCaptureFixture) -> None:
    old = config_file.loads(GOOD, ['evaluate.suites=["json"]', "gate.suite_worse_by=0.1", 'evaluate.lm_eval=["a"]'])
    assert "evaluate.suites is gone, and read as evaluate.lm_eval ['fineloop_json']" in caplog.text
    assert (old.evaluate.lm_eval, old.gate.lm_eval_worse_by) == (["a", "fineloop_json"], {"fineloop_json": 0.1})
    config_file.loads(GOOD, ["gate.suite_worse_by=0.2"])
    assert "gate.suite_worse_by is gone, and 0.2 is not used: gate.lm_eval_worse_by has a margin" in caplog.text
