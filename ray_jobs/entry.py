"""Shared code of all Ray job entry points: arguments, config, logging, and errors as messages."""

import argparse
import json
import logging
import signal
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.lineage import Started
from components.shared import garbage
from components.shared.errors import FineloopError
from components.shared.machine import account
from components.shared.protocol import say, say_failure
from components.store.store import open_uri

OURS = ("components", "ray_jobs")


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """An argument parser with the arguments that every job takes; `text`, the module's docstring, is its help."""
    formatter = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(prog=f"python -m {module}", description=text, formatter_class=formatter)
    result.add_argument("--config", required=True, help="TOML file, or s3:// address of one")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as train.learning_rate=2e-4",
    )
    return result


def takes_data(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of a job that resumes under its run's name, and that prepares its data itself if given none."""
    parser.add_argument("--run-id", help="name of the run in the store; one that was cut off goes on under its name")
    parser.add_argument(
        "--dataset", help="s3:// address of a prepared dataset; without it, data.source is prepared first"
    )
    return parser


def load_config(location: str, overrides: list[str]) -> RunConfig:
    """Load the config from a file or from the store. Raises ConfigError: it does not exist or is not valid."""
    if not location.startswith("s3://"):
        return config_file.load(Path(location), overrides)
    store, key = open_uri(location, field="--config")
    return config_file.loads(store.get(key).decode("utf-8"), overrides, origin=location)


def new_run_id(adapter: str) -> str:
    """A new run id, which sorts by time and contains the adapter's name."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{adapter}-{uuid.uuid4().hex[:4]}"


def started(environment: Mapping[str, str], ray_job_id: str) -> Started:
    """The ids of the Ray job that runs this driver, and the user who submitted it.

    Ray's Jobs API passes an entry point the metadata of its submission (ray/dashboard/modules/job/job_supervisor.py);
    a module that is run by hand has none.
    """
    about = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return Started(
        user=about.get("fineloop_user", "") or account(environment),
        kfp_run_id=about.get("fineloop_kfp_run_id", ""),
        submission_id=about.get("job_submission_id", ""),
        ray_job_id=ray_job_id,
    )


def quiet_libraries() -> None:
    """Keep progress bars and libraries' deprecation warnings out of a job's log, so that its own lines stand out."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def print_err(text: str, end: str = "\n") -> None:
    """Print a message for the user on stderr: stdout is for answers alone."""
    sys.stderr.write(text + end)
    sys.stderr.flush()


@contextmanager
def for_people() -> Iterator[None]:
    """Run a job at a terminal: announce slow steps, and turn a FineloopError into one line and its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that copies of adapters are removed
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ray_jobs").setLevel(logging.INFO)
    print_err("starting PyTorch and transformers")
    quiet_libraries()
    try:
        yield
    except FineloopError as exc:
        print_err(f"fineloop: {exc}")
        sys.exit(exc.exit_code)


def connect() -> None:
    """Connect this driver to its Ray cluster, unless it is connected already."""
    import ray

    ray.init(log_to_driver=True, logging_level=logging.WARNING, ignore_reinit_error=True)


def log_as(step: str, *, rank: int = 0) -> None:
    """Print what our own modules log at INFO and above as lines of this step; of a further worker, which would only
    repeat them, the warnings alone, as Ray Train's root logger in a worker passes on all records
    (ray/train/v2/_internal/logging/logging.py)."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(step, record.getMessage())

    for logger in map(logging.getLogger, OURS):
        logger.setLevel(logging.WARNING if rank else logging.INFO)
        if rank == 0:
            logger.propagate = False
            logger.handlers = [Lines()]


def run(step: str, job: Callable[[], None], *, uses_models: bool = True) -> None:
    """Run a job and end with its exit code: a FineloopError becomes one line that the submitter can read."""
    garbage.leave_at_exit()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log_as(step)
    if uses_models:
        quiet_libraries()
    try:
        job()
    except FineloopError as exc:
        say_failure(step, exc)
        sys.exit(exc.exit_code)


def main(step: str, parser: argparse.ArgumentParser, job: Callable[[RunConfig, argparse.Namespace], None]) -> None:
    """Parse the command line, and `run` the job with the config that it names."""
    arguments = parser.parse_args()
    run(step, lambda: job(load_config(arguments.config, arguments.set), arguments))
