"""Opens, records and ends one step of a run.

The first step settles the config and writes it to the run's folder. Later steps get the address of that folder and the
config's digest: a Ray job may write there too, and must not change the config that the run was started with.
"""

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from components.config import config_file
from components.config.schema import RunConfig
from components.records import runs
from components.records.steps import Decision, Status, StepRecord
from components.shared import garbage
from components.shared.errors import ConfigError, Conflict, FineloopError, IntegrityError
from components.shared.protocol import STARTED, say, say_failure
from components.store import folders
from components.store.store import Store, open_uri

CONFIG = "run parameter config"
"""As the form of the Kubeflow UI names its fields."""
NOTHING: Mapping[str, str] = MappingProxyType({})
INTERRUPTED = "FINELOOP_INTERRUPTED"
"""The environment variable of steps that a local run starts once somebody has interrupted it."""


@dataclass
class StepRun:
    """A running step; the values it puts in `result` are recorded with it."""

    name: str
    run_id: str
    config: RunConfig
    store: Store
    dataset_sha256: str = ""
    """Of the manifest of the dataset that the run prepared; empty where the step was given none."""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def run_uri(self) -> str:
        """The run's folder, with a slash at the end."""
        return self.store.uri(runs.run_key(self.run_id))

    def record_skip(self, reasons: Iterable[str], *, since_run: str | None) -> None:
        adapter = self.config.adapter
        about = {"adapter": adapter.name, "alias": adapter.alias, "run_id": self.run_id, "since_run": since_run}
        decision = Decision.model_validate({"decision": "skipped", **about, "reasons": tuple(reasons)})
        runs.write(self.store, self.run_id, decision)

    def say(self, text: str) -> None:
        say(self.name, text)


def first_step(
    name: str, config: Mapping[str, Any], run_id: str, *, overrides: Mapping[str, str] = NOTHING
) -> contextlib.AbstractContextManager[StepRun]:
    """Begin a run: validate the config, and record it with `overrides` applied as runs/<run_id>/config.toml.

    A run that is begun again may distribute its work differently, such as among fewer workers: the new config is then
    recorded instead. `config` may be JSON of a protobuf Struct, as Kubeflow passes it. Overrides are
    `section.key=value` by the run parameter that a person filled in; errors about the key name the parameter. Raises
    ConfigError: the config is not valid, or the run began with another one.
    """
    return _step(name, lambda: _begun(name, config, run_id, overrides), overrides)


def step(
    name: str, run_uri: str, config_digest: str, dataset_uri: str = "", dataset_sha256: str = ""
) -> contextlib.AbstractContextManager[StepRun]:
    """Run one step of a run that has begun, and record its outcome in runs/<run_id>/steps/<name>.json. Raises
    IntegrityError: the recorded config is not the one with this digest, or the dataset's manifest not the one with
    `dataset_sha256`, unless that is empty."""

    def opened() -> StepRun:
        step_run = _reopened(name, run_uri, config_digest)
        if dataset_sha256:
            key = step_run.store.key(dataset_uri).rstrip("/")
            folders.read_manifest(step_run.store, key, manifest_sha256=dataset_sha256)
            step_run.dataset_sha256 = dataset_sha256
        return step_run

    return _step(name, opened)


def last_step(name: str, config: Mapping[str, Any], run_id: str) -> contextlib.AbstractContextManager[StepRun]:
    """Run the last step of a run, whether or not the run got as far as recording its config.

    If the config was recorded, that one is used, but for where the store is and whom to tell: a training may write to
    the run's folder, and would else choose who gets a signed message.
    """
    return _step(name, lambda: _as_begun(name, config, run_id))


@contextlib.contextmanager
def _step(name: str, opened: Callable[[], StepRun], overrides: Mapping[str, str] = NOTHING) -> Iterator[StepRun]:
    started_at, began = datetime.now(UTC), time.monotonic()
    step_run: StepRun | None = None

    def record(status: Status) -> None:
        if step_run is not None:
            runs.write(
                step_run.store,
                step_run.run_id,
                StepRecord(
                    step=name,
                    status=status,
                    started_at=started_at.isoformat(),
                    seconds=round(time.monotonic() - began, 3),
                    result=step_run.result,
                ),
            )

    garbage.leave_at_exit()  # a step is a process
    with _components_log_as(name):
        say(name, STARTED)
        try:
            with _naming_parameters(overrides):
                step_run = opened()
                yield step_run
            record("succeeded")
        except Exception as exc:  # a step is a process entry point: its error crosses to another process
            if not isinstance(exc, FineloopError):
                traceback.print_exc()
            say_failure(name, exc)
            if step_run is not None:
                step_run.result.setdefault("error", {"kind": type(exc).__name__, "message": str(exc)})
            with contextlib.suppress(FineloopError):
                record("failed")
            raise
        say(name, f"finished in {time.monotonic() - began:.1f} s")


@contextlib.contextmanager
def _naming_parameters(overrides: Mapping[str, str]) -> Iterator[None]:
    """Name in an error about a key the run parameter that set it: the form of the Kubeflow UI shows no keys."""
    try:
        yield
    except FineloopError as exc:
        message = str(exc)
        names = [name for name, override in overrides.items() if override.partition("=")[0] in message]
        if not names:
            raise
        to_blame, rest = f"run parameter {', '.join(names)}", message.removeprefix(CONFIG)
        raise type(exc)(f"{to_blame}: {message}" if rest == message else f"{to_blame}{rest}") from exc


def _begun(name: str, values: Mapping[str, Any], run_id: str, overrides: Mapping[str, str]) -> StepRun:
    config = _validated(values, run_id, overrides)
    store, key = Store.open(config.registry), runs.run_key(run_id, runs.CONFIG)
    body = config_file.dumps(config).encode()
    try:
        store.create(key, body, content_type="application/toml")
    except Conflict:
        first = config_file.loads(store.get(key).decode(), origin=store.uri(key))
        if first.training_digest != config.training_digest:
            raise ConfigError(
                f"run {run_id} began with another config ({store.uri(key)}): take another run_id"
            ) from None
        if first.digest != config.digest:  # the run goes on with other workers
            store.put(key, body, content_type="application/toml")
    return StepRun(name, run_id, config, store)


def _reopened(name: str, run_uri: str, config_digest: str) -> StepRun:
    where, key = open_uri(run_uri + runs.CONFIG, field="run_uri")
    config = config_file.loads(where.get(key).decode(), origin=run_uri + runs.CONFIG)
    if config.digest != config_digest:
        raise IntegrityError(
            f"{run_uri}{runs.CONFIG} has digest {config.digest}, and the run began with {config_digest}: it was "
            "changed since, so start another run"
        )
    return StepRun(name, run_uri.rstrip("/").rpartition("/")[2], config, Store.open(config.registry))


def _as_begun(name: str, values: Mapping[str, Any], run_id: str) -> StepRun:
    config = _validated(values, run_id, NOTHING)
    store, key = Store.open(config.registry), runs.run_key(run_id, runs.CONFIG)
    if begun := store.read(key):
        recorded = config_file.loads(begun[0].decode(), origin=store.uri(key))
        config = recorded.model_copy(update={"registry": config.registry, "announce": config.announce})
    return StepRun(name, run_id, config, store)


def require_run_id(run_id: str) -> None:
    """Raise ConfigError if the id cannot name a run and its folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise ConfigError(f"run_id {run_id!r}: takes letters, digits, '.', '_' and '-', at most 100 characters")


def _validated(values: Mapping[str, Any], run_id: str, overrides: Mapping[str, str]) -> RunConfig:
    require_run_id(run_id)
    table = config_file.whole_numbers(values)
    return config_file.validate(table, [*overrides.values()], origin=CONFIG, overriding="")


@contextlib.contextmanager
def _components_log_as(name: str) -> Iterator[None]:
    """Print the components' log messages at INFO and above as lines of this step."""

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


# The image and the arguments of every step's KFP component.

IMAGE = "fineloop/step-python:0.2.0"
"""The image that every step runs in; `fineloop compile --image` replaces it with a pinned one."""
COMPONENT: dict[str, Any] = {"base_image": IMAGE, "packages_to_install": [], "install_kfp_package": False}
"""The arguments of every `dsl.component`. The code is in the image, so that a step installs nothing when it starts."""
