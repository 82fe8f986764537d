"""Freeze what a release writes: `python -m tests.frozen.make CHECKOUT RELEASE`.

Runs the release's own code, from a checkout of its commit without a remote, on a tiny base: one run whose version is
promoted, then one of LoftQ whose version is held against it. The whole bucket is then left as files under
tests/frozen/RELEASE/registry/, and is never made again: what counts is that later code reads these very bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from components.config.schema import RegistryConfig
from components.store.store import Store
from pipelines.local import seaweedfs, server
from tests.frozen.registry import ADAPTER, BUCKET, HERE, PREFIX
from tests.models.tiny import build_base, colour_rows

CONFIG = f"""
[adapter]
name = "{ADAPTER}"
[model]
base = "s3://{BUCKET}/{PREFIX}/given/base"
max_length = 64
[data]
source = "s3://{BUCKET}/{PREFIX}/given/colours.jsonl"
eval_share = 0.2
[method]
rank = 4
[train]
learning_rate = 1e-2
epochs = 12
evals_per_epoch = 2
eval_records = 32
checkpoint_every_steps = 100
[ray]
num_workers = 2
[evaluate]
records = 32
samples = 4
max_new_tokens = 8
[registry]
bucket = "{BUCKET}"
prefix = "{PREFIX}"
"""
RUNS = {"promoted": [], "held": ["method.name=loftq", "train.max_steps=2", "train.checkpoint_every_steps=0"]}
NUM_ROWS = 200
# What is frozen names no machine.
NAMELESS = "import platform\nplatform.platform = lambda *_, **__: 'Linux'\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("release")
    arguments = parser.parse_args()
    target = HERE / arguments.release / "registry"
    if target.exists():
        parser.error(f"{target} is frozen")
    with tempfile.TemporaryDirectory(prefix="fineloop-frozen-") as scratch:
        running = server.start(seaweedfs.SeaweedFS(Path(scratch, "store"), BUCKET))
        try:
            os.environ.update(seaweedfs.Endpoint.read(running.endpoint).environment())
            store = Store.open(RegistryConfig(bucket=BUCKET, prefix=PREFIX))
            give(store, Path(scratch))
            run(arguments.checkout.absolute(), Path(scratch))
            for entry in store.list(""):
                path = target / entry.key
                path.parent.mkdir(parents=True, exist_ok=True)
                store.download(entry.key, path)
        finally:
            running.stop()


def give(store: Store, scratch: Path) -> None:
    """The base and the data that both runs start from."""
    for path in build_base(scratch / "base").iterdir():
        store.put(f"given/base/{path.name}", path)
    store.put("given/colours.jsonl", "".join(json.dumps(row) + "\n" for row in colour_rows(NUM_ROWS)).encode())


def run(checkout: Path, scratch: Path) -> None:
    (scratch / "config.toml").write_text(CONFIG)
    (scratch / "nameless").mkdir()
    (scratch / "nameless" / "sitecustomize.py").write_text(NAMELESS)
    path = f"{scratch / 'nameless'}:{checkout}"
    for run_id, settings in RUNS.items():
        command = [sys.executable, "-m", "pipelines.cli", "run", "-c", str(scratch / "config.toml"), "--run-id", run_id]
        command += ["--home", str(scratch / "home"), *[part for each in settings for part in ("--set", each)]]
        subprocess.run(command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, check=True)


if __name__ == "__main__":
    main()
