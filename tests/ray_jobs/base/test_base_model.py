"""From a reference to a model in memory. Nothing is faked but the size: see `tests.models.tiny` and `tiny_gguf`."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.config.schema import ModelConfig
from components.shared.errors import ConfigError, IntegrityError
from ray_jobs.base import base_model, local_cache
from ray_jobs.text import chat_format
from tests.doubles import hub
from tests.models.tiny_gguf import build_package
from tests.models.train_group import in_group
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]
RESOLVE = """
import logging, sys
from components.config.schema import ModelConfig
from ray_jobs.base import base_model
logging.basicConfig(level=logging.INFO, format="%(message)s")
base = base_model.resolve(ModelConfig(base=sys.argv[1]), weights="without weights" not in sys.argv)
print(base.path)
"""


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


def load(reference: object, base_format: str = "bf16"):
    config = ModelConfig(base=str(reference))
    return base_model.load_model(base_model.resolve(config), config, base_format, use_gpu=False)  # type: ignore[arg-type]


def in_a_process(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RESOLVE, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    input_ids = torch.arange(20)[None]
    with torch.inference_mode():
        converted = load("pkg://tiny_weights/Tiny.gguf")(input_ids=input_ids).logits
        assert torch.equal(converted, load(tiny_base)(input_ids=input_ids).logits)
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


@pytest.mark.parametrize(
    ("damage", "how"),
    [("model.safetensors", "changed"), ("tokenizer.json", "gone"), (local_cache.DIGESTS, "changed")],
)
def test_a_damaged_conversion_names_the_folder_to_delete(damage, how, package):
    base = resolve("pkg://tiny_weights/Tiny.gguf")
    if how == "gone":
        (base.path / damage).unlink()
    else:
        body = bytearray((base.path / damage).read_bytes())
        body[-1] ^= 1
        (base.path / damage).write_bytes(body)
    with pytest.raises(IntegrityError, match=f"delete {base.path}"):
        resolve("pkg://tiny_weights/Tiny.gguf")
    shutil.rmtree(base.path)
    assert resolve("pkg://tiny_weights/Tiny.gguf") == base


def test_of_a_hub_model_the_weights_are_fetched_once(tiny_base, tmp_path):
    # What openai/gpt-oss-20b, mistralai/Mistral-7B-Instruct-v0.3 and repositories with an ONNX export hold beside them.
    folder = shutil.copytree(tiny_base, tmp_path / "repository")
    others = ["original/model.safetensors", "original/config.json", "original/dtypes.json", "metal/model.bin"]
    others += ["consolidated.safetensors", "consolidated.safetensors.index.json", "onnx/model.safetensors", "LICENSE"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with hub.serving("org/name", folder) as served:
        process = in_a_process("org/name", HF_ENDPOINT=served.url, HF_HOME=str(tmp_path / "home"))
        found, output = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    path = Path(found.strip().splitlines()[-1])
    assert path.name == hub.COMMIT
    assert served.sent == {file.name for file in tiny_base.iterdir()}
    assert (path / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()


def test_whoever_needs_no_weights_of_a_hub_model_fetches_none(tiny_base, tmp_path):
    with hub.serving("org/name", shutil.copytree(tiny_base, tmp_path / "repository")) as served:
        about = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home")}
        found, output = in_a_process("org/name", "without weights", **about).communicate(timeout=PATIENCE_S)
        assert served.sent == {file.name for file in tiny_base.iterdir()} - {"model.safetensors"}
        path = Path(found.strip().splitlines()[-1])
        assert path.name == hub.COMMIT
        again, output = in_a_process("org/name", **about).communicate(timeout=PATIENCE_S)
        assert Path(again.strip().splitlines()[-1]) == path, output
        assert "model.safetensors" in served.sent
