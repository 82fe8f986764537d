"""What is swept: arms (a method at one rank and batch size), their points, and the config of a point's training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from components.config import config_file
from components.config.methods import METHODS
from components.config.schema import MethodConfig, RunConfig
from components.config.tune import TuneConfig
from components.handover.serve_manifest import ServableAs, serving
from components.shared.errors import ConfigError
from ray_jobs.training import train_loop

MEASUREMENTS = 4
"""Minimum number of held-out evaluations per trial: enough to stop it halfway, or when it diverges."""


@dataclass(frozen=True)
class Arm:
    """A method at one rank and batch size, with a learning rate sweep of its own."""

    method: str
    rank: int
    batch_size: int


@dataclass(frozen=True)
class Point:
    """One training of an arm."""

    arm: Arm
    learning_rate: float
    seed: int
    compares: bool = False
    """Whether it belongs to the comparison of methods."""

    @property
    def name(self) -> str:
        """Name of the point, unique within a sweep; its trial's record has the same name."""
        arm = self.arm
        return f"{arm.method}-r{arm.rank}-b{arm.batch_size}-{self.learning_rate:.3g}-s{self.seed}"


def arms(config: RunConfig) -> Iterator[Arm]:
    """Yield the arms that the config sweeps, sorted by the format of their base, so that it is loaded rarely.

    Raises:
        ConfigError: an arm has no legal config.
    """
    names = config.tune.methods or [config.method.name]
    for name in sorted(dict.fromkeys(names), key=lambda name: METHODS[name].base):
        method = _method(config, name)
        for rank in config.tune.space.ranks or [method.r]:
            for batch_size in config.tune.space.batch_sizes or [config.train.batch_size]:
                arm = Arm(name, rank, batch_size)
                at_rate(config, arm, prior(config, arm))
                yield arm


def prior(config: RunConfig, arm: Arm) -> float:
    """The learning rate to search around: the config's; for another method, scaled by the methods' relative rates."""
    relative = METHODS[arm.method].relative_rate / METHODS[config.method.name].relative_rate
    return float(f"{min(config.learning_rate * (1 if arm.method == config.method.name else relative), 0.1):.3g}")


def at_rate(config: RunConfig, arm: Arm, learning_rate: float) -> RunConfig:
    """The config of a run that trains the arm at a learning rate.

    Raises:
        ConfigError: it is no legal config.
    """
    method = _method(config, arm.method)
    rank = {} if arm.rank == method.r else {"rank": arm.rank}
    train = {"learning_rate": learning_rate, "batch_size": arm.batch_size}
    return _checked(
        config.model_copy(
            update={
                "method": method.model_copy(update=rank),
                "train": config.train.model_copy(update=train),
            }
        ),
        f"sweeping {arm.method}",
    )


def trial_config(config: RunConfig, point: Point, num_records: int) -> RunConfig:
    """The config of a point's training: like a run's, but on one worker, which holds the whole base.

    Neither the number of workers nor ZeRO-3 changes the optimizer steps.
    """
    run = at_rate(config, point.arm, point.learning_rate)
    train = run.train.model_copy(
        update={
            "seed": point.seed,
            "max_steps": config.tune.max_steps or run.train.max_steps,
            "checkpoint_every_steps": 0,
            "zero_stage": min(run.train.zero_stage, 2),
        }
    )
    per_epoch, total = math.ceil(num_records / train.batch_size), train_loop.num_steps(train, num_records)
    often = max(train.evals_per_epoch, math.ceil(per_epoch * MEASUREMENTS / total))
    return run.model_copy(
        update={
            "train": train.model_copy(update={"evals_per_epoch": often}),
            "ray": run.ray.model_copy(update={"num_workers": 1}),
            "tune": TuneConfig(),
        }
    )


def servable_as(config: RunConfig, arm: Arm) -> ServableAs:
    """How an arm's adapters can be served, as far as the method determines it."""
    return serving(_method(config, arm.method).row, rank=arm.rank, target_modules=()).servable_as


def _method(config: RunConfig, name: str) -> MethodConfig:
    """The method by its name: the config's own as it is, another with its own default rank and axes."""
    own = config.method
    if name == own.name:
        return own
    shared = {"dropout": own.dropout, "target_modules": own.target_modules, "loftq_steps": own.loftq_steps}
    return MethodConfig.model_validate({"name": name, **shared})


def _checked(config: RunConfig, doing: str) -> RunConfig:
    try:
        return config_file.loads(config_file.dumps(config))
    except ConfigError as exc:
        raise ConfigError(f"{doing}: {str(exc).removeprefix('config: ')}") from exc
