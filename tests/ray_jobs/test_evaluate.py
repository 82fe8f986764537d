"""The measurement against a plain one: full logits, one record at a time, in float32, on files that were published."""

import dataclasses
import json
import re
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from components.config.schema import RunConfig
from components.gate.comparisons import parse_evidence, read_evidence
from components.prepare.dataset import Message, Record
from components.prepare.prepare import prepare
from components.records import runs
from components.records.steps import TrainResult
from components.registry import signing
from components.registry.aliases import Cause, promote, rollback
from components.registry.versions import read_lineage
from components.shared.errors import DataError, IntegrityError
from components.shared.metrics import METRICS, alike
from components.store.store import Store
from ray_jobs import evaluate as evaluating
from ray_jobs.adapters import recorded
from ray_jobs.base import base_model
from ray_jobs.evaluate import _contenders, _write_records, compared, plan, run, since_champion
from ray_jobs.export import ExportRequest, export
from ray_jobs.scoring.answers import MARKS, Score, paired_difference
from ray_jobs.scoring.measure import Contender, measure_shard, with_room_for_answers
from ray_jobs.talking import speaker
from ray_jobs.text import chat_format
from tests.models import tiny_version
from tests.models.spec import changed
from tests.models.tiny import build_base, colour_rows
from tests.ray_jobs.plain import Plain, plain_of, published

RECORDS = tiny_version.RECORDS[:12]
NOISE = 0.02  # of a token's nats: bfloat16 weights and activations against float32 ones
MAX_NEW_TOKENS = 8
TEMPLATE = "{% for m in messages %}[{{ m['role'][0] }}] {{ m['content'] }}<|end|>{% endfor %}[a] "


@pytest.fixture
def config(placed: Callable[..., RunConfig]) -> RunConfig:
    return placed(f"evaluate.max_new_tokens={MAX_NEW_TOKENS}")


def assert_scores_are(scores: list[Score], plain: Plain) -> None:
    num_compared = 0
    for score, record in zip(scores, RECORDS, strict=True):
        assert score.nll == pytest.approx(plain.nll(record), rel=0.01, abs=NOISE * len(plain.tokens(record)[1]))
        text, num_tokens, is_whole = plain.answer(record, MAX_NEW_TOKENS)
        assert score.text == text if is_whole else score.text.startswith(text.rstrip())
        num_compared += num_tokens
    assert num_compared > len(RECORDS) * MAX_NEW_TOKENS / 3


def test_a_champion_is_measured_on_the_base_and_the_words_it_was_trained_with(config, store, tmp_path):
    other = build_base(tmp_path / "other", seed=5)
    (other / "chat_template.jinja").write_text(TEMPLATE)
    theirs = changed(config, f"model.base={other}", "model.max_length=48", "method.rank=4")
    old = published(theirs, store, tmp_path, seed=2)
    promote(store, config.adapter.name, old.version)
    new = published(config, store, tmp_path, seed=1)
    found = measure_shard(_contenders(config, store, new), RECORDS, shard_index=0)
    assert list(found.scores) == ["base", "champion", "candidate"]
    base = Plain(config.model.base)
    assert found.tokens == {record.id: len(base.tokens(record)[1]) for record in RECORDS}
    assert_scores_are(found.scores["base"], base)
    assert_scores_are(found.scores["champion"], plain_of(theirs, store, old, tmp_path))
    assert_scores_are(found.scores["candidate"], plain_of(config, store, new, tmp_path))
    assert abs(found.scores["base"][0].nll - found.scores["candidate"][0].nll) > 1
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=rf"trained on {other} with kind folder sha256 \w+, and today that is"):
        measure_shard(_contenders(config, store, new), RECORDS, shard_index=0)


@pytest.mark.parametrize("field", ["base", "revision", "thinking"])
def test_a_candidate_whose_lineage_names_another_base_or_format_is_measured_on_neither(config, store, tmp_path, field):
    theirs = {"base": str(build_base(tmp_path / "other", seed=5)), "revision": "dev", "thinking": True}[field]
    ours = getattr(config.model, field)
    planted = published(changed(config, f"model.{field}={json.dumps(theirs)}"), store, tmp_path, seed=1)
    names_both = re.escape(f"has model.{field} = {theirs!r}, and the config of its run has {ours!r}")
    with pytest.raises(IntegrityError, match=names_both):
        plan(config, store, run_id="night", dataset_uri=store.uri("datasets/d"), candidate=planted)


def test_a_version_with_a_chat_template_of_its_own_is_not_measured_not_asked_and_not_exported(config, store, tmp_path):
    folder = tmp_path / "seed-1/adapter-lora"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    planted = published(config, store, tmp_path, seed=1)
    names_both = f"{planted.version} hold a chat template .* its base {config.model.base} "
    with pytest.raises(IntegrityError, match=names_both):
        measure_shard(_contenders(config, store, planted), RECORDS, shard_index=0)
    with pytest.raises(IntegrityError, match=names_both):
        speaker.load(config, store, planted, "colours", with_base=True)
    for form in ("merged", "base"):
        with pytest.raises(IntegrityError, match=names_both):
            export(config, config.adapter.name, ExportRequest(form, tmp_path / form))


@pytest.mark.usefixtures("in_this_process")
def test_a_look_is_an_evaluation_of_all_its_records_and_of_nothing_else(config, store, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "is_shared", lambda *_: False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(24)))
    config = changed(config, f"data.source={rows}", "data.eval_share=0.5", "evaluate.records=2")
    dataset = prepare(config, store)
    old, new = published(config, store, tmp_path, seed=2), published(config, store, tmp_path, seed=1)
    promote(store, config.adapter.name, old.version)  # whatever holds the alias
    for against, role in ((old.version, "champion"), ("base", "base")):
        found = run(config, run_id="look", dataset_uri=dataset.uri, version_uri=new.uri, against=against)
        assert {name for name, model in found.models.items() if model} == {role, "candidate"}
        assert (found.model("candidate").version, found.records) == (new.version, dataset.eval_records)
        assert found.probes == {}
        evidence = read_evidence(store, runs.read(store, "look", type(found)))
        assert len(set(evidence.names)) == dataset.eval_records
        assert evidence.pairs(METRICS["loss"], role) is not None


@pytest.mark.slow
def test_a_champion_that_another_release_trained_is_still_measured(config, store, tmp_path, monkeypatch):
    theirs = changed(config, "method.rank=4", "method.base=int8")
    old, new = published(theirs, store, tmp_path, seed=2), published(config, store, tmp_path, seed=1)
    promote(store, config.adapter.name, old.version)

    def of_another_release(*arguments):
        lineage = read_lineage(*arguments)
        stored = lineage["config"]
        # Keys that are gone since, a section too, one that is new, and a value that no training takes any more.
        del stored["ray"]["cpu_matmul_dtype"]
        stored["train"]["zero_stage"] = 5
        return lineage | {"config": stored | {"model": stored["model"] | {"gone": 1}, "tune": {"trials": 3}}}

    monkeypatch.setattr(recorded, "read_lineage", of_another_release)
    sharded = changed(config, "train.zero_stage=3")  # which int8 is not trained with, and is measured all the same
    contenders = _contenders(sharded, store, new)
    found = measure_shard(contenders, RECORDS[:4], shard_index=0)
    assert contenders[1].config.method.r == 4
    assert contenders[1].config.method.row.base == "int8"
    assert len(found.scores["champion"]) == 4


def test_prompt_gain_is_the_loss_behind_the_next_prompt_minus_the_loss_behind_its_own(config, store, tmp_path):
    version = published(config, store, tmp_path, seed=1)
    records = RECORDS[:3]
    contenders = _contenders(config, store, version)
    found = measure_shard(contenders, records, shard_index=0)
    tokens = list(found.tokens.values())
    summary = compared(config, contenders, records, tokens, found.scores, run_id="r")
    plain = plain_of(config, store, version, tmp_path)
    own = sum(plain.nll(record) for record in records)
    other = sum(
        plain.nll(record, prompt_of=behind) for record, behind in zip(records, [*records[1:], records[0]], strict=True)
    )
    metrics = summary.models["candidate"].metrics
    assert metrics["prompt_gain"] == pytest.approx((other - own) / sum(tokens), abs=2 * NOISE)
    assert metrics["loss"] == pytest.approx(own / sum(tokens), abs=NOISE)
    assert summary.metric("base", "prompt_gain") is None
    assert (summary.models["champion"], summary.paired["champion"], summary.samples[0]["champion"]) == (None,) * 3
    assert abs(other - own) / sum(tokens) > 3 * NOISE


def test_a_record_too_long_for_one_contender_is_left_out_of_all(config, store, tmp_path):
    long = Record("long", [Message("user", "sky")], "x" * 45)
    longer = Record("longer", [Message("user", "sky")], "x" * 80)
    theirs = changed(config, "model.max_length=48")
    old, new = published(theirs, store, tmp_path, seed=2), published(config, store, tmp_path, seed=1)
    records = [RECORDS[0], long, RECORDS[1], longer]
    alone = measure_shard(_contenders(config, store, new), records, shard_index=0)
    assert list(alone.tokens) == [RECORDS[0].id, "long", RECORDS[1].id]
    promote(store, config.adapter.name, old.version)
    found = measure_shard(_contenders(config, store, new), records, shard_index=0)
    assert list(found.tokens) == [RECORDS[0].id, RECORDS[1].id]
    assert {role: len(scores) for role, scores in found.scores.items()} == {"base": 2, "champion": 2, "candidate": 2}
    with pytest.raises(DataError, match=r"no held-out record fits model\.max_length 64: raise it"):
        measure_shard(_contenders(config, store, new), [longer], shard_index=0)


def test_an_nf4_candidate_is_measured_on_an_nf4_base(config, store, tmp_path):
    quantised = changed(config, "method.name=qlora")
    version = published(quantised, store, tmp_path, seed=1)
    four, sixteen = (
        measure_shard(_contenders(each, store, version), RECORDS[:3], shard_index=0) for each in (quantised, config)
    )
    for role in ("base", "candidate"):
        assert four.scores[role] != sixteen.scores[role]
        for a, b in zip(four.scores[role], sixteen.scores[role], strict=True):
            assert a.nll == pytest.approx(b.nll, rel=0.5)


def test_a_version_whose_files_were_tampered_with_is_not_measured(config, store, tmp_path):
    version = published(config, store, tmp_path, seed=1)
    path = tmp_path / "seed-1" / "adapter-lora" / "adapter_model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(path).items()}, path)
    store.put(store.key(f"{version.uri}/adapter_model.safetensors"), path)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        measure_shard(_contenders(config, store, version), RECORDS, shard_index=0)


def test_what_is_kept_of_each_record_is_what_the_gate_reads(store):
    records = [dataclasses.replace(record, group=f"g{row % 4}") for row, record in enumerate(RECORDS)]
    scores = {
        role: [Score(float(row), other, "", dict.fromkeys(MARKS, 0.5)) for row in range(12)]
        for role, other in (("base", None), ("candidate", 9.0))
    }
    _write_records(store, "run-1", records, [2] * 12, scores)
    found = parse_evidence(store.get("runs/run-1/evaluation_records.parquet"), "it")
    assert found.num_independent == 4
    pairs = found.pairs(METRICS["loss"], "base")
    assert pairs.ours.tolist() == list(range(12))
    assert pairs.groups.tolist() == [0, 1, 2, 3] * 3
    assert found.columns["candidate_other_prompt_nll"].tolist() == [9.0] * 12
    assert "base_other_prompt_nll" not in found.columns


def test_new_and_known_records_are_compared_apart_and_few_without_a_bound(config):
    def scores(right: list[int], nll: float) -> list[Score]:
        return [
            Score(nll, None, "", {**dict.fromkeys(MARKS, 0.0), "exact_match": float(row in right)}) for row in range(12)
        ]

    theirs, ours = scores([8, 9, 10, 11], 2.0), scores([0, 1, 2, 8, 9, 10], 1.0)
    measured, is_new = {"champion": theirs, "candidate": ours}, [row < 4 for row in range(12)]
    enough = since_champion(changed(config, "gate.min_records=4"), RECORDS, [2] * 12, measured, is_new)
    assert {which: [(each.metric, each.records, each.difference) for each in of] for which, of in enough.items()} == {
        "new": [("loss", 4, 0.5), ("exact_match", 4, 0.75)],
        "seen": [("loss", 8, 0.5), ("exact_match", 8, -0.125)],
    }
    assert enough["new"][1] == paired_difference(ours[:4], theirs[:4], [2] * 4, "exact_match")
    few = since_champion(changed(config, "gate.min_records=5"), RECORDS, [2] * 12, measured, is_new)
    assert few["new"] == [each.model_copy(update={"ci95": None}) for each in enough["new"]]
    assert few["seen"] == enough["seen"]
    assert since_champion(config, RECORDS, [2] * 12, measured, [False] * 12) == {}


def test_the_comparison_holds_what_gate_and_report_read(config, store, tmp_path):
    old, new = (published(config, store, tmp_path, seed=seed) for seed in (2, 1))
    promote(store, config.adapter.name, old.version)
    config = changed(config, "evaluate.samples=2", "gate.metric=exact_match", 'evaluate.metrics=["operator:eq"]')
    contenders = _contenders(config, store, new)
    asked = [dataclasses.replace(r, prompt=[Message("system", "Be brief."), *r.prompt]) for r in RECORDS]
    scored = measure_shard(contenders, asked, shard_index=0)
    found = compared(config, contenders, asked, list(scored.tokens.values()), scored.scores, run_id="r")
    assert found.records == len(RECORDS)
    versions = {role: model.version for role, model in found.models.items()}
    assert versions == {"base": None, "champion": old.version, "candidate": new.version}
    always = {key for key, metric in METRICS.items() if not metric.on_request}
    for model in found.models.values():
        assert model.metrics.keys() == {*always, "operator:eq"}
        assert model.metrics["operator:eq"] == model.metrics["exact_match"]
    assert found.paired.keys() == {"base", "champion"}
    assert {pair.metric for pair in found.paired.values()} == {"exact_match"}
    assert len(found.samples) == 2
    for sample, record in zip(found.samples, RECORDS, strict=False):
        assert sample.keys() == {"id", "prompt", "reference", "base", "champion", "candidate"}
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": record.prompt[0].content}]
        assert (sample["id"], sample["prompt"], sample["reference"]) == (record.id, turns, record.answer)
    assert found.generation == {"max_new_tokens": MAX_NEW_TOKENS, "decoding": "greedy"}


def test_the_best_version_so_far_is_measured_where_a_promotion_named_another_than_the_champion(config, store, tmp_path):
    best, champion, new = (published(config, store, tmp_path, seed=seed) for seed in (3, 2, 1))
    name = config.adapter.name
    promote(store, name, best.version)
    promote(store, name, champion.version, cause=Cause("run", evidence={"anchor": best.version}))

    def held_to() -> list[tuple[str, str | None]]:
        return [(each.role, each.version and each.version.version) for each in _contenders(config, store, new)]

    all_four = [("base", None), ("champion", champion.version), ("anchor", best.version), ("candidate", new.version)]
    assert held_to() == all_four
    contenders = _contenders(config, store, new)
    found = measure_shard(contenders, RECORDS[:2], shard_index=0)
    evaluation = compared(config, contenders, RECORDS[:2], list(found.tokens.values()), found.scores, run_id="r")
    assert evaluation.model("anchor").version == best.version
    assert evaluation.metric("anchor", "loss") != evaluation.metric("champion", "loss")
    # One more night, and back again: what that night's champion was held to, the next candidate is held to.
    promote(store, name, new.version, cause=Cause("run-2", evidence={"anchor": best.version}))
    rollback(store, name)
    assert held_to() == all_four
    key = Ed25519PrivateKey.generate()
    trusting = Store(store._client, store.bucket, store.prefix, trusted_keys=[signing.public_text(key)])
    signing.revoke(store, name, best.version, key, reason="it was trained on the wrong data")
    assert "anchor" not in [each.role for each in _contenders(config, trusting, new)]
    rollback(store, name)
    assert [role for role, _ in held_to()] == ["base", "champion", "candidate"]


def test_where_a_key_is_trusted_a_run_compares_its_own_candidate_unsigned_and_no_other(config, store, tmp_path):
    old, new = (published(config, store, tmp_path, seed=seed) for seed in (2, 1))
    key = Ed25519PrivateKey.generate()
    config = changed(config, f'registry.trusted_keys=["{signing.public_text(key)}"]')
    ids = {"version": new.version, "version_uri": new.uri}
    runs.write(store, "ours", TrainResult(**ids, manifest_sha256=new.manifest_sha256))
    runs.write(store, "changed", TrainResult(**ids, manifest_sha256="0" * 64))
    runs.write(store, "earlier", TrainResult(**ids))

    def roles(run_id: str) -> list[str]:
        return [*measure_shard(_contenders(config, store, new, run_id), RECORDS[:1], shard_index=0).scores]

    assert roles("ours") == ["base", "candidate"]
    for run_id in ("changed", "earlier", "another", ""):
        with pytest.raises(IntegrityError, match=f"{new.version} is signed by none"):
            roles(run_id)
    promote(store, config.adapter.name, old.version)
    with pytest.raises(IntegrityError, match=f"{old.version} is signed by none"):
        roles("ours")
    signing.sign(store, config.adapter.name, old.version, key, alias="production")
    assert "champion" in roles("ours")


def test_labels_that_only_their_writing_tells_apart_are_scored_as_such(config):
    config = changed(config, 'evaluate.metrics=["label_accuracy"]')
    base = Contender("base", config, None, base_model.resolve(config.model).identity)
    (answer,) = measure_shard([base], RECORDS[:1], shard_index=0).scores["base"]
    assert answer.text.swapcase() != answer.text
    other = dataclasses.replace(RECORDS[0], answer=answer.text.swapcase())

    def marked(contender: Contender) -> float:
        return measure_shard([contender], [other], shard_index=0).scores["base"][0].marks["label_accuracy"]

    assert marked(base) == 1
    assert marked(dataclasses.replace(base, alike=alike([answer.text, other.answer]))) == 0


@pytest.mark.parametrize(("answer", "expected"), [("b", 8), ("b" * 400, 401)])
def test_an_unset_answer_length_is_the_longest_references(config, answer, expected):
    longer = changed(config, "model.max_length=512")
    unset = longer.model_copy(update={"evaluate": longer.evaluate.model_copy(update={"max_new_tokens": None})})
    records = [*RECORDS[:2], Record("long", [Message("user", "sky")], answer)]
    chat = chat_format.load(base_model.resolve(unset.model), unset.model)
    assert with_room_for_answers(unset, records, chat).evaluate.max_new_tokens == expected
    assert with_room_for_answers(longer, records, chat) == longer
