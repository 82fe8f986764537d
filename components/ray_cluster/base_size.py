"""Checks before a job is queued that the disk of a pod holds the base; sizes are from a listing, not a download."""

import fnmatch
import logging

from components.config.ray import RayJobCluster
from components.config.schema import ModelConfig, RunConfig
from components.shared.errors import StoreError
from components.store.store import open_uri

logger = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
NEVER = ("*/*", "consolidated*")
"""Files of a hub's repository that no worker downloads; see ray_jobs/base/hub.py."""
HUB_TIMEOUT_S = 10.0


def require_disk(config: RunConfig) -> None:
    """Require that each pod's disk holds the base, where the job creates its pods. A base whose size is unknown here is
    checked by the job itself.

    Raises:
        ConfigError: each of the pods would be evicted while it downloads the base.
    """
    cluster = config.ray.cluster
    if isinstance(cluster, RayJobCluster) and (size := base_bytes(config.model)):
        cluster.require_disk(config.model.base, size)


def base_bytes(model: ModelConfig) -> int | None:
    """The bytes that a pod downloads; None where there is no listing, or the base is neither in S3 nor on a hub."""
    if model.base.startswith("s3://"):
        return _in_s3(model.base)
    return None if "://" in model.base or model.base.startswith((".", "/", "~")) else _on_the_hub(model)


def _in_s3(uri: str) -> int | None:
    store, prefix = open_uri(uri, field="model.base")
    try:
        return sum(item.size for item in store.list(prefix.rstrip("/") + "/")) or None
    except StoreError as exc:
        logger.info("the size of model.base is not known here: %s", exc)
        return None


def _on_the_hub(model: ModelConfig) -> int | None:
    try:
        from huggingface_hub import HfApi

        found = HfApi().model_info(
            model.base, revision=model.revision or None, files_metadata=True, timeout=HUB_TIMEOUT_S
        )
    except Exception as exc:  # not installed, out of reach, or refused: many types, and none has to stop a run
        logger.info("the size of model.base is not known here: %s", str(exc).partition("\n")[0])
        return None
    names = {each.rfilename: each.size or 0 for each in found.siblings or []}
    return sum(size for name, size in names.items() if _is_downloaded(name)) or None


def _is_downloaded(name: str) -> bool:
    return fnmatch.fnmatch(name, WEIGHTS) and not any(fnmatch.fnmatch(name, pattern) for pattern in NEVER)
