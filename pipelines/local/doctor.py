"""`fineloop doctor`: checks whether this machine can run Fineloop, and has the GPUs that a config asks for."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from components.config.schema import RunConfig
from components.handover.announce import reached
from components.shared.errors import FineloopError, GroundError, StoreError
from components.shared.machine import available_bytes, in_environment, machine_bytes, this_cpu
from pipelines.check import IN_MESSAGE, Check, check
from pipelines.local import local_services, ray_head, seaweedfs

GIB = 1024**3
HOME_DISK_BYTES = 3 * GIB  # a converted 135M base model, its checkpoints and the embedded store's volumes
MEMORY_BYTES = 6 * GIB  # two CPU workers on the built-in example, the Ray head and the store
STEP_PACKAGES = ("boto3", "pyarrow", "pydantic", "kfp", "ray", "jinja2", "tomli_w")
TRAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "safetensors", "gguf")
WAYS_OUT = "set ray.use_gpu=false to train on its processors, or name a cluster with RAY_ADDRESS"
Found = tuple[bool, str, str]  # whether it is well, what was seen, and what to do where it is not


def checks(home: Path, config: RunConfig) -> list[Check]:
    """Check the machine, its packages and GPUs, and store and Ray as far as each is configured or up. Starts nothing; a
    few small objects under the registry's prefix try the store."""
    return [
        check(name, *look(home, config)) for name, look in CHECKS.items() if name != "/dev/shm" or Path(name).is_dir()
    ]


def _disk(path: Path, needed: int, fix: str) -> Found:
    existing = next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    return free >= needed, f"{free / GIB:.1f} GiB free at {path}, {needed / GIB:.1f} wanted", fix


def _memory(_home: Path, _config: RunConfig) -> Found:
    total, need = machine_bytes(), f"the built-in example needs {MEMORY_BYTES / GIB:.0f} GiB"
    detail = f"{total / GIB:.1f} GiB, {available_bytes() / GIB:.1f} of them free now"
    return total >= MEMORY_BYTES, detail, f"{need}: lower ray.num_workers or use a larger machine"


def _packages(packages: tuple[str, ...], extra: str) -> Found:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return not missing, f"missing: {', '.join(missing)}" if missing else "all found", f"pip install -e '{extra}'"


def _weed(_home: Path, _config: RunConfig) -> Found:
    if local_services.store_configured():
        return True, "not needed: AWS_ENDPOINT_URL is set", ""
    try:
        return True, seaweedfs.find_binary(), ""
    except FineloopError as exc:
        return False, "no weed binary", str(exc)


def _store(home: Path, config: RunConfig) -> Found:
    configured = local_services.store_configured()
    endpoint = None if configured else local_services.store_service(home).endpoint()
    if not configured and endpoint is None:
        return True, "none configured: an embedded one starts with each run", ""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or (endpoint or {})["url"]
    from components.store.store import Store

    try:
        with in_environment({} if configured else local_services.client_environment("store", home)):
            Store.open(config.registry).check()
    except StoreError as exc:
        return False, f"{url}: {exc}", IN_MESSAGE
    return True, f"{url}, bucket {config.registry.bucket}: reachable, honours conditional writes", ""


def _ray(home: Path, _config: RunConfig) -> Found:
    if local_services.ray_configured():
        url = os.environ["RAY_ADDRESS"]
        if not url.startswith(("http://", "https://")):
            return False, f"RAY_ADDRESS={url}", "RAY_ADDRESS takes the Jobs API: http://HOST:8265"
        token = os.environ.get("RAY_AUTH_TOKEN")
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if token is None and path.is_file():
            token = path.read_text(encoding="ascii").strip()
        fix = "check RAY_ADDRESS, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and that the cluster runs"
        return ray_head.answers(url, token), url, fix
    if (endpoint := local_services.ray_service(home).endpoint()) is None:
        return True, "none configured: a local head starts with each run", ""
    answered = ray_head.answers(endpoint["url"], Path(endpoint["token_path"]).read_text(encoding="ascii"))
    return answered, endpoint["url"], "fineloop ray down; fineloop ray up"


def _gpu(_home: Path, config: RunConfig) -> Found:
    if importlib.util.find_spec("ray") and (lack := lacking(config)):
        detail, _, fix = lack.partition(": ")
        return False, detail, fix
    try:
        seen = nvidia_gpus()
    except GroundError as exc:
        return False, str(exc), IN_MESSAGE
    return True, "; ".join(", ".join(gpu) for gpu in seen) or "none seen: the workers use the CPU", ""


def nvidia_gpus() -> list[tuple[str, str]]:
    """Name and memory, such as 81559 MiB, of each GPU that NVIDIA's driver names. Raises GroundError: the driver does
    not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (subprocess.SubprocessError, OSError) as exc:
        raise GroundError(f"nvidia-smi failed ({exc}): check the NVIDIA driver") from exc
    return [(name, memory.strip()) for name, _, memory in (line.partition(",") for line in lines if line.strip())]


CHECKS: dict[str, Callable[[Path, RunConfig], Found]] = {
    "python": lambda *_: (True, platform.python_version(), ""),
    "disk at --home": lambda home, _: _disk(home, HOME_DISK_BYTES, "free some space or take another --home"),
    "temporary disk": lambda *_: _disk(Path(tempfile.gettempdir()), GIB, "free some space or set TMPDIR"),  # for Ray
    "memory": _memory,
    "processor": lambda *_: (True, f"{this_cpu().name}, {this_cpu().kind}", ""),
    "cores": lambda *_: (this_cpu().cores >= 2, str(this_cpu().cores), "two workers share one core: it works, slowly"),
    "/dev/shm": lambda *_: _disk(
        Path("/dev/shm"), ray_head.OBJECT_STORE_BYTES, "Ray falls back to the temporary disk: docker run --shm-size=1g"
    ),
    "packages": lambda *_: _packages(STEP_PACKAGES, "."),
    "train packages": lambda *_: _packages(TRAIN_PACKAGES, ".[train]"),
    "embedded store": _weed,
    "store": _store,
    "ray": _ray,
    "gpu": _gpu,
    "notified": lambda _, config: (*reached(config.announce, os.environ), "set them: docs/registry.md, Notifications"),
}


def lacking(config: RunConfig, *, address: str = "") -> str:
    """Say which GPUs a run here lacks, and what to do; empty if none are lacking, or it runs on another cluster."""
    ray = config.ray
    if not ray.use_gpu or address or local_services.ray_configured() or not ray.cluster.has_address:
        return ""
    count = num_gpus()
    if count == 0:
        return f"ray.use_gpu=true asks for a GPU, and Ray sees none on this machine: {WAYS_OUT}"
    if count < ray.min_workers:
        return f"ray.num_workers={ray.min_workers} asks for a GPU each, and this machine has {count}: lower it to that"
    spec = importlib.util.find_spec("torch")  # its version file is read, because importing torch takes seconds
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    if version and re.search(r"^(cuda|hip|xpu)\b[^=\n]*= '", version, re.MULTILINE) is None:
        return f"ray.use_gpu=true asks for a GPU, and this torch is a build for processors alone: {WAYS_OUT}"
    return ""


def num_gpus() -> int:
    """Return the number of GPUs that Ray sees on this machine."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")  # as a head does (ray._private.resource_and_label_spec)
    visible = manager.get_current_process_visible_accelerator_ids()
    count: int = manager.get_current_node_num_accelerators()
    return count if visible is None else min(count, len(visible))
