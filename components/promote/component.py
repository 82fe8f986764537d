"""Kubeflow steps: the ends of a run."""

from kfp import dsl

from components.shared.step import COMPONENT


@dsl.component(**COMPONENT)
def promote(config: str, run_id: str) -> str:
    """Point the alias at the candidate and return the event's URI."""
    from components.promote.promote import promote as move_alias
    from components.shared.step import step

    with step("promote", config, run_id) as run:
        event_uri = move_alias(run)
    return event_uri


@dsl.component(**COMPONENT)
def hold(config: str, run_id: str) -> str:
    """Leave the alias where it is and return the decision's URI."""
    from components.promote.promote import hold as leave_alias
    from components.shared.step import step

    with step("hold", config, run_id) as run:
        decision_uri = leave_alias(run)
    return decision_uri


@dsl.component(**COMPONENT)
def skip(config: str, run_id: str) -> str:
    """Train nothing, because there is too little new, and return the decision's URI."""
    from components.promote.promote import skip as leave_everything
    from components.shared.step import step

    with step("skip", config, run_id) as run:
        decision_uri = leave_everything(run)
    return decision_uri
