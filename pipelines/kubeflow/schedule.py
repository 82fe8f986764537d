"""Creates, updates and deletes schedules. A schedule is one recurring run of Kubeflow, identified by its name.

Kubeflow cannot change a recurring run. So an update first creates the new one, then disables and deletes the old one. A
crash in between leaves two, never none, and the next update or deletion removes the older one. A recurring run owns the
workflows that it started; deleting it would end them, so it is deleted with the policy ORPHAN (servers since 2.16), and
the runs that it has started continue.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from components.shared.errors import ConfigError, UserError
from components.step.kfp import IMAGE
from pipelines.kubeflow import cron, runs
from pipelines.kubeflow.client import Kubeflow, one_of
from pipelines.kubeflow.given_config import GivenConfig, sent
from pipelines.kubeflow.package import PIPELINE, Package, find_pipeline, publish
from pipelines.kubeflow.run import Specs, stamp
from pipelines.kubeflow.timing import Timing

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Schedule:
    """A schedule on the server; `detail` is kfp's record, `others` are the older records of its name."""

    kubeflow: Kubeflow
    detail: Any
    others: Sequence[Any] = ()

    @property
    def name(self) -> str:
        """The display name."""
        return str(self.detail.display_name)

    @property
    def recurring_run_id(self) -> str:
        """Kubeflow's id of the recurring run."""
        return str(self.detail.recurring_run_id)

    @property
    def is_enabled(self) -> bool:
        """Whether it starts runs, and is not paused."""
        return bool(self.detail.status == "ENABLED")

    @property
    def kfp_cron(self) -> str:
        """Kubeflow's cron expression of six fields, the first of which is seconds."""
        trigger = self.detail.trigger.cron_schedule if self.detail.trigger else None
        return trigger.cron if trigger else ""

    @property
    def cron(self) -> str:
        """Cron expression of five fields; empty for a schedule made elsewhere that has no such equivalent."""
        return cron.from_kfp(self.kfp_cron)

    @property
    def timing(self) -> Timing:
        """The times of its runs."""
        trigger = self.detail.trigger.cron_schedule if self.detail.trigger else None
        return Timing(
            self.cron,
            int(self.detail.max_concurrency or 1),
            trigger.start_time if trigger else None,
            trigger.end_time if trigger else None,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of each of its runs."""
        return sent(self.detail)

    @property
    def config(self) -> GivenConfig:
        """The config of each run; empty if a schedule made elsewhere leaves it to the pipeline's default."""
        return GivenConfig.of(self.detail, {})

    @property
    def url(self) -> str:
        """Address of the schedule in the UI."""
        return self.kubeflow.schedule_url(self.recurring_run_id)

    def live_runs(self) -> list[str]:
        """Return the ids of live runs that it, or an older recurring run of its name, has started."""
        mine = [self.recurring_run_id, *(other.recurring_run_id for other in self.others)]
        return [detail.run_id for detail in runs.of_schedule(self.kubeflow, mine)]

    def as_json(self) -> dict[str, Any]:
        """Return the schedule for scripts."""
        timing = self.timing
        return {
            "name": self.name,
            "recurring_run_id": self.recurring_run_id,
            "enabled": self.is_enabled,
            "cron": timing.cron,
            "kfp_cron": self.kfp_cron,
            "words": cron.words(timing.cron) if timing.cron else "",
            "next": [stamp(time) for time in timing.next_times(datetime.now(UTC))]
            if timing.cron and self.is_enabled
            else [],
            "time_zone": "UTC",
            "overlap": "skip" if timing.max_concurrency == 1 else "allow",
            "max_concurrency": timing.max_concurrency,
            "catch_up": not self.detail.no_catchup,
            "start": stamp(timing.start),
            "end": stamp(timing.end),
            "adapter": self.config.adapter,
            "config_digest": self.config.digest,
            "pipeline_version_id": self.detail.pipeline_version_reference.pipeline_version_id,
            "service_account": self.detail.service_account or "",
            "url": self.url,
        }


def listed(kubeflow: Kubeflow, name: str = "") -> list[Schedule]:
    """Return every schedule of the pipeline, sorted by name, or the one with this name."""
    pipeline_id = find_pipeline(kubeflow, PIPELINE)
    found: dict[str, list[Any]] = {}
    for detail in _recurring_runs(kubeflow, name):
        reference = detail.pipeline_version_reference
        if reference and reference.pipeline_id == pipeline_id:
            found.setdefault(detail.display_name, []).append(detail)
    # If several have one name, the newest counts; an interrupted update may have left an older one.
    return [Schedule(kubeflow, *_newest_first(details)) for _, details in sorted(found.items())]


def find(kubeflow: Kubeflow, name: str) -> Schedule:
    """Return the schedule with this name.

    Raises:
        UserError: there is none.
    """
    found = listed(kubeflow, name)
    if not found:
        raise UserError(f"{kubeflow.host} has no schedule {name!r}: see `fineloop schedule list`")
    return found[0]


def create(
    kubeflow: Kubeflow,
    name: str,
    package: Package,
    timing: Timing,
    *,
    parameters: dict[str, Any],
    experiment: str,
    service_account: str = "",
) -> Schedule:
    """Create a schedule, enabled.

    Raises:
        UserError: the name is taken, or is not valid.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"schedule {name!r}: a name is lower-case letters, digits and '-', at most 63 characters")
    if next(_recurring_runs(kubeflow, name), None):
        raise UserError(
            f"{kubeflow.host} has a recurring run {name!r} already: change it with `fineloop schedule update {name}`, "
            "or choose another name"
        )
    with kubeflow.asking("create the experiment"):
        made = kubeflow.client.create_experiment(experiment, namespace=kubeflow.namespace or None)
    return _create(
        kubeflow, name, package, timing, parameters, made.experiment_id, service_account=service_account, enabled=True
    )


def update(
    old: Schedule,
    package: Package,
    timing: Timing,
    *,
    parameters: dict[str, Any],
    service_account: str | None = None,
) -> Schedule:
    """Replace a schedule; a paused one stays paused, and the runs that it has started continue.

    `service_account` None keeps the schedule's account.
    """
    account = old.detail.service_account if service_account is None else service_account
    new = _create(
        old.kubeflow,
        old.name,
        package,
        timing,
        parameters,
        old.detail.experiment_id,
        service_account=account or "",
        enabled=old.is_enabled,
    )
    for detail in (old.detail, *old.others):
        _retire(old.kubeflow, detail)
    return new


def set_enabled(schedule: Schedule, enabled: bool) -> Schedule:
    """Pause or resume a schedule; live runs continue. Older recurring runs of its name are paused in either case."""
    kubeflow = schedule.kubeflow
    with kubeflow.asking(f"{'resume' if enabled else 'pause'} schedule {schedule.name}"):
        for other in schedule.others:
            kubeflow.client.disable_recurring_run(other.recurring_run_id)
        change = kubeflow.client.enable_recurring_run if enabled else kubeflow.client.disable_recurring_run
        change(schedule.recurring_run_id)
        return replace(schedule, detail=kubeflow.client.get_recurring_run(schedule.recurring_run_id))


def delete(schedule: Schedule) -> None:
    """Delete a schedule, and older recurring runs of its name that an update left; live runs continue."""
    for detail in (*schedule.others, schedule.detail):
        _retire(schedule.kubeflow, detail)


def config_of(schedule: Schedule) -> Mapping[str, Any]:
    """Return the config of a schedule's runs.

    Raises:
        ConfigError: the schedule was made elsewhere, and has no config.
    """
    if not schedule.config.table:
        raise ConfigError(
            f"schedule {schedule.name} was not made by Fineloop and holds no config: give one with -c FILE"
        )
    return schedule.config.table


def image_of(schedule: Schedule) -> str:
    """Return the image of its steps; empty if it is the project's own, whose tag depends on the code's release."""
    spec = Specs(schedule.kubeflow).of(schedule.detail)
    executors = spec.get("deploymentSpec", {}).get("executors", {}).values()
    images = {executor["container"]["image"] for executor in executors if "container" in executor}
    others = {image for image in images if not image.startswith(IMAGE.partition(":")[0] + ":")}
    return others.pop() if len(others) == 1 else ""


def _create(
    kubeflow: Kubeflow,
    name: str,
    package: Package,
    timing: Timing,
    parameters: dict[str, Any],
    experiment_id: str,
    *,
    service_account: str,
    enabled: bool,
) -> Schedule:
    published = publish(kubeflow, package)
    with kubeflow.asking(f"create schedule {name}"):
        detail = kubeflow.client.create_recurring_run(
            experiment_id,
            name,
            description=f"Retrains {package.config.adapter.name} {cron.words(timing.cron)} (UTC).",
            start_time=stamp(timing.start),
            end_time=stamp(timing.end),
            cron_expression=cron.to_kfp(timing.cron),
            max_concurrency=timing.max_concurrency,
            no_catchup=True,
            params=parameters,
            pipeline_id=published.pipeline_id,
            version_id=published.version_id,
            enabled=enabled,
            service_account=service_account or None,
        )
    return Schedule(kubeflow, detail)


def _retire(kubeflow: Kubeflow, detail: Any) -> None:
    recurring_run_id = detail.recurring_run_id
    with kubeflow.asking(f"delete the recurring run {recurring_run_id} of {detail.display_name}"):
        kubeflow.client.disable_recurring_run(recurring_run_id)
        kubeflow.client.recurring_runs.recurring_run_service_delete_recurring_run(
            recurring_run_id, propagation_policy="ORPHAN"
        )


def _recurring_runs(kubeflow: Kubeflow, name: str) -> Any:
    named = {"filter": one_of("display_name", name)} if name else {}
    return kubeflow.listed(
        "schedules",
        kubeflow.client.list_recurring_runs,
        "recurring_runs",
        namespace=kubeflow.namespace or None,
        **named,
    )


def _newest_first(details: list[Any]) -> tuple[Any, list[Any]]:
    newest, *others = sorted(details, key=lambda detail: (detail.created_at, detail.status == "ENABLED"), reverse=True)
    return newest, others
