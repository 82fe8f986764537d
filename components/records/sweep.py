"""Records of a sweep: its trials, its result, and the learning rate that a run trains at."""

from typing import Any, ClassVar, Literal

from components.records.steps import Part, Record, TextLosses

TrialStatus = Literal["running", "finished", "stopped", "diverged", "failed"]


class Trial(Record):
    """One training of a sweep."""

    FILE: ClassVar[str] = "trials/<name>.json"

    name: str
    config_digest: str
    """Digest of the trial's whole config; a trial with another config is another trial."""
    method: str
    learning_rate: float
    rank: int
    batch_size: int
    seed: int
    compares: bool = False
    """Whether the trial belongs to the comparison of methods, with a seed that the search has not used."""
    status: TrialStatus
    why: str = ""
    loss: float | None = None
    """Validation loss of the weights that would be published, in nats per answer token; for a stopped trial, its last
    one. None if the trial diverged or failed."""
    start_loss: float | None = None
    steps: int = 0
    num_steps: int = 0
    seconds: float | None = None
    waited_s: float | None = None
    """Seconds between the previous trial in the same process and this one; None for a process's first trial."""
    ready_s: float | None = None
    """Seconds from the trial's beginning to its first step: loading the base and attaching the adapter."""
    step_s: float | None = None
    bases_loaded: int = 0
    curve: list[tuple[int, float]] = []
    record_nll: list[float] = []
    """Negative log-likelihood of each validation record's answer, in nats; only for a finished trial."""
    record_tokens: list[int] = []
    general_text: TextLosses | None = None
    """Losses on general text, for a trial that compares methods: `candidate` is measured after the training, `base`
    before it, unless the method makes its own base, which without the adapter is only half of the initial model."""
    general_s: float | None = None

    @property
    def is_outcome(self) -> bool:
        """Whether repeating the training would give the same result, so that a resumed sweep does not repeat it."""
        return self.status in ("finished", "stopped", "diverged")


class RateLoss(Part):
    """Loss of a method at one learning rate, over its seeds."""

    learning_rate: float
    loss: float | None
    """Mean of the trials' losses; None if a trial diverged."""
    statuses: list[TrialStatus]
    ci95: tuple[float, float] | None = None
    """95 % confidence interval of the loss over the validation records, and over the seeds if there are several."""


class Forgotten(Part):
    """How far a method's trainings raise the loss on general text, in nats per token."""

    base_format: str
    """Number format of the base compared with: the method's, if a trial of the sweep measured the base in it."""
    base_loss: float
    losses: list[float]
    rise: float
    """How far the mean of `losses` is above `base_loss`."""
    ci95: tuple[float, float]
    passages: int


class Tuned(Part):
    """What a sweep found for one method at one rank and batch size."""

    method: str
    rank: int
    batch_size: int
    prior: float
    """The learning rate in force before the sweep: the config's, or the method's default."""
    learning_rate: float
    loss: float
    below: RateLoss | None = None
    """The nearest tried rate below the best one; None if the grid ends there."""
    above: RateLoss | None = None
    is_inside: bool
    """Whether the best rate lies inside the grid: both neighbours were tried and are worse."""
    gain_over_prior: float | None = None
    """How much lower the loss is than the prior rate's, in nats per answer token; None if that diverged."""
    rates: list[RateLoss]
    step_s: float | None = None
    memory_bytes: int | None = None
    forgotten: Forgotten | None = None
    """Rise of the loss on general text; None if not measured, for example if no methods are compared."""


class MethodComparison(Part):
    """A method against the reference, each at its own best rate, on the same records and seeds."""

    method: str
    reference: str
    gain: float
    """How much lower the method's loss is than the reference's, in nats per answer token."""
    ci95: tuple[float, float]
    seeds: int
    records: int
    time_ratio: float | None = None
    memory_ratio: float | None = None
    servable_as: str = "lora"
    """`lora`, `lora-export` or `merged`, as in a version's lineage."""


class SweepResult(Record):
    """What a sweep found. Losses are on the records that checkpoints are chosen on, never on the gate's alone."""

    FILE: ClassVar[str] = "sweep.json"

    run_id: str
    adapter: str
    base: dict[str, Any]
    dataset: dict[str, Any]
    """The dataset, as in a version's lineage."""
    config_sha256: str
    environment: dict[str, Any]
    records: int
    start_loss: float | None
    margin: float = 0.0
    best: Tuned
    tuned: list[Tuned]
    comparisons: list[MethodComparison] = []
    verdict: str
    advised_method: str
    trials: list[Trial]
    """All trials, without the losses of single records, which are in each trial's own file."""
    seconds: float | None = None


class TunedRate(Record):
    """The learning rate that a run trains at in place of its config's."""

    FILE: ClassVar[str] = "rate.json"

    learning_rate: float
    prior: float
    sweep_run_id: str | None = None
    """The run whose sweep found the rate: this one or an earlier one; None if the rate is the config's."""
