"""What models make of general text, against transformers' own loss, and what is not read twice."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from components.config.schema import RunConfig
from components.records.steps import Evaluation
from components.registry.versions import Version
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.evaluate import compared
from ray_jobs.probes.texts import Passages, prepare_passages
from ray_jobs.scoring.measure import Findings, Outcome, measure_shard
from ray_jobs.text import chat_format
from tests.models import tiny_version
from tests.models.spec import changed
from tests.models.tiny_version import contenders, remember
from tests.ray_jobs.plain import passage_losses

RECORDS = tiny_version.RECORDS[:4]


@pytest.fixture
def config(placed: Callable[..., RunConfig]) -> RunConfig:
    return placed("evaluate.general_passages=5", "model.max_length=40")


def asked(config: RunConfig, store: Store, *versions: Version) -> Passages:
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    return prepare_passages(store, chat, config, contenders(config, *versions))


def read(config: RunConfig, version: Version, passages: Passages) -> Findings:
    """What one worker finds in its passages."""
    (share,) = measure_shard(contenders(config, version), RECORDS, {"t": passages}, shard_index=1).shares
    return share["t"]


def test_a_passage_is_read_as_transformers_reads_it(config, store, version) -> None:
    passages = asked(config, store, version)
    assert passages.roles == {"base", "candidate"}
    found = read(config, version, passages)
    assert found["base"].nll == pytest.approx(passage_losses(config.model.base, 40, 5), rel=0.01)
    assert sum(found["candidate"].nll) > sum(found["base"].nll) + 1  # an update drawn at random knows less


def test_shares_give_the_same_as_the_whole_in_the_same_order(config, store, version) -> None:
    whole = asked(config, store, version)
    shares = [whole.at(lambda count, first=first: range(first, count, 2)) for first in range(2)]
    parts = [read(config, version, share) for share in shares]
    alone = {role: found.nll for role, found in read(config, version, whole).items()}
    together = whole.outcome(parts, None).record
    assert together.nll.keys() == {"base", "candidate"}
    for role, nll in together.nll.items():
        assert nll == pytest.approx(alone[role], rel=1e-3)
    assert together.loss("base") == pytest.approx(sum(alone["base"]) / (5 * 39), rel=1e-3)


def test_the_comparison_tells_every_models_loss_per_token(config, store, version) -> None:
    passages, models = asked(config, store, version), contenders(config, version)
    found = measure_shard(models, RECORDS, {"general_text": passages}, shard_index=1)
    (share,) = found.shares
    general = passages.outcome([share["general_text"]], None)
    compare = partial(compared, config, models, RECORDS, [*found.tokens.values()], found.scores, run_id="r")
    loud = Outcome({"base": [3.0]}, {"candidate": {"loudness": 7.0}}, lines=[])  # of a probe of its own
    evaluation = compare({"general_text": general, "loud": loud})
    for role in ("base", "candidate"):
        assert evaluation.metric(role, "general_loss") == pytest.approx(sum(share["general_text"][role].nll) / (5 * 39))
    read = Evaluation.from_json(evaluation.as_json(), "here")
    assert (read.general_text, read.probes) == (general.record, {"loud": loud.record})
    assert read.models["candidate"].metrics["loudness"] == 7
    assert compare().metric("candidate", "general_loss") is None


def test_what_an_earlier_run_has_read_is_not_read_again(config, store, version) -> None:
    champion = replace(version, run_id="earlier")
    text = asked(config, store, champion).losses
    known = text.model_copy(update={"nll": {"base": [1.0] * 5, "candidate": [2.0] * 5}})
    remember(store, config, champion, general_text=known)
    candidate = replace(version, version="0" * 12, run_id="later")
    passages = asked(config, store, champion, candidate)
    assert passages.roles == {"candidate"}
    assert passages.losses.nll == {"base": [1.0] * 5, "champion": [2.0] * 5}

    store.put(f"runs/{champion.run_id}/evaluation.json", b"{")
    assert asked(config, store, champion, candidate).roles == {"base", "champion", "candidate"}
    remember(store, config, champion, general_text=known)
    fewer, quantised = (changed(config, change) for change in ("evaluate.general_passages=4", "method.base=nf4"))
    assert asked(fewer, store, champion, candidate).roles == {"base", "champion", "candidate"}
    assert asked(quantised, store, champion, candidate).roles == {"base", "candidate"}


def test_who_stands_on_another_base_is_left_out(config, store, version) -> None:
    ours = contenders(config, version, replace(version, version="0" * 12))
    other = [ours[0], replace(ours[1], base_identity={"kind": "folder", "sha256": "0"}), ours[2]]
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    assert prepare_passages(store, chat, config, other).roles == {"base", "candidate"}


def test_without_passages_nobody_is_asked(config, store, version) -> None:
    passages = asked(changed(config, "evaluate.general_passages=0"), store, version)
    assert passages.roles == frozenset()
    assert passages.outcome([{}], None).record is None
