"""`fineloop run`, `train` and `sweep`: the pipeline on this machine, and what came of it."""

import contextlib
import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import tomlkit

from components.config import config_file
from components.config.methods import setting
from components.config.schema import TRACKER_SECRETS_FILE, RunConfig
from components.handover.announce import failed_notifications, warning
from components.records import runs
from components.records.runs import PAGES
from components.records.steps import ROLES, Decision, Evaluation, Role, TrainResult
from components.records.sweep import SweepResult, Tuned
from components.shared.errors import ConfigError, FineloopError, ObjectMissing, UserError
from components.shared.machine import in_environment, this_cpu
from components.shared.protocol import counted
from pipelines.local.display import Display, is_live
from pipelines.local.doctor import lacking
from pipelines.local.job import Ended, watch
from pipelines.local.local_services import local_services, ray_configured, store_configured
from pipelines.local.server import private_folder, python_path, write_private

if TYPE_CHECKING:
    from components.report.run_files import RunFiles
    from components.store.store import Store

LOG = "pipeline.log"
BAR = 24  # length of the longest bar of a sweep, in characters
What = Literal["retrain", "train", "sweep", "check"]


@dataclass(frozen=True)
class Place:
    """Where runs keep their files on this machine, and the terminal that shows them."""

    home: Path
    terminal: TextIO
    verbose: bool = False
    address: str = ""  # Jobs API of a Ray cluster; empty means RAY_ADDRESS, or else the local head


@dataclass(frozen=True)
class Finished:
    """A run that has ended, while its store is up."""

    store: "Store"
    run_id: str
    folder: Path  # its folder on this machine
    ground_s: float  # seconds that the servers' start took
    total_s: float


def run(
    config: RunConfig, place: Place, *, what: Literal["retrain", "train"], run_id: str = "", dataset_uri: str = ""
) -> "Outcome":
    """Run the pipeline to its end and return the outcome; arguments and errors as in `finished`."""
    with finished(config, place, what=what, run_id=run_id, dataset_uri=dataset_uri) as ended:
        return read_outcome(config, ended, is_decided=what == "retrain")


@contextlib.contextmanager
def finished(
    config: RunConfig, place: Place, *, what: What, run_id: str = "", dataset_uri: str = ""
) -> Iterator[Finished]:
    """Run the pipeline to its end: one line per step on the terminal, all output in HOME/runs/<run_id>/pipeline.log.

    The block reads what came of it. With `dataset_uri` a training takes that dataset instead of its sources. Ctrl-C and
    SIGTERM arrive as KeyboardInterrupt, which leaves no process and no Ray job behind.

    Raises:
        UserError: the config takes no address, this machine lacks its GPUs, the home cannot be written, or another
            command is executing this run.
        FineloopError: a step failed; the exception has the class of the step's own error.
        GroundError: the store or the Ray head did not start.
    """
    from components.step.step import require_run_id
    from components.store.store import Store

    cluster = config.ray.cluster
    if place.address and not cluster.has_address:
        raise UserError(
            f'--address {place.address}: with ray.cluster.kind = "{cluster.kind}" the config alone says which cluster. '
            "Drop --address, or --set ray.cluster.kind=jobs-api"
        )
    if lack := lacking(config, address=place.address):
        raise ConfigError(lack)
    needs_head = cluster.has_address and not place.address
    run_id = run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"  # sorts by time
    require_run_id(run_id)
    began = time.monotonic()
    home = place.home.absolute()
    folder = private_folder(private_folder(home / "runs") / run_id)
    private_folder(home / "kfp")  # the steps' outputs, reports among them: private even where the home is open
    display = Display(place.terminal, live=is_live(place.terminal) and not place.verbose)
    try:
        with contextlib.ExitStack() as while_it_runs:
            while_it_runs.enter_context(_alone(folder, what))
            (folder / "config.toml").write_text(config_file.dumps(config), encoding="utf-8")
            if needs_head and not ray_configured() and not config.ray.use_gpu and what != "sweep":
                print(this_cpu().summary, file=place.terminal, flush=True)
            ground_began = time.monotonic()
            display.start("servers")
            services = local_services(place.home, bucket=config.registry.bucket, ray=needs_head)
            environment = while_it_runs.enter_context(services)
            ground_s = time.monotonic() - ground_began
            display.finish(ground_s)
            environment |= {"RAY_ADDRESS": place.address} if place.address else {}
            while_it_runs.enter_context(in_environment(environment))
            while_it_runs.enter_context(_goes_on(what, run_id, place))
            store = Store.open(config.registry)
            ended = _execute(what, run_id, config, folder, environment, place, display, dataset_uri)
            display.close()
            with _explained(store, run_id, folder, ended):
                yield Finished(store, run_id, folder, round(ground_s, 3), round(time.monotonic() - began, 3))
    except BaseException:
        display.fail()
        raise


@contextlib.contextmanager
def _alone(folder: Path, what: What) -> Iterator[None]:
    """Lock the run's folder against other commands. The lock's file names what runs, for `fineloop runs`. Raises
    UserError: another command holds the lock."""
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
        if what == "check":  # a look that logged nothing has changed nothing
            raise
        command = ["fineloop", "run" if what == "retrain" else what]
        command += ["-c", str(place.home / "runs" / run_id / "config.toml"), "--run-id", run_id]
        command += ["--home", str(place.home)] if place.home != Path(".fineloop") else []
        command += ["--address", place.address] if place.address else []
        exc.add_note(f"to go on from where it was: {shlex.join(command)}")
        raise


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
        write_private(folder / TRACKER_SECRETS_FILE, json.dumps(tokens))  # the worker that tracks is no child of ours
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
            from components.ray_cluster.submit import stop_run

            with contextlib.suppress(FineloopError):  # jobs that a step which was killed could not stop
                stop_run(run_id, config.ray)
    return ended


@contextlib.contextmanager
def _explained(store: "Store", run_id: str, folder: Path, ended: Ended) -> Iterator[None]:
    """Raise the failure of a step, or else read the outcome: the process's exit status says little about it."""
    try:
        if ended.failure is not None:
            raise ended.failure
        try:
            yield
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `fineloop run --json` prints; `train` leaves the decision out. A skipped run has no version."""

    run_id: str
    adapter: str
    version: str | None
    version_uri: str | None
    decision: str | None = None
    verdict: str | None = None
    promoted: bool = False
    reasons: list[str] = field(default_factory=list)
    metrics: dict[Role, dict[str, float | None] | None]
    report: str | None = None
    store: dict[str, str]
    timings_s: dict[str, float]
    untold: dict[str, str]  # notifications that failed, and why
    files: "RunFiles"  # all that the run left, which is not printed

    def as_json(self) -> dict[str, Any]:
        fields = dict(vars(self))
        del fields["files"]
        if not self.untold:
            del fields["untold"]
        if self.decision is None:
            for key in ("decision", "verdict", "promoted", "reasons", "report"):
                del fields[key]
        return fields


def read_outcome(config: RunConfig, ended: Finished, *, is_decided: bool) -> Outcome:
    """Read the outcome of a run. If a gate decided, copy its report to HOME/runs/RUN/report.html, and the registry's
    pages to HOME/pages/, where the report's links lead. Raises ObjectMissing: the run has no decision or no report, or
    without a gate no version, or compared none; FineloopError: the run decided to promote and the alias did not move,
    or the other way round."""
    from components.report.report import read_run

    store, run_id = ended.store, ended.run_id
    made = runs.read(store, run_id, Decision, to_show=True) if is_decided else runs.read(store, run_id, TrainResult)
    if made.version:
        runs.read(store, run_id, Evaluation)
    files = read_run(config, store, run_id)
    promoted, decided = any(step.moved_alias for step in files.steps), dict[str, Any]()
    if is_decided and (decision := files.decision):
        if promoted != decision.promoted:
            place, did = f"{decision.adapter}@{decision.alias}", "moved" if promoted else "did not move"
            raise FineloopError(f"run {run_id} decided to {decision.decision} {decision.version}, but {place} {did}")
        report = ended.folder / runs.REPORT
        report.write_bytes(store.get(runs.run_key(run_id, runs.REPORT)))
        pages = private_folder(report.parents[2] / PAGES)
        for info in store.list(PAGES):
            if info.key.endswith(".html"):
                (pages / Path(info.key).name).write_bytes(store.get(info.key))
        decided = {"decision": decision.decision, "verdict": decision.verdict, "reasons": list(decision.reasons)}
        decided |= {"promoted": promoted, "report": str(report)}
    took = {step.step: step.seconds for step in files.steps}
    return Outcome(
        run_id=run_id,
        adapter=files.adapter,
        version=made.version,
        version_uri=made.version_uri,
        metrics={role: dict(model.metrics) if (model := files.model(role)) else None for role in ROLES},
        store={"endpoint": store.endpoint, "bucket": store.bucket, "prefix": store.prefix},
        timings_s={"ground": ended.ground_s, **took, "total": ended.total_s},
        untold=failed_notifications(files.steps),
        files=files,
        **decided,
    )


def summary(outcome: Outcome, *, home: Path, program: str = "fineloop") -> str:
    """Format the outcome for people, in the words of its report; `program` is the name of `fineloop` in this shell."""
    from components.report.report import metric_rows
    from components.report.sections import forgotten, headline, next_steps

    run, top = outcome.files, headline(outcome.files)
    lines = ["", top.title, *(textwrap.fill(text, 100) for text in (top.lead, top.consequence) if text)]
    lines += [textwrap.fill(reason, 100, initial_indent="  - ", subsequent_indent="    ") for reason in top.reasons]
    moved = f"{outcome.adapter}@{run.alias}" if outcome.promoted else ""
    lines += [*(warning(key, why, moved) for key, why in outcome.untold.items()), ""]
    if run.evaluation:
        roles = [role for role in ROLES if outcome.metrics[role]]
        rows = [("", [*map(str, roles)]), *metric_rows([outcome.metrics[role] or {} for role in roles])]
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
        told = [*run.evaluation.freshness, *textwrap.wrap(forgotten(run), 98)]
        lines += [*(f"  {line}" for line in told), ""]
    where = {"version": outcome.version_uri, "report": outcome.report}
    where["store"] = f"{outcome.store['endpoint']} (bucket {outcome.store['bucket']})"
    lines += [f"  {what:<9} {place}" for what, place in where.items() if place]
    parts = {"servers" if step == "ground" else step: seconds for step, seconds in outcome.timings_s.items()}
    took = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in parts.items() if step != "total")
    lines += [f"  {'time':<9} {outcome.timings_s['total']:.0f} s: {took}", ""]
    commands = next_steps(run, home=str(home))
    if not store_configured():
        option = "" if home == Path(".fineloop") else f" --home {shlex.quote(str(home))}"
        commands.append((f"fineloop store up{option}", "open the store to other S3 clients; it sleeps between runs"))
    shown = [(program + command.removeprefix("fineloop"), why) for command, why in commands]
    width = max((len(command) for command, _ in shown), default=0)
    return "\n".join([*lines, *[f"  {command:<{width}}  {why}" for command, why in shown], ""])


def check(config: RunConfig, place: Place, *, run_id: str = "") -> dict[str, Any]:
    """Look at production; returns the results of the steps check and roll-back. Raises FineloopError: as `finished`."""
    with finished(config, place, what="check", run_id=run_id) as ended:
        results = {step.step: step.result for step in runs.steps(ended.store, ended.run_id)}
        return {"run_id": ended.run_id, **results["check"], "moved": results.get("roll-back")}


def sweep(config: RunConfig, place: Place, *, run_id: str = "") -> SweepResult:
    """Run a sweep to its end, or resume the one with this id. Raises FineloopError: as `finished`."""
    from components.report.charts import rates_picture

    sweeping = config.model_copy(update={"tune": config.tune.model_copy(update={"when": "always"})})
    with finished(sweeping, place, what="sweep", run_id=run_id) as ended:
        result = runs.read(ended.store, ended.run_id, SweepResult)
        (ended.folder / runs.SWEEP).write_bytes(result.as_json())
        picture_path(place, ended.run_id).write_text(rates_picture(result), encoding="utf-8")
        return result


def picture_path(place: Place, run_id: str) -> Path:
    """Return the path of a sweep's picture on this machine."""
    return place.home.absolute() / "runs" / run_id / "sweep.svg"


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Yield the result as lines of text."""
    for tuned in result.tuned:
        yield f"{tuned.method}, rank {tuned.rank}, {counted(tuned.batch_size, 'record')} a step"
        losses = [rate.loss for rate in tuned.rates if rate.loss is not None]
        least, span = min(losses), (max(losses) - min(losses)) or 1.0
        for rate in tuned.rates:
            mark = "*" if rate.learning_rate == tuned.learning_rate else " "
            if rate.loss is None:
                yield f"  {mark} {rate.learning_rate:>8.3g}         -  {', '.join(sorted(set(rate.statuses)))}"
                continue
            bar = "#" * max(1, round(BAR * (rate.loss - least) / span))
            stopped = "  stopped early" if "stopped" in rate.statuses else ""
            yield f"  {mark} {rate.learning_rate:>8.3g}  {rate.loss:8.4f}  {bar}{stopped}"
        yield ""
    yield result.verdict


def changes(config: RunConfig, best: Tuned) -> dict[str, str | int | float]:
    """Return the keys to change so that a config trains as the best of a sweep did, with their values."""
    new: dict[str, tuple[str | int | float, Any]] = {
        "method.name": (best.method, config.method.name),
        "method.rank": (best.rank, config.method.model_copy(update={"name": best.method}).r),
        "train.batch_size": (best.batch_size, config.train.batch_size),
        "train.learning_rate": (best.learning_rate, config.train.learning_rate),
    }
    return {key: value for key, (value, current) in new.items() if value != current}


def apply(path: Path, config: RunConfig, best: Tuned) -> dict[str, str | int | float]:
    """Write the sweep's result to a config file, leaving the rest of its text as it is; return the keys that changed.
    Raises ConfigError: the changed file could not be read."""
    new = changes(config, best)
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    for key, value in new.items():
        section, _, name = key.partition(".")
        document.setdefault(section, tomlkit.table())[name] = value
    text = tomlkit.dumps(document)
    try:
        config_file.loads(text, origin=str(path))
    except ConfigError as exc:
        by_hand = " ".join(setting(key, value) for key, value in new.items())
        raise ConfigError(f"--apply would spoil {path}, which is left as it is; set {by_hand}: {exc}") from exc
    path.write_text(text, encoding="utf-8")
    return new
