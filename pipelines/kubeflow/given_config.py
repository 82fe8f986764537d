"""The config of a run, or of each run of a schedule, as read from kfp's record of it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import config_file
from components.prepare.prepare import ANYWAY, KEYS, overrides
from components.shared.errors import ConfigError
from pipelines.kubeflow.parameters import CONFIG, defined


@dataclass(frozen=True)
class GivenConfig:
    """A config, and the parameters that replace keys of it. `table` is empty for a run of another pipeline."""

    table: Mapping[str, Any]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, detail: Any, spec: Mapping[str, Any]) -> "GivenConfig":
        """Read the config that was sent, or else the default in the pipeline's spec; an empty spec has no default."""
        default = defined(spec).get(CONFIG, {}).get("defaultValue") if spec else None
        given = sent(detail)
        fields = {name: given[name] for name in (*KEYS, ANYWAY) if name in given}
        return cls(_table(given.get(CONFIG) or default), fields)

    @property
    def adapter(self) -> str:
        """Name of the adapter to retrain; empty if the config has none."""
        section = self.table.get("adapter")
        if not isinstance(section, Mapping):
            return ""
        return str(self.fields.get("adapter_name") or section.get("name", ""))

    @property
    def digest(self) -> str:
        """The config's digest, as in lineage; empty if this version of Fineloop cannot read the config."""
        if not self.table:
            return ""
        try:
            return config_file.validate(self.table, [*overrides(**self.fields).values()]).digest
        except ConfigError:
            return ""


def sent(detail: Any) -> dict[str, Any]:
    """Return the parameters of a run, or of each run of a recurring run, as they were sent."""
    return dict(detail.runtime_config.parameters or {}) if detail.runtime_config else {}


def _table(given: Any) -> dict[str, Any]:
    """Return a sent config as a table; release 0.1.0 sent it as TOML. Empty if it cannot be read."""
    try:
        read = tomllib.loads(given) if isinstance(given, str) else config_file.whole_numbers(given)
    except tomllib.TOMLDecodeError:
        return {}
    return dict(read) if isinstance(read, Mapping) else {}
