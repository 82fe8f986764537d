"""vLLM, asked for adapters by name: it gets verified copies that are named by their version."""

import asyncio
import contextlib
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from components.config import config_file
from components.handover import vllm_resolver
from components.registry.aliases import promote
from components.registry.event_log import append_event
from components.registry.versions import publish_version
from components.shared.errors import IntegrityError
from components.store import folders
from components.store.store import Store
from tests.components.config.loading import GOOD
from tests.doubles import vllm
from tests.doubles.vllm import Server

ROOT = Path(__file__).parents[3]


def published(
    store: Store,
    weights: bytes,
    *,
    base: str = "org/base",
    servable_as: str = "lora",
    stands_on: Mapping[str, str] | None = None,
    **more: Any,
) -> str:
    recipe = {"serving": {"servable_as": servable_as, "notes": ["its magnitudes make it no LoRA"]}, **(stands_on or {})}
    lineage = {"run_id": "r", "base": {"reference": base, "identity": {"kind": "hub"}}, "recipe": recipe, **more}
    config = json.dumps({"r": 8, "base_model_name_or_path": (stands_on or {}).get("stands_on", base)}).encode()
    files = {"adapter_model.safetensors": weights, "adapter_config.json": config}
    return publish_version(store, "icd", files, lineage=lineage).version


@pytest.fixture
def server(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A vLLM that has loaded the plugin as its entry point names it."""
    registry = vllm.installed(monkeypatch)
    config = tmp_path / "config.toml"
    where = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    config.write_text(config_file.dumps(config_file.loads(GOOD, ["adapter.name=icd", "model.base=org/base", *where])))
    monkeypatch.setenv(vllm_resolver.CONFIG_VARIABLE, str(config))
    monkeypatch.setenv(vllm_resolver.FOLDER_VARIABLE, str(tmp_path / "copies"))
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = entry_points["vllm.general_plugins"]["fineloop"].partition(":")
    getattr(importlib.import_module(module), function)()
    assert all(isinstance(each, vllm.LoRAResolver) for each in registry.resolvers.values())
    return Server(registry, "org/base")


def test_an_alias_becomes_a_verified_copy_named_by_its_version(server: Server, store: Store) -> None:
    one, two = published(store, b"one"), published(store, b"two")
    promote(store, "icd", one)
    first = asyncio.run(server.resolve_lora("icd@production"))
    assert first.lora_name == f"icd@{one}"
    assert (Path(first.lora_path) / "adapter_model.safetensors").read_bytes() == b"one"
    promote(store, "icd", two)
    assert asyncio.run(server.resolve_lora("icd@production")) is first  # as vLLM does, until it is told to unload it
    server.unload_lora_adapter("icd@production")
    second = asyncio.run(server.resolve_lora("icd@production"))
    assert (second.lora_name, second.lora_int_id) == (f"icd@{two}", 2)
    assert (Path(second.lora_path) / "adapter_model.safetensors").read_bytes() == b"two"
    paths = {f"icd@{each}": str(Path(second.lora_path).with_name(f"icd-{each}")) for each in (one, two)}
    assert {each.lora_name: each.lora_path for each in server.added} == paths


def test_one_version_asked_for_by_several_names_at_once_is_fetched_once(server: Server, store: Store) -> None:
    version = published(store, b"one")
    promote(store, "icd", version)

    async def asked() -> set[tuple[str, str]]:
        names = ("icd", "icd@production", f"icd@{version}", f"icd@{version[:5]}")
        found = await asyncio.gather(*map(server.resolve_lora, names))
        return {(each.lora_name, each.lora_path) for each in found if each}

    ((name, path),) = asyncio.run(asked())
    assert name == f"icd@{version}"
    assert json.loads((Path(path) / "lineage.json").read_bytes())["run_id"] == "r"


@pytest.mark.parametrize("name", ["org/other-lora", "icd@staging", "unknown", "../icd"])
def test_what_the_registry_does_not_have_is_left_to_other_resolvers(server: Server, store: Store, name: str) -> None:
    promote(store, "icd", published(store, b"one"))
    assert asyncio.run(server.resolve_lora(name)) is None


@pytest.mark.parametrize("made", [{"base": "org/another"}, {"servable_as": "merged"}])
def test_an_adapter_of_another_base_or_no_lora_is_not_served(
    server: Server, store: Store, tmp_path: Path, made: dict[str, str]
) -> None:
    promote(store, "icd", published(store, b"one", **made))
    assert asyncio.run(server.resolve_lora("icd")) is None
    assert not (tmp_path / "copies").exists()


def test_a_base_that_pull_wrote_is_known_by_its_identity(
    server: Server, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, "icd", published(store, b"one", base="pkg://x/y.gguf"))
    assert asyncio.run(server.resolve_lora("icd")) is None
    base = tmp_path / "icd-v1-base"
    base.mkdir()
    monkeypatch.setattr(server, "base_model_name", str(base))
    for kind, is_served in (("package", False), ("hub", True)):
        record = {"form": "base", "base_model": {"identity": {"kind": kind}}}
        (base / "export.json").write_text(json.dumps(record))
        assert (asyncio.run(server.resolve_lora("icd")) is not None) == is_served


def test_a_base_that_loftq_made_is_known_by_its_manifest(
    server: Server, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (folders.publish(store, f"bases/{name}", {"w": name.encode()}, about={}) for name in ("1", "2"))
    stands_on = {"stands_on": store.uri("bases/1"), "stands_on_sha256": one.sha256}
    promote(store, "icd", published(store, b"one", stands_on=stands_on))
    for name, manifest, is_served in (("2", other, False), ("1", one, True)):
        base = tmp_path / f"icd-v{name}-base"
        folders.pull(store, f"bases/{name}", base, manifest_sha256=manifest.sha256)
        monkeypatch.setattr(server, "base_model_name", str(base))
        assert (asyncio.run(server.resolve_lora("icd")) is not None) == is_served


def test_only_what_an_alias_points_at_or_held_is_served_unless_an_option_says_otherwise(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held, holds, refused = (published(store, weights) for weights in (b"one", b"two", b"three"))
    promote(store, "icd", held)
    promote(store, "icd", holds)
    # Whoever trains may write events: one that names no move of the alias's own changes nothing.
    body = {"alias": "production", "from": holds, "to": refused, "manifest_sha256": "0" * 64}
    append_event(store, "icd", "promoted", body)
    found = {each: asyncio.run(server.resolve_lora(f"icd@{each}")) for each in (held, holds, refused)}
    assert [each for each, request in found.items() if request] == [held, holds]
    assert "FINELOOP_LORA_ANY_VERSION is not 1" in caplog.text
    monkeypatch.setenv(vllm_resolver.ANY_VARIABLE, "1")
    vllm_resolver.register()
    anew = Server(server.registry, "org/base")
    assert asyncio.run(anew.resolve_lora(f"icd@{refused}"))


@pytest.mark.parametrize("in_use", [True, False])
def test_copies_of_vllms_that_have_ended_are_removed_and_of_one_that_runs_they_are_not(
    server: Server, store: Store, tmp_path: Path, in_use: bool
) -> None:
    version = published(store, b"one")
    promote(store, "icd", version)
    old, own = tmp_path / "copies/copies/icd-v0", tmp_path / "copies/pulled-by-hand"
    old.mkdir(parents=True)
    own.mkdir()
    holder = ["flock", "--shared", str(tmp_path / "copies/copies.lock"), "sh", "-c", "echo held; read line"]
    with contextlib.ExitStack() as stack:
        if in_use:
            vllm_beside = stack.enter_context(subprocess.Popen(holder, stdin=PIPE, stdout=PIPE))
            assert vllm_beside.stdout.readline() == b"held\n"
        assert asyncio.run(server.resolve_lora("icd"))
        assert (old.exists(), own.exists()) == (in_use, True)


def test_a_damaged_version_is_served_by_nobody(server: Server, store: Store, tmp_path: Path) -> None:
    version = published(store, b"one")
    promote(store, "icd", version)
    store.put(f"adapters/icd/versions/{version}/adapter_model.safetensors", b"0ne")
    with pytest.raises(IntegrityError, match="adapter_model"):
        asyncio.run(server.resolve_lora("icd"))
    assert list((tmp_path / "copies/copies").iterdir()) == []


def test_a_vllm_that_is_not_told_where_to_keep_copies_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_resolver.FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    vllm_resolver.register()
