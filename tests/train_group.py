"""A worker group without Ray, for tests of the loop itself: real processes, a real gloo group, the real store.

`python -m tests.train_group SPEC.json` is one rank; `train` starts them all.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trained:
    """What rank 0 saw."""

    losses: list[float]
    eval_losses: list[float]
    weights: dict[str, Any]
    resumed_from: int
    stopped_early: bool
    steps: int


def train(config_toml: str, rows: list[dict[str, str]], directory: Path, *, run_id: str, num_workers: int) -> Trained:
    """Train on `rows`, the last eighth held out; `run_id` names the checkpoints in the store."""
    from safetensors.numpy import load_file

    directory.mkdir(parents=True, exist_ok=True)
    spec = directory / "spec.json"
    result = directory / "result.json"
    spec.write_text(json.dumps({"config": config_toml, "rows": rows, "run_id": run_id, "result": str(result)}))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.train_group", str(spec)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_workers)
    ]
    logs = [rank.communicate(timeout=240)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(logs)[-6000:])
    found = json.loads(result.read_text())
    return Trained(weights=load_file(result.with_suffix(".safetensors")), **found)


def main(spec_path: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from components.prepare.validate import validate
    from components.registry import lineage
    from components.registry.store import Store
    from components.shared import config_file
    from ray_jobs import base_model, checkpoint
    from ray_jobs.batching import tokenize
    from ray_jobs.train_loop import Worker
    from ray_jobs.worker import TrainJob, fit

    spec = json.loads(Path(spec_path).read_text())
    config = config_file.loads(spec["config"])
    dist.init_process_group("gloo")
    worker = Worker(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    base = base_model.resolve(config.model)
    tokenizer = base_model.load_tokenizer(base, config.model)
    records = [validate(row).record for row in spec["rows"]]
    cut = len(records) * 7 // 8
    splits = [tokenize(part, tokenizer, config.model.max_length) for part in (records[:cut], records[cut:])]
    job = TrainJob(
        config_toml=spec["config"],
        run_id=spec["run_id"],
        dataset=lineage.Dataset("d0", "s3://none", "0", cut, len(records) - cut),
        base=lineage.Base(config.model.base, base.identity),
        pad=tokenizer.pad_token_id,
    )
    seen: list[dict[str, Any]] = []
    stop_after = int(os.environ.get("STOP_AFTER_STEP", "0"))

    def report(record: dict[str, Any]) -> None:
        seen.append(record)
        if record["step"] == stop_after:
            os._exit(0 if worker.rank else 3)  # as a lost machine: nothing is cleaned up

    adapted, outcome, _ = fit(config, job, worker, Store.open(config.registry), *splits, report=report)
    if worker.rank == 0:
        weights = {name: tensor.float().clone() for name, tensor in checkpoint.trainable(adapted).items()}
        save_file(weights, Path(spec["result"]).with_suffix(".safetensors"))
        Path(spec["result"]).write_text(
            json.dumps(
                {
                    "losses": [r["loss"] for r in seen if r["kind"] == "train"],
                    "eval_losses": [r["loss"] for r in seen if r["kind"] == "eval"],
                    "resumed_from": outcome.resumed_from,
                    "stopped_early": outcome.stopped_early,
                    "steps": outcome.progress.step,
                }
            )
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
