"""Chat templates, rendered in a child process whose time and memory the kernel limits.

A template is a program that comes with a base. jinja's sandbox keeps it from the machine but lets it take all time and
memory, and no signal handler ends a power or a comparison that stays within one function of C. Any record may be the
one that triggers this. So each process that renders has one child, which does what transformers'
`render_jinja_template` does, call after call, with a limit of processor time for each message. `install` replaces that
function by one that calls the child, for all callers of `apply_chat_template`, lm-eval among them.
"""

import atexit
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from components.shared import memory
from components.shared.errors import ConfigError, JobError
from ray_jobs.text.bounded import MORE_BYTES, SECONDS

CALLS = 32
"""In one message, so that waiting for another process does not cost more than the templates."""
Call = dict[str, Any]
"""Arguments of transformers' `render_jinja_template`, by name."""
_one_at_a_time, _local = threading.Lock(), threading.local()
_child: subprocess.Popen[bytes] | None = None


class RefusedByTemplate(Exception):
    """A template makes nothing of such turns: jinja's own error, or what the template's expressions raised."""


def install() -> None:
    """Let transformers render chat templates in the child from now on, in this process; does not wait for the child."""
    from transformers import tokenization_utils_base

    tokenization_utils_base.render_jinja_template = _apart
    with _one_at_a_time:
        _running()


def together(tokenizer: Any, asked: Iterable[Mapping[str, Any]]) -> list[str | RefusedByTemplate]:
    """What the tokenizer's `apply_chat_template` makes of each of these arguments, or why it makes nothing of them.

    Raises:
        ConfigError: the template takes more time or memory than one needs.
    """
    install()
    calls: list[Call | RefusedByTemplate] = []
    _local.calls = calls
    try:
        for arguments in asked:
            try:
                tokenizer.apply_chat_template(**arguments, tokenize=False)  # gets as far as `_apart`
            except Exception as exc:  # of many kinds, for turns that it refuses; callers name the record
                calls.append(RefusedByTemplate(str(exc)))
    finally:
        _local.calls = None
    rendered = iter(_rendered([call for call in calls if isinstance(call, dict)]))
    found = (next(rendered) if isinstance(call, dict) else call for call in calls)
    return [each if isinstance(each, RefusedByTemplate) else each[0][0] for each in found]


def _apart(**call: Any) -> Any:
    """transformers' `render_jinja_template`: the texts of the conversations, and where the assistant speaks in each."""
    if (calls := getattr(_local, "calls", None)) is not None:
        calls.append(call)
        return [""], []
    (found,) = _rendered([call])
    if isinstance(found, RefusedByTemplate):
        raise found
    return found


def _rendered(calls: Sequence[Call]) -> list[Any]:
    found = [each for at in range(0, len(calls), CALLS) for each in _answer(calls[at : at + CALLS])]
    return [RefusedByTemplate(each) if isinstance(each, str) else each for each in found]


def _answer(calls: Sequence[Call]) -> list[Any]:
    with _one_at_a_time:
        child, line = _running(), b""
        try:
            child.stdin.write(json.dumps({"seconds": SECONDS, "calls": calls}).encode() + b"\n")
            child.stdin.flush()
            line = child.stdout.readline()
        finally:
            if not line:  # it has ended, or the wait for it was interrupted
                _end(child)
    if not line and child.returncode > 0:
        raise JobError(f"the process that renders chat templates ended with exit code {child.returncode}")
    answer = json.loads(line) if line else "TimeoutError" if child.returncode == -signal.SIGXCPU else "MemoryError"
    if isinstance(answer, str):
        raise ConfigError(
            f"the chat template of model.base does not come to an end in {SECONDS:.0f} s and {MORE_BYTES >> 20} MiB "
            f"({answer}): take a base with a sound one"
        )
    return list(answer)


def _running() -> Any:
    global _child
    if _child is None or _child.poll() is not None:
        path = os.pathsep.join(each or str(Path.cwd()) for each in sys.path)
        command = [sys.executable, "-P", "-m", "ray_jobs.text.rendering"]
        _child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        atexit.register(_end, _child)
    return _child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    with child:  # waits, and closes the pipes
        pass


def _serve() -> None:
    """The child: answers each line of input by a line, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed
    render = _renderer()
    for line in sys.stdin.buffer:
        message = json.loads(line)
        seconds = math.ceil(time.process_time() + message["seconds"])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            with memory.at_most(MORE_BYTES):
                answer: list[Any] | str = [_found(render, call) for call in message["calls"]]
        except (MemoryError, RecursionError) as exc:
            answer = type(exc).__name__
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _found(render: Any, call: Call) -> Any:
    try:
        return render(**call)
    except (MemoryError, RecursionError):
        raise
    except Exception as exc:  # jinja's own, and whatever the template's expressions raise
        return str(exc)


def _renderer() -> Any:
    """transformers' own, without what its packages import beside it: half a second for each process that renders."""
    root = next(iter(getattr(find_spec("transformers"), "submodule_search_locations", [])))
    for name, path in (("transformers", root), ("transformers.utils", f"{root}/utils")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [path]
    return importlib.import_module("transformers.utils.chat_template_utils").render_jinja_template


if __name__ == "__main__":
    _serve()
