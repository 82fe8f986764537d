"""The config that a run was given, or that a schedule gives each of its runs, as kfp's record of it holds it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import config_file
from components.prepare.parameters import ANYWAY, KEYS, overrides
from components.shared.errors import ConfigError
from pipelines.kubeflow.parameters import CONFIG, defined


@dataclass(frozen=True)
class GivenConfig:
    """A config, and the parameters that replace keys of it; no table for what runs another pipeline than ours."""

    table: Mapping[str, Any]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, detail: Any, spec: Mapping[str, Any]) -> "GivenConfig":
        """As sent, or else the pipeline's default; an empty spec has none."""
        default = defined(spec).get(CONFIG, {}).get("defaultValue") if spec else None
        given = sent(detail)
        fields = {name: given[name] for name in (*KEYS, ANYWAY) if name in given}
        return cls(_table(given.get(CONFIG) or default), fields)

    @property
    def adapter(self) -> str:
        """The adapter that it retrains; empty where it names none."""
        section = self.table.get("adapter")
        if not isinstance(section, Mapping):
            return ""
        return str(self.fields.get("adapter_name") or section.get("name", ""))

    @property
    def digest(self) -> str:
        """As lineage has it; empty where this version of Fineloop cannot read the config."""
        if not self.table:
            return ""
        try:
            return config_file.validate(self.table, [*overrides(**self.fields).values()]).digest
        except ConfigError:
            return ""


def sent(detail: Any) -> dict[str, Any]:
    """The parameters of a run, or of each run of a recurring one, as they were sent."""
    return dict(detail.runtime_config.parameters or {}) if detail.runtime_config else {}


def _table(given: Any) -> dict[str, Any]:
    """A config as it is sent, and as release 0.1.0 sent it, which was TOML."""
    try:
        read = tomllib.loads(given) if isinstance(given, str) else config_file.whole_numbers(given)
    except tomllib.TOMLDecodeError:
        return {}
    return dict(read) if isinstance(read, Mapping) else {}
