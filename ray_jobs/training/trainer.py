"""Ray Train as Fineloop uses it: one function on every worker of a group, and what rank 0 returned.

A worker that raises while the others wait for it in a collective operation ends them all: Ray Train's controller sees
it within a second and kills the group. Then it starts another, at most `max_failures` times, but for what
`is_mistake` names.
"""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from components.config.schema import RunConfig
from components.records import runs
from components.shared.errors import JobError, UserError
from components.shared.low_memory import ran_low
from components.store.store import Store

RESIZE_EVERY_S = 60.0
"""How often an elastic training looks whether more workers have room. They begin at its newest checkpoint."""


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
    """Start the workers, and again after at most `max_failures` failures, or where a node of theirs was taken.

    `name` is Ray's folder within the run's.

    Raises:
        UserError: the user's mistake, as the first worker that met it raised it.
        JobError: the workers failed for another reason.
    """
    from ray.exceptions import OutOfMemoryError
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    # It prints and logs what a worker prints: every line would come twice.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    trainer = TorchTrainer(
        partial(_saying_mistakes_once, function),
        train_loop_config=dict(arguments),
        torch_config=TorchConfig(
            backend="nccl" if config.ray.use_gpu else "gloo", timeout_s=config.ray.collective_timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(config),
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=config.ray.use_gpu,
            resources_per_worker=config.ray.per_worker,
        ),
        run_config=RayRunConfig(
            name=name,
            storage_path=store.uri(runs.run_key(run_id).rstrip("/")),
            failure_config=FailureConfig(
                max_failures=max_failures, max_preemption_failures=config.ray.max_preemption_failures
            ),
            callbacks=[_ending_at_mistakes()],
        ),
    )
    try:
        answer: dict[str, Any] = trainer.fit().return_value or {}
    except ControllerError as exc:
        if is_mistake(exc.controller_failure):
            raise exc.controller_failure from None
        raise _failed(str(exc.controller_failure)) from exc
    except OutOfMemoryError as exc:  # of the controller itself
        raise _failed(str(exc)) from exc
    except TrainingFailedError as exc:
        raise _failed(_root(exc)) from exc
    return answer


def is_mistake(exc: BaseException) -> bool:
    """Whether starting the workers again could not mend it."""
    return isinstance(exc, (UserError, JobError))


def _saying_mistakes_once(
    function: Callable[[dict[str, Any]], dict[str, Any]], arguments: dict[str, Any]
) -> dict[str, Any]:
    """In each worker. Ray Train would log a mistake with its stack, and the driver says it in one sentence."""
    try:
        return function(arguments)
    except Exception as exc:
        if is_mistake(exc):
            _quieten()
        raise


def _quieten() -> None:
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def _ending_at_mistakes() -> Any:
    """What Ray Train's controller calls for each failure; what it raises is not tried again."""
    from ray.train import UserCallback

    class EndsAtMistake(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            # A worker that lost its connection to the one that made the mistake may have failed as well.
            for _, found in sorted(worker_exceptions.items()):
                if is_mistake(found):
                    _quieten()  # the controller ends with this
                    raise found

    return EndsAtMistake()


def _num_workers(config: RunConfig) -> int | tuple[int, int]:
    fewest, most = config.ray.min_workers, config.ray.max_workers
    return (fewest, most) if config.ray.is_elastic else most


def _failed(why: str) -> JobError:
    return JobError(f"the workers failed: {ran_low(why) or why}")


def _root(exc: Any) -> str:
    failures = getattr(exc, "worker_failures", None) or {}
    return "; ".join(f"rank {rank}: {failure}".strip() for rank, failure in sorted(failures.items())[:1]) or str(exc)
