"""Manifests for servers of LoRA adapters, and for routers that share requests out between two versions.

A version is served under its own id, never under an alias: vLLM answers from prefixes that it cached for an earlier
adapter of the same name (vllm-project/vllm#42125). So requests use another name after an alias has moved.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from components.config.config_file import COMMIT
from components.config.methods import OWN_BASE, VLLM_MAX_LORA_RANKS, Method
from components.registry.aliases import PRODUCTION, read_alias
from components.registry.signing import require_signed
from components.registry.versions import Version, read_file, read_lineage, resolve
from components.shared.errors import IntegrityError, UserError
from components.store.folders import MANIFEST
from components.store.store import Store

# How a version can be served: as it is, after `fineloop adapters export --lora`, or merged into its base.
#
# Checked against vLLM, whose rules the other servers of LoRA adapters share or tighten (vllm/config/lora.py and
# vllm/lora/peft_helper.py, 2026): ranks up to 512, no DoRA, no other trained modules, no bias, layers that it wraps.

ServableAs = Literal["lora", "lora-export", "merged"]

FOLDER_VARIABLE = "FINELOOP_LORA_FOLDER"
"""The environment variable with the folder for the copies of a vLLM that asks the registry: see vllm_resolver."""
VLLM_MODULES = {
    # Llama, Mistral, Qwen, Gemma, SmolLM and most others
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    # Phi-3; GPT-NeoX, Falcon and BLOOM; OPT and Phi; GPT-2 and StarCoder
    *("qkv_proj", "gate_up_proj"),
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    *("out_proj", "fc1", "fc2"),
    *("c_attn", "c_proj", "c_fc"),
}
"""Layers that vLLM wraps, by the last part of their name: the linear layers of the models that it implements."""


QUANTISED = {
    "nf4": "trained on NF4 weights: --quantization bitsandbytes serves the like, a 16-bit base differs slightly",
    "int8": "trained on int8 weights and activations, which vLLM does not make: measure it on a 16-bit base",
}


@dataclass(frozen=True)
class Serving:
    """How one version can be served, with notes for whoever serves it."""

    servable_as: ServableAs
    """lora: as published. lora-export: after `export --lora`. merged: only after `export --merged`, which any can."""
    notes: list[str]
    """Reasons and settings, a sentence each."""


def serving(method: Method, *, rank: int, target_modules: Sequence[str]) -> Serving:
    """How an adapter can be served; `target_modules` are the last parts of the adapted layers' names.

    For experts that are adapted as one parameter they are the last two parts, such as experts.down_proj: servers differ
    in how they want LoRA of those.
    """
    obstacles = []
    if method.adapter in ("dora", "dvora"):
        obstacles.append("its magnitudes make it no LoRA, and vLLM does not load DoRA")
    if max_lora_rank(rank) is None:
        obstacles.append(f"rank {rank} is above vLLM's largest --max-lora-rank, {VLLM_MAX_LORA_RANKS[-1]}")
    if strange := sorted(set(target_modules) - VLLM_MODULES):
        obstacles.append(f"vLLM is not known to wrap {', '.join(strange)}")
    if obstacles:
        return Serving("merged", [*obstacles, "adapters export --merged makes a model that every server loads"])
    notes = [f"with vLLM: --enable-lora --max-lora-rank {max_lora_rank(rank)}"]
    if method.init in OWN_BASE:
        notes.append("it belongs to the base of its own that adapter_config.json names, and to no other")
    elif method.base != "bf16":
        notes.append(QUANTISED[method.base])
    if method.adapter == "vera":
        exact = "adapters export --lora turns VeRA's shared matrices and vectors into plain LoRA, exactly"
        return Serving("lora-export", [exact, *notes])
    if method.scaling == "rslora":
        notes.append("a server that ignores use_rslora scales it wrongly: adapters export --lora folds the scaling in")
    return Serving("lora", notes)


def recorded(lineage: Mapping[str, Any]) -> Serving:
    """How a version can be served, as recorded in its lineage."""
    return Serving(**lineage["recipe"]["serving"])


def max_lora_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds an adapter of this rank; None above the largest."""
    return next((choice for choice in VLLM_MAX_LORA_RANKS if rank <= choice), None)


Server = Literal["ray-serve", "kserve", "llm-d", "vllm", "vllm-resolver"]
MOST_ADAPTERS = 16
CONFIG = "adapter_config.json"
EXPORT_RECORD = "export.json"
HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
"""A model id on a hub. It cannot begin like an option: it comes from a version's files and goes into a command."""
FOLDER = re.compile(r"(?:\./|/)[^\x00-\x1f]*")
S3_FOLDER = re.compile(r"s3://[^\x00-\x1f]+")


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
    base_identity: Mapping[str, str] = field(default_factory=dict)
    """Identity of the base of the version's config, or the manifest's sha256 of another that was made for it."""
    is_pulled: bool = False
    """Whether `base` is the folder to which `fineloop adapters pull --with-base` writes it by default."""


def served(store: Store, version: Version) -> Served:
    """The facts needed to serve a version. Rank and base come from its adapter_config.json, which servers read; the
    signature is checked here, as they check none. Raises UserError if it cannot be served as it is; IntegrityError if
    its files are not those of its manifest, or no trusted key has signed it."""
    require_signed(store, version.name, version.version, version.manifest_sha256, alias=version.asked_as)
    lineage, adapter = read_lineage(store, version), read_file(store, version, CONFIG)
    try:
        kind, identity = recorded(lineage), lineage["base"]["identity"]
        base = adapter["base_model_name_or_path"]
        rank = max(adapter["r"], *adapter.get("rank_pattern", {}).values(), 1)
        revision = identity.get("commit", "")
        if revision and not COMMIT.fullmatch(revision):
            raise ValueError(f"{revision!r} is no commit")
        made = {"manifest_sha256": lineage["recipe"].get("stands_on_sha256", "")}
        of_base = dict(identity) if base == lineage["base"]["reference"] else made
        if identity["kind"] == "folder" and "://" not in base:
            base = str(Path(base).expanduser().absolute())
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise IntegrityError(f"{version.uri} does not say how it is served: {type(exc).__name__} {exc}") from exc
    if kind.servable_as != "lora":
        raise UserError(
            f"{version.name} {version.version} is not served as it is ({'; '.join(kind.notes)}): "
            "`fineloop adapters export` makes what servers load"
        )
    max_rank = max_lora_rank(rank)
    assert max_rank is not None  # else it is servable as merged only
    at = (version.name, version.version, version.uri)
    return Served(*at, base, revision, max_rank, bool(store.trusted_keys), of_base)


def placed(facts: Served, server: Server, base: str = "") -> Served:
    """The facts with the base at `base`; or, for a vLLM that cannot fetch it by its own name, in the folder to which
    `fineloop adapters pull --with-base` writes it."""
    if base:
        return replace(facts, base=base, revision="")
    if server.startswith("vllm") and not _is_read(facts.base, server) and "://" in facts.base:
        return replace(facts, base=f"./{facts.name}-{facts.version}-base", revision="", is_pulled=True)
    return facts


def _is_read(base: str, server: Server) -> bool:
    return any(pattern.fullmatch(base) for pattern in MANIFESTS[server][0])


def base_of(folder: Path) -> dict[str, str] | None:
    """The base that `fineloop adapters pull --with-base` wrote there, as in `Served.base_identity`; None if there is
    none."""
    try:
        if (made := folder / MANIFEST).is_file():
            return {"manifest_sha256": hashlib.sha256(made.read_bytes()).hexdigest()}
        record = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
        return dict(record["base_model"]["identity"]) if record["form"] == "base" else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def beside(store: Store, facts: Served, server: Server, share: int) -> Served:
    """What gets the other requests where a version gets `share` per cent of them: production, or, where that is this
    one, the one before it. Raises UserError: there is none, on this base, or this server shares no requests out."""
    if server not in WEIGHTED:
        has = "Ray Serve LLM has no weights" if server == "ray-serve" else "vLLM serves what a request names"
        raise UserError(f"--share is for a router, --for {' or '.join(WEIGHTED)}; {has}: leave out --share")
    if not 1 <= share <= 99:
        raise UserError(f"--share {share}: a share of the requests in per cent, from 1 to 99")
    pointer = read_alias(store, facts.name, PRODUCTION)
    other = pointer and (pointer.event["from"] if pointer.version == facts.version else pointer.version)
    if not other:
        raise UserError(
            f"--share leaves the other requests to another version, and {PRODUCTION} of {facts.name} has held none but "
            f"{facts.version}: leave out --share"
        )
    rest = served(store, resolve(store, f"{facts.name}@{other}"))
    if rest.base != facts.base:
        raise UserError(
            f"--share: {facts.name} {facts.version} stands on {facts.base}, and {rest.version} on {rest.base}; a "
            "router shares out between adapters of one base: leave out --share"
        )
    return rest


def manifest(facts: Served, server: Server, *, share: int = 100, rest: Served | None = None) -> Any:
    """The manifest for this server, as values to write as YAML; for vLLM the words of its command line.

    Beside `rest`, the version gets `share` per cent of the requests. Raises UserError: the server cannot read a base by
    that name, or would load versions that nobody has signed.
    """
    if not _is_read(facts.base, server):
        reference = f"{facts.name}@{facts.version}"
        raise UserError(
            f"{facts.name} {facts.version} was trained on {facts.base!r}, which --for {server} cannot fetch: `fineloop "
            f"adapters pull {reference} --with-base` writes it as a folder, and --base names where the server finds a "
            f"copy of that; or `fineloop adapters export {reference} --merged` writes a model of its own"
        )
    return WEIGHTED[server](((rest, 100 - share), (facts, share))) if rest else MANIFESTS[server][1](facts)


def _ray_serve(facts: Served) -> dict[str, Any]:
    """The Ray Serve config. Requests name any version of the adapter as model="BASE:VERSION", and it is loaded then.

    The folder of all versions is Ray Serve LLM's dynamic_lora_loading_path: the name of a folder below it is taken as
    the adapter's name (ray/llm/_internal/common/utils/lora_utils.py, get_lora_model_ids), and no signature is checked.
    BASE ends at the first colon, so it is written without its scheme.
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
    lora = {"dynamic_lora_loading_path": facts.uri.rpartition("/")[0], "max_num_adapters_per_replica": MOST_ADAPTERS}
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
    if facts.max_lora_rank > 64:  # with which KServe's own runtime starts vLLM
        environment = [{"name": "VLLM_ADDITIONAL_ARGS", "value": f"--max-lora-rank={facts.max_lora_rank}"}]
        spec["template"] = {"containers": [{"name": "main", "env": environment}]}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": {"name": _kubernetes_name(facts)},
        "spec": spec,
    }


def _kubernetes_name(facts: Served) -> str:
    return facts.name.replace(".", "-").replace("_", "-")


Weights = Sequence[tuple[Served, int]]


def _kserve_weighted(weights: Weights) -> dict[str, Any]:
    """A KServe service for each version, in one group. Requests name the adapter, and not its version: KServe shares
    out only between services whose models have the same names (pkg/controller/v1alpha2/llmisvc/router_group.go)."""
    services = []
    for facts, weight in weights:
        service, group = _kserve(facts), _kubernetes_name(facts)
        service["metadata"]["name"] = f"{group}-{facts.version}"
        service["spec"]["model"]["lora"]["adapters"][0]["name"] = facts.name
        route = {"http": {}, "group": group, "weight": weight}
        service["spec"]["router"] = {"route": route, "gateway": {}, "scheduler": {}}
        services.append(service)
    return {"apiVersion": "v1", "kind": "List", "items": services}


def _llm_d(weights: Weights) -> dict[str, Any]:
    """The rule by which llm-d's router has requests for the adapter answered by versions, in the names of the resolver.

    Field names: llm-d/llm-d-router, apix/v1alpha2/inferencemodelrewrite_types.go.
    """
    facts = weights[0][0]
    pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": _kubernetes_name(facts)}
    targets = [{"modelRewrite": f"{target.name}@{target.version}", "weight": share} for target, share in weights]
    return {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": {"name": _kubernetes_name(facts)},
        "spec": {"poolRef": pool, "rules": [{"matches": [{"model": {"value": facts.name}}], "targets": targets}]},
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


MANIFESTS: Mapping[Server, tuple[Sequence[re.Pattern[str]], Callable[[Served], Any]]] = {
    "ray-serve": ((HUB_ID, FOLDER, S3_FOLDER), _ray_serve),
    "kserve": ((HUB_ID, S3_FOLDER), _kserve),
    "llm-d": ((HUB_ID, FOLDER), lambda facts: _llm_d(((facts, 1),))),
    "vllm": ((HUB_ID, FOLDER), _vllm),
    "vllm-resolver": ((HUB_ID, FOLDER), _vllm_resolver),
}
"""The forms of a base's name that each server reads, and its manifest. A FOLDER is on the server's machine."""
WEIGHTED: Mapping[Server, Callable[[Weights], Any]] = {"kserve": _kserve_weighted, "llm-d": _llm_d}
"""The servers that share requests out between two versions."""
