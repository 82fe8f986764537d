"""vLLM, asked for adapters by name: it gets verified copies that are named by their version."""

import asyncio
import importlib
import json
import sys
import tomllib
from pathlib import Path

import pytest

from components.registry import vllm_resolver
from components.registry.aliases import promote
from components.registry.store import Store
from components.registry.versions import publish_version
from components.shared.errors import IntegrityError
from tests.doubles import vllm
from tests.doubles.vllm import Server

ROOT = Path(__file__).parents[3]


def published(store: Store, weights: bytes, *, base: str = "org/base", servable_as: str = "lora") -> str:
    recipe = {"serving": {"servable_as": servable_as, "notes": ["its magnitudes make it no LoRA"]}}
    lineage = {"run_id": "r", "base": {"reference": base}, "recipe": recipe}
    files = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    return publish_version(store, "icd", files, lineage=lineage).version


@pytest.fixture
def server(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A vLLM that has loaded the plugin as its entry point names it."""
    registry = vllm.installed(monkeypatch)
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
[adapter]
name = "icd"
[model]
base = "org/base"
[data]
source = "data.jsonl"
[registry]
bucket = "{store.bucket}"
prefix = "{store.prefix}"
"""
    )
    monkeypatch.setenv(vllm_resolver.CONFIG_VARIABLE, str(config))
    monkeypatch.setenv(vllm_resolver.FOLDER_VARIABLE, str(tmp_path / "copies"))
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = entry_points["vllm.general_plugins"]["fineloop"].partition(":")
    getattr(importlib.import_module(module), function)()
    assert all(isinstance(each, vllm.LoRAResolver) for each in registry.resolvers.values())
    return Server(registry, "org/base")


def test_an_alias_becomes_a_verified_copy_named_by_its_version_and_moving_it_another_name(
    server: Server, store: Store
) -> None:
    one, two = published(store, b"one"), published(store, b"two")
    promote(store, "icd", one)
    first = asyncio.run(server.resolve_lora("icd@production"))
    assert first is not None
    assert first.lora_name == f"icd@{one}"
    assert (Path(first.lora_path) / "adapter_model.safetensors").read_bytes() == b"one"
    promote(store, "icd", two)
    assert asyncio.run(server.resolve_lora("icd@production")) is first  # as vLLM does, until it is told to unload it
    server.unload_lora_adapter("icd@production")
    second = asyncio.run(server.resolve_lora("icd@production"))
    assert second is not None
    assert (second.lora_name, second.lora_int_id) == (f"icd@{two}", 2)
    assert (Path(second.lora_path) / "adapter_model.safetensors").read_bytes() == b"two"
    assert {each.lora_name: each.lora_path for each in server.added} == {
        f"icd@{version}": str(Path(second.lora_path).with_name(f"icd-{version}")) for version in (one, two)
    }


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
    published(store, b"one")
    assert asyncio.run(server.resolve_lora(name)) is None


@pytest.mark.parametrize("made", [{"base": "org/another"}, {"servable_as": "merged"}])
def test_an_adapter_of_another_base_or_no_lora_is_not_served(
    server: Server, store: Store, tmp_path: Path, made: dict[str, str]
) -> None:
    published(store, b"one", **made)
    assert asyncio.run(server.resolve_lora("icd")) is None
    assert not (tmp_path / "copies").exists()


def test_a_damaged_version_is_served_by_nobody(server: Server, store: Store, tmp_path: Path) -> None:
    version = published(store, b"one")
    store.put(f"adapters/icd/versions/{version}/adapter_model.safetensors", b"0ne")
    with pytest.raises(IntegrityError, match="adapter_model"):
        asyncio.run(server.resolve_lora("icd"))
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_vllm_that_is_not_told_where_to_keep_copies_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_resolver.FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    vllm_resolver.register()
