"""`fineloop run` and `fineloop train`: the pipeline on this machine, with embedded servers or configured ones."""

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, TypeVar

from components.config import config_file
from components.config.schema import RunConfig
from components.config.track import SECRETS_FILE
from components.shared.cpus import this_cpu
from components.shared.environment import in_environment
from components.shared.errors import ConfigError, FineloopError, ObjectMissing, UserError
from pipelines.local.display import Display, is_live
from pipelines.local.gpus import lacking
from pipelines.local.local_services import local_services, ray_configured
from pipelines.local.outcome import Outcome, read_outcome, read_trained
from pipelines.local.private import private_folder
from pipelines.local.service import python_path, write_private
from pipelines.local.watch import Ended, watch

if TYPE_CHECKING:
    from components.store.store import Store

LOG = "pipeline.log"
What = Literal["retrain", "train", "sweep"]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Place:
    """Where runs keep their files on this machine, and the terminal that shows them."""

    home: Path
    terminal: TextIO
    verbose: bool = False
    address: str = ""
    """Jobs API of a Ray cluster; empty means RAY_ADDRESS, or else the local head."""


def new_run_id() -> str:
    """Return a new run id; ids sort by time, and differ between runs that begin in the same second."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run(
    config: RunConfig, place: Place, *, what: Literal["retrain", "train"], run_id: str = "", dataset_uri: str = ""
) -> Outcome:
    """Run the pipeline to its end and return the outcome; arguments and errors as in `run_and_read`."""

    def read(store: "Store", run_id: str, folder: Path, ground_s: float, total_s: float) -> Outcome:
        if what == "train":
            return read_trained(config, store, run_id, ground_s=ground_s, total_s=total_s)
        return read_outcome(store, run_id, ground_s=ground_s, total_s=total_s, report_path=folder / "report.html")

    return run_and_read(config, place, read, what=what, run_id=run_id, dataset_uri=dataset_uri)


def run_and_read(
    config: RunConfig,
    place: Place,
    read: "Callable[[Store, str, Path, float, float], Read]",
    *,
    what: What,
    run_id: str = "",
    dataset_uri: str = "",
) -> Read:
    """Run the pipeline to its end: one line per step on the terminal, all output in HOME/runs/<run_id>/pipeline.log.

    Then `read` is called while the store is up, with the store, the run's id, its folder on this machine, and the
    seconds that the servers' start and the whole run took. With `dataset_uri` a training takes that dataset instead of
    its sources. Ctrl-C and SIGTERM arrive as KeyboardInterrupt, which leaves no process and no Ray job behind.

    Raises:
        UserError: an address is given to a config whose `ray.cluster` takes none, this machine lacks the GPUs that
            it asks for, the home cannot be written, or another command is executing this run.
        FineloopError: a step failed; the exception has the class of the step's own error.
        GroundError: the store or the Ray head did not start.
    """
    from components.step.step import require_run_id

    _require_runnable(config, place)
    needs_head = config.ray.cluster.has_address and not place.address
    run_id = run_id or new_run_id()
    require_run_id(run_id)
    began = time.monotonic()
    home = place.home.absolute()
    folder = private_folder(private_folder(home / "runs") / run_id)
    private_folder(home / "kfp")  # the steps' outputs, reports among them: private even where the home is open
    display = Display(place.terminal, live=is_live(place.terminal) and not place.verbose)
    trains_here = needs_head and not ray_configured() and not config.ray.use_gpu
    try:
        ray_address = {"RAY_ADDRESS": place.address} if place.address else {}
        with contextlib.ExitStack() as while_it_runs:
            while_it_runs.enter_context(_alone(folder, what))
            (folder / "config.toml").write_text(config_file.dumps(config), encoding="utf-8")
            if trains_here and what != "sweep":
                print(this_cpu().summary, file=place.terminal, flush=True)
            ground_began = time.monotonic()
            display.start("servers")
            services = local_services(place.home, bucket=config.registry.bucket, ray=needs_head)
            environment = while_it_runs.enter_context(services)
            ground_s = time.monotonic() - ground_began
            display.finish(ground_s)
            environment = {**environment, **ray_address}
            with in_environment(environment), _goes_on(what, run_id, place), _followed(config, run_id, folder):
                ended = _execute(what, run_id, config, folder, environment, place, display, dataset_uri)
                display.close()
                return _read(read, config, run_id, folder, ended, ground_s=ground_s, began=began)
    except BaseException:
        display.fail()
        raise


def _require_runnable(config: RunConfig, place: Place) -> None:
    cluster = config.ray.cluster
    if place.address and not cluster.has_address:
        raise UserError(
            f'--address {place.address}: with ray.cluster.kind = "{cluster.kind}" the config alone says which cluster. '
            "Drop --address, or --set ray.cluster.kind=jobs-api"
        )
    if lack := lacking(config, address=place.address):
        raise ConfigError(lack)


@contextlib.contextmanager
def _alone(folder: Path, what: What) -> Iterator[None]:
    """Lock the run's folder against other commands; the lock ends with the context, or this process in any way.

    Its file names what runs, for `fineloop runs`.

    Raises:
        UserError: another command holds the lock.
    """
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {folder.name} is under way in another process: wait for its end, or take another --run-id"
            ) from None
        lock.truncate(0)
        lock.write(what)
        lock.flush()
        yield


@contextlib.contextmanager
def _goes_on(what: What, run_id: str, place: Place) -> Iterator[None]:
    """If a run does not finish, add a note on how to resume it, unless its input must change first."""
    try:
        yield
    except UserError:
        raise
    except (FineloopError, OSError, KeyboardInterrupt) as exc:
        command = ["fineloop", "run" if what == "retrain" else what]
        command += ["-c", str(place.home / "runs" / run_id / "config.toml"), "--run-id", run_id]
        command += ["--home", str(place.home)] if place.home != Path(".fineloop") else []
        command += ["--address", place.address] if place.address else []
        exc.add_note(f"to go on from where it was: {shlex.join(command)}")
        raise


@contextlib.contextmanager
def _followed(config: RunConfig, run_id: str, folder: Path) -> Iterator[None]:
    """Write event files of the run's curve while it runs."""
    from components.store.store import Store
    from pipelines.local.event_files import beside

    with beside(Store.open(config.registry), run_id, folder):
        yield


def _execute(
    what: What,
    run_id: str,
    config: RunConfig,
    folder: Path,
    environment: Mapping[str, str],
    place: Place,
    display: Display,
    dataset_uri: str,
) -> Ended:
    ended: Ended | None = None
    scratch = folder / "scratch"  # for steps, which may be killed before they empty it
    shutil.rmtree(scratch, ignore_errors=True)
    private_folder(scratch)
    if tokens := {name: os.environ[name] for name in config.track.secrets if name in os.environ}:
        write_private(folder / SECRETS_FILE, json.dumps(tokens))  # the worker that tracks is no child of ours
    variables = {"PYTHONPATH": python_path(os.environ), "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    try:
        ended = watch(
            [
                *(sys.executable, "-m", "pipelines.local.run_pipeline", what),
                *("--config", str(folder / "config.toml"), "--run-id", run_id),
                *("--pipeline-root", str(place.home.absolute() / "kfp"), "--dataset", dataset_uri),
            ],
            environment={**os.environ, **environment, **variables},
            directory=folder,
            log_path=folder / LOG,
            on_line=display.line,
            on_tick=display.tick,
            on_text=(lambda text: print(text, file=place.terminal)) if place.verbose else None,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if ended is None or ended.killed_by:
            _stop_jobs(config, run_id)
    return ended


def _read(
    read: "Callable[[Store, str, Path, float, float], Read]",
    config: RunConfig,
    run_id: str,
    folder: Path,
    ended: Ended,
    *,
    ground_s: float,
    began: float,
) -> Read:
    """Raise the failure of a step, or else read the outcome: the process's exit status says little about it."""
    from components.records import runs
    from components.store.store import Store

    store = Store.open(config.registry)
    try:
        if ended.failure is not None:
            raise ended.failure.as_error()
        try:
            return read(store, run_id, folder, round(ground_s, 3), round(time.monotonic() - began, 3))
        except ObjectMissing as exc:
            why = f"its process was ended by {ended.killed_by}" if ended.killed_by else str(exc)
            raise FineloopError(f"run {run_id} ended early and no step said why: {why}") from exc
    except FineloopError as exc:
        exc.add_note(f"{f'step {ended.failed_step}; ' if ended.failed_step else ''}log: {folder / LOG}")
        if "report" in ended.finished:
            with contextlib.suppress(OSError):  # errors of the store are OSErrors too, like the disk's
                report = folder / runs.REPORT
                report.write_bytes(store.get(runs.run_key(run_id, runs.REPORT)))
                exc.add_note(f"report: {report}")
        raise


def _stop_jobs(config: RunConfig, run_id: str) -> None:
    """Stop the jobs that the run left on the cluster; a step that was killed could not do so."""
    from components.ray_cluster.submit import stop_run

    with contextlib.suppress(FineloopError):
        stop_run(run_id, config.ray)
