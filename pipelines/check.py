"""Findings of `fineloop doctor`, on this machine or on a cluster."""

from dataclasses import dataclass

IN_MESSAGE = "see the message"
"""The `fix` of a check whose detail says it."""


@dataclass(frozen=True)
class Check:
    """One finding. `fix` says what to do if `ok` is false, and is empty otherwise.

    If something could not be checked, `seen` is false and `ok` is true: that is neither a fault nor a proof.
    """

    name: str
    ok: bool
    detail: str
    fix: str
    seen: bool = True


def check(name: str, ok: bool, detail: str, fix: str) -> Check:
    """Return a finding, with `fix` only if it is not `ok`."""
    return Check(name, ok, detail, "" if ok else fix)
