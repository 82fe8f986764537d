"""What a sweep leaves: its trials, what it found, and the rate that a run trains at."""

from typing import Any, ClassVar, Literal

from components.records.part import Part
from components.records.steps import Record, TextLosses

TrialStatus = Literal["running", "finished", "stopped", "diverged", "failed"]


class Trial(Record):
    """One training of a sweep."""

    FILE: ClassVar[str] = "trials/<name>.json"

    name: str
    config_digest: str
    """Of the trial's whole config: with another one the trial is another one too."""
    method: str
    learning_rate: float
    rank: int
    batch_size: int
    seed: int
    compares: bool = False
    """Whether it belongs to the comparison of methods, with a seed that the search has not seen."""
    status: TrialStatus
    why: str = ""
    """Of one that diverged or failed, in a sentence."""
    loss: float | None = None
    """Validation loss of the weights that would be published, in nats per answer token; of one that was stopped, its
    last. None of one that diverged or failed."""
    start_loss: float | None = None
    """The base's, before the first step."""
    steps: int = 0
    num_steps: int = 0
    seconds: float | None = None
    """From its beginning to its end."""
    waited_s: float | None = None
    """From the end of the trial before it in the same process to its beginning; None of a process's first."""
    ready_s: float | None = None
    """From its beginning to its first step: what loading and attaching took."""
    step_s: float | None = None
    """Seconds of an optimizer step, the median."""
    bases_loaded: int = 0
    """How many bases its process had loaded by then."""
    curve: list[tuple[int, float]] = []
    """Validation loss after so many steps."""
    record_nll: list[float] = []
    """Of each validation record, the nats of its answer; of a finished trial alone."""
    record_tokens: list[int] = []
    general_text: TextLosses | None = None
    """Read after the training as `candidate`, of one that compares methods; and before it as `base`, unless the method
    has a base of its own, which is only half of what its adapter begins as."""
    general_s: float | None = None
    """Seconds that reading it took."""

    @property
    def is_outcome(self) -> bool:
        """Whether the same training again would end no otherwise: a sweep that is resumed does not repeat it."""
        return self.status in ("finished", "stopped", "diverged")


class RateLoss(Part):
    """One rate of a method, over its seeds."""

    learning_rate: float
    loss: float | None
    """Mean of the trials' losses; None where a trial diverged."""
    statuses: list[TrialStatus]
    ci95: tuple[float, float] | None = None
    """Over the validation records, of one seed; over the seeds too where there are several."""


class Forgotten(Part):
    """What a method's trainings cost on general text, in nats per token."""

    base_format: str
    """Of the base that is compared with: the method's own, where a training of the sweep has read as that."""
    base_loss: float
    losses: list[float]
    """After each training that compares methods, in the order of their seeds."""
    rise: float
    """How far their mean is above the base's."""
    ci95: tuple[float, float]
    """Of the rise, over passages and seeds."""
    passages: int


class Tuned(Part):
    """What a sweep found for one method at one rank and batch size."""

    method: str
    rank: int
    batch_size: int
    prior: float
    """The rate in force before: of the config, or the method's own."""
    learning_rate: float
    loss: float
    below: RateLoss | None = None
    """The nearest rate that was tried below the best; None where the grid ends."""
    above: RateLoss | None = None
    is_inside: bool
    """Whether the best lies inside the grid: both neighbours were tried and are worse."""
    gain_over_prior: float | None = None
    """How much lower its loss is than the prior rate's, in nats per answer token; None where that diverged."""
    rates: list[RateLoss]
    """In ascending order."""
    step_s: float | None = None
    memory_bytes: int | None = None
    """Of one worker, as planned."""
    forgotten: Forgotten | None = None
    """None where it was not measured, as where no methods are compared."""


class MethodComparison(Part):
    """A method against the reference, each at its own best rate, on the same records and seeds."""

    method: str
    reference: str
    gain: float
    """How much lower its loss is, in nats per answer token."""
    ci95: tuple[float, float]
    seeds: int
    records: int
    time_ratio: float | None = None
    """Of a step, to the reference's."""
    memory_ratio: float | None = None
    servable_as: str = "lora"
    """lora, lora-export or merged, as a version's lineage has it."""


class SweepResult(Record):
    """What a sweep found. Losses are on the records that checkpoints are chosen on, never on the gate's alone."""

    FILE: ClassVar[str] = "sweep.json"

    run_id: str
    adapter: str
    base: dict[str, Any]
    """Reference and identity of the base model."""
    dataset: dict[str, Any]
    """As lineage names it."""
    config_sha256: str
    environment: dict[str, Any]
    """As lineage has it: code, packages, image."""
    records: int
    """Validation records."""
    start_loss: float | None
    """The base's on them."""
    margin: float = 0.0
    """What a method must gain to be advised."""
    best: Tuned
    tuned: list[Tuned]
    """Of every method, rank and batch size."""
    comparisons: list[MethodComparison] = []
    verdict: str
    """In words."""
    advised_method: str
    trials: list[Trial]
    """Without the losses of single records, which lie with each trial."""
    seconds: float | None = None


class TunedRate(Record):
    """The learning rate that a run trains at in place of its config's."""

    FILE: ClassVar[str] = "rate.json"

    learning_rate: float
    prior: float
    """The config's."""
    sweep_run_id: str | None = None
    """The run whose sweep found it: this one, or an earlier one; None where it is the config's own."""
    advice: str = ""
    """Where the rate may lie now, when rank, batch size or data are others than at an earlier sweep."""
