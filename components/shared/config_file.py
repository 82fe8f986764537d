"""Reading and writing a config: TOML in, overrides applied, mistakes said in one message."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from components.shared.config import RunConfig
from components.shared.errors import ConfigError


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `section.key=value` overrides on top of it.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not satisfy the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config {path} cannot be read: {exc}") from exc
    return loads(text, overrides, origin=str(path))


def loads(text: str, overrides: Sequence[str] = (), *, origin: str = "config") -> RunConfig:
    """Parse TOML text; `origin` is what an error calls it.

    Raises:
        ConfigError: as for `load`.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{origin} is not valid TOML: {exc}") from exc
    for override in overrides:
        _override(raw, override)
    return validate(raw, origin=origin)


def validate(raw: dict[str, Any], *, origin: str = "config") -> RunConfig:
    """Validate a parsed config, with every mistake in one message.

    Raises:
        ConfigError: lists each field at fault, what it held and what it takes.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as exc:
        problems = [_explain(error) for error in exc.errors()]
        raise ConfigError(f"{origin}: " + "\n  ".join(["", *problems] if len(problems) > 1 else problems)) from exc


def dumps(config: RunConfig) -> str:
    """The resolved config as TOML; `loads` gives back an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def json_schema() -> str:
    """JSON Schema of the config for editors, as indented JSON."""
    schema = RunConfig.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: expected section.key=value, such as train.learning_rate=2e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word or a path needs no quotes on a command line
    table = raw
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
    table[path[-1]] = parsed


def _explain(error: Any) -> str:
    where, kind, given = error["loc"], error["type"], error["input"]
    field = ".".join(str(part) for part in where)
    if kind == "extra_forbidden":
        known = _keys_at(where[:-1])
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = (
            f"did you mean {'.'.join([*map(str, where[:-1]), near[0]])}?" if near else f"known here: {', '.join(known)}"
        )
        return f"unknown key {field}: {hint}"
    if kind == "missing":
        return f"{field} is required"
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return message if not field or message.startswith(field.split(".")[0]) else f"{field}: {message}"
    return f"{field} = {given!r}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _keys_at(where: Sequence[str | int]) -> list[str]:
    """Names of the keys of the section at a location inside the config."""
    model: type[BaseModel] = RunConfig
    for part in where:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in nested if issubclass(kind, BaseModel))
    return list(model.model_fields)
