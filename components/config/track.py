"""Trackers of experiments that see a training's curve while it goes on."""

from typing import Annotated

from pydantic import StringConstraints

from components.config.section import Section

Project = Annotated[str, StringConstraints(pattern=r"^([\w.-]+(/[\w.-]+)?)?$")]
Uri = Annotated[str, StringConstraints(pattern=r"^((https?://[^\s/?#@]+(/\S*)?)|((sqlite|file):/\S+))?$")]


class TrackConfig(Section):
    """Trackers that the first worker sends each step and measurement to while it trains; none by default.

    Their packages are installed beside the workers by whoever names them. A tracker that is away costs its own points
    and no step. Tokens come from the workers' environment, by the names that each package reads.
    """

    mlflow: Uri = ""
    """MLflow's tracking URI, such as http://mlflow:5000 or sqlite:////srv/mlflow.db: a run in the experiment of the
    adapter's name."""
    wandb: Project = ""
    """Project of Weights & Biases: PROJECT or ENTITY/PROJECT."""
    trackio: Project = ""
    """Project of trackio."""
