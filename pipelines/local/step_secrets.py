"""Secrets of single steps. As on a cluster, only these steps get them, and no other process that is started here.

Steps that train or compare may run the code of a base, a metric or a task, which must not find a key to sign with.
"""

from collections.abc import Mapping


def of_step(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of this step."""
    prefixes = _of_its_own().get(name, ())
    return {each: value for each, value in environment.items() if each.startswith(prefixes)}


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the secrets of any step or tracker."""
    from components.config import track

    every = tuple(each for names in (*_of_its_own().values(), *track.SECRETS.values()) for each in names)
    return {name: value for name, value in environment.items() if not name.startswith(every)}


def _of_its_own() -> dict[str, tuple[str, ...]]:
    """Prefixes of the variables that only one step is given, by the step's name: promote signs and announces the alias,
    evaluate signs what was measured, report sends events to an OpenLineage server."""
    from components.promote import announce  # not at the top: `fineloop --help` imports this module's neighbours

    of_promote = ("FINELOOP_SIGN", *announce.secrets())
    return {"promote": of_promote, "evaluate": ("FINELOOP_EVALUATION_",), "report": ("OPENLINEAGE_",)}
