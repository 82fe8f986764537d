"""Checks a run's parameters against the compiled pipeline before anything is sent."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import UserError

CONFIG = "config"
KINDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "NUMBER_INTEGER": ("a whole number", int),
    "NUMBER_DOUBLE": ("a number", (int, float)),
    "BOOLEAN": ("true or false", bool),
    "LIST": ("a JSON list", list),
    "STRUCT": ("a JSON object", dict),
}


def defined(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pipeline's parameters by name, as its spec defines them."""
    found: dict[str, dict[str, Any]] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    return found


def resolve(
    spec: Mapping[str, Any], config: RunConfig, given: Sequence[str], *, kept: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the parameters to send: the config, and each NAME=VALUE of `given` in the type that the pipeline wants.

    `kept` has earlier values, which stay unless the pipeline has no such parameter any more, or `config` or `given`
    replaces them.

    Raises:
        UserError: a name is unknown or missing, or a value does not have the parameter's type.
    """
    known = defined(spec)
    values = {name: value for name, value in (kept or {}).items() if name in known}
    if CONFIG in known:
        values[CONFIG] = config_file.as_table(config)
    for argument in given:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"--param {argument}: expected NAME=VALUE")
        if name == CONFIG:
            raise UserError("--param config: the config comes from -c FILE and --set KEY=VALUE")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            others = ", ".join(sorted(set(known) - {CONFIG})) or "none"
            raise UserError(
                f"--param {name}: the pipeline has no such parameter; "
                + (f"did you mean {near[0]}?" if near else f"it takes {others}")
            )
        values[name] = _typed(name, text, known[name])
    missing = [
        name
        for name, parameter in known.items()
        if name not in values and not parameter.get("isOptional") and "defaultValue" not in parameter
    ]
    if missing:
        raise UserError(f"the pipeline needs --param {missing[0]}=VALUE")
    return values


def _typed(name: str, text: str, parameter: Mapping[str, Any]) -> Any:
    kind = parameter["parameterType"]
    value: Any = text
    if kind != "STRING":
        wanted, types = KINDS[kind]
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "BOOLEAN"):
            raise UserError(f"--param {name}={text}: expected {wanted}")
    literals = parameter.get("literals")
    if literals and value not in literals:
        raise UserError(f"--param {name}={text}: expected one of {', '.join(map(str, literals))}")
    return value
