"""The shape of a base model without its weights: config.json, or the header of a GGUF, and nothing else is fetched."""

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.schema import ModelConfig
from components.registry.store import open_uri
from components.shared.errors import ConfigError, ObjectMissing
from ray_jobs.base_model import FILES, cache_dir, snapshot

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "config.json"


def read(config: ModelConfig) -> "PretrainedConfig":
    """The base's transformers configuration.

    Raises:
        ConfigError: `model.base` names nothing that exists, or nothing that transformers knows.
    """
    reference = config.base
    if reference.startswith("pkg://"):
        return load(_gguf(reference), config)
    if reference.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="fineloop-config-") as scratch:
            return load(_from_s3(reference, Path(scratch)), config)
    if "://" in reference:
        raise ConfigError(f"model.base {reference!r}: expected a hub id, a local folder, s3://... or pkg://...")
    folder = Path(reference).expanduser()
    if folder.is_dir():
        if not (folder / FILE).is_file():
            raise ConfigError(f"model.base {reference}: no {FILE} there, so it is not a transformers model")
        return load(folder, config)
    if folder.is_absolute() or reference.startswith("."):
        raise ConfigError(f"model.base {reference}: there is no such folder")
    return load(snapshot(config, [FILE]), config)


def locate(config: ModelConfig) -> Path:
    """The folder, or the GGUF, that holds the base's configuration and tokenizer on this machine. Fetches no weights.

    Raises:
        ConfigError: `model.base` names nothing that exists, or lies in S3.
    """
    reference = config.base
    if reference.startswith("pkg://"):
        return _gguf(reference)
    if "://" in reference:
        raise ConfigError(f"model.base {reference}: only its configuration is read before a run")
    folder = Path(reference).expanduser()
    return folder if folder.is_dir() else snapshot(config, [name for name in FILES if "safetensors" not in name])


def load(path: Path, config: ModelConfig) -> "PretrainedConfig":
    """The configuration that lies in a folder or in a GGUF on this machine."""
    from transformers import AutoConfig

    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model.base {config.base}: transformers cannot read its configuration: {exc}") from exc


def _gguf(reference: str) -> Path:
    package, _, file = reference.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.base {reference}: the Python package {package!r} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if path.suffix != ".gguf" or not path.is_file():
        raise ConfigError(f"model.base {reference}: package {package!r} holds no GGUF file {file!r}")
    with path.open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    converted = cache_dir() / f"gguf-{digest[:16]}"  # where `base_model` puts it: read in no time
    return converted if (converted / FILE).is_file() else path


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
