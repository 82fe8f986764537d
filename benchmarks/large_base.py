"""What a 70B base costs to read: `python -m benchmarks.large_base FOLDER --gateway versitygw [--fetch]`.

The base is made up: a folder in transformers' format with the shapes of Llama 3 70B (arXiv:2407.21783, table 3), whose
safetensors have whole headers and holes in place of weights. A real S3 server serves it from there (versitygw's posix
backend), behind a proxy that counts requests and bytes of each process by itself: of what asks for a pod's disk, of
`plan` and of a driver, up to where workers would begin; Ray is told of GPUs that are not there. With --fetch also what
two workers of a node read before they load it, and both again after a restart, beside the seconds that `plan` says for
a network as fast as the server here, and for a disk as fast as --caches: it needs 141 GB, of which a zram device holds
almost nothing.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from benchmarks import example
from benchmarks import processes_of_a_large_base as processes
from benchmarks.counting_proxy import APP_ID, Counts, counting_proxy
from pipelines.commands.arguments import table
from tests.models.shapes import LLAMA_3_70B
from tests.models.tiny import colour_rows, write_tokenizer

SHARDS = 30
BF16_BYTES = 2
CONFIG = """
[adapter]
name = "large"
[model]
base = "s3://bases/whole"
max_length = 64
[data]
source = "{folder}/colours.jsonl"
[method]
name = "qlora"
rank = 8
target_modules = ["q_proj", "v_proj"]
[train]
learning_rate = 1e-4
batch_size = 8
micro_batch_size = 1
max_steps = 2
zero_stage = 3
[ray]
num_workers = 8
use_gpu = true
gpu = "H100"
[registry]
bucket = "registry"
"""


def write_base(folder: Path) -> int:
    """Write the base; gives the bytes of its weights."""
    import torch
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    config = copy.copy(LLAMA_3_70B)
    config.update({"dtype": "bfloat16", "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    config.update({"max_position_embeddings": 8192, "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    of_a_shard = -(-len(names) // SHARDS)
    parts = [names[start : start + of_a_shard] for start in range(0, len(names), of_a_shard)]
    placed, total = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        total += write_shard(folder / file, {name: shapes[name] for name in part})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in folder.iterdir():  # where versitygw keeps what an upload would have had for an etag
        os.setxattr(file, "user.etag", b'"%s"' % hashlib.md5(file.name.encode()).hexdigest().encode())
    return total


def write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """A file in the safetensors format whose weights are a hole; gives their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BF16_BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@contextlib.contextmanager
def served(folder: Path, gateway: str) -> Iterator[str]:
    """URL of a server of the buckets that lie in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"ROOT_ACCESS_KEY": "large", "ROOT_SECRET_KEY": "a secret of this benchmark"}
    os.environ |= {
        "AWS_ACCESS_KEY_ID": keys["ROOT_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": keys["ROOT_SECRET_KEY"],
        "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server = subprocess.Popen(
        [gateway, "--port", f"127.0.0.1:{port}", "--quiet", "posix", str(folder)], env={**os.environ, **keys}
    )
    try:
        while server.poll() is None:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def in_process(name: str, function: Any, *arguments: Any, **environment: str) -> Any:
    """Run it in a process of its own, that the proxy knows by this name; returns what it returns."""
    return at_once([name], function, *arguments, **environment)[0]


def at_once(names: Sequence[str], function: Any, *arguments: Any, **environment: str) -> list[Any]:
    """Run it in a process for each name, all at the same time."""
    with contextlib.ExitStack() as pools, pytest.MonkeyPatch.context() as patched:
        begun = []
        for name in names:
            for key, value in {APP_ID: name, **environment}.items():
                patched.setenv(key, value)
            pool = pools.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            begun.append(pool.submit(function, *arguments))  # starts the process, with this environment
        return [each.result() for each in begun]


def measure_whole(folder: Path, caches: Path, *, fetch: bool) -> None:
    """What is read of the base before there are workers."""
    toml = CONFIG.format(folder=folder)
    in_process("whole-plan", processes.planned, toml)
    for attempt in ("first", "again"):
        cache = {"FINELOOP_CACHE": str(caches / "driver")}
        in_process(f"whole-driver-{attempt}", processes.driven, toml, "whole", **cache)
    identity = in_process("whole-known-to-driver", processes.identified, toml, **cache)
    if fetch:
        measure_start(toml, identity, caches / "node")


def measure_start(toml: str, identity: Mapping[str, str], cache: Path) -> None:
    """Two workers of a node get the base, and get it again; then the node's disk is read once, as they load from it."""
    took: dict[str, float] = {}
    network = in_process("whole-server", processes.server_speed, SHARDS // 10)
    for attempt in ("first", "again"):
        ranks = [f"whole-rank-{rank}-{attempt}" for rank in range(2)]
        begun = time.perf_counter()
        at_once(ranks, processes.fetched, toml, identity, FINELOOP_CACHE=str(cache))
        took[attempt] = time.perf_counter() - begun
    shards = sorted(path.resolve() for path in cache.rglob("*.safetensors"))
    disk = in_process("whole-disk", processes.disk_speed, shards[: SHARDS // 10])
    begun = time.perf_counter()
    in_process("whole-load", processes.disk_speed, shards)
    took["load"] = time.perf_counter() - begun
    says = in_process("whole-start", processes.start_of, toml, network, disk)
    here, at = sum(map(os.path.getsize, shards)), says["seconds"]
    print(f"a node's bytes: plan {says['node_bytes'] / 1e9:.1f} GB, here {here / 1e9:.1f} GB")
    print(f"a server of {network / 1e9:.2f} GB/s, a disk of {disk / 1e9:.2f} GB/s")
    print(f"fetch: plan {at['fetch']:.0f} s, here {took['first']:.0f} s; again {took['again']:.0f} s")
    print(f"load: plan {at['load']:.0f} s, here {took['load']:.0f} s")


def rows(counts: Counts) -> list[tuple[str, ...]]:
    """The table."""
    lines = [("process", "requests", "MB", "of weights, MB")]
    for process, asked in counts.by_process.items():
        lines.append((process, f"{asked.requests}", f"{asked.read_bytes / 1e6:,.1f}", f"{asked.of_weights / 1e6:,.1f}"))
    return lines


def main() -> None:
    parser = example.parser("large_base", __doc__)
    parser.add_argument("folder", type=Path, help="empty, or not there yet")
    parser.add_argument("--gateway", default="versitygw", help="github.com/versity/versitygw, 1.8")
    parser.add_argument("--fetch", action="store_true", help="have workers download the whole base")
    parser.add_argument("--caches", type=Path, help="folder of the nodes' caches; by default in FOLDER")
    options = parser.parse_args()
    folder = options.folder.absolute()
    caches = (options.caches or folder / "caches").absolute()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    (folder / "buckets" / "registry").mkdir(parents=True)
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colour_rows(100)))
    total = write_base(folder / "buckets" / "bases" / "whole")
    print(f"{total / 1e9:.1f} GB of weights")
    with served(folder / "buckets", options.gateway) as url, counting_proxy(url) as counts:
        os.environ["AWS_ENDPOINT_URL"] = counts.url
        try:
            measure_whole(folder, caches, fetch=options.fetch)
        finally:
            print(table(rows(counts)))


if __name__ == "__main__":
    main()
