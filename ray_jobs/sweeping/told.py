"""A sweep's trials as the rows of a table, which a person sees grow; the command line aligns its columns."""

from components.registry.records import Trial
from components.shared.durations import duration

COLUMNS = ("method", "rank", "batch", "rate", "seed", "loss", "steps", "outcome")


def header() -> str:
    """What stands above the rows."""
    return " ".join(["|", *COLUMNS])


def row(trial: Trial) -> str:
    """One trial that has ended; none but the last of its columns holds a space."""
    loss = f"{trial.loss:.4f}" if trial.loss is not None else "-"
    took = f" in {duration(trial.seconds)}" if trial.seconds is not None else ""
    why = f": {trial.why}" if trial.why else ""
    return (
        f"| {trial.method} {trial.rank} {trial.batch_size} {trial.learning_rate:.3g} {trial.seed} {loss} "
        f"{trial.steps}/{trial.num_steps} {trial.status}{took}{why}"
    )
