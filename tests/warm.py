"""A Python whose heavy imports are done: `python -m MODULE` is forked from one process that has made them already.

A step under kfp.local, or a command, imports kfp, Ray and the like anew in each process, which takes a second; a fork
takes some hundredths. `bin/python3` is a small program. Asked for one of `PRELOADED`, it has the server fork a process
with its streams, arguments, environment, folder and umask, passes signals on to it, and ends as that does; in every
other case it becomes the real Python. If it is killed, so is the session of what was forked.

A test that sends signals to whole groups, or reads /proc of what it starts, takes the real one. So does whatever asks
what an import does at start: tests/test_boundaries.py, tests/e2e and tests/journeys start each process from nothing.
"""

import array
import atexit
import contextlib
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from components.store.client import client_from_environment

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "FINELOOP_TESTS_PYTHON"
"""Of the environment: where such a Python is, for all processes of a test run."""
STEPS = (
    *("kfp.local", "kfp.dsl.executor_main", "ray.job_submission", "pyarrow.parquet", "boto3", "botocore.httpsession"),
    *("pipelines.retrain", "pipelines.cli", "pipelines.local.run", "components.prepare.by_engine"),
    *("components.tune.tune", "components.finetune.finetune", "components.evaluate.evaluate", "components.gate.gate"),
    *("components.promote.promote", "components.report.report"),
)
MODELS = ("torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb")
RANKS = ("tests.models.preloaded",)
PRELOADED = {
    "tests.doubles.kfp_server.child": STEPS,
    "kfp.dsl.executor_main": STEPS,
    "pipelines.local.run_pipeline": STEPS,
    "pipelines.cli": STEPS,
    "ray_jobs.candidate": STEPS,  # the stub's, as the next two; so nothing of ray_jobs may be imported before
    "ray_jobs.evaluate": STEPS,
    "ray_jobs.sweep": STEPS,
    "tests.components.ray_cluster.submitting": STEPS,
    "ray_jobs.plan": MODELS,
    "ray_jobs.preview": MODELS,
    "ray_jobs.export": MODELS,
    "tests.doubles.vllm_llm": MODELS,
    "tests.models.rank": RANKS,
}
"""What is forked, and what its server has imported then: a fork of all of torch takes twice as long as one of steps."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CLIENT = """
import array, json, os, signal, socket, sys
arguments = sys.argv[1:]
if arguments[:1] != ["-m"] or arguments[1] not in {server_of} or "PYTHONWARNINGS" in os.environ:
    os.execv({real!r}, [{real!r}, *arguments])
umask = os.umask(0)
os.umask(umask)
server = socket.socket(socket.AF_UNIX)
server.connect({server_of}[arguments[1]])
request = json.dumps(
    {{"arguments": arguments[1:], "folder": os.getcwd(), "environment": dict(os.environ), "umask": umask}}
).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
signal.pthread_sigmask(signal.SIG_BLOCK, {forwarded})
server.sendall(request)
answers = server.makefile("r")
pid = int(answers.readline())
for number in {forwarded}:
    signal.signal(number, lambda number, _frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {forwarded})
code = int(answers.readline())
if code < 0:  # ended by a signal: so do we
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The path of such a Python, beside links to what lies beside the real one. It imports at its first use."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        real, programs = sys.executable, Path(folder, "bin")
        programs.mkdir()
        for path in Path(real).parent.iterdir():
            if not path.name.startswith("python"):
                (programs / path.name).symlink_to(path)
        addresses = {names: f"{folder}/{number}" for number, names in enumerate((STEPS, MODELS, RANKS))}
        server_of = {module: addresses[names] for module, names in PRELOADED.items()}
        client = Path(folder, "client.py")
        client.write_text(CLIENT.format(server_of=server_of, real=real, forwarded=tuple(map(int, FORWARDED))))
        for name in ("python", "python3"):  # by a shell, as the first line of a script takes no path with a space
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(real)} -IS {shlex.quote(str(client))} "$@"\n')
            (programs / name).chmod(0o755)
        with contextlib.ExitStack() as servers:
            for address in addresses.values():
                servers.enter_context(_server(address, str(programs / "python3")))
            yield str(programs / "python3")


@contextlib.contextmanager
def _server(address: str, python: str) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}  # nor is anybody asked for one
    with (
        socket.socket(socket.AF_UNIX) as listener,
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", python, str(listener.fileno())],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        ) as server,
    ):
        listener.bind(address)
        listener.listen(64)
        listener.close()  # here, so that nobody waits for a server that has ended
        assert server.stdin is not None
        yield
        server.stdin.close()  # the server ends with this end of the pipe, in whichever way that closes


def serve(listener: socket.socket) -> None:
    """Fork for each connection until standard input ends; what was forked returns as well, and runs its module."""
    outside = [each for each in sys.path if each not in ("", str(ROOT))]
    forked: dict[int, socket.socket] = {}
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    while True:
        readable, _, _ = select.select([sys.stdin, listener, woken, *forked.values()], [], [])
        if sys.stdin in readable:
            os._exit(0)
        if woken in readable:
            woken.recv(4096)
        for pid, client in list(forked.items()):
            if client in readable:  # a client says nothing more: it was killed
                _kill(pid)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                forked.pop(pid).close()
        if listener in readable:
            client, _ = listener.accept()
            streams, request = _read(client)
            if request is None:
                client.close()
                continue
            _preload(PRELOADED[request["arguments"][0]])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listener, woken, waker, client, *forked.values()):
                    each.close()
                _become(streams, outside, **request)
                return
            for stream in streams:
                os.close(stream)
            forked[pid] = client
            try:
                client.sendall(f"{pid}\n".encode())
            except OSError:  # it was killed meanwhile
                _kill(pid)


def _preload(names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in sys.modules]:
        gc.disable()
        for name in missing:
            importlib.import_module(name)
        client_from_environment()  # for the first one botocore reads what S3 can do, which takes a tenth of a second
        gc.freeze()
        gc.enable()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)


def _read(client: socket.socket) -> tuple[list[int], dict[str, Any] | None]:
    """The streams and the request; None from a client that was killed while it asked."""
    streams = array.array("i")
    size, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
    for *_, descriptors in ancillary:
        streams.frombytes(descriptors)
    with client.makefile("rb") as request:
        body = request.read(int.from_bytes(size, "big"))
    try:
        return list(streams), json.loads(body)
    except ValueError:
        for stream in streams:
            os.close(stream)
        return [], None


def _become(
    streams: list[int],
    outside: list[str],
    *,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    umask: int,
) -> None:
    """Take over what Python reads when it starts."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.umask(umask)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) else -1, encoding="utf-8", closefd=False)
    sys.stdout.reconfigure(write_through=bool(environment.get("PYTHONUNBUFFERED")))
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    path = environment.get("PYTHONPATH", "")
    sys.path[:] = [folder, *filter(None, path.split(os.pathsep)), *outside]
    importlib.invalidate_caches()
    sys.argv = arguments
    sys.modules.pop(arguments[0], None)


def stack(context: int = 0) -> list[inspect.FrameInfo]:
    """In place of inspect.stack: kfp asks for its caller's name at each setting of a task, and with it where the source
    of all frames is, which takes half a second for a pipeline where much is imported."""
    frame, frames = inspect.currentframe(), []
    while frame and (frame := frame.f_back):
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
    return frames


def _run(module: str) -> int:
    """The exit code, as Python's own end has it."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return exc.code or 0
        print(exc.code, file=sys.stderr)
        return 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    sys.executable = sys.argv[1]  # of what is forked, so that its own processes are forked too
    inspect.stack = stack
    serve(socket.socket(fileno=int(sys.argv[2])))
    code = _run(sys.argv[0])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # without taking apart all that was imported, which would copy it first
