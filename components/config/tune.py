"""The config's `tune` section: which rates a sweep tries, and when a run sweeps by itself."""

from typing import Annotated, Literal

from pydantic import Field

from components.config.methods import MethodName
from components.config.section import Section

Rate = Annotated[float, Field(gt=0, lt=1)]
When = Literal["never", "always", "no_prior_sweep", "data_changed"]


class TuneConfig(Section):
    """How learning rates are swept. Every trial is a training, judged on the records that checkpoints are chosen on."""

    when: When = "never"
    """When a run of the pipeline sweeps before it trains: never, so that it trains at the config's rate; always;
    no_prior_sweep, if none is stored for this adapter, base, method and data source; data_changed, if none is stored
    for this very dataset. Unless it is never, the run trains at the rate that was found, now or before."""
    methods: list[MethodName] = []
    """Methods to compare, each at its own best rate; empty sweeps method.name alone."""
    learning_rates: list[Rate] = []
    """Rates to try, exactly these; empty makes a grid around the current rate."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 1
    """Trainings at each rate, with different seeds; their mean loss counts."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a trial, with the schedule fitted to them; 0 trains as long as a run does."""
