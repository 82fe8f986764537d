"""What differs on GPUs: other kernels for NF4 and attention, NCCL, and copies between host and device.

There a training must take the steps of a plain loop on the CPU, in one process and without DeepSpeed. The same tests
run on two CPU workers with gloo, so that `pytest -m gpu`, which takes every GPU of the machine, tries nothing but CUDA.
On the CPU, test_matrix.py shares trainings out in more ways, and test_train_loop.py resumes more of them.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from components.config import config_file
from components.config.schema import RunConfig
from components.store.store import Store
from ray_jobs.base import base_model
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import collate, tokenize
from tests.doubles.datasets import validate
from tests.models.plain import plain_training
from tests.models.tiny import colour_rows
from tests.models.train_group import Trained, train_all

ROWS = colour_rows(128)  # 112 to train on in seven steps, and 16 held out
WAYS = {
    "ZeRO 2": ["train.zero_stage=2"],
    "ZeRO 2, offloaded": ["train.zero_stage=2", "train.cpu_offload=true"],
    "ZeRO 3": ["train.zero_stage=3"],
    "ZeRO 3, offloaded": ["train.zero_stage=3", "train.cpu_offload=true"],
}
ON_A_GPU = {
    "activations offloaded": [
        "train.zero_stage=2",
        "train.gradient_checkpointing=true",
        "train.activation_offloading=true",
    ]
}
# GPU and CPU both round to bfloat16 what they have summed in float32, in another order. On the CPU, products that are
# not rounded at all move these losses by 0.0034 and the norms by 0.3%: fifteen times that is allowed.
NOISE = 0.05
NORM_NOISE = 0.05
GPU, SLOW = pytest.mark.gpu, pytest.mark.slow
ON_GPUS = [pytest.param("cuda", base, marks=GPU) for base in ("nf4", "bf16")]
ON_CPUS = [pytest.param("cpu", base, marks=SLOW) for base in ("nf4", "bf16")]


class Group:
    """A worker for each GPU of the machine, a power of two and at most eight, or two CPU workers."""

    def __init__(self, device: str, config: RunConfig, store: Store, directory: Path) -> None:
        self.use_gpu = device == "cuda"
        self._num_workers = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()) if self.use_gpu else 2
        self._config, self._directory, self._numbers = config_file.dumps(config), directory, itertools.count()
        self._settings = [
            f"registry.bucket={store.bucket}",
            f"registry.prefix={store.prefix}",
            f"ray.use_gpu={str(self.use_gpu).lower()}",
            f"ray.num_workers={self._num_workers}",
            "ray.cpu_matmul_dtype=bfloat16",
            f"train.micro_batch_size={config.train.batch_size // self._num_workers}",
        ]

    def config(self, *changes: str) -> str:
        return config_file.dumps(config_file.loads(self._config, [*self._settings, *changes]))

    def train(self, runs: dict[str, list[str]]) -> dict[str, Trained]:
        """One training after the other in the same processes, each with its changes; a run goes on by its id."""
        directory = self._directory / str(next(self._numbers))
        configs = {run_id: self.config(*changes) for run_id, changes in runs.items()}
        return train_all(configs, ROWS, directory, num_workers=self._num_workers, use_gpu=self.use_gpu)


@pytest.fixture
def group(device: str, config: RunConfig, store: Store, tmp_path: Path) -> Group:
    return Group(device, config, store, tmp_path)


@GPU
@pytest.mark.parametrize("base_format", ["bf16", "nf4"])
def test_the_loss_on_a_gpu_is_that_on_the_cpu(config: RunConfig, base_format):
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    split = tokenize([validate(row).record for row in colour_rows(16)], chat, config.model.max_length)
    batch = collate(split, range(len(split)), chat.pad)
    losses = []
    for use_gpu in (False, True):
        model = base_model.load_model(base, config.model, base_format, use_gpu=use_gpu)
        with torch.inference_mode():
            nll = answer_nll(model, batch["input_ids"].to(model.device), batch["labels"].to(model.device))
        losses.append(nll.mean().item())
    assert losses[1] == pytest.approx(losses[0], abs=NOISE)


@pytest.mark.parametrize(("device", "base"), [*ON_GPUS, *ON_CPUS])
def test_every_way_of_sharing_a_training_out_takes_the_steps_of_a_plain_loop_on_the_cpu(group: Group, base: str):
    method = f"method.base={base}"
    ways = {**WAYS, **(ON_A_GPU if group.use_gpu else {})}
    trained = group.train({way: [method, *changes] for way, changes in ways.items()})
    expected = plain_training(group.config(method, "ray.use_gpu=false"), ROWS)
    assert len(expected.losses) == 7
    for way, found in trained.items():
        np.testing.assert_allclose(found.losses, expected.losses, atol=NOISE, err_msg=way)
        np.testing.assert_allclose(found.grad_norms, expected.grad_norms, rtol=NORM_NOISE, err_msg=way)
        np.testing.assert_allclose(found.eval_losses, trained["ZeRO 2"].eval_losses, atol=NOISE, err_msg=way)


@pytest.mark.parametrize(("device", "base"), [*ON_GPUS, pytest.param("cpu", "nf4", marks=SLOW)])
@pytest.mark.parametrize("way", ["ZeRO 3, offloaded", "ZeRO 2"])
def test_a_lost_group_resumes_to_the_steps_of_an_uninterrupted_one(group: Group, base: str, way: str, monkeypatch):
    changes = [f"method.base={base}", *WAYS[way], "train.checkpoint_every_steps=2", "train.max_steps=4"]
    (whole,) = group.train({"whole": changes}).values()
    monkeypatch.setenv("STOP_AFTER_STEP", "3")
    with pytest.raises(RuntimeError):
        group.train({"lost": changes})
    monkeypatch.delenv("STOP_AFTER_STEP")
    (resumed,) = group.train({"lost": changes}).values()
    assert resumed.resumed_from == 2
    np.testing.assert_allclose(resumed.losses, whole.losses[2:], atol=NOISE if group.use_gpu else 0, rtol=0)
