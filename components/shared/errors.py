"""All errors that Fineloop raises on purpose, except those with an underscore, which their own module catches.

To add one: subclass the branch that sets its exit code, and keep `__init__` to one message so that it survives pickling
between workers and steps.
"""

from collections.abc import Mapping
from typing import Any


class FineloopError(Exception):
    """The root of the tree. `exit_code` is the exit status of the command line."""

    exit_code = 1

    def as_json(self) -> dict[str, Any]:
        return {"error": {"kind": type(self).__name__, "message": str(self)}}


class UserError(FineloopError):
    """The input is wrong; the message names the field and the fix."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A config key is unknown, has the wrong type, or contradicts another."""


class Diverged(ConfigError):
    """The loss of a training is no longer a number, or is above its start where a sweep asks for less."""


class DataError(UserError, ValueError):
    """The data cannot be read, validated or used with this config."""


class StoreError(FineloopError, OSError):
    """The object store is unreachable, refuses the credentials, or lacks a feature that the registry relies on."""


class ObjectMissing(StoreError):
    """The object, version, alias or manifest does not exist."""


class IntegrityError(StoreError):
    """The content that was read is not what the manifest lists."""


class UnknownName(UserError, ObjectMissing):
    """There is no adapter, version, alias or run of the given name."""


class Conflict(StoreError):
    """A compare-and-swap lost: the object changed, or came to exist, after it was read."""


class AliasConflict(Conflict):
    """The alias is held by another version than the caller took as its start."""

    holder: Mapping[str, str] | None = None
    """The current holder: alias, version, since and run_id. None if no version holds the alias."""

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "conflict": dict(self.holder or {})}


class JobError(FineloopError, RuntimeError):
    """A Ray job failed, was stopped, or ran past its deadline."""


class WorkersMissing(JobError):
    """A job's own cluster lacks workers; another one may have them."""


class KubeflowError(FineloopError, RuntimeError):
    """The Kubeflow Pipelines API server refused the credentials or the request."""


class KubeflowAway(KubeflowError):
    """The server, or what stands before it, did not answer; asking again may help."""


class AnnounceError(FineloopError, RuntimeError):
    """A server to notify of a moved alias was away, or did not answer with success."""


class GroundError(FineloopError, RuntimeError):
    """The embedded S3 server or the local Ray head did not come up."""


def by_name(name: str, message: str) -> FineloopError:
    """Rebuild an error that crossed a process boundary as its class name and message.

    An unknown name gives a plain `FineloopError`, so a newer job can talk to an older step.
    """
    pending: list[type[FineloopError]] = [FineloopError]
    while pending:
        kind = pending.pop()
        if kind.__name__ == name:
            return kind(message)
        pending.extend(kind.__subclasses__())
    return FineloopError(f"{name}: {message}")
