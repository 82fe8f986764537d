"""What a training begins with: the records that it reads, which of them are left out or cut, and where it goes on from
a version, that version's weights, to the bit, and nothing else fits.
"""

import functools
import pickle
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from components.config import config_file
from components.prepare.dataset import Message, Record
from components.prepare.split import judges, validation_and_test
from components.registry import collect
from components.registry.aliases import promote
from components.registry.versions import Version, publish_version, read_lineage
from components.shared.errors import ConfigError, DataError, IntegrityError
from components.store import folders
from ray_jobs.adapters import dora
from ray_jobs.base import base_model
from ray_jobs.text import chat_format, token_store
from ray_jobs.text.batching import tokenize
from ray_jobs.training import checkpoint, opening, starting, zero
from tests.doubles import datasets, hub
from tests.models.spec import changed
from tests.models.tiny import build_base, colour_rows
from tests.models.train_group import fit_in_rank, in_group
from tests.ray_jobs.training.in_store import in_store, published


def chosen(config, store, run_id: str) -> Version | None:
    began = starting.choose_start(config, store, run_id, base_model.resolve(config.model))
    return began and began.version


def test_the_version_that_a_run_began_from_stays_while_the_run_is_under_way(config, store):
    rules = collect.Rules(keep_last=0, older_than=timedelta(0))
    version = published(config, store)
    gone = collect.removals(store, ["colours"], rules, now=datetime.now(UTC))
    assert [each.name for each in gone if each.kind == "version"] == [f"colours@{version.version}"]
    assert chosen(in_store(config, store, f"train.start_from=colours@{version.version}"), store, "run-1") is not None
    assert collect.removals(store, ["colours"], rules, now=datetime.now(UTC)) == []


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_run_begins_with_the_weights_of_the_version_that_it_goes_on_from(config, store, method):
    config = in_store(config, store, f"method.name={method}", "train.start_from=production")
    assert chosen(config, store, "run-0") is None  # nothing is in production: the base
    version = published(config, store)
    promote(store, "colours", version.version)
    began = chosen(config, store, "run-1")
    assert began.version == version.version
    weights = opening.start_weights(store, began)
    adapted = opening.assemble(config, base_model.resolve(config.model), use_gpu=False, start=weights)
    dora.settle(adapted)
    found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    # Whatever happens to the alias, a run that is started again begins where it began.
    other = published(config, store, moved=2.0, start=began)
    promote(store, "colours", other.version)
    assert chosen(config, store, "run-1").version == version.version
    assert chosen(config, store, "run-2").version == other.version
    assert read_lineage(store, other)["parents"] == [version.uri]


def test_a_driver_that_reads_no_weights_holds_the_workers_to_the_base_of_the_version(
    config, store, tmp_path, monkeypatch
):
    """The version's lineage names the bytes that its run's workers read, though their driver knew of none."""
    for path in base_model.resolve(config.model).path.iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    config = in_store(config, store, f"model.base={store.uri('bases/tiny')}", "train.start_from=production")
    with monkeypatch.context() as on_the_driver:
        on_the_driver.setenv("FINELOOP_CACHE", str(tmp_path / "driver"))
        unread = base_model.resolve(config.model, weights=False, registry=store)
    assert not unread.is_known
    version = published(config, store, told=unread.identity)
    promote(store, "colours", version.version)
    wanted = starting.choose_start(config, store, "run-1", unread).base
    assert wanted.identity == read_lineage(store, version)["base"]["identity"]
    assert wanted.identity == base_model.resolve(config.model).identity
    weights = store.get("bases/tiny/model.safetensors")
    store.put("bases/tiny/model.safetensors", weights[:-2] + b"\0\0")
    with pytest.raises(IntegrityError, match="the adapter was trained on"):
        base_model.resolve(config.model, recorded=wanted.identity, registry=store)


def fit_from(version: Version, config_toml: str, *, breaks: bool) -> tuple[list[float], int]:
    """This rank's losses, and how often it had base and adapter made."""
    initialize, adapted = zero.initialize, opening.assemble

    def break_one(model: Any, *arguments: Any) -> Any:
        engine = initialize(model, *arguments)
        weight = engine.module.get_parameter("base_model.model.model.layers.1.mlp.down_proj.base_layer.weight")
        weight.ds_tensor.copy_(weight.ds_tensor.flip(0))
        return engine

    with (
        mock.patch.object(zero, "initialize", break_one if breaks else initialize),
        mock.patch.object(opening, "assemble", side_effect=adapted) as made,
    ):
        fitted = fit_in_rank(config_file.loads(config_toml), colour_rows(36), run_id="on", start=version)
    return [each["loss"] for each in fitted.records if each["kind"] == "train"], made.call_count


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", pytest.param("bf16", marks=pytest.mark.full)])
def test_under_zero_3_nobody_holds_the_model_whole_to_go_on_and_a_broken_shard_is_seen(config, store, tmp_path, base):
    settings = [f"method.base={base}", "train.max_steps=2", "ray.cpu_matmul_dtype=bfloat16"]
    config = in_store(config, store, *settings)
    version = published(config, store, moved=0.02)
    sharded, whole = (config_file.dumps(in_store(config, store, f"train.zero_stage={stage}")) for stage in (3, 0))
    fit, breaking = (functools.partial(fit_from, version, breaks=breaks) for breaks in (False, True))
    (losses, made), _ = in_group(fit, sharded, directory=tmp_path, num_workers=2)
    assert made == 1  # what is trained, in shards
    (expected, _), _ = in_group(fit, whole, directory=tmp_path, num_workers=2)
    assert losses == pytest.approx(expected, abs=0.02)
    with pytest.raises(RuntimeError, match=r"the same model unsharded is .* training would go on other weights"):
        in_group(breaking, sharded, directory=tmp_path, num_workers=2)


def fit_each(tomls: dict[str, str], version: Version) -> dict[str, tuple[dict[str, np.ndarray], float]]:
    """Final weights, and the held-out loss of what is published, of each."""
    found = {}
    for name, toml in tomls.items():
        fitted = fit_in_rank(config_file.loads(toml), colour_rows(36), run_id=name, start=version)
        weights = checkpoint.trainable(fitted.adapted).items()
        found[name] = {key: weight.detach().float().numpy() for key, weight in weights}, fitted.trained.eval_loss
    return found


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_published_lies_on_the_line_from_what_was_trained_to_where_it_began(
    config, store, tmp_path, zero_stage
):
    settings = ["train.max_steps=6", f"train.zero_stage={zero_stage}", "ray.cpu_matmul_dtype=bfloat16"]
    config = in_store(config, store, *settings)
    version = published(config, store, moved=0.02)
    going_on = "train.start_from=production"
    tomls = {
        "whole": config_file.dumps(in_store(config, store, going_on)),
        "nowhere": config_file.dumps(in_store(config, store, going_on, "train.learning_rate=1e-12")),
        "three quarters": config_file.dumps(in_store(config, store, going_on, "train.start_share=0.25")),
    }
    found, *_ = in_group(fit_each, tomls, version, directory=tmp_path, num_workers=2)
    (whole, whole_loss), (began, began_loss), (between, loss) = found.values()
    moved = 0.0
    for name, weight in between.items():
        np.testing.assert_allclose(weight, 0.75 * whole[name] + 0.25 * began[name], rtol=2**-8, atol=1e-7)
        moved = max(moved, float(np.abs(whole[name] - began[name]).max()))
    assert moved > 0.02
    assert loss not in (whole_loss, began_loss)
    assert min(whole_loss, began_loss) - 0.05 < loss < max(whole_loss, began_loss)


def test_a_share_of_the_base_is_refused(config, store):
    with pytest.raises(ConfigError, match=r"train\.start_from=production, or remove train\.start_share"):
        in_store(config, store, "train.start_share=0.5")


def test_another_method_rank_or_base_is_refused_with_the_reason(config, store, tmp_path):
    version = published(in_store(config, store), store)
    from_it = f"train.start_from=colours@{version.version}"
    for override, message in (
        ("method.rank=4", f"{version.version} was trained with method.rank = 8, and this run has 4: set it so"),
        ("method.name=rslora", "was trained with method.scaling = 'classic', and this run has 'rslora'"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(in_store(config, store, from_it, override), store, override)
    base, other = config.model.base, build_base(tmp_path, seed=1)
    with pytest.raises(
        IntegrityError, match=f"trained on {base} with kind folder sha256 .*, and model.base is {other} with"
    ):
        chosen(in_store(config, store, from_it, f"model.base={other}"), store, "another base")


def begun(config, store, run_id: str) -> base_model.Base:
    """The base of a run as its driver resolves it, and as the version that it starts from has it."""
    keep = starting.identity_to_keep(config, store, run_id, print)
    base = starting.resolve_base(config, store, print, recorded=keep).base
    starting.choose_start(config, store, run_id, base)
    return base


@pytest.mark.parametrize("start_from", ["production", "base"])
def test_a_commit_at_the_hub_ends_no_night_and_the_base_moves_where_it_is_told_to(
    config, store, tmp_path, monkeypatch, tiny_base, start_from
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))
    with hub.serving("colours/tiny", tiny_base) as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        nightly = in_store(config, store, "model.base=colours/tiny", f"train.start_from={start_from}")
        assert begun(nightly, store, "first").identity["commit"] == hub.COMMIT
        promote(store, "colours", published(nightly, store).version)
        served.commit = hub.LATER
        assert begun(nightly, store, "second").identity["commit"] == hub.COMMIT
        moved = in_store(nightly, store, f"model.revision={hub.LATER}", "train.start_from=base")
        assert begun(moved, store, "moved").identity["commit"] == hub.LATER
        going_on = in_store(moved, store, "train.start_from=production")
        names_both = f"colours/tiny with kind hub commit {hub.COMMIT}, and model.base is .* commit {hub.LATER}: name"
        with pytest.raises(IntegrityError, match=names_both):
            begun(going_on, store, "going on")
        promote(store, "colours", published(moved, store, moved=2.0).version)
        assert begun(nightly, store, "third").identity["commit"] == hub.LATER
        # Another branch than theirs is what it names today.
        assert begun(in_store(moved, store, "model.revision=dev"), store, "dev").identity["commit"] == served.commit


def test_weights_that_were_changed_are_not_begun_with(config, store):
    version = published(in_store(config, store), store)
    key = f"adapters/colours/versions/{version.version}/adapter_model.safetensors"
    store.put(key, store.get(key)[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors has sha256 \w+, the manifest says \w+"):
        opening.start_weights(store, version)


@pytest.mark.parametrize(
    ("more", "found"), [({"usage": {"flops_with_parents": 5e18}}, 5e18), ({"usage": {}}, None), ({}, None)]
)
def test_what_the_versions_before_it_computed_is_known_where_they_say_so(store, more, found):
    files = {"adapter_model.safetensors": b"1", "adapter_config.json": b"{}"}
    version = publish_version(store, "icd", files, lineage={"run_id": "r", "training": {"more": more}})
    assert starting.flops_of(store, version) == found
    assert starting.flops_of(store, None) == 0


def records(*lengths):
    return [Record(f"r{place}", [Message("user", "x" * length)], "blue") for place, length in enumerate(lengths)]


@pytest.fixture
def chat(config):
    return chat_format.load(base_model.resolve(config.model), config.model)


def planned(train, evaluation, chat, config, store):
    """What the driver knows of both splits, and what it says."""
    folder = datasets.publish(store, train=train, evaluation=evaluation)
    said = []
    return starting.read_splits(store, folder.uri, resolved(chat, config), said.append), said


def resolved(chat, config):
    base = base_model.resolve(config.model)
    return starting.ResolvedBase(config, base, base_model.load_config(base.path, config.model), chat)


def test_prompts_that_are_cut_are_counted_and_limited_as_answers_are(config, chat, store):
    most = changed(config, "data.max_reject_share=0.25")
    (train, _), said = planned(records(10, 100, 10, 10), records(20), chat, most, store)
    assert len(train) == 4
    assert said == ["made 1 prompt shorter, to fit model.max_length 64"]
    split = token_store.load(store, train.stored)
    assert (list(split.cut), list(split.too_long)) == (["r1"], [])
    with pytest.raises(DataError, match=r"the prompts of 2 of 4 records \(50%; as 'r1'\) are too long for model\.max"):
        planned(records(10, 100, 100, 10), records(20), chat, most, store)


def test_system_messages_that_lose_their_end_are_counted(config, chat, store):
    asked = [Message("system", "s" * 80), Message("user", "x" * 10)]
    train = [Record("s", asked, "b"), *records(100, 10)]
    _, said = planned(train, records(20), chat, changed(config, "data.max_reject_share=1"), store)
    assert said == ["made 2 prompts shorter, to fit model.max_length 64, 1 of them in the system message too"]


def test_answers_that_are_too_long_are_left_out_counted_and_limited(config, chat, store):
    most = changed(config, "data.max_reject_share=0.25")
    long = [Record("r9", [Message("user", "x" * 10)], "b" * 80)]
    (train, _), said = planned([*records(10, 10), *long, *records(*[10] * 3)[2:]], records(20), chat, most, store)
    why = "their answers do not fit model.max_length 64, or hold a token that ends an answer"
    assert said == [f"left out 1 record: {why}"]
    assert list(token_store.load(store, train.stored).ids) == ["r0", "r1", "r2"]
    with pytest.raises(DataError, match=r"the answers of 1 of 3 records \(33%; as 'r9'\) are too long for model\.max"):
        planned([*long, *records(10, 10)], records(20), chat, most, store)
    with pytest.raises(DataError, match=r"the answers of 1 of 1 records \(100%; as 'r9'\) are too long for model\.max"):
        planned(records(10), long, chat, most, store)


def test_the_gate_decides_on_records_that_no_training_looks_at(config, chat, store):
    """None of them is counted either: the evaluation says which it leaves out."""
    held_out = records(*[20] * 60)
    folder = datasets.publish(store, train=records(10, 10), evaluation=held_out)
    judging = {record.id for record in judges(store, folder.uri, config).records}
    spoiled = [replace(each, answer="b" * 80) if each.id in judging else each for each in held_out]
    (_, chosen_on), said = planned(records(10, 10), spoiled, chat, config, store)
    assert said == []
    assert 0 < len(judging) < len(held_out)
    assert set(token_store.load(store, chosen_on.stored).ids) == {record.id for record in held_out} - judging


def test_the_driver_knows_the_lengths_of_what_workers_read(config, chat, store):
    few = changed(config, "train.eval_records=7", "data.max_reject_share=1")
    train, held_out = records(10, 100, 20, 30), records(*range(10, 60))
    found, _ = planned(train, held_out, chat, few, store)
    validation, _ = validation_and_test(held_out, validation_share=few.data.validation_share)
    for split, expected in zip(found, [train, validation[:7]], strict=True):
        plain = tokenize(expected, chat, few.model.max_length)
        read = token_store.load(store, split.stored)
        assert read.digest == plain.digest
        assert list(read.ids) == plain.ids
        assert split.lengths.tolist() == plain.lengths.tolist()
        assert split.num_answer_tokens.tolist() == plain.num_answer_tokens.tolist() == read.num_answer_tokens.tolist()
        assert len(pickle.dumps(split.stored)) < 1000


def test_a_dataset_is_recorded_with_the_tokens_that_were_read(config, chat, store):
    uri = datasets.publish(store, train=records(10, 20), evaluation=records(20)).uri
    assert starting.dataset_record(store, uri).tokens == {}
    read = starting.read_splits(store, uri, resolved(chat, config), print)
    recorded = starting.dataset_record(store, uri, *(split.stored for split in read)).tokens
    (train, held_out) = recorded.values()
    assert train != held_out
    for folder, sha256 in recorded.items():
        assert folders.read_manifest(store, f"{store.key(uri)}/tokens/{folder}").content_sha256 == sha256


def test_tokens_that_the_base_has_no_embeddings_for_are_refused_where_records_write_them(config, chat, store):
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<LOC>"]}, replace_extra_special_tokens=False)
    planned(records(10), records(20), chat, config, store)
    tagged = [Record("t", [Message("user", "Rome")], "<LOC>")]
    with pytest.raises(ConfigError, match=r"writes token 260 \('<LOC>'\), and the base has embeddings for 260"):
        planned(tagged, records(20), chat, config, store)
