"""Notify Kubeflow's Model Registry, MLflow and a webhook of a moved alias.

The move has happened, and a failed notification does not undo it. A warning names the server, and the command that
notifies it again. Each notification creates what is missing, and repeating it changes nothing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from components.config.schema import AnnounceConfig
from components.config.track import SECRETS
from components.promote import mlflow, model_registry, webhook
from components.promote.announcement import Announcement, announcement
from components.records.steps import StepRecord
from components.shared.errors import FineloopError

if TYPE_CHECKING:
    from components.registry.event_log import Event
    from components.store.store import Store

logger = logging.getLogger(__name__)

NOTIFIED = "told"
"""The outcome of a notification that arrived; any other outcome is the reason why it failed."""


class Notifier(NamedTuple):
    """How one kind of server is notified."""

    notify: Callable[[str, Announcement, Mapping[str, str]], None]
    """Takes the address, the announcement, and those of `secrets` that are set."""
    secrets: tuple[str, ...]
    """Names of environment variables. Only what moves an alias is given them: the step, on a cluster and here, and
    the commands."""


NOTIFIERS: dict[str, Notifier] = {
    "model_registry": Notifier(model_registry.notify, (model_registry.TOKEN,)),
    "mlflow": Notifier(mlflow.notify, SECRETS["mlflow"]),
    "webhook": Notifier(webhook.notify, (webhook.SECRET,)),
}
"""The notifiers by the key of the config that holds the address."""


def secrets() -> tuple[str, ...]:
    """The secrets of all notifiers."""
    return tuple(name for notifier in NOTIFIERS.values() for name in notifier.secrets)


def announce(
    config: AnnounceConfig, store: "Store", name: str, event: "Event", environment: Mapping[str, str]
) -> dict[str, str]:
    """Notify the servers that the config names; returns by their keys `NOTIFIED` or the reason for a failure."""
    addresses = {key: address for key, address in config if address}
    outcomes: dict[str, str] = {}
    for key, address in addresses.items():
        notify, names = NOTIFIERS[key]
        try:
            notify(
                address,
                announcement(store, name, event),
                {each: environment[each] for each in names if each in environment},
            )
            outcomes[key] = NOTIFIED
        except (FineloopError, LookupError, TypeError) as exc:  # the last two: not an answer of the API
            outcomes[key] = str(exc) if isinstance(exc, FineloopError) else f"{address} answers strangely: {exc!r}"
            logger.warning("%s", warning(key, name, event.body["alias"], outcomes[key]))
    return outcomes


def failed_notifications(steps: Iterable[StepRecord]) -> dict[str, str]:
    """The reasons of the notifications of a run's promotion that failed, by the key of the config."""
    announced = {key: why for step in steps for key, why in step.result.get("announced", {}).items()}
    return {key: why for key, why in announced.items() if why != NOTIFIED}


def warning(key: str, name: str, alias: str, why: str) -> str:
    """The warning that a server could not be notified of a move."""
    again = f"`fineloop adapters announce {name}@{alias}` notifies it again"
    return f"announce.{key} was not notified of {name}@{alias}: {why}; {again}"
