"""The frozen base model: from a reference to files on this machine, to an immutable identity, to a model in memory.

hub id               downloaded by huggingface_hub; identity is the commit
local folder         used in place; identity is the sha256 of its files
s3://BUCKET/FOLDER   downloaded once into the cache; identity is the sha256 of its files, which the registry remembers
pkg://PACKAGE/FILE   converted once into the cache; identity is the sha256 of the GGUF
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from components.config import config_file
from components.config.methods import BaseFormat
from components.config.ray import dtype_on
from components.config.schema import ModelConfig, RunConfig
from components.shared.errors import ConfigError, IntegrityError, ObjectMissing
from components.store.store import JSON, ObjectInfo, Store, encode_json, open_uri
from ray_jobs.base import architecture, attention, local_cache
from ray_jobs.base.local_cache import cache_dir, local_path, once, remembered

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Weights are read only from safetensors: a pickle can run code.
WEIGHTS = "*.safetensors"
FILES = [WEIGHTS, "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
CONFIG_FILE = "config.json"
IDENTITY = "identity.json"  # in the registry: the identity of a base in S3
LISTING = "listing"
HASHED_AT_ONCE = 4
"""Number of a base's files that are hashed in parallel; one core hashes 1.3 GB per second."""
IDENTIFYING = ("kind", "commit", "sha256")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class Base:
    """A base model on this machine's disk."""

    reference: str
    path: Path
    """Folder in transformers' format, with safetensors weights."""
    identity: dict[str, str]
    """What identifies this base: its kind, and a commit or sha256. For a folder in S3 whose weights nobody has read,
    `listing` replaces sha256, and `resolve` then accepts only the same objects."""

    @property
    def is_known(self) -> bool:
        """Whether the identity determines the base's bytes, that is, is not a mere listing."""
        return LISTING not in self.identity


def resolve(
    config: ModelConfig,
    *,
    recorded: Mapping[str, str] | None = None,
    weights: bool = True,
    registry: Store | None = None,
) -> Base:
    """Download the base to this machine. Safe to call from several processes at once: later ones find it in the cache.

    With `weights` false, no weights are fetched from the hub or from S3. The identity of a folder in S3 is then the one
    that an earlier read left in `registry`, and each process that loads the weights verifies it; see `Base.is_known`
    for a folder that was never read. With `weights` true, the registry records what was read.

    `recorded` is the base's identity from a version's lineage or from another process: no other base is returned, and
    from the hub that commit is fetched, wherever the branch points today. Raises ConfigError: `model.base` does not
    exist, or cannot be loaded; IntegrityError: the cached copy has changed, or the base is not the recorded one, or
    `model.revision` is another commit.
    """
    if recorded is None:
        return _bring(config, weights, registry)
    if "commit" in recorded:
        if config_file.COMMIT.fullmatch(config.revision) and config.revision != recorded["commit"]:
            raise IntegrityError(
                f"the adapter was trained on {config.base} with {text_of(recorded)}, and model.revision is "
                f"{config.revision}: train it again"
            )
        config = config.model_copy(update={"revision": recorded["commit"]})
    base = _bring(config, weights, registry, recorded.get(LISTING))
    if LISTING in recorded:
        return base
    if not base.is_known:
        return replace(base, identity=dict(recorded))  # nothing more is known without reading the weights
    require_same(base, recorded)
    return base


def require_same(base: Base, recorded: Mapping[str, str]) -> None:
    """Require that the base is the one whose identity a version's lineage gives. Raises IntegrityError: it is another
    one."""
    if not is_same(base, recorded):
        was, now = text_of(recorded), text_of(base.identity)
        raise IntegrityError(
            f"the adapter was trained on {base.reference} with {was}, and today that is {now}: put the files that it "
            "was trained on back there, or train it again"
        )


def is_same(base: Base, recorded: Mapping[str, str]) -> bool:
    """Whether the base is the one with this identity; of one that nobody has read, whether it is of the same kind."""
    keys = IDENTIFYING if base.is_known else IDENTIFYING[:1]
    return all(base.identity.get(key) == recorded.get(key) for key in keys)


def text_of(identity: Mapping[str, str]) -> str:
    """What identifies a base, for people."""
    return " ".join(f"{key} {identity[key]}" for key in IDENTIFYING if key in identity) or "no identity"


def _bring(config: ModelConfig, weights: bool, registry: Store | None, listing: str | None = None) -> Base:
    path = local_path(config.base)
    if path is None and config.base.startswith("s3://"):
        return _from_s3(config.base, weights, registry, listing)
    if path is None:
        path = local_cache.snapshot(config, FILES if weights else [name for name in FILES if name != WEIGHTS])
        _require_model(path, config.base, has_weights=None if weights else True)  # else who loads them hears of it
        return Base(config.base, path, {"kind": "hub", "commit": path.name})
    if path.is_file():
        return _from_package(config.base, path)
    return Base(config.base, _require_model(path, config.base), _folder_identity("folder", path))


def load_model(
    base: Base,
    config: ModelConfig,
    base_format: BaseFormat,
    *,
    use_gpu: bool,
    across_gpus: bool = False,
    dtype: "torch.dtype | None" = None,
) -> "PreTrainedModel":
    """Load the frozen base: in 16 bits, in NF4 with double quantisation (arXiv:2305.14314), or in int8
    (arXiv:2208.07339).

    `across_gpus` spreads layers over the machine's GPUs, which compute one after the other. Within `zero.sharding` each
    weight is sharded as it is read, a bfloat16 base by rank 0 for all. `dtype` is that of weights and activations; None
    means bfloat16, or float16 on a GPU without bfloat16. Raises ConfigError: the base is no causal language model, does
    not support `model.attention`, or is already quantised in another format.
    """
    import torch
    from transformers import AutoConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    if base_format == "nf4":
        from ray_jobs.base import four_bits

        four_bits.register()
    dtype = dtype or architecture.dtype_here("auto", use_gpu=use_gpu)
    shape = AutoConfig.from_pretrained(base.path, trust_remote_code=config.trust_remote_code)
    architecture.require_causal(shape, reference=base.reference)
    device = torch.cuda.current_device() if use_gpu else "cpu"
    place = "auto" if across_gpus and use_gpu and torch.cuda.device_count() > 1 else {"": device}
    model: PreTrainedModel = architecture.auto_class(shape).from_pretrained(
        base.path,
        dtype=dtype,
        **architecture.quantization(shape, base_format, dtype, reference=base.reference),
        attn_implementation=attention.for_text(shape, attention.choose(shape, config.attention, use_gpu=use_gpu)),
        device_map=None if is_deepspeed_zero3_enabled() else place,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
    )
    model.requires_grad_(False)
    if not use_gpu:
        # The hidden states of the rows' last positions are not contiguous. PyTorch would then copy the output head once
        # per row: seconds for every batch in generation.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if base_format == "nf4":
            _never_repack(model)
    if base_format != "bf16":
        _never_replace()
    return model


def is_quantised(base: Base) -> bool:
    """Whether the folder's weights are already quantised."""
    return "quantization_config" in json.loads((base.path / CONFIG_FILE).read_text(encoding="utf-8"))


def _never_repack(model: "PreTrainedModel") -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPU.

    It would do so when a layer first runs in evaluation mode, and never undo it. The repacked product has no gradient,
    so training that continues after an evaluation would silently be wrong (bitsandbytes 0.50, nn/modules.py).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _never_replace() -> None:
    """Keep peft's DoRA from replacing a quantised weight in host memory by a copy in every forward pass.

    The copy of an int8 weight lacks its scales, and DeepSpeed does not treat a copy as the parameter that it shards
    (peft 0.21, utils/integrations.py).
    """
    from peft.tuners.lora import dora
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    from ray_jobs.base import four_bits

    def dequantised(module: Any) -> Any:
        if type(module.weight).__name__ == "Params4bit":
            return four_bits.dequantize_4bit(module.weight, module.weight.quant_state)
        if type(module.weight).__name__ == "Int8Params":
            return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
        return dequantize_module_weight(module)

    dora.dequantize_module_weight = dequantised


def _from_s3(reference: str, weights: bool, registry: Store | None, expected: str | None) -> Base:
    """Resolve a folder in S3; `expected` is the listing that another process has found, None accepts any."""
    store, prefix = open_uri(reference, field="model.base")
    prefix = prefix.rstrip("/") + "/"
    objects = list(store.list(prefix))
    if not objects:
        raise ConfigError(f"model.base {reference}: there is nothing in this folder")
    # The etag is included because many stores round times to seconds, and new content may have the same size.
    described = json.dumps([[item.key, item.size, item.etag, item.last_modified.isoformat()] for item in objects])
    listing = hashlib.sha256((reference + described).encode()).hexdigest()[:16]
    if expected not in (None, listing):
        raise IntegrityError(f"model.base {reference}: its objects have changed since the run began: begin another run")
    path = cache_dir() / f"s3-{listing}"
    weight_objects = [item for item in objects if item.key.endswith(WEIGHTS.lstrip("*"))]

    def download(target: Path, but: Sequence[ObjectInfo] = ()) -> None:
        for item in objects:
            if item in but:
                continue
            name = item.key.removeprefix(prefix)
            if not _is_inside(name):
                raise ConfigError(f"model.base {reference}: the object {item.key!r} would leave the folder: rename it")
            store.download(item.key, target / name)

    identity_key = f"bases/{path.name}/{IDENTITY}"
    if not weights and not path.exists():
        shape = path.with_name(f"{path.name}-shape")
        once(shape, lambda target: download(target, weight_objects))
        recorded = _recorded_identity(registry, identity_key) if registry is not None else None
        identity = recorded or {"kind": "s3", LISTING: listing}
        return Base(reference, _require_model(shape, reference, has_weights=bool(weight_objects)), identity)
    once(path, download)
    base = Base(reference, _require_model(path, reference), _folder_identity("s3", path))
    if registry is not None:
        _record_identity(registry, identity_key, base)
    return base


def _record_identity(registry: Store, key: str, base: Base) -> None:
    """Record the identity of what was read in the registry, unless it is there already. Raises IntegrityError: the
    first reader of the same objects has read other bytes."""
    recorded = _recorded_identity(registry, key)
    if recorded is None:
        registry.claim(key, encode_json(base.identity), content_type=JSON)
        recorded = _recorded_identity(registry, key)
    if recorded not in (None, base.identity):
        raise IntegrityError(
            f"model.base {base.reference} has {text_of(base.identity)} here, and had {text_of(recorded)} where the "
            f"same objects were read first: delete {base.path}, or {registry.uri(key)} if that reading was the wrong "
            "one"
        )


def _recorded_identity(registry: Store, key: str) -> dict[str, str] | None:
    try:
        identity = registry.get_json(key)
    except (ObjectMissing, IntegrityError):
        return None
    is_one = isinstance(identity, dict) and identity.keys() == {"kind", "sha256"} and identity["kind"] == "s3"
    return {name: str(value) for name, value in identity.items()} if is_one else None


def _from_package(reference: str, gguf: Path) -> Base:
    path, digest = local_cache.converted(gguf), remembered(gguf)
    _require_model(path, reference)
    package, _, file = reference.removeprefix("pkg://").partition("/")
    names = metadata.packages_distributions().get(package)
    if names:  # else a folder on the path, which is not installed
        package = f"{names[0]}=={metadata.version(names[0])}"
    return Base(reference, path, {"kind": "package", "package": package, "file": file, "sha256": digest})


def licence(base: Base) -> tuple[str, list[Path]]:
    """The licence of a base's weights, as its GGUF or its package names it, and files with its text; "" and none where
    nothing says it."""
    if base.identity["kind"] != "package":
        return "", [path for path in base.path.glob("*") if path.name.startswith(LICENCES)]
    import gguf

    field = gguf.GGUFReader(str(local_path(base.reference))).get_field("general.license")
    named = str(field.contents()) if field else ""
    package, is_installed, _ = base.identity["package"].partition("==")
    if not is_installed:  # a folder on the path
        return named, []
    about, files = metadata.metadata(package).json, metadata.files(package) or []
    named = named or str(about.get("license_expression") or about.get("license") or "")
    return named, [Path(str(file.locate())) for file in files if file.name.startswith(LICENCES)]


def _require_model(path: Path, reference: str, *, has_weights: bool | None = None) -> Path:
    """Return the folder if it holds a model; `has_weights` overrides looking for weights in the folder. Raises
    ConfigError: it has no config.json, no safetensors weights, or an index that names files outside the folder."""
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError(f"model.base {reference}: no {CONFIG_FILE} there, so it is not a transformers model")
    if not (any(path.glob(WEIGHTS)) if has_weights is None else has_weights):
        raise ConfigError(f"model.base {reference}: no *.safetensors there; pickled weights are not loaded")
    for index in path.glob("*.safetensors.index.json"):
        # transformers joins these names to the folder, while the base's identity covers only files inside the folder.
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if outside := sorted({name for name in shards if not _is_inside(name)}):
            raise ConfigError(
                f"model.base {reference}: {index.name} names {outside[0]!r}, which lies outside the folder"
            )
    return path


def _is_inside(name: str) -> bool:
    """Whether a name that is relative to a folder stays inside it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _folder_identity(kind: str, path: Path) -> dict[str, str]:
    """Identity of a folder: a sha256 over all its files, symbolic links followed, since the hub's caches use them."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:  # hashing releases the GIL
        hashes = pool.map(remembered, files)
        digests = {file.relative_to(path).as_posix(): digest for file, digest in zip(files, hashes, strict=True)}
    return {"kind": kind, "sha256": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}


# The configuration of a base model without its weights.


def read_config(config: ModelConfig) -> "PretrainedConfig":
    """The base's transformers configuration. Raises ConfigError: `model.base` does not exist, or transformers does not
    support it."""
    return load_config(locate(config), config)


def locate(config: ModelConfig) -> Path:
    """The local folder or GGUF that holds the base's configuration and tokenizer. Downloads no weights. Raises
    ConfigError: `model.base` does not exist."""
    path = local_path(config.base)
    if path is None:
        return resolve(config, weights=False).path
    if path.is_file() and (written := local_cache.conversion(path) / CONFIG_FILE).is_file():
        return written.parent  # loads much faster than the GGUF
    return path


def load_config(path: Path, config: ModelConfig) -> "PretrainedConfig":
    """Load the configuration from a local folder or GGUF."""
    from transformers import AutoConfig

    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if not (path / CONFIG_FILE).is_file():
            raise OSError(f"no {CONFIG_FILE} there")
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model.base {config.base}: transformers cannot read its configuration: {exc}") from exc


def positions(base: "PretrainedConfig") -> int | None:
    """The longest text that the base has positions for, in tokens; None where there is no limit.

    RoPE scaling reaches further than `max_position_embeddings`: linear and dynamic scaling to `factor` times as many,
    YaRN to `factor` times the original length (as in vLLM, vllm/config/model.py, _get_and_verify_max_len).
    """
    text = base.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not longest:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    reach = [longest]
    for kind in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        if kind.get("rope_type") in ("linear", "dynamic", "yarn"):
            reach.append((kind.get("original_max_position_embeddings") or longest) * kind.get("factor", 1.0))
    return int(max(reach))


def fitted(config: RunConfig, base: "PretrainedConfig", log: Callable[[str], None]) -> RunConfig:
    """The config with `model.max_length` limited to the base's positions; `log` receives a line where it is lowered.
    Raises ConfigError: the length was set explicitly and exceeds the base's positions; or the lowered value is too
    small for other keys; or the base does not support `model.attention`, or the training's dtype."""
    model, limit = config.model, positions(base)
    if model.attention != "auto":
        attention.choose(base, model.attention, use_gpu=config.ray.use_gpu)
    if dtype_on(config.train.dtype, config.ray.capability) == "float16":
        architecture.require_unquantised(base, reference=model.base)
    if limit is None or model.max_length <= limit:
        return config
    if "max_length" in model.model_fields_set:
        raise ConfigError(
            f"model.max_length {model.max_length} is more than the {limit} positions of model.base {model.base}: "
            f"set it to {limit} or less"
        )
    log(f"model.max_length: {limit}, all the positions that {model.base} has")
    return config_file.validate(
        config_file.as_table(config), [f"model.max_length={limit}"], origin=f"model.base {model.base}", overriding=""
    )
