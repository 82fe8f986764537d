"""When two answers are the same: what the metrics count, the report shows."""

import string
import unicodedata


def normal(text: str) -> str:
    """One Unicode form, single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def label(text: str) -> str:
    """What makes an answer the same class as another: neither case, nor punctuation and white space around it."""
    return normal(text).strip(string.punctuation + " ").casefold()
