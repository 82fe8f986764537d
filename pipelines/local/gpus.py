"""Checks that this machine has the GPUs that a config asks for, before the local Ray head starts or data are read."""

import importlib.util
import re
from pathlib import Path

from components.config.schema import RunConfig
from pipelines.local.local_services import ray_configured

WAYS_OUT = "set ray.use_gpu=false to train on its processors, or name a cluster with RAY_ADDRESS"


def lacking(config: RunConfig, *, address: str = "") -> str:
    """Say which GPUs a run here lacks, and what to do; empty if none are lacking, or it runs on another cluster."""
    ray = config.ray
    if not ray.use_gpu or address or ray_configured() or not ray.cluster.has_address:
        return ""
    count = num_gpus()
    if count == 0:
        return f"ray.use_gpu=true asks for a GPU, and Ray sees none on this machine: {WAYS_OUT}"
    if count < ray.min_workers:
        return f"ray.num_workers={ray.min_workers} asks for a GPU each, and this machine has {count}: lower it to that"
    if _torch_is_for_processors():
        return f"ray.use_gpu=true asks for a GPU, and this torch is a build for processors alone: {WAYS_OUT}"
    return ""


def num_gpus() -> int:
    """Return the number of GPUs that Ray sees on this machine."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")  # as a head does (ray._private.resource_and_label_spec)
    visible = manager.get_current_process_visible_accelerator_ids()
    count: int = manager.get_current_node_num_accelerators()
    return count if visible is None else min(count, len(visible))


def _torch_is_for_processors() -> bool:
    """Whether torch is a CPU-only build. Its version file is read, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    return bool(version) and re.search(r"^(cuda|hip|xpu)\b[^=\n]*= '", version, re.MULTILINE) is None
