"""What earlier runs have measured of this run's contenders, which then is not measured again.

Whoever stands on another base than the first contender is no part of it: it has other tokens, and never could or knew
what that base can and knows.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components.registry.records import Evaluation
from components.registry.store import Store
from components.registry.versions import evaluation
from components.shared.errors import IntegrityError

if TYPE_CHECKING:
    from ray_jobs.scoring.measure import Contender

logger = logging.getLogger(__name__)


def on_the_first_base(contenders: Sequence["Contender"]) -> list["Contender"]:
    """Who stands on the base that the first one is or stands on."""
    return [each for each in contenders if each.base_identity == contenders[0].base_identity]


def measured_before(store: Store, contender: "Contender") -> Evaluation | None:
    """The evaluation of the run that made a contender, whose candidate it was; None without one that is whole."""
    if contender.version is None:
        return None
    try:
        return evaluation(store, contender.version)
    except IntegrityError as exc:
        logger.info("%s: what it found is measured again", exc)
        return None
