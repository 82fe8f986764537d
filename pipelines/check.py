"""What `fineloop doctor` finds, on this machine or on a cluster."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding. `fix` says what to do when `ok` is false, and is empty otherwise.

    What could not be looked at is no fault and no proof: `ok`, and not `seen`.
    """

    name: str
    ok: bool
    detail: str
    fix: str
    seen: bool = True


def check(name: str, ok: bool, detail: str, fix: str) -> Check:
    """A finding, with its fix where one is needed."""
    return Check(name, ok, detail, "" if ok else fix)
