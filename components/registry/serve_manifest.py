"""What a server of LoRA adapters is told so that it serves versions: three servers, each in its own words.

A version is served under its own id and never an alias's: vLLM answers from the prefixes that it cached of an earlier
adapter of the same name (vllm-project/vllm#42125), so that moving an alias is asking for another name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from components.registry import serving
from components.registry.store import Store
from components.registry.versions import Version, read_lineage
from components.registry.vllm_resolver import FOLDER_VARIABLE
from components.shared.errors import UserError

Server = Literal["ray-serve", "kserve", "vllm", "vllm-resolver"]
KSERVE_MAX_RANK = 64
"""The --max-lora-rank that KServe's own runtime starts vLLM with; a larger one is set in the manifest."""
MOST_ADAPTERS = 16


@dataclass(frozen=True)
class Served:
    """What the manifests say of a version."""

    name: str
    version: str
    uri: str
    base: str
    revision: str
    max_lora_rank: int


def served(store: Store, version: Version) -> Served:
    """What serving the version takes.

    Raises:
        UserError: it cannot be served as it is, or its base is no model of a hub.
    """
    lineage = read_lineage(store, version)
    kind = serving.recorded(lineage)
    if kind.servable_as != "lora":
        raise UserError(
            f"{version.name} {version.version} is not served as it is ({'; '.join(kind.notes)}): "
            "`fineloop adapters export` makes what servers load"
        )
    config: Mapping[str, Any] = lineage.get("config", {})
    base = str(lineage.get("base", {}).get("reference", ""))
    if "://" in base or base.startswith(("/", ".")) or not base:
        raise UserError(
            f"{version.name} {version.version} stands on {base or 'no base that its lineage names'}, which no server "
            "fetches by that name: publish the base on a hub, or `fineloop adapters export --merged`"
        )
    rank = serving.max_lora_rank(int(config.get("method", {}).get("r") or 0))
    assert rank is not None  # else it is servable as merged only
    revision = str(config.get("model", {}).get("revision") or "")
    return Served(version.name, version.version, version.uri, base, revision, rank)


def manifest(facts: Served, server: Server) -> Any:
    """What to write for this server, as values of YAML; for vLLM its command line, a word each."""
    return MANIFESTS[server](facts)


def _ray_serve(facts: Served) -> dict[str, Any]:
    """Any version of the adapter is asked for as model="BASE:VERSION", and loaded then.

    The folder of all versions is Ray Serve LLM's dynamic_lora_loading_path: it takes the name of a folder below it for
    the adapter's (ray/llm/_internal/common/utils/lora_utils.py, get_lora_model_ids).
    """
    model: dict[str, Any] = {"model_id": facts.base, "model_source": facts.base}
    engine: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": facts.max_lora_rank,
        "max_loras": MOST_ADAPTERS,
        **({"revision": facts.revision} if facts.revision else {}),
    }
    lora = {
        "dynamic_lora_loading_path": facts.uri.rpartition("/")[0],
        "max_num_adapters_per_replica": MOST_ADAPTERS,
    }
    config = {"model_loading_config": model, "lora_config": lora, "engine_kwargs": engine}
    application = {
        "name": facts.name,
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    return {"applications": [application]}


def _kserve(facts: Served) -> dict[str, Any]:
    """KServe loads adapters when it starts: another version is another manifest, and a rollout.

    Names are those of kserve/kserve, pkg/apis/serving/v1alpha1/llm_inference_service_types.go (LLMModelSpec, LoRASpec).
    """
    model = {
        "uri": f"hf://{facts.base}{f':{facts.revision}' if facts.revision else ''}",
        "name": facts.base,
        "lora": {"adapters": [{"name": facts.version, "uri": facts.uri}]},
    }
    spec: dict[str, Any] = {"model": model}
    if facts.max_lora_rank > KSERVE_MAX_RANK:
        arguments = f"--max-lora-rank={facts.max_lora_rank}"
        environment = [{"name": "VLLM_ADDITIONAL_ARGS", "value": arguments}]
        spec["template"] = {"containers": [{"name": "main", "env": environment}]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": {"name": facts.name.replace(".", "-").replace("_", "-")},
        "spec": spec,
    }


def _vllm(facts: Served) -> list[str]:
    """For a version that `fineloop adapters pull` has fetched to its default folder."""
    return [*_vllm_with_lora(facts), "--lora-modules", f"{facts.version}=./{facts.name}-{facts.version}"]


def _vllm_resolver(facts: Served) -> list[str]:
    """For a vLLM that Fineloop is installed beside: any version or alias is asked for as model="NAME@VERSION"."""
    environment = {FOLDER_VARIABLE: f"./{facts.name}", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}
    return ["env", *[f"{name}={value}" for name, value in environment.items()], *_vllm_with_lora(facts)]


def _vllm_with_lora(facts: Served) -> list[str]:
    return [
        *("vllm", "serve", facts.base, *(["--revision", facts.revision] if facts.revision else [])),
        *("--enable-lora", "--max-lora-rank", str(facts.max_lora_rank)),
    ]


MANIFESTS: Mapping[Server, Callable[[Served], Any]] = {
    "ray-serve": _ray_serve,
    "kserve": _kserve,
    "vllm": _vllm,
    "vllm-resolver": _vllm_resolver,
}
