"""How the report names metrics and writes numbers, sizes and times."""

from dataclasses import dataclass
from datetime import UTC, datetime

from components.shared import metrics


@dataclass(frozen=True)
class Metric:
    """One metric as people read it."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    meaning: str
    is_share: bool = False

    def text(self, value: float | None) -> str:
        """The number in its usual precision; shares in per cent."""
        if value is None:
            return "not measured"
        return f"{value:.1%}".replace("%", " %") if self.is_share else number(value)  # a narrow space before the sign

    def gain(self, ours: float, theirs: float) -> float:
        """How much better ours is; negative when it is worse."""
        return theirs - ours if self.lower_is_better else ours - theirs

    def gain_text(self, gain: float) -> str:
        """An improvement or the opposite in words."""
        amount = f"{abs(gain) * 100:.1f} points" if self.is_share else number(abs(gain))
        if float(amount.split()[0].replace(",", "")) == 0:
            return "no difference"
        return f"{amount} {'better' if gain > 0 else 'worse'}"

    def signed(self, gain: float) -> str:
        """A difference with its sign, for intervals."""
        amount = f"{abs(gain) * 100:.1f}" if self.is_share else number(abs(gain))
        return f"{'−' if gain < 0 else '+'}{amount}"  # noqa: RUF001 - a true minus sign, for people


MEANINGS = {
    "exact_match": "answers that equal the reference",
    "token_f1": "words shared with the reference",
    "loss": "surprise at the reference answer",
    "perplexity": "the same surprise, as a count of choices",
    "prompt_gain": "how much the answer depends on its prompt",
}
METRICS = tuple(
    Metric(key, fact.label[0].upper() + fact.label[1:], fact.unit, fact.lower_is_better, MEANINGS[key], fact.is_share)
    for key, fact in metrics.METRICS.items()
)
BY_KEY = {metric.key: metric for metric in METRICS}


def number(value: float) -> str:
    """Three decimals for small numbers, fewer for large ones, thousands separated."""
    size = abs(value)
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 10_000 else 0
    return f"{value:,.{digits}f}"


def count(value: int | float | None) -> str:
    """A whole number with thousands separated."""
    return "unknown" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(value: datetime) -> str:
    """A point in time, in UTC, to the minute."""
    return value.astimezone(UTC).strftime("%-d %B %Y, %H:%M UTC")


def parse_moment(value: object) -> datetime | None:
    """An ISO 8601 text or seconds since 1970 as a time in UTC, or None when it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC)
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
