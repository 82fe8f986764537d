"""The config that a run was given, or that a schedule gives each of its runs, as kfp's record of it holds it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.config import config_file
from components.shared.errors import ConfigError
from pipelines.kubeflow.parameters import CONFIG, defined


@dataclass(frozen=True)
class GivenConfig:
    """A config as TOML; empty for what runs another pipeline than ours."""

    toml: str

    @classmethod
    def of(cls, detail: Any, spec: Mapping[str, Any]) -> "GivenConfig":
        """As sent, or else the pipeline's default; an empty spec has none."""
        default = defined(spec).get(CONFIG, {}).get("defaultValue", "") if spec else ""
        return cls(str(sent(detail).get(CONFIG) or default))

    @property
    def adapter(self) -> str:
        """The adapter that it retrains; empty where it names none."""
        try:
            return str(tomllib.loads(self.toml)["adapter"]["name"])
        except (tomllib.TOMLDecodeError, KeyError, TypeError):
            return ""

    @property
    def digest(self) -> str:
        """As lineage has it; empty where this version of Fineloop cannot read the config."""
        try:
            return config_file.loads(self.toml).digest
        except ConfigError:
            return ""


def sent(detail: Any) -> dict[str, Any]:
    """The parameters of a run, or of each run of a recurring one, as they were sent."""
    return dict(detail.runtime_config.parameters or {}) if detail.runtime_config else {}
