"""Numbers with what they count."""


def counted(number: int, noun: str) -> str:
    """As in `1 record` and `1,200 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
