"""From a reference to a model in memory: a folder, a package, and a folder of S3, of which a driver and workers fetch
what they need, and all read the same; and what a base's configuration limits.

Nothing is faked but the size: see `tests.models.tiny` and `tiny_gguf`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, Qwen2Config

from components.config import config_file
from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, IntegrityError
from components.store.store import ObjectInfo, Store
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from tests.models.bases import load, logits
from tests.models.shapes import small
from tests.models.tiny_gguf import build_package
from tests.models.train_group import in_group

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def package(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python package with the tiny base as a GGUF; gives the GGUF's path."""
    built = build_package(tiny_base, tmp_path / "site", "tiny_weights", "Tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))  # for ranks, which are processes of their own
    return built


def resolve(reference: object, revision: str = "") -> base_model.Base:
    return base_model.resolve(ModelConfig(base=str(reference), revision=revision))


def test_a_folder_is_used_where_it_lies_and_known_by_its_bytes(tiny_base, tmp_path, cache):
    base = resolve(tiny_base)
    assert base.path == tiny_base
    copy = shutil.copytree(tiny_base, tmp_path / "copy")
    assert resolve(copy).identity == base.identity
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    assert resolve(copy).identity != base.identity
    assert base.identity["kind"] == "folder"
    assert not cache.exists()


def test_a_commit_that_the_config_names_is_held_against_the_recorded_one():
    named = ModelConfig(base="colours/tiny", revision="a" * 40)
    with pytest.raises(IntegrityError, match=f"kind hub commit {'b' * 40}, and model.revision is {'a' * 40}"):
        base_model.resolve(named, recorded={"kind": "hub", "commit": "b" * 40})


def test_pickled_weights_are_not_loaded(tiny_base, tmp_path):
    shutil.copy(tiny_base / "config.json", tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors there; pickled weights are not loaded"):
        resolve(tmp_path)


def test_of_a_recorded_hub_base_that_commit_is_asked_for(tiny_base, tmp_path, monkeypatch):
    def at(repo: str, *, revision: str | None, **_: object) -> str:  # as huggingface_hub lays snapshots out
        folder = tmp_path / "snapshots" / (revision or "newest")
        return str(folder if folder.exists() else shutil.copytree(tiny_base, folder))

    monkeypatch.setattr("huggingface_hub.snapshot_download", at)
    config = ModelConfig(base="org/name", revision="main")
    recorded = {"kind": "hub", "commit": "c0ffee"}
    assert base_model.resolve(config).identity["commit"] == "main"
    assert base_model.resolve(config, recorded=recorded).identity == recorded


def test_a_recorded_package_may_have_another_version_of_the_same_weights(package):
    base = resolve("pkg://tiny_weights/Tiny.gguf")
    config = ModelConfig(base=base.reference)
    assert base_model.resolve(config, recorded={**base.identity, "package": "tiny==0.1"}) == base
    with pytest.raises(IntegrityError, match="kind package sha256 0, and today that is kind package sha256"):
        base_model.resolve(config, recorded={**base.identity, "sha256": "0"})


def test_a_base_whose_index_names_weights_elsewhere_is_refused(tiny_base, tmp_path):
    """transformers would read them from there, and the base's identity would not say so."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    for shard in ("../tiny/model.safetensors", "/etc/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard, "lm_head.weight": "a.safetensors"}}))
        with pytest.raises(ConfigError, match=rf"index\.json names '{shard}', which lies outside the folder"):
            resolve(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert resolve(folder).path == folder


def test_a_gguf_becomes_the_model_it_was_made_from(package, tiny_base, cache):
    base = resolve("pkg://tiny_weights/Tiny.gguf")
    assert base.path.parent == cache
    assert base.identity == {
        "kind": "package",
        "package": "tiny_weights",
        "file": "Tiny.gguf",
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
    }
    assert torch.equal(logits(load("pkg://tiny_weights/Tiny.gguf"), 20), logits(load(tiny_base), 20))
    config = ModelConfig(base=str(tiny_base))
    tokenizers = [chat_format.load(found, config).tokenizer for found in (base, resolve(tiny_base))]
    turns = [{"role": "user", "content": "sky, Ünïcode"}, {"role": "assistant", "content": "blue"}]
    texts = [tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) for tokenizer in tokenizers]
    assert texts[0] == texts[1]


def resolve_in_rank(reference: str) -> Path:
    """With what is logged on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    return resolve(reference).path


@pytest.mark.slow
def test_two_processes_at_once_convert_once(package, cache, tmp_path):
    paths = in_group(resolve_in_rank, "pkg://tiny_weights/Tiny.gguf", directory=tmp_path / "group", num_workers=2)
    output = [path.read_text() for path in (tmp_path / "group").glob("rank-*.log")]
    assert sum(log.count("converting Tiny.gguf to safetensors, once") for log in output) == 1
    assert set(paths) == {path for path in cache.iterdir() if path.is_dir()}


def test_a_conversion_that_fails_leaves_nothing_that_looks_finished(package, cache):
    package.write_bytes(package.read_bytes()[:-4096])
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever gguf says of a file that ends too early
        resolve("pkg://tiny_weights/Tiny.gguf")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def flip_the_last_bit(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", flip_the_last_bit), ("tokenizer.json", Path.unlink)]
)
def test_a_damaged_conversion_names_the_folder_to_delete(name, damage, package):
    base = resolve("pkg://tiny_weights/Tiny.gguf")
    damage(base.path / name)
    with pytest.raises(IntegrityError, match=f"delete {base.path}"):
        resolve("pkg://tiny_weights/Tiny.gguf")
    shutil.rmtree(base.path)
    assert resolve("pkg://tiny_weights/Tiny.gguf") == base


@pytest.fixture
def uploaded(store, tiny_base) -> str:
    for path in tiny_base.iterdir():
        store.put(f"bases/tiny/{path.name}", path)
    return store.uri("bases/tiny/")


def test_an_s3_folder_is_downloaded_once_and_again_when_it_changes(uploaded, store):
    first = resolve(uploaded)
    inode = (first.path / "model.safetensors").stat().st_ino
    assert resolve(uploaded) == first
    assert (first.path / "model.safetensors").stat().st_ino == inode
    store.put("bases/tiny/generation_config.json", b'{"changed": true}')
    second = resolve(uploaded)
    assert second.path != first.path
    assert second.identity != first.identity


@pytest.fixture
def on_another_machine(uploaded, store, tmp_path, monkeypatch) -> Callable[..., tuple[base_model.Base, set[str]]]:
    """The base as it is brought onto a machine of that name, and the files that are fetched for it."""
    fetched: list[str] = []
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, key, path: fetched.append(path.name) or download(self, key, path)
    )

    def bring(name: str, **how: Any) -> tuple[base_model.Base, set[str]]:
        monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / name))
        fetched.clear()
        return base_model.resolve(ModelConfig(base=uploaded), registry=store, **how), set(fetched)

    return bring


def test_a_driver_never_fetches_the_weights_of_an_s3_folder(on_another_machine, uploaded, store, tiny_base):
    config, files = ModelConfig(base=uploaded), {path.name for path in tiny_base.iterdir()}
    unread, fetched = on_another_machine("driver", weights=False)
    assert fetched == files - {"model.safetensors"}
    assert not unread.is_known
    read, fetched = on_another_machine("worker", recorded=unread.identity)
    assert fetched == files
    assert read.identity == {**resolve(tiny_base).identity, "kind": "s3"}
    assert on_another_machine("worker", recorded=unread.identity) == (read, set())
    told, fetched = on_another_machine("driver of the next run", weights=False)
    assert (told.identity, told.is_known, fetched) == (read.identity, True, files - {"model.safetensors"})
    assert chat_format.load(unread, config).pad == chat_format.load(read, config).pad

    store.put("bases/tiny/model.safetensors", (read.path / "model.safetensors").read_bytes()[::-1])
    assert not on_another_machine("driver", weights=False)[0].is_known
    with pytest.raises(IntegrityError, match="have changed since the run began"):
        on_another_machine("worker of the first run", recorded=unread.identity)


def test_what_a_version_was_trained_on_is_taken_at_its_word_until_the_weights_are_read(on_another_machine):
    recorded = {"kind": "s3", "sha256": "0" * 64}
    base, fetched = on_another_machine("driver", weights=False, recorded=recorded)
    assert (base.identity, "model.safetensors" in fetched) == (recorded, False)
    with pytest.raises(IntegrityError, match="today that is kind s3 sha256"):
        on_another_machine("worker", recorded=base.identity)


def test_workers_that_read_other_bytes_of_the_same_objects_are_told_so(on_another_machine, uploaded, store):
    unread, _ = on_another_machine("driver", weights=False)
    on_another_machine("first", recorded=unread.identity)
    store.put_json(f"bases/s3-{unread.identity['listing']}/identity.json", {"kind": "s3", "sha256": "0" * 64})
    with pytest.raises(IntegrityError, match=rf"and had kind s3 sha256 {'0' * 64} where the same objects were read"):
        on_another_machine("second", recorded=unread.identity)


def test_new_bytes_of_the_same_size_and_second_are_another_base(uploaded, store, monkeypatch):
    listing, second = Store.list, datetime(2026, 11, 29, tzinfo=UTC)
    monkeypatch.setattr(
        Store, "list", lambda self, prefix: (replace(info, last_modified=second) for info in listing(self, prefix))
    )
    first = resolve(uploaded)
    store.put("bases/tiny/model.safetensors", (first.path / "model.safetensors").read_bytes()[::-1])
    assert resolve(uploaded).identity != first.identity


def test_a_folder_beside_it_with_a_longer_name_is_not_part_of_it(uploaded, store):
    store.put("bases/tiny-other/stray.txt", b"x")
    assert not (resolve(uploaded).path / "stray.txt").exists()


@pytest.mark.parametrize("name", ["../x.json", "/x.json"])
def test_an_s3_folder_whose_objects_would_lie_elsewhere_is_refused(name, store, cache, monkeypatch):
    """Servers that keep such keys as they are exist; ours here makes paths of them."""

    def listed(_, prefix):
        return iter([ObjectInfo(key=f"{prefix}{name}", size=1, etag="0", last_modified=datetime.now(UTC))])

    monkeypatch.setattr(Store, "list", listed)
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ConfigError, match=rf"the object '.*/bases/odd/{name}' would leave the folder: rename it"):
        resolve(store.uri("bases/odd"))


def test_an_empty_s3_folder_says_so_and_leaves_nothing_in_the_cache(store, cache):
    with pytest.raises(ConfigError, match="there is nothing in this folder"):
        resolve(store.uri("bases/none"))
    assert not cache.exists()


def test_of_an_s3_folder_the_config_alone_is_read(store: Store):
    body = json.dumps(small().to_dict()).encode()
    store.put("bases/small/config.json", body)
    store.put("bases/small/model.safetensors", b"never read")
    assert base_model.read_config(ModelConfig(base=store.uri("bases/small/"))).hidden_size == 128
    store.put("bases/empty/README.md", b"nothing")
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        base_model.read_config(ModelConfig(base=store.uri("bases/empty/")))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{tmp}/nowhere", "there is no such folder"),
        ("{tmp}", r"no config\.json there"),
        ("ftp://host/model", "expected a hub id"),
        ("a/b/c", "neither a local folder nor a hub id"),
        ("org/model", "the model hub cannot be reached"),
        ("pkg://no_such_package/x.gguf", "'no_such_package' is not installed"),
        ("pkg://this/x.gguf", "'this' is not installed"),
        ("pkg://json/__init__.py", r"holds no '__init__.py'; its GGUF files are \[\]"),
    ],
)
def test_a_base_that_is_not_there_is_the_users_mistake(base, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (base_model.read_config, base_model.resolve):
        with pytest.raises(ConfigError, match=message):
            read(ModelConfig(base=base.format(tmp=tmp_path)))


def test_a_configuration_that_transformers_does_not_know_is_the_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match="cannot read its configuration"):
        base_model.read_config(ModelConfig(base=str(tmp_path)))


# Qwen2.5's model card, on texts longer than 32,768 tokens: YaRN with a factor of 4 reaches 131,072.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# Llama 3.1's config.json names what it reaches after its scaling by 8.
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (GPT2Config(), 1024),  # n_positions, which it has learned one by one
        (BloomConfig(), None),  # ALiBi: distances, no positions
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 8.0}), 32768),
        (Qwen2Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA_3), 131072),
        (Gemma3Config(text_config={"max_position_embeddings": 8192}), 8192),
    ],
)
def test_how_long_a_text_the_base_has_positions_for(base, expected):
    assert base_model.positions(base) == expected


TABLE = {"adapter": {"name": "a"}, "model": {"base": "gpt2"}, "data": {"source": "x.jsonl"}, "method": {"name": "lora"}}


def test_a_context_that_nobody_set_is_no_longer_than_the_base_has_positions_for():
    said: list[str] = []
    written = config_file.dumps(config_file.validate(TABLE))  # as a run's steps hand it on
    config = base_model.fitted(config_file.loads(written), GPT2Config(n_positions=512), said.append)
    assert config.model.max_length == 512
    assert said == ["model.max_length: 512, all the positions that gpt2 has"]
    assert config.digest == config_file.validate(TABLE, ["model.max_length=512"]).digest
    assert base_model.fitted(config, GPT2Config(n_positions=512), said.append) == config
    for roomy in (GPT2Config(n_positions=2048), BloomConfig()):
        assert base_model.fitted(config_file.loads(written), roomy, said.append).model.max_length == 1024
    assert len(said) == 1


def test_a_context_that_was_set_beyond_the_positions_is_refused_and_the_positions_are_not():
    for length in (1024, 1025):  # the default as well, where it was set
        config = config_file.loads(config_file.dumps(config_file.validate(TABLE, [f"model.max_length={length}"])))
        reason = rf"model\.max_length {length} is more than the {length - 1} positions of model\.base gpt2"
        with pytest.raises(ConfigError, match=reason):
            base_model.fitted(config, GPT2Config(n_positions=length - 1), pytest.fail)
        assert base_model.fitted(config, GPT2Config(n_positions=length), pytest.fail) == config


def test_a_context_that_is_lowered_leaves_room_for_the_answers_that_were_asked_for():
    config = config_file.validate(TABLE, ["evaluate.max_new_tokens=600"])
    message = r"base gpt2: evaluate\.max_new_tokens 600 leaves no room .* model\.max_length 512"
    with pytest.raises(ConfigError, match=message):
        base_model.fitted(config, GPT2Config(n_positions=512), [].append)


def test_a_folder_of_the_users_home_is_planned_and_trained(tiny_base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_base)
    config = ModelConfig(base="~/model")
    assert base_model.resolve(config).path == tmp_path / "model"
    assert base_model.read_config(config).hidden_size == 64
    assert base_model.locate(config) == tmp_path / "model"
