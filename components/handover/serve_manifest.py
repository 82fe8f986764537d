"""Manifests for three servers of LoRA adapters.

A version is served under its own id, never under an alias: vLLM answers from prefixes that it cached for an earlier
adapter of the same name (vllm-project/vllm#42125). So requests use another name after an alias has moved.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.config.config_file import COMMIT
from components.handover import serving
from components.handover.serving import FOLDER_VARIABLE
from components.registry.signing import require_signed
from components.registry.versions import Version, read_file, read_lineage
from components.shared.errors import IntegrityError, UserError
from components.store.store import Store

Server = Literal["ray-serve", "kserve", "vllm", "vllm-resolver"]
KSERVE_MAX_RANK = 64
"""The --max-lora-rank that KServe's own runtime starts vLLM with; a larger one is set in the manifest."""
MOST_ADAPTERS = 16
CONFIG = "adapter_config.json"
HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
"""A model id on a hub. It cannot begin like an option: it comes from a version's files and goes into a command."""
FOLDER = re.compile(r"/[^\x00-\x1f]*")
S3_FOLDER = re.compile(r"s3://[^\x00-\x1f]+")
READ_BY: Mapping[Server, Sequence[re.Pattern[str]]] = {
    "ray-serve": [HUB_ID, FOLDER, S3_FOLDER],
    "kserve": [HUB_ID, S3_FOLDER],
    "vllm": [HUB_ID, FOLDER],
    "vllm-resolver": [HUB_ID, FOLDER],
}
"""The forms of a base's name that each server reads. vLLM, and so Ray Serve LLM, also reads a folder on its machine."""


@dataclass(frozen=True)
class Served:
    """The facts about a version that go into the manifests."""

    name: str
    version: str
    uri: str
    base: str
    revision: str
    max_lora_rank: int
    signed_alone: bool = False
    """Whether the registry serves only what a trusted key has signed."""


def served(store: Store, version: Version) -> Served:
    """The facts needed to serve a version. Rank and base come from its adapter_config.json, which servers read.

    Raises:
        UserError: it cannot be served as it is.
        IntegrityError: it does not name its base, its files are not those of its manifest, or no trusted key has signed
            it. Servers check no signature: they fetch what the manifest names.
    """
    require_signed(store, version.name, version.version, version.manifest_sha256, alias=version.asked_as)
    lineage, adapter = read_lineage(store, version), read_file(store, version, CONFIG)
    try:
        kind, identity = serving.recorded(lineage), lineage["base"]["identity"]
        base = adapter["base_model_name_or_path"]
        rank = max(adapter["r"], *adapter.get("rank_pattern", {}).values(), 1)
        revision = identity.get("commit", "")
        if revision and not COMMIT.fullmatch(revision):
            raise ValueError(f"{revision!r} is no commit")
        if identity["kind"] == "folder" and "://" not in base:
            base = str(Path(base).expanduser().absolute())
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{version.uri} does not say how it is served: {type(exc).__name__} {exc}") from exc
    if kind.servable_as != "lora":
        raise UserError(
            f"{version.name} {version.version} is not served as it is ({'; '.join(kind.notes)}): "
            "`fineloop adapters export` makes what servers load"
        )
    max_rank = serving.max_lora_rank(rank)
    assert max_rank is not None  # else it is servable as merged only
    return Served(version.name, version.version, version.uri, base, revision, max_rank, bool(store.trusted_keys))


def manifest(facts: Served, server: Server) -> Any:
    """The manifest for this server, as values to write as YAML; for vLLM the words of its command line.

    Raises:
        UserError: the server cannot read a base by that name, or would load versions that nobody has signed.
    """
    packaged = facts.base.startswith("pkg://")  # which no server reads
    if not any(pattern.fullmatch(facts.base) for pattern in READ_BY[server]):
        raise UserError(
            f"{facts.name} {facts.version} was trained on {facts.base!r}, which --for {server} cannot fetch: "
            f"{'' if packaged else 'choose another server, publish the base on a hub, or '}"
            f"`fineloop adapters export {facts.name}@{facts.version} --merged` writes a model of its own"
        )
    return MANIFESTS[server](facts)


def _ray_serve(facts: Served) -> dict[str, Any]:
    """The Ray Serve config. Requests name any version of the adapter as model="BASE:VERSION", and it is loaded then.

    The folder of all versions is Ray Serve LLM's dynamic_lora_loading_path: the name of a folder below it is taken as
    the adapter's name (ray/llm/_internal/common/utils/lora_utils.py, get_lora_model_ids). BASE ends at the first colon,
    so it is written without its scheme.

    Raises:
        UserError: only signed versions are to be served: Ray Serve LLM loads any folder there, and checks no signature.
    """
    if facts.signed_alone:
        raise UserError(
            "--for ray-serve lets requests name any version, refused and revoked ones too, and registry.trusted_keys "
            "is set: use --for vllm-resolver, which checks signatures, or --for kserve or vllm for this version alone"
        )
    model: dict[str, Any] = {"model_id": facts.base.rpartition("://")[2], "model_source": facts.base}
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
    """The KServe manifest. KServe loads adapters when it starts: another version needs another manifest, and a rollout.

    Field names: kserve/kserve, pkg/apis/serving/v1alpha1/llm_inference_service_types.go (LLMModelSpec, LoRASpec).
    """
    hub = f"hf://{facts.base}{f':{facts.revision}' if facts.revision else ''}"
    model = {
        "uri": hub if HUB_ID.fullmatch(facts.base) else facts.base,
        "name": facts.base.rstrip("/").rpartition("://")[2],
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
    """The vLLM command for a version that `fineloop adapters pull` has fetched to its default folder."""
    return [*_vllm_with_lora(facts), "--lora-modules", f"{facts.version}=./{facts.name}-{facts.version}"]


def _vllm_resolver(facts: Served) -> list[str]:
    """The command for a vLLM with Fineloop installed: requests name any version or alias as model="NAME@VERSION"."""
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
