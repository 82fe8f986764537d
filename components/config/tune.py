"""The config's `tune` section: which rates a sweep tries, when a run sweeps by itself, and what a method must gain."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.config.methods import MethodName
from components.config.section import Section

Rate = Annotated[float, Field(gt=0, lt=1)]
When = Literal["never", "always", "no_prior_sweep", "data_changed"]
Scheduler = Literal["asha", "median", "none"]


class TuneSpace(Section):
    """What a sweep tries, all with all; an empty list keeps what the config has."""

    learning_rates: list[Rate] = []
    """Rates to try, exactly these; empty makes a grid around the current rate."""
    ranks: list[Annotated[int, Field(ge=1, le=1024)]] = []
    """Values of method.rank."""
    batch_sizes: list[Annotated[int, Field(ge=1)]] = []
    """Values of train.batch_size."""


class TuneConfig(Section):
    """How learning rates are swept. Every trial is a training, judged on the records that checkpoints are chosen on."""

    when: When = "never"
    """When a run of the pipeline sweeps before it trains: never, so that it trains at the config's rate; always;
    no_prior_sweep, if none is stored for this adapter, base, method and data source; data_changed, if none is stored
    for this very dataset. Unless it is never, the run trains at the rate that was found, now or before."""
    methods: list[MethodName] = []
    """Methods to compare, each at its own best rate; empty sweeps method.name alone."""
    space: TuneSpace = TuneSpace()
    """What is tried."""
    points: Annotated[int, Field(ge=3, le=15)] = 5
    """Number of rates in the first grid, half a decade apart; odd, with the current rate in the middle."""
    widen: Annotated[int, Field(ge=0, le=8)] = 4
    """Maximum number of half decades that are added to an end of the grid, one by one, while the best rate is at that
    end."""
    refine: bool = True
    """Also try the quarter decades on both sides of the best rate."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 1
    """Trainings at each rate, with different seeds; their mean loss counts."""
    compare_seeds: Annotated[int, Field(ge=2, le=50)] = 3
    """Further trainings of each compared method at its best rate, with seeds that its search has not seen."""
    margin: Annotated[float, Field(ge=0)] = 0.01
    """Another method is advised instead of plain LoRA only if the 95 % interval of its gain lies above this, in nats
    per answer token."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of a trial, with the schedule fitted to them; 0 trains as long as a run does."""
    scheduler: Scheduler = "asha"
    """Trials to stop halfway: asha stops the worse half (arXiv:1810.05934), median those that are worse than the median
    of the others so far (Vizier), none stops none."""

    @model_validator(mode="after")
    def _has_a_middle(self) -> "TuneConfig":
        if self.points % 2 == 0:
            raise ValueError(f"points {self.points} has no middle: try tune.points={self.points + 1}")
        return self
