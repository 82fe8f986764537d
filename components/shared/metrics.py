"""The metrics of an evaluation: what people call them, their unit, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric."""

    label: str
    unit: str
    """Empty where the number speaks for itself."""
    lower_is_better: bool
    is_share: bool = False
    """A value in 0..1, shown in per cent; differences are shown in points."""


METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact match", "", lower_is_better=False, is_share=True),
    "token_f1": Metric("token F1", "", lower_is_better=False, is_share=True),
    "loss": Metric("loss", "nats per answer token", lower_is_better=True),
    "perplexity": Metric("perplexity", "", lower_is_better=True),
    "prompt_gain": Metric("prompt gain", "nats per answer token", lower_is_better=False),
}
