"""What models are asked outside the domain: each probe is a file here and a row of the table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from components.config.schema import RunConfig
from components.store.store import Store
from ray_jobs.probes import harness
from ray_jobs.probes.texts import prepare_own_answers, prepare_passages
from ray_jobs.scoring.measure import Contender, Probe
from ray_jobs.text.chat_format import ChatFormat


class Kind(NamedTuple):
    """One kind of probe."""

    prepare: Callable[[Store, ChatFormat, RunConfig, Sequence[Contender]], Probe]
    """The items that the config asks for, for the contenders that no earlier run has measured on them."""
    check: Callable[[RunConfig], None] | None = None
    """Raise ConfigError where the probe cannot run, before anything is trained."""


PROBES = {
    "general_text": Kind(prepare_passages),
    "own_answers": Kind(prepare_own_answers),
    "harness": Kind(harness.prepare, harness.check),
}
"""By the key in evaluation.json; one that is no field of it goes below `probes` there."""
