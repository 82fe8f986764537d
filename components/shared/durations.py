"""Formats lengths of time for people."""


def duration(seconds: float) -> str:
    """A measured duration: below a minute to a tenth of a second, below an hour to the second, else to the minute."""
    if 0 < seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{f'{seconds:.1f}'.removesuffix('.0')} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def estimated_duration(seconds: float) -> str:
    """An estimated duration, no finer than it is known: in whole seconds below 90, else in whole minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# Formats numbers with the noun that they count.


def counted(number: int, noun: str) -> str:
    """The number with its noun, as in `1 record` and `1,200 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
