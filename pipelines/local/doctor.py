"""`fineloop doctor`: checks whether this machine can run Fineloop. Starts nothing."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from components.config.schema import RegistryConfig, RunConfig
from components.shared.errors import FineloopError, StoreError
from components.shared.machine import available_bytes, in_environment, machine_bytes, this_cpu
from pipelines.check import IN_MESSAGE, Check, check
from pipelines.local import local_services, ray_head, seaweedfs
from pipelines.local.local_services import ray_configured
from pipelines.local.server import LOOPBACK

# Checks that this machine has the GPUs that a config asks for, before the local Ray head starts or data are read.

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


GIB = 1024**3
PYTHON = (3, 11)
HOME_DISK_BYTES = 3 * GIB  # a converted 135M base model, its checkpoints and the embedded store's volumes
TEMP_DISK_BYTES = 1 * GIB  # Ray spills and logs there
MEMORY_BYTES = 6 * GIB  # two CPU workers on the built-in example, the Ray head and the store
SHM_BYTES = ray_head.OBJECT_STORE_BYTES
STEP_PACKAGES = ("boto3", "pyarrow", "pydantic", "kfp", "ray", "jinja2", "tomli_w")
TRAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "accelerate", "safetensors", "gguf")


def checks(home: Path, *, config: RunConfig | None = None) -> list[Check]:
    """Check the machine, the packages, the store and Ray, as far as each is installed, configured or up.

    With `config`, a few small objects under the registry's prefix are written, read and removed again, in the store
    that the environment names, or else in the embedded one that is up. The GPUs that the config asks for are checked.
    """
    registry = config.registry if config else None
    return [*_machine(home), *_packages(), _weed(), _loopback(), _store(home, registry), _ray(home), _gpu(config)]


def _machine(home: Path) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield check("python", sys.version_info >= PYTHON, version, "use Python 3.11 or newer")
    yield _disk("disk at --home", home, HOME_DISK_BYTES, "free some space or take another --home")
    yield _disk("temporary disk", Path(tempfile.gettempdir()), TEMP_DISK_BYTES, "free some space or set TMPDIR")
    memory = machine_bytes()
    yield check(
        "memory",
        memory >= MEMORY_BYTES,
        f"{memory / GIB:.1f} GiB, {available_bytes() / GIB:.1f} of them free now",
        f"the built-in example needs {MEMORY_BYTES / GIB:.0f} GiB: lower ray.num_workers or use a larger machine",
    )
    cpu = this_cpu()
    yield Check("processor", True, f"{cpu.name}, {cpu.kind}", "")
    yield check("cores", cpu.cores >= 2, str(cpu.cores), "two workers share one core: it works, slowly")
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield _disk("/dev/shm", shm, SHM_BYTES, "Ray falls back to the temporary disk: docker run --shm-size=1g")


def _disk(name: str, path: Path, needed: int, fix: str) -> Check:
    existing = next(place for place in [path.absolute(), *path.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    return check(name, free >= needed, f"{free / GIB:.1f} GiB free at {path}, {needed / GIB:.1f} wanted", fix)


def _packages() -> Iterator[Check]:
    for name, packages, extra in (("packages", STEP_PACKAGES, "."), ("train packages", TRAIN_PACKAGES, ".[train]")):
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        detail = f"missing: {', '.join(missing)}" if missing else "all found"
        yield check(name, not missing, detail, f"pip install -e '{extra}'")


def _weed() -> Check:
    if local_services.store_configured():
        return Check("embedded store", True, "not needed: AWS_ENDPOINT_URL is set", "")
    try:
        return Check("embedded store", True, seaweedfs.find_binary(), "")
    except FineloopError as exc:
        return Check("embedded store", False, "no weed binary", str(exc))


def _loopback() -> Check:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind((LOOPBACK, 0))
            server.listen()
            client.settimeout(2)
            client.connect(server.getsockname())
    except OSError as exc:
        return Check("loopback", False, str(exc), f"allow TCP connections on {LOOPBACK}")
    return Check("loopback", True, f"connections on {LOOPBACK} work", "")


def _store(home: Path, registry: RegistryConfig | None) -> Check:
    name = "store"
    configured = local_services.store_configured()
    endpoint = None if configured else local_services.store_service(home).endpoint()
    if not configured and endpoint is None:
        return Check(name, True, "none configured: an embedded one starts with each run", "")
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or (endpoint or {})["url"]
    if registry is None:
        return Check(name, True, f"{url} (not tried: no config)", "")
    from components.store.store import Store

    try:
        with in_environment({} if configured else local_services.store_environment(home)):
            Store.open(registry).check()
    except StoreError as exc:
        return Check(name, False, f"{url}: {exc}", IN_MESSAGE)
    return Check(name, True, f"{url}, bucket {registry.bucket}: reachable, honours conditional writes", "")


def _ray(home: Path) -> Check:
    if local_services.ray_configured():
        url = os.environ["RAY_ADDRESS"]
        if not url.startswith(("http://", "https://")):
            return Check("ray", False, f"RAY_ADDRESS={url}", "RAY_ADDRESS takes the Jobs API: http://HOST:8265")
        token = os.environ.get("RAY_AUTH_TOKEN")
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if token is None and path.is_file():
            token = path.read_text(encoding="ascii").strip()
        fix = "check RAY_ADDRESS, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and that the cluster runs"
        return check("ray", ray_head.answers(url, token), url, fix)
    if (endpoint := local_services.ray_service(home).endpoint()) is None:
        return Check("ray", True, "none configured: a local head starts with each run", "")
    answered = ray_head.answers(endpoint["url"], Path(endpoint["token_path"]).read_text(encoding="ascii"))
    return check("ray", answered, endpoint["url"], "fineloop ray down; fineloop ray up")


def _gpu(config: RunConfig | None) -> Check:
    if config is not None and importlib.util.find_spec("ray") and (lack := lacking(config)):
        detail, _, fix = lack.partition(": ")
        return Check("gpu", False, detail, fix)
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check("gpu", True, "none seen: the workers use the CPU", "")
    try:
        query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as exc:
        return Check("gpu", False, f"nvidia-smi failed ({exc})", "check the NVIDIA driver")
    return Check("gpu", True, "; ".join(found.splitlines()), "")
