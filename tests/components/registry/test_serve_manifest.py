"""What servers are told: the layout is held to how Ray Serve LLM's own loader finds an adapter."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from components.registry.serve_manifest import Served, manifest, served
from components.registry.store import Store
from components.registry.versions import publish_version
from components.shared.errors import UserError

FACTS = Served("icd", "v1", "s3://b/adapters/icd/versions/v1", "org/base", "abc", 16)


def lineage(base: str = "org/base", rank: int = 24, kind: str = "lora") -> dict[str, Any]:
    return {
        "run_id": "r",
        "base": {"reference": base},
        "config": {"method": {"r": rank}, "model": {"revision": None}},
        "recipe": {"serving": {"servable_as": kind, "notes": ["its magnitudes make it no LoRA"]}},
    }


def test_ray_serve_finds_a_version_by_its_folder_as_its_own_loader_joins_it() -> None:
    (application,) = manifest(FACTS, "ray-serve")["applications"]
    (config,) = application["args"]["llm_configs"]
    source = Path(importlib.util.find_spec("ray").origin).parent / "llm/_internal/common/utils/lora_utils.py"
    names = {"get_base_model_id", "get_lora_id"}
    tree = ast.parse(source.read_text())
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]
    loader: dict[str, Any] = {}
    exec(compile(ast.Module(functions, []), str(source), "exec"), loader)  # ray's own, without its serving packages
    asked = f"{config['model_loading_config']['model_id']}:{FACTS.version}"
    assert loader["get_base_model_id"](asked) == "org/base"
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


def test_what_cannot_be_served_as_it_is_is_refused_with_the_way_out(store: Store) -> None:
    def facts(number: int, **fields: Any) -> Served:
        files = {"adapter_model.safetensors": b"%d" % number, "adapter_config.json": b"{}"}
        return served(store, publish_version(store, "icd", files, lineage=lineage(**fields)))

    assert facts(1).max_lora_rank == 32  # the smallest of vLLM's that holds 24
    with pytest.raises(UserError, match=r"not served as it is .its magnitudes.*adapters export"):
        facts(2, kind="merged")
    with pytest.raises(UserError, match=r"stands on pkg://x/y.gguf, which no server fetches"):
        facts(3, base="pkg://x/y.gguf")
