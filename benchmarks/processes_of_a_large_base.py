"""What large_base.py has others do: each function is the whole of one process."""

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from tests.ray_jobs import own_ray

MIB = 2**20


class Reached(Exception):
    """Workers would begin now."""


def planned(config_toml: str) -> None:
    """`fineloop plan`'s own part that reads the base."""
    from ray_jobs import plan
    from ray_jobs.base import base_model
    from ray_jobs.planning.capacity import named_device

    config = config_file.loads(config_toml)
    plan.planned(config, base_model.read_config(config.model), named_device(config))


def identified(config_toml: str) -> dict[str, str]:
    """The base's identity as a driver knows it without its weights, which it gives to the workers."""
    from components.store.store import Store
    from ray_jobs.base import base_model

    config = config_file.loads(config_toml)
    return base_model.resolve(config.model, weights=False, registry=Store.open(config.registry)).identity


def fetched(config_toml: str, identity: Mapping[str, str]) -> None:
    """What a worker reads from the store of the base, before it loads it from its node's disk."""
    from components.store.store import Store
    from ray_jobs.base import base_model

    config = config_file.loads(config_toml)
    base_model.resolve(config.model, recorded=identity, registry=Store.open(config.registry))


def server_speed(shards: int) -> float:
    """Bytes a second of some of the whole base's shards from the server, all at once, if nothing is done with them."""
    from components.store.client import client_from_environment

    client = client_from_environment()
    listed = client.list_objects_v2(Bucket="bases", Prefix="whole/")["Contents"]
    keys = [listing["Key"] for listing in listed if listing["Key"].endswith(".safetensors")][:shards]

    def read(key: str) -> int:
        body = client.get_object(Bucket="bases", Key=key)["Body"]
        return sum(map(len, body.iter_chunks(MIB)))

    begun = time.perf_counter()
    with ThreadPoolExecutor(shards) as pool:
        read_bytes = sum(pool.map(read, keys))
    return read_bytes / (time.perf_counter() - begun)


def disk_speed(shards: Sequence[Path]) -> float:
    """Bytes a second of files that the kernel has forgotten, from one pass over them."""
    read_bytes, begun = 0, time.perf_counter()
    for path in shards:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := file.read(16 * MIB):
                read_bytes += len(chunk)
    return read_bytes / (time.perf_counter() - begun)


def start_of(config_toml: str, network: float, disk: float) -> dict[str, Any] | None:
    """What `fineloop plan` says of the start, for a network and a disk of so many bytes a second."""
    from ray_jobs.base import base_model
    from ray_jobs.planning import capacity
    from ray_jobs.planning.rehearsal import Rehearsal

    config = config_file.loads(config_toml)
    base = base_model.read_config(config.model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(capacity, "NETWORK", network)
        patched.setattr(capacity, "DISK", disk)
        return capacity.start(config, base, Rehearsal.of(config, base).stats)


def driven(config_toml: str, run_id: str) -> None:
    """`ray_jobs.finetune`'s driver, until it would start workers."""
    from ray_jobs import finetune
    from ray_jobs.prepare import prepare
    from ray_jobs.training import trainer

    def stop(*_: Any, **__: Any) -> dict[str, Any]:
        raise Reached

    own_ray.start(16, 8)
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # there may be others on this machine
    with pytest.MonkeyPatch.context() as patched, contextlib.suppress(Reached):
        patched.setattr(trainer, "run", stop)
        config = config_file.loads(config_toml)
        finetune.run(config, run_id=run_id, dataset_uri=prepare(config, finetune.STEP))
