"""A recurring run: when it is due, and the run that it then asks for."""

import copy
import itertools
from datetime import datetime
from typing import Any

from tests.doubles.kfp_server.cron import Cron

CARRIED = ("experiment_id", "pipeline_spec", "pipeline_version_reference", "service_account")


class Schedule:
    """`record` is what the API shows of it."""

    def __init__(self, record: dict[str, Any], cron: Cron) -> None:
        self.record = record
        self._cron = cron
        self._last = datetime.fromisoformat(record["created_at"])
        self._index = itertools.count(1)

    @property
    def is_enabled(self) -> bool:
        return bool(self.record["status"] == "ENABLED")

    def set_enabled(self, enabled: bool) -> None:
        self.record["status"] = "ENABLED" if enabled else "DISABLED"

    def due(self, at: datetime, *, num_live: int) -> dict[str, Any] | None:
        """The run to create at a moment, if any: without catch-up, only the latest tick that was missed counts."""
        if not self.is_enabled or num_live >= int(self.record["max_concurrency"]):
            return None
        trigger = self.record["trigger"]["cron_schedule"]
        last = self._last
        if start := trigger.get("start_time"):
            last = max(last, datetime.fromisoformat(start))
        until = min(at, datetime.fromisoformat(trigger["end_time"])) if trigger.get("end_time") else at
        missed = list(itertools.takewhile(lambda tick: tick <= until, self._cron.after(last)))
        if not missed:
            return None
        self._last = missed[-1] if self.record.get("no_catchup") else missed[0]
        carried = {key: self.record[key] for key in CARRIED if self.record.get(key)}
        name = f"{self.record['display_name']}-{next(self._index)}-{self._last.timestamp():.0f}"
        return {**carried, "display_name": name, "runtime_config": copy.deepcopy(self.record["runtime_config"])}
