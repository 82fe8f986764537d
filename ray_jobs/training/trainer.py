"""Ray Train as Fineloop uses it: one function on every worker of a group, and what rank 0 returned."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from components.config.schema import RunConfig
from components.records import runs
from components.shared import errors
from components.shared.errors import JobError
from components.store.store import Store


def run(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: Mapping[str, Any],
    config: RunConfig,
    store: Store,
    *,
    run_id: str,
    name: str,
    max_failures: int,
) -> dict[str, Any]:
    """Start the workers, and again after at most `max_failures` failures; `name` is Ray's folder within the run's.

    Raises:
        UserError: the user's mistake, which the function returns as its `failure`.
        JobError: the workers failed for another reason.
    """
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    # It prints and logs what a worker prints: every line would come twice.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    trainer = TorchTrainer(
        function,
        train_loop_config=dict(arguments),
        torch_config=TorchConfig(backend="nccl" if config.ray.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.ray.num_workers,
            use_gpu=config.ray.use_gpu,
            resources_per_worker=per_worker(config),
        ),
        run_config=RayRunConfig(
            name=name,
            storage_path=store.uri(runs.run_key(run_id).rstrip("/")),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        answer: dict[str, Any] = trainer.fit().return_value or {}
    except TrainingFailedError as exc:
        raise JobError(f"the workers failed: {_root(exc)}") from exc
    return checked(answer)


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """What the function returned.

    Raises:
        UserError: the mistake that it returned.
        JobError: the failure that it returned.
    """
    if "failure" in answer:
        raise errors.by_name(answer["failure"]["error"], answer["failure"]["message"])
    return answer


def per_worker(config: RunConfig) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    return {"CPU": config.ray.cpus_per_worker, **({"GPU": 1} if config.ray.use_gpu else {})}


def _root(exc: Any) -> str:
    failures = getattr(exc, "worker_failures", None) or {}
    return "; ".join(f"rank {rank}: {failure}".strip() for rank, failure in sorted(failures.items())[:1]) or str(exc)
