"""Checks that the pods of a run on Kubeflow can read its data and base, which must not be on the submitter's disk."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.config.schema import RunConfig
from components.shared.errors import UserError

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_reach(config: RunConfig, parameters: Mapping[str, Any]) -> None:
    """Refuse a config that names a local path, or a parameter that replaces a key by one.

    Raises:
        UserError: `data.source`, `model.base`, or the parameter that replaces it is a local path.
    """
    sources = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    named = [("data.source", source) for source in sources]
    if replaced := parameters.get("data_source"):
        named = [("--param data_source", str(replaced))]
    for name, source in named:
        if _scheme(source) in ("", "file"):
            raise UserError(
                f"{name} is {source!r}, a path, and no pod reads this machine's disk: put the data in S3 and give "
                "s3://BUCKET/FOLDER/, or take the built-in example://icd10"
            )
    field, base = "model.base", config.model.base
    if replaced := parameters.get("base_model"):
        field, base = "--param base_model", str(replaced)
    if _scheme(base) == "file" or (not _scheme(base) and _is_path(base)):
        raise UserError(
            f"{field} is {base!r}, a path, and no pod reads this machine's disk: put the folder in S3 and give "
            "s3://BUCKET/FOLDER, or name a hub id or pkg://PACKAGE/FILE.gguf. What is a hub id and also a folder here "
            "means the folder, as it does for transformers: run the command elsewhere if you mean the hub's"
        )


def _scheme(place: str) -> str:
    scheme, separator, _ = place.partition("://")
    return scheme if separator else ""


def _is_path(base: str) -> bool:
    """Whether `base` cannot be a hub id, or looks like one but exists here as a path."""
    return not _HUB_ID.fullmatch(base) or Path(base).exists()
