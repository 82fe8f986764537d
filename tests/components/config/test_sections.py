"""What keys take together, what of them a training depends on, what is hardly ever meant, and earlier keys."""

import tomllib
from dataclasses import fields
from itertools import product
from typing import Any

import pytest

from components.config import config_file, methods
from components.config.methods import METHODS, Cell, nearest_legal, refusals
from components.config.schema import MethodConfig, TrainConfig, cautions
from components.config.section import REMOVED
from tests.components.config.cells import AXES
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
        (["ray.num_workers=[4, 2]"], "put the smaller number first"),
        (["ray.num_workers=[1, 3]"], "train.batch_size 16 is not a multiple of train.micro_batch_size 8 x ray.num_w"),
        ([PAGED], "Nearest to it: train.optimizer=adamw_8bit"),
        ([PAGED, GPU, "train.cpu_offload=true"], "Nearest to it: train.optimizer=adamw_8bit"),
        ([OFFLOADED, GPU], "set train.gradient_checkpointing=true, or remove train.activation_offloading"),
        ([OFFLOADED, CHECKPOINTED], "where they lie without ray.use_gpu: remove train.activation_off"),
        (["gate.worse_on_general_text_by=0.5", "evaluate.general_passages=0"], "what evaluate.general_passages 0 does"),
        (["gate.lm_eval_worse_by={arc=0.1}"], "gate.lm_eval_worse_by asks for arc, which evaluate.lm_eval does not"),
        (["evaluate.lm_eval=['']"], "evaluate.lm_eval"),
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
        ("train.zero_stage=3", False),
        ("train.batch_size=32", True),
        ("train.optimizer=adamw_8bit", True),
        ("ray.cpu_matmul_dtype=float32", True),
        ("method.rank=4", True),
    ],
)
def test_what_a_training_computes_is_in_its_digest_and_how_it_is_shared_out_is_not(change: str, is_computed) -> None:
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
def test_what_is_no_metric_is_refused_where_the_config_is_read(metric: str) -> None:
    for where in ("gate.metric='{}'", "evaluate.metrics=['{}']"):
        assert "nor a function of your own as module:function" in message_of(where.format(metric))


# Keys of earlier configs: accepted for a release, which says so, and no part of what a config is.


def test_earlier_keys_of_tune_are_accepted_and_a_line_each_says_so(caplog: pytest.LogCaptureFixture) -> None:
    changes = ["tune.space.learning_rates=[1e-3]", "tune.refine=false", "tune.scheduler=none", "tune.seeds=2"]
    tune = set_in(*changes).tune
    assert (tune.learning_rates, tune.seeds) == ([1e-3], 2)
    assert [message.split()[3] for message in caplog.messages] == ["tune.refine", "tune.scheduler", "tune.space"]


def test_a_config_that_holds_earlier_keys_at_their_defaults_says_nothing_and_is_the_same(caplog) -> None:
    plain = set_in("tune.when=always")
    space: dict[str, list[int]] = {"learning_rates": [], "ranks": [], "batch_sizes": []}
    tune = {"when": "always", "learning_rates": [], "points": 5, "space": space}
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


def test_every_cell_is_legal_or_has_a_legal_one_near() -> None:
    for values in product(*AXES.values()):
        cell = Cell(*values)
        near = nearest_legal(cell)
        assert not list(refusals(near)), cell
        assert bool(list(refusals(cell))) == (near != cell), cell


def test_every_method_is_legal_by_its_name_alone_and_axes_spell_what_has_no_name() -> None:
    assert {name: set_in(f"method.name={name}").method.row for name in METHODS} == METHODS
    row = set_in("method.name=dora", "method.scaling=rslora", "method.base=int8").method.row
    assert (row.adapter, row.scaling, row.base) == ("dora", "rslora", "int8")


def test_rank_rate_and_alpha_are_the_methods_own_until_set() -> None:
    lora, vera = set_in("method.name=lora"), set_in("method.name=vera")
    assert (lora.method.r, lora.method.lora_alpha, vera.method.r) == (16, 32.0, 256)
    assert lora.learning_rate == pytest.approx(2e-4)
    assert vera.learning_rate > lora.learning_rate
    assert set_in("method.name=vera", "train.learning_rate=0.5", "method.rank=8").learning_rate == 0.5


@pytest.mark.parametrize(
    ("overrides", "reason", "near"),
    [
        (["method.base=int8", "train.zero_stage=3"], "bitsandbytes#1451", "Nearest to it: train.zero_stage=2"),
        (["method.name=loftq", "method.base=bf16"], "this base is not NF4", "Nearest to it: method.base=nf4"),
        (["method.name=vera", "method.scaling=rslora"], "no alpha to scale", "method.scaling=classic"),
        (["train.cpu_offload=true", "train.zero_stage=0"], "no partition", "train.zero_stage=1"),
        (["method.name=dora", "method.init=loftq"], "this adapter has others", "method.init=default"),
        (["method.name=vera", "method.alpha=8"], "method.alpha 8 scales nothing in vera", "remove it"),
    ],
)
def test_an_illegal_cell_is_refused_with_its_reason_and_the_nearest_legal_one(overrides, reason, near: str) -> None:
    message = message_of(*overrides)
    assert reason in message
    assert near in message


def test_the_fields_named_to_a_person_are_the_config_s_own() -> None:
    for field in fields(Cell):
        assert field.name in (MethodConfig if field.name in methods.AXES else TrainConfig).model_fields


def said(*changes: str, num_steps: int | None = None) -> list[str]:
    return list(cautions(set_in("method.name=lora", *changes), num_steps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.learning_rate=0.9"], "train.learning_rate 0.9 is 4.5e+03 times the 0.0002 of lora at rank 16"),
        (["method.name=vera", "train.learning_rate=2e-5"], "train.learning_rate 2e-05 is a 300th of the 0.006 of vera"),
        (["method.rank=256", "method.alpha=0.01"], "method.alpha 0.01 is a 5.12e+04th of the 512 of lora at rank 256"),
    ],
)
def test_a_setting_that_is_far_from_any_in_use_is_named(changes, message):
    (line,) = said(*changes)
    assert line.startswith(message)
    few, *_ = said(num_steps=7)
    assert few.startswith("7 optimizer steps are few")
    assert not said(num_steps=200)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_said_of_what_methods_set_themselves_and_of_what_sweeps_try(name):
    own = METHODS[name].learning_rate
    for rate in (own / 10, own, own * 10):
        assert not said(f"method.name={name}", f"train.learning_rate={rate:.12f}")


@pytest.mark.parametrize("path", [*REMOVED])
def test_a_removed_key_is_read_and_said_to_be_gone_and_moves_no_digest(path: str, caplog) -> None:
    cluster = ["ray.cluster.kind=rayjob"] if path.startswith("ray.cluster") else []
    plain, removed = set_in(*cluster), REMOVED[path]
    for value in [each for each in (removed.default, 7) if each is not None]:
        caplog.clear()
        table: dict[str, Any] = tomllib.loads(GOOD)
        *sections, key = path.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
        found = config_file.validate(table, cluster)
        assert (found, found.digest, found.training_digest) == (plain, plain.digest, plain.training_digest)
        assert (path in caplog.text and removed.instead in caplog.text) is (value == 7)


def test_an_old_key_is_read_and_said_to_be_old(caplog: pytest.LogCaptureFixture) -> None:
    found = set_in("ray.cluster.kind=rayjob", "ray.cluster.spot=true")
    assert len(found.ray.cluster.worker_template["spec"]["tolerations"]) == 3
    assert "ray.cluster.spot: read for this release only" in caplog.text
    caplog.clear()
    config_file.loads(config_file.dumps(set_in("ray.cluster.kind=rayjob")))
    assert not caplog.text
