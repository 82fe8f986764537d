"""Manifests for servers: the layout is compared with how Ray Serve LLM's own loader finds an adapter."""

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.handover.serve_manifest import MANIFESTS, Served, manifest, placed, served
from components.registry import signing
from components.shared.errors import IntegrityError, UserError
from components.store.store import Store
from tests.components.handover.published import written
from tests.frozen import registry

FACTS = Served("icd", "v1", "s3://b/adapters/icd/versions/v1", "org/base", "abc", 16)


@pytest.mark.parametrize("base", ["org/base", "/srv/base", "s3://b/bases/one"])
def test_ray_serve_finds_a_version_by_its_folder_as_its_own_loader_joins_it(base: str) -> None:
    (application,) = manifest(dataclasses.replace(FACTS, base=base), "ray-serve")["applications"]
    (config,) = application["args"]["llm_configs"]
    source = Path(importlib.util.find_spec("ray").origin).parent / "llm/_internal/common/utils/lora_utils.py"
    names = {"get_base_model_id", "get_lora_id"}
    tree = ast.parse(source.read_text())
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]
    loader: dict[str, Any] = {}
    exec(compile(ast.Module(functions, []), str(source), "exec"), loader)  # ray's own, without its serving packages
    asked = f"{config['model_loading_config']['model_id']}:{FACTS.version}"
    assert loader["get_base_model_id"](asked) == base.removeprefix("s3://")
    assert config["model_loading_config"]["model_source"] == base
    # os.path.join(remote_path, lora_name) in download_lora_adapter
    assert f"{config['lora_config']['dynamic_lora_loading_path']}/{loader['get_lora_id'](asked)}" == FACTS.uri
    assert config["engine_kwargs"] == {"enable_lora": True, "max_lora_rank": 16, "max_loras": 16, "revision": "abc"}


def test_kserve_and_vllm_name_the_version_and_the_rank_that_they_must_allow() -> None:
    spec = manifest(FACTS, "kserve")["spec"]
    assert spec["model"]["lora"]["adapters"] == [{"name": "v1", "uri": FACTS.uri}]
    assert "template" not in spec
    large = manifest(Served("icd", "v1", FACTS.uri, "org/base", "", 256), "kserve")["spec"]
    assert large["template"]["containers"][0]["env"][0]["value"] == "--max-lora-rank=256"
    command = " ".join(manifest(FACTS, "vllm"))
    assert command.startswith("vllm serve org/base --revision abc --enable-lora --max-lora-rank 16")
    assert command.endswith("--lora-modules v1=./icd-v1")
    resolving = " ".join(manifest(FACTS, "vllm-resolver"))
    # vLLM asks its resolvers only where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
    assert resolving == (
        "env FINELOOP_LORA_FOLDER=./icd VLLM_ALLOW_RUNTIME_LORA_UPDATING=true "
        "vllm serve org/base --revision abc --enable-lora --max-lora-rank 16"
    )


def test_where_keys_are_trusted_no_server_is_sent_to_what_none_of_them_signed(store: Store) -> None:
    version, key = written().published(store), Ed25519PrivateKey.generate()
    strict = Store(store._client, store.bucket, store.prefix, trusted_keys=[signing.public_text(key)])
    with pytest.raises(IntegrityError, match="signed by none"):
        served(strict, version)
    signing.sign(store, "icd", version.version, key, alias="production")
    facts = served(strict, version)
    assert facts.version == version.version
    # Its manifest leads to the folder of all versions, and the server loads any that a request names.
    with pytest.raises(UserError, match=r"registry\.trusted_keys is set: use --for vllm-resolver"):
        manifest(facts, "ray-serve")
    for server in ("kserve", "vllm", "vllm-resolver"):
        assert manifest(facts, server) == manifest(served(store, version), server)
    assert manifest(served(store, version), "ray-serve")


@pytest.mark.parametrize(("rank", "pattern", "allowed"), [(4, {}, 8), (24, {}, 32), (4, {"layers.0.mlp": 48}, 64)])
def test_the_rank_that_servers_must_allow_holds_that_of_the_adapters_own_config(
    store: Store, rank: int, pattern: dict[str, int], allowed: int
) -> None:
    made = written()
    version = dataclasses.replace(made, adapter={**made.adapter, "r": rank, "rank_pattern": pattern}).published(store)
    # Of vLLM's choices the smallest that holds it: vllm/config/lora.py, MaxLoRARanks.
    assert f"--max-lora-rank {allowed} " in " ".join(manifest(served(store, version), "vllm"))


def test_a_server_gets_the_base_that_the_adapter_stands_on_by_a_name_that_it_reads(store: Store) -> None:
    plain, own = (written(run_id=run_id, base="").published(store) for run_id in ("promoted", "held"))
    for version, base in ((plain, "given/base"), (own, "bases/6b23e4f55dbbd7fd/f95ac8bc76594715")):
        uri = f"s3://{registry.BUCKET}/{registry.PREFIX}/{base}"
        assert manifest(served(store, version), "kserve")["spec"]["model"]["uri"] == uri
        (application,) = manifest(served(store, version), "ray-serve")["applications"]
        assert application["args"]["llm_configs"][0]["model_loading_config"]["model_source"] == uri
        for server in ("vllm", "vllm-resolver"):
            with pytest.raises(UserError, match=rf"was trained on '{uri}', which --for {server} cannot fetch"):
                manifest(served(store, version), server)
            pulled = placed(served(store, version), server)
            assert pulled.is_pulled
            assert f"vllm serve ./icd-{version.version}-base --enable-lora" in " ".join(manifest(pulled, server))
    made = written(base="models/base")
    made.lineage["base"]["identity"] = {"kind": "folder", "sha256": "0"}
    here = served(store, made.published(store))
    assert manifest(here, "vllm")[2] == str(Path.cwd() / "models/base")
    with pytest.raises(UserError, match="--for kserve cannot fetch"):
        manifest(here, "kserve")


def test_a_packaged_base_is_served_from_the_folder_that_pull_writes_or_from_a_copy_that_is_named(store: Store) -> None:
    made = written(base="pkg://x/y.gguf")
    made.lineage["base"]["identity"] = {"kind": "package", "sha256": "0"}
    facts = served(store, made.published(store))
    assert facts.base_identity == {"kind": "package", "sha256": "0"}
    (pulled, base), own = manifest(placed(facts, "vllm"), "vllm")[1:3], f"./icd-{facts.version}"
    assert (pulled, base) == ("serve", f"{own}-base")
    assert manifest(placed(facts, "vllm"), "vllm")[-1] == f"{facts.version}={own}"
    for server in ("ray-serve", "kserve"):
        with pytest.raises(UserError, match="--with-base` writes it as a folder, and --base names where"):
            manifest(placed(facts, server), server)
    copied = placed(facts, "kserve", "s3://b/bases/x")
    assert manifest(copied, "kserve")["spec"]["model"]["uri"] == "s3://b/bases/x"
    with pytest.raises(UserError, match="'-x', which --for vllm cannot fetch"):
        manifest(placed(facts, "vllm", "-x"), "vllm")


@pytest.mark.parametrize(
    "base", ["--trust-remote-code", "org/--x", "pkg://x/y.gguf", "", "a b", "org/base\n--x", "../x"]
)
def test_a_name_that_a_server_could_take_for_anything_else_is_refused(store: Store, base: str) -> None:
    made = written()
    version = dataclasses.replace(made, adapter={**made.adapter, "base_model_name_or_path": base}).published(store)
    for server in MANIFESTS:
        with pytest.raises(UserError, match=r"was trained on '.*cannot fetch"):
            manifest(served(store, version), server)


def test_what_cannot_be_served_as_it_is_is_refused_with_the_way_out(store: Store) -> None:
    made = written()
    made.lineage["recipe"]["serving"] = {"servable_as": "merged", "notes": ["its magnitudes make it no LoRA"]}
    with pytest.raises(UserError, match=r"not served as it is .its magnitudes.*adapters export"):
        served(store, made.published(store))


@pytest.mark.parametrize(
    ("section", "value"), [("base", None), ("recipe", {}), ("base", {"identity": {"commit": "--x"}})]
)
def test_a_lineage_that_does_not_say_what_serving_takes_is_one_sentence(store: Store, section: str, value: Any) -> None:
    made = written()
    version = dataclasses.replace(made, lineage={**made.lineage, section: value}).published(store)
    with pytest.raises(IntegrityError, match="does not say how it is served"):
        served(store, version)
