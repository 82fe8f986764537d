"""The configuration of a base model without its weights: reads only config.json, or the header of a GGUF."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.schema import ModelConfig, RunConfig
from components.shared.errors import ConfigError, ObjectMissing
from components.store.store import open_uri
from ray_jobs.base import attention
from ray_jobs.base.base_model import FILES
from ray_jobs.base.digests import remembered
from ray_jobs.base.hub import snapshot
from ray_jobs.base.local_cache import cache_dir
from ray_jobs.base.reference import HubId, LocalFolder, PackagedGguf, S3Folder, parse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "config.json"


def read(config: ModelConfig) -> "PretrainedConfig":
    """The base's transformers configuration.

    Raises:
            ConfigError: `model.base` does not exist, or transformers does not support it.
    """
    match parse(config.base):
        case PackagedGguf(path=path):
            return load(_converted(path), config)
        case S3Folder(uri):
            with tempfile.TemporaryDirectory(prefix="fineloop-config-") as scratch:
                return load(_from_s3(uri, Path(scratch)), config)
        case LocalFolder(path):
            if not (path / FILE).is_file():
                raise ConfigError(f"model.base {config.base}: no {FILE} there, so it is not a transformers model")
            return load(path, config)
        case HubId():
            return load(snapshot(config, [FILE]), config)


def locate(config: ModelConfig) -> Path:
    """The local folder or GGUF that holds the base's configuration and tokenizer. Downloads no weights.

    Raises:
        ConfigError: `model.base` does not exist, or lies in S3.
    """
    match parse(config.base):
        case PackagedGguf(path=path):
            return _converted(path)
        case S3Folder(uri):
            raise ConfigError(f"model.base {uri}: only its configuration is read before a run")
        case LocalFolder(path):
            return path
        case HubId():
            return snapshot(config, [name for name in FILES if "safetensors" not in name])


def load(path: Path, config: ModelConfig) -> "PretrainedConfig":
    """Load the configuration from a local folder or GGUF."""
    from transformers import AutoConfig

    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
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

    Raises:
        ConfigError: the length was set explicitly and exceeds the base's positions; or the lowered value is too small
            for other keys; or the base does not support `model.attention`.
    """
    model, limit = config.model, positions(base)
    if model.attention != "auto":
        attention.choose(base, model.attention, use_gpu=config.ray.use_gpu)
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


def _converted(gguf: Path) -> Path:
    """The folder that `base_model` converted the GGUF to, which loads much faster; the GGUF itself if there is none."""
    digest = remembered(gguf, cache_dir().with_name("digests"))
    converted = cache_dir() / f"gguf-{digest[:16]}"
    return converted if (converted / FILE).is_file() else gguf


def _from_s3(reference: str, scratch: Path) -> Path:
    store, prefix = open_uri(reference, field="model.base")
    prefix = prefix.rstrip("/") + "/"
    code = [item.key for item in store.list(prefix) if item.key.endswith(".py") and "/" not in item.key[len(prefix) :]]
    try:
        for key in [prefix + FILE, *code]:  # the code runs only with model.trust_remote_code
            (scratch / key.removeprefix(prefix)).write_bytes(store.get(key))
    except ObjectMissing as exc:
        raise ConfigError(f"model.base {reference}: no {FILE} there, so it is not a transformers model") from exc
    return scratch
