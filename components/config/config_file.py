"""Reading and writing a config: TOML in, overrides applied, mistakes said in one message."""

import copy
import difflib
import json
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from components.config.ray import CLUSTERS, NumWorkers
from components.config.schema import MethodConfig, ModelConfig, RunConfig
from components.config.section import REMOVED, Section
from components.shared.errors import ConfigError

# What transformers, peft, TRL, Axolotl and LLaMA-Factory call keys of the config. None of these is a key of ours.

_THEIRS = {
    "data.eval_share": "test_size val_set_size val_size",
    "data.max_records": "max_samples",
    "data.source": "dataset dataset_name path",
    "method.alpha": "lora_alpha",
    "method.base": "load_in_8bit",
    "method.dropout": "lora_dropout",
    "method.name": "load_in_4bit",
    "method.rank": "lora_r lora_rank r",
    "method.target_modules": "lora_target lora_target_modules",
    "model.base": "base_model model_name_or_path",
    "model.max_length": "cutoff_len max_seq_len max_seq_length sequence_len",
    "ray.num_workers": "num_gpus",
    "train.batch_size": "gradient_accumulation_steps",
    "train.checkpoint_every_steps": "save_steps",
    "train.dtype": "bf16 fp16",
    "train.epochs": "num_epochs num_train_epochs",
    "train.evals_per_epoch": "eval_steps",
    "train.learning_rate": "lr",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.optimizer": "optim",
    "train.warmup_share": "warmup_ratio warmup_steps",
}
SYNONYMS = {theirs: ours for ours, names in _THEIRS.items() for theirs in names.split()}


logger = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
EITHER: dict[Any, str] = {
    str | list[str]: "a string or a list of strings",
    NumWorkers: "an integer, at least 1, or two of them: [min, max]",
}
"""What a key of several types takes."""
WITH_SET = " with --set"
Read = TypeVar("Read", bound=Section)


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `section.key=value` overrides on top of it. Raises ConfigError: the file is missing,
    is not TOML, or does not satisfy the schema."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config {path} cannot be read: {exc}") from exc
    return loads(text, overrides, origin=str(path))


def loads(text: str, overrides: Sequence[str] = (), *, origin: str = "config", overriding: str = WITH_SET) -> RunConfig:
    """Parse TOML text; an error calls it by `origin`, and with overrides by `overriding` after that. Raises
    ConfigError as `load`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{origin} is not valid TOML: {exc}") from exc
    return validate(raw, overrides, origin=origin, overriding=overriding)


def validate(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "config", overriding: str = WITH_SET
) -> RunConfig:
    """Apply overrides to a parsed config and validate it. Raises ConfigError, which lists each field at fault, what it
    held and what it takes."""
    table = copy.deepcopy(dict(raw))
    for override in overrides:
        _override(table, override)
    origin = f"{origin}{overriding}" if overrides else origin
    _in_new_words(table, origin)
    _without_removed(table, origin)
    try:
        return RunConfig.model_validate(table)
    except ValidationError as exc:
        by_path: dict[str, str] = {}
        for error in exc.errors():
            by_path.setdefault(_path(error["loc"]), _explain(error))
        problems = list(by_path.values())
        keys = {override.partition("=")[0].strip(): override for override in reversed(overrides)}
        to_blame = [next((keys[key] for key in keys if f"{path}.".startswith(f"{key}.")), None) for path in by_path]
        if overriding == WITH_SET and all(to_blame):  # the file has nothing to do with it
            origin = f"--set {to_blame[0]}" if not problems[1:] else "--set"
        raise ConfigError(
            "\n  ".join([f"{origin}:", *problems]) if problems[1:] else f"{origin}: {problems[0]}"
        ) from exc


def _in_new_words(table: dict[str, Any], origin: str) -> None:
    """Turn keys that are accepted for one release into what took their place."""
    match table:
        case {"tune": {"space": {"learning_rates": [*rates]}}} if rates:
            table["tune"]["learning_rates"] = rates
    match table:
        case {"evaluate": {"suites": [*suites]} as evaluate} if suites and isinstance(table.get("gate", {}), dict):
            tasks, gate = [f"fineloop_{name}" for name in evaluate.pop("suites")], table.get("gate", {})
            evaluate["lm_eval"] = [*evaluate.get("lm_eval", []), *tasks]
            if (margin := gate.pop("suite_worse_by", None)) is not None:
                gate["lm_eval_worse_by"] = {**dict.fromkeys(tasks, margin), **gate.get("lm_eval_worse_by", {})}
            logger.warning("%s: evaluate.suites is gone, and read as evaluate.lm_eval %s", origin, tasks)


def _without_removed(table: dict[str, Any], origin: str) -> None:
    """Take the removed keys out of a config, and say so of each that held another value than the one in force."""
    for path, removed in REMOVED.items():
        *sections, key = path.split(".")
        node: Any = table
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node and (value := node.pop(key)) != removed.default:
            logger.warning("%s: %s is gone, and %r is not used: %s", origin, path, value, removed.instead)


def with_stored(config: RunConfig, stored: Mapping[str, Any], *, origin: str, commit: str = "") -> RunConfig:
    """Return the config with the base and the method of a stored one, as needed to run an adapter of that run.

    Another release may have stored it. Nothing but those two sections is read, keys of theirs that this release does
    not know are passed over, and what could not be trained any more can still be run. A base's own Python code runs
    only where this config allows it, which it does for its own base and revision alone. `commit` is the one at which
    the stored base is fetched from its hub; empty for any other. Raises ConfigError: a value that is needed is missing,
    or not one that this release can use; or the base comes with code, and this config does not allow that of this base
    to run.
    """
    model = _read_stored(ModelConfig, stored.get("model", {}), origin=f"{origin}: model")
    method = _read_stored(MethodConfig, stored.get("method", {}), origin=f"{origin}: method")
    if model.trust_remote_code and not _may_run_code(config.model, model, commit):
        revision = commit or model.revision
        allowed = f"allows that of {config.model.base} alone" if config.model.trust_remote_code else "allows none"
        raise ConfigError(
            f"{origin}: its base {model.base}{revision and f' at {revision}'} comes with Python code of its own, and "
            f"this config {allowed}: read that code, then set model.base={model.base}"
            f"{revision and f' model.revision={revision}'} model.trust_remote_code=true"
        )
    return config.model_copy(update={"model": model, "method": method})


def _may_run_code(own: ModelConfig, stored: ModelConfig, commit: str) -> bool:
    """Whether consent to the config's own base covers the stored one: a commit covers itself, a branch its commits."""
    revision = (commit or stored.revision) if COMMIT.fullmatch(own.revision) else stored.revision
    return own.trust_remote_code and (own.base, own.revision) == (stored.base, revision)


def _read_stored(section: type[Read], raw: Mapping[str, Any], *, origin: str) -> Read:
    fields = {key: value for key, value in raw.items() if key in section.model_fields}
    if passed_over := sorted(raw.keys() - fields.keys()):
        logger.info("%s holds what this release does not know, and passes over: %s", origin, ", ".join(passed_over))
    try:
        return section.model_validate(fields)
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        raise ConfigError(f"{origin} cannot be used by this release: {problems}") from exc


def dumps(config: RunConfig) -> str:
    """The resolved config as TOML; `loads` gives back an equal one."""
    return tomli_w.dumps(as_table(config))


def as_table(config: RunConfig, *, given_only: bool = False) -> dict[str, Any]:
    """Return the resolved config as `validate` takes it, or only the keys that were set.

    An unset `model.max_length` is in neither: it depends on the base, which is not known here.
    """
    table = config.model_dump(mode="json", exclude_none=True, exclude_unset=given_only)
    if "max_length" not in config.model.model_fields_set:
        table["model"].pop("max_length", None)
    return table


def whole_numbers(value: Any) -> Any:
    """JSON of a protobuf Struct, whose numbers are all doubles, with the whole ones as integers.

    The schema takes an integer for a float, and no float for an integer.
    """
    if isinstance(value, Mapping):
        return {key: whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def json_schema() -> str:
    """JSON Schema of the config for editors, as indented JSON."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value, such as train.learning_rate=2e-4")
    table = raw
    for depth, part in enumerate(path[:-1], start=1):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            name = ".".join(path[:depth])
            raise ConfigError(f"--set {override}: {name} is no section but {table!r}: set it whole, as {name}=...")
    table[path[-1]] = _parse(value, override)


def _parse(value: str, override: str) -> Any:
    """A TOML value, or else the text itself: a bare word or a path needs no quotes on a command line."""
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError as exc:
        if value.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"--set {override}: the value is not valid TOML: {exc}") from exc
        return value
    return parsed["value"] if len(parsed) == 1 else value


def _explain(error: Any) -> str:
    where, kind, value = error["loc"], error["type"], error["input"]
    field, section = _located(where)
    name, message = _path(where), error["msg"]
    if kind == "extra_forbidden":
        return f"unknown key {name}: {_nearest(where)}"
    if kind.startswith("union_tag"):
        return f"{name}.kind: expected {' or '.join(CLUSTERS)}"
    if kind == "missing" and section:
        return f"section [{name}] is missing: it needs {', '.join(_required(section))}"
    if kind == "missing":
        return f"{name} is required: {field.description if field else ''}"
    if kind == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if field and field.annotation in EITHER:
        message = f"expected {EITHER[field.annotation]}"
    elif kind == "model_type" and section:
        one = "one section, headed once" if isinstance(value, list) else "a section"
        keys = _required(section) or list(section.model_fields)[:3]
        message = f"expected {one}, with keys such as {', '.join(keys)}"
    elif kind == "list_type" and section:
        message = f"expected a list of sections, each headed [[{name}]]"
    elif kind == "string_pattern_mismatch" and field:
        message = f"expected {error['ctx']['pattern']} ({field.description})"
    return f"{name} = {value!r}: {message.removeprefix('Input ').removeprefix('String ')}"


def _nearest(where: Sequence[str | int]) -> str:
    """What an unknown key may stand for: its namesake in another section, or else a like key in this one."""
    unknown, section = str(where[-1]), _located(where[:-1])[1]
    assert section, where
    others = [kind for kind, other in CLUSTERS.items() if unknown in other.model_fields and other is not section]
    if others and section in CLUSTERS.values():
        return f'it belongs to {_path(where[:-2])}.kind = "{others[0]}", and this is kind = "{where[-2]}"'
    likely = [path for path in key_paths(RunConfig) if path.rpartition(".")[2] == unknown]
    if not likely and unknown in SYNONYMS:
        likely = [SYNONYMS[unknown]]
    if not likely:
        prefix = _path(where[:-1])
        close = difflib.get_close_matches(unknown, section.model_fields, n=1)
        likely = [f"{prefix}.{key}" if prefix else key for key in close]
    return f"did you mean {' or '.join(likely)}?" if likely else f"known here: {', '.join(section.model_fields)}"


def _path(where: Sequence[str | int]) -> str:
    """The key at a location, dotted; pydantic names each branch of a union, which people do not know."""
    parts: list[str] = []
    for depth, part in enumerate(where):
        field = _located(where[:depth])[0]
        if field and field.annotation in EITHER:
            break
        if part not in CLUSTERS:
            parts.append(str(part))
    return ".".join(parts)


def _located(where: Sequence[str | int]) -> tuple[FieldInfo | None, type[BaseModel] | None]:
    """The field at a location inside the config, and the section that it holds, or holds a list of."""
    field: FieldInfo | None = None
    section: type[BaseModel] | None = RunConfig
    for part in where:
        if part in CLUSTERS:
            section, field = CLUSTERS[str(part)], None
        elif isinstance(part, str) and section:
            field = section.model_fields.get(part)
            section = _held(field) if field else None
    return field, section


def _held(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _required(section: type[BaseModel]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key below a section that is not inside a list, dotted; of a tagged union the keys of all members."""
    for name, field in section.model_fields.items():
        yield prefix + name
        below = [*CLUSTERS.values()] if field.discriminator else []
        if field.annotation is (inner := _held(field)) and inner:
            below = [inner]
        for member in below:
            yield from key_paths(member, f"{prefix}{name}.")
