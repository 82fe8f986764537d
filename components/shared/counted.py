"""Formats numbers with the noun that they count."""


def counted(number: int, noun: str) -> str:
    """The number with its noun, as in `1 record` and `1,200 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
