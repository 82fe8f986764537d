"""Tell others of a move of an alias: Kubeflow's Model Registry, MLflow, a webhook.

The move has happened, and stands. Who cannot be told is named in a warning, with the command that tells again: each
teller makes what is missing, and telling twice changes nothing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from components.config.announce import AnnounceConfig
from components.promote import mlflow, model_registry, webhook
from components.promote.announcement import Announcement, announcement
from components.records.steps import StepRecord
from components.shared.errors import FineloopError

if TYPE_CHECKING:
    from components.registry.event import Event
    from components.store.store import Store

logger = logging.getLogger(__name__)

TOLD = "told"
"""What became of an announcement; anything else is why it could not be made."""
Tell = Callable[[str, Announcement, Mapping[str, str]], None]
TELLERS: dict[str, Tell] = {"model_registry": model_registry.tell, "mlflow": mlflow.tell, "webhook": webhook.tell}
"""By the key of the config that holds the address. Each takes address, announcement and the environment, where its
secrets are."""


def announce(
    config: AnnounceConfig, store: "Store", name: str, event: "Event", environment: Mapping[str, str]
) -> dict[str, str]:
    """Notify the servers that the config names; returns for each key of it `TOLD`, or why that failed."""
    addresses = {key: address for key, address in config if address}
    outcomes: dict[str, str] = {}
    for key, address in addresses.items():
        try:
            TELLERS[key](address, announcement(store, name, event), environment)
            outcomes[key] = TOLD
        except (FineloopError, LookupError, TypeError) as exc:  # the last two: an answer that is not what the API's is
            outcomes[key] = str(exc) if isinstance(exc, FineloopError) else f"{address} answers strangely: {exc!r}"
            logger.warning("%s", warning(key, name, event.body["alias"], outcomes[key]))
    return outcomes


def untold(steps: Iterable[StepRecord]) -> dict[str, str]:
    """Notifications of a run's promotion that failed, by the key of the config, with the reason."""
    announced = {key: why for step in steps for key, why in step.result.get("announced", {}).items()}
    return {key: why for key, why in announced.items() if why != TOLD}


def warning(key: str, name: str, alias: str, why: str) -> str:
    """That somebody could not be told of a move, for people."""
    again = f"`fineloop adapters announce {name}@{alias}` tells it again"
    return f"announce.{key} was not told of {name}@{alias}: {why}; {again}"
