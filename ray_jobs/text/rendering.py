"""Chat templates, rendered in a child process whose time and memory the kernel limits.

A template is a program that comes with a base. jinja's sandbox isolates it from the machine but does not limit its time
and memory, and a signal handler cannot interrupt a power or a comparison inside a single C function. Any record may
trigger this. So each process that renders has one child process, which runs transformers' `render_jinja_template`, call
after call, with a limit of CPU time for each message. `install` replaces that function by one that calls the child, for
all callers of `apply_chat_template`, including lm-eval.
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
"""Number of calls in one message, so that communication does not cost more than rendering."""
Call = dict[str, Any]
"""Arguments of transformers' `render_jinja_template`, by name."""
_one_at_a_time, _local = threading.Lock(), threading.local()
_child: subprocess.Popen[bytes] | None = None


class RefusedByTemplate(Exception):
    """The template does not accept these turns: jinja's own error, or one that the template's expressions raised."""


def install() -> None:
    """Have transformers render this process's chat templates in the child from now on; does not wait for the child."""
    from transformers import tokenization_utils_base

    tokenization_utils_base.render_jinja_template = _apart
    with _one_at_a_time:
        _running()


def together(tokenizer: Any, asked: Iterable[Mapping[str, Any]]) -> list[str | RefusedByTemplate]:
    """The results of the tokenizer's `apply_chat_template` for each of these arguments, or the errors that it raised.

    Raises:
        ConfigError: the template takes too much time or memory.
    """
    install()
    calls: list[Call | RefusedByTemplate] = []
    _local.calls = calls
    try:
        for arguments in asked:
            try:
                tokenizer.apply_chat_template(**arguments, tokenize=False)  # calls `_apart`
            except Exception as exc:  # many types, for turns that the template refuses; callers name the record
                calls.append(RefusedByTemplate(str(exc)))
    finally:
        _local.calls = None
    rendered = iter(_rendered([call for call in calls if isinstance(call, dict)]))
    found = (next(rendered) if isinstance(call, dict) else call for call in calls)
    return [each if isinstance(each, RefusedByTemplate) else each[0][0] for each in found]


def _apart(**call: Any) -> Any:
    """Replacement of transformers' `render_jinja_template`: the rendered texts, and the assistant's spans in each."""
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
            if not line:  # the child has ended, or waiting for it was interrupted
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
    """Run as the child process: answer each line of input with one line, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # other output goes to stderr
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
    except Exception as exc:  # jinja's errors, and any that the template's expressions raise
        return str(exc)


def _renderer() -> Any:
    """transformers' function without its packages' other imports, which would take half a second in each process."""
    root = next(iter(getattr(find_spec("transformers"), "submodule_search_locations", [])))
    for name, path in (("transformers", root), ("transformers.utils", f"{root}/utils")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [path]
    return importlib.import_module("transformers.utils.chat_template_utils").render_jinja_template


if __name__ == "__main__":
    _serve()
