"""`fineloop serve`'s server, on a real version of the tiny base."""

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import config_file
from components.config.schema import RegistryConfig, RunConfig
from components.store.store import Store
from tests.models.tiny_version import publish

if TYPE_CHECKING:
    from ray_jobs.talking.server import Server


@contextmanager
def serving(base: Path, bucket: str, scratch: Path) -> "Iterator[Server]":
    """A version of `base` and the base itself, which answer with eight tokens at most."""
    import torch

    from ray_jobs import serve

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    text = f'[adapter]\nname = "colours"\n[model]\nbase = "{base}"\nmax_length = 256\n[data]\nsource = "x.jsonl"\n'
    config: RunConfig = config_file.loads(text + '[method]\nname = "lora"\n[evaluate]\nmax_new_tokens = 8\n')
    registry = RegistryConfig(bucket=bucket, prefix=f"tests/{uuid.uuid4().hex}")
    config = config.model_copy(update={"registry": registry})
    version = publish(config, Store.open(registry), scratch)
    with listening(serve.opened(config, f"colours@{version.version}", 0, with_base=True)) as server:
        yield server
    torch.set_num_threads(threads)


@contextmanager
def listening(server: "Server") -> "Iterator[Server]":
    """The server, answering in a thread."""
    loop = asyncio.new_event_loop()
    serving = loop.create_task(server.serve())

    def answer() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()
