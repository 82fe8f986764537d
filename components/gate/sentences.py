"""How the gate words its numbers: sentences that a manager can read and an engineer can check."""

from collections.abc import Mapping
from typing import Any

from components.shared.metrics import METRICS


def value_text(metric: str, value: float, *beside: float) -> str:
    """The number in its usual precision, or in as many digits as keep it apart from the numbers shown `beside` it."""
    share = METRICS[metric].is_share
    usual = 1 if share else 3
    for digits in range(usual, 10):
        shown = _digits(value, digits, share=share)
        if all(abs(value - other) < 1e-9 or shown != _digits(other, digits, share=share) for other in beside):
            return shown + (" %" if share else "")
    return repr(value)


def amount_text(metric: str, value: float, *beside: float) -> str:
    """A difference or a margin: like a value, but shares are in points."""
    return value_text(metric, value, *beside).replace(" %", " points")


def bound_text(metric: str, bound: float) -> str:
    """A bound as the config states it, shares in per cent."""
    return f"{bound * 100:.10g} %" if METRICS[metric].is_share else f"{bound:.10g}"


def margin_text(metric: str, bound: float) -> str:
    """A margin as the config states it, shares in points."""
    return bound_text(metric, bound).replace(" %", " points")


def interval_text(metric: str, paired: Mapping[str, Any] | None) -> str:
    """One more sentence with the paired 95 % interval, or nothing when there is none for this metric."""
    if not paired or paired.get("metric") != metric or not paired.get("ci95"):
        return ""
    low, high = paired["ci95"]
    bounds = f"{_signed(metric, low)} to {_signed(metric, high)}"
    if low > 0:
        meaning = "it lies above zero, so the improvement is not down to chance"
    elif high < 0:
        meaning = "it lies below zero, so the loss of quality is not down to chance"
    else:
        meaning = "it includes zero, so the two may be equally good"
    records = paired["records"]
    return f" Record by record ({records} of them), the 95 % interval of the improvement is {bounds}: {meaning}."


def _signed(metric: str, value: float) -> str:
    text = amount_text(metric, abs(value))
    return f"{'−' if value < 0 else '+'}{text}"  # noqa: RUF001 - a true minus sign, for people


def _digits(value: float, digits: int, *, share: bool) -> str:
    return f"{value * 100 if share else value:.{digits}f}"
