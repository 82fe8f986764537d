"""One step of a run: how it is opened, recorded and ended."""

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from components.config import config_file
from components.config.schema import RunConfig
from components.registry import runs
from components.registry.records import Status, StepRecord
from components.registry.store import Store
from components.shared.errors import ConfigError, Conflict, FineloopError
from components.shared.protocol import STARTED, say, say_failure

PARAMETER = "run parameter"
"""As the form of the Kubeflow UI calls its fields."""
CONFIG = f"{PARAMETER} config"
NOTHING: Mapping[str, str] = MappingProxyType({})

_RUN_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


@dataclass
class StepRun:
    """A running step; what it puts in `result` is recorded with it."""

    name: str
    run_id: str
    config: RunConfig
    store: Store
    result: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Tell a person how it goes."""
        say(self.name, text)


@contextlib.contextmanager
def step(
    name: str, config_toml: str, run_id: str, *, overrides: Mapping[str, str] = NOTHING, as_begun: bool = False
) -> Iterator[StepRun]:
    """Run one step: validate the config, open the store, record the outcome in runs/<run_id>/steps/<name>.json.

    The first step of a run records the config, `overrides` applied, as runs/<run_id>/config.toml. They are
    `section.key=value` by the run parameter that a person filled in; errors about the key name it. With `as_begun` the
    recorded config is taken where it exists, and the given one only says where the store is.

    Raises:
        ConfigError: the config is not valid, or the run began with another one.
        StoreError: the store cannot be used.
    """
    started_at, began = datetime.now(UTC), time.monotonic()
    step_run: StepRun | None = None
    with _components_log_as(name):
        say(name, STARTED)
        try:
            with _naming_parameters(overrides):
                step_run = _open(name, config_toml, run_id, overrides, as_begun=as_begun)
                yield step_run
            _record(step_run, "succeeded", started_at, time.monotonic() - began)
        except Exception as exc:  # a step is a process entry point: whatever ends it crosses to another process
            if not isinstance(exc, FineloopError):
                traceback.print_exc()
            say_failure(name, exc)
            if step_run is not None:
                step_run.result.setdefault("error", {"kind": type(exc).__name__, "message": str(exc)})
                with contextlib.suppress(FineloopError):
                    _record(step_run, "failed", started_at, time.monotonic() - began)
            raise
        say(name, f"finished in {time.monotonic() - began:.1f} s")


@contextlib.contextmanager
def _naming_parameters(overrides: Mapping[str, str]) -> Iterator[None]:
    """Head an error about a key by the run parameter that set it: who fills in the Kubeflow UI's form sees no keys."""
    try:
        yield
    except FineloopError as exc:
        message = str(exc)
        names = [name for name, override in overrides.items() if override.partition("=")[0] in message]
        if not names:
            raise
        to_blame = f"{PARAMETER} {', '.join(names)}"
        is_of_config = message.startswith(CONFIG)
        raise type(exc)(message.replace(CONFIG, to_blame, 1) if is_of_config else f"{to_blame}: {message}") from exc


def _open(name: str, config_toml: str, run_id: str, overrides: Mapping[str, str], *, as_begun: bool) -> StepRun:
    if not _RUN_ID.match(run_id):
        raise ConfigError(f"run_id {run_id!r}: takes letters, digits, '.', '_' and '-', at most 100 characters")
    config = config_file.loads(config_toml, [*overrides.values()], origin=CONFIG, overriding="")
    store = Store.open(config.registry)
    if as_begun:
        begun = store.read(runs.run_key(run_id, runs.CONFIG))
        return StepRun(name, run_id, _recorded(store, run_id, begun[0]) if begun else config, store)
    body = config_file.dumps(config).encode()
    try:
        store.create(runs.run_key(run_id, runs.CONFIG), body, content_type="application/toml")
    except Conflict:
        first = _recorded(store, run_id, store.get(runs.run_key(run_id, runs.CONFIG)))
        if first.digest != config.digest:
            uri = store.uri(runs.run_key(run_id, runs.CONFIG))
            raise ConfigError(f"run {run_id} began with another config ({uri}): take another run_id") from None
    return StepRun(name, run_id, config, store)


def _recorded(store: Store, run_id: str, body: bytes) -> RunConfig:
    return config_file.loads(body.decode(), origin=store.uri(runs.run_key(run_id, runs.CONFIG)))


def _record(step_run: StepRun, status: Status, started_at: datetime, seconds: float) -> None:
    record = StepRecord(
        step=step_run.name,
        status=status,
        started_at=started_at.isoformat(),
        seconds=round(seconds, 3),
        result=step_run.result,
    )
    runs.write(step_run.store, step_run.run_id, record)


@contextlib.contextmanager
def _components_log_as(name: str) -> Iterator[None]:
    """Let what the components log at INFO and above reach people as lines of this step."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(name, record.getMessage())

    logger, handler = logging.getLogger("components"), Lines()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # kfp's own handler on the root logger would print each line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
