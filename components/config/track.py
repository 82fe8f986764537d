"""Trackers of experiments that see a training's curve while it goes on."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import StringConstraints

from components.config.section import Section

Project = Annotated[str, StringConstraints(pattern=r"^([\w.-]+(/[\w.-]+)?)?$")]
Uri = Annotated[str, StringConstraints(pattern=r"^((https?://[^\s/?#@]+(/\S*)?)|((sqlite|file):/\S+))?$")]

SECRETS: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "wandb": ("WANDB_API_KEY",),
    "trackio": (),
}
"""The environment variables that each tracker logs in with. Only the worker that tracks is given them."""
RUNS = "FINELOOP_RUNS"
"""Environment variable of a head of this machine: the folder of its runs, where the worker finds `SECRETS_FILE`."""
SECRETS_FILE = "scratch/track.json"
"""The secrets of a run's trackers in its folder on this machine, while it runs."""


class TrackConfig(Section):
    """Trackers that the first worker sends each step and measurement to while it trains; none by default.

    Their packages are installed beside the workers by whoever names them. A tracker that is away costs its own points
    and no step. Tokens come from the environment, by the names that each package reads: MLFLOW_TRACKING_TOKEN, or
    MLFLOW_TRACKING_USERNAME and _PASSWORD; WANDB_API_KEY.
    """

    mlflow: Uri = ""
    """MLflow's tracking URI, such as http://mlflow:5000 or sqlite:////srv/mlflow.db: a run in the experiment of the
    adapter's name."""
    wandb: Project = ""
    """Project of Weights & Biases: PROJECT or ENTITY/PROJECT."""
    trackio: Project = ""
    """Project of trackio."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The environment variables that the named trackers log in with."""
        return tuple(name for tracker, names in SECRETS.items() if getattr(self, tracker) for name in names)
