"""Manifests with one thing changed."""

from typing import Any

from infra.checks.manifests import Manifest

REMOVED = object()
WORKERS = "RayJob spec rayClusterSpec workerGroupSpecs 0"
WORKER = f"{WORKERS} template spec"
CONTAINER = f"{WORKER} containers 0"
REAPER = "CronJob spec jobTemplate spec template"


def changed(manifests: list[Manifest], where: str, value: Any) -> list[Manifest]:
    """The manifests, in which a place holds another value, or nothing (REMOVED).

    Args:
        manifests: changed in place.
        where: the kind, or KIND=NAME, then the keys that lead there; a last "+" appends to a list.
        value: what stands there then; a function is given what stood there.
    """
    what, *keys, last = where.split()
    kind, _, name = what.partition("=")
    place: Any = next(m for m in manifests if m["kind"] == kind and name in ("", m["metadata"]["name"]))
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if last == "+":
        place.append(value)
    elif value is REMOVED:
        del place[int(last) if isinstance(place, list) else last]
    else:
        place[last] = value(place[last]) if callable(value) else value
    return manifests
