"""Workers that measure, each on a base of its own or on one that they shard, and straight after a training."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from components.config import config_file
from components.records import runs
from components.registry.aliases import promote
from components.shared.errors import DataError
from components.store.store import Store
from ray_jobs import finetune
from ray_jobs.base import base_model, together
from ray_jobs.evaluate import _contenders, plan
from ray_jobs.planning.capacity import Device, must_be_shared
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.probes import PROBES
from ray_jobs.probes.texts import Read
from ray_jobs.scoring.answers import Score
from ray_jobs.scoring.measure import BaseCache, Findings, Rows, ShardResult, Subject, measure_shard
from ray_jobs.text import chat_format
from ray_jobs.training.measuring import Task, _as_plain, _measured_in_turn, from_plain
from ray_jobs.training.zero import Worker
from tests.doubles import datasets
from tests.models.shapes import small
from tests.models.spec import changed
from tests.models.tiny_version import RECORDS, publish
from tests.models.train_group import in_group
from tests.ray_jobs import own_ray
from tests.ray_jobs.training.in_store import in_store


def measure_in_rank(task: Task) -> ShardResult:
    """What one rank does: its result."""
    here = Worker(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with together.gloo_group(here.num_workers) as group:
        return _measured_in_turn(task, BaseCache(), here, group)


def test_a_workers_result_comes_back_from_json_as_it_was() -> None:
    score = Score(1.5, None, "red", {"exact_match": 1.0}, differs=False)
    found: dict[str, Findings] = {"general_text": {"base": Read([0.5, 0.25])}}
    result = ShardResult({"a": 2}, {"base": [score]}, [found], "2026-12-02T03:00:00+00:00", "float32")
    assert from_plain(json.loads(json.dumps(_as_plain(result)))) == result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shared"), [pytest.param("lora", True, marks=pytest.mark.full), ("qlora", True), ("lora", False)]
)
def test_several_workers_find_the_scores_of_one(config, store, tmp_path, name, shared, monkeypatch):
    stage = ["train.zero_stage=3"] if shared else []
    config = in_store(config, store, *stage, f"method.name={name}", "ray.num_workers=2", "evaluate.batch_size=3")
    old = publish(changed(config, "train.seed=1"), store, tmp_path / "old", std=0.2)
    new = publish(config, store, tmp_path / "new")
    promote(store, config.adapter.name, old.version)
    contenders = _contenders(config, store, new)
    records = RECORDS[:11]  # no even share for two workers, and of the passages neither
    three = changed(config, "evaluate.general_passages=3", "evaluate.own_answers=3")
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    probes = {key: kind.prepare(store, chat, three, contenders) for key, kind in PROBES.items()}
    threads = torch.get_num_threads()
    if shared:  # LoRA goes peft's way there: here it does too, as a model of chance has ties that rounding breaks
        monkeypatch.setattr("ray_jobs.kernels.fused.adopt", lambda model: None)
    expected = measure_shard(contenders, records, probes, shard_index=1)
    torch.set_num_threads(threads)
    task = Task(contenders, records, base_model.load_config(base.path, config.model), probes, together=shared)
    found, same = in_group(measure_in_rank, task, directory=tmp_path / "logs", num_workers=2)
    assert found == same
    assert found.tokens == expected.tokens
    assert found.scores.keys() == {"base", "champion", "candidate"}
    order = [[*expected.tokens].index(name) for name in found.tokens]
    for role, scores in expected.scores.items():
        for ours, theirs in zip(found.scores[role], [scores[row] for row in order], strict=True):
            assert ours.text == theirs.text
            assert ours.nll == pytest.approx(theirs.nll, rel=0.01)
            assert (ours.other_prompt_nll is None) == (role == "base")
    ours, theirs = (
        {key: probe.outcome([share[key] for share in result.shares], chat).record for key, probe in probes.items()}
        for result in (found, expected)
    )
    assert len(found.shares) == 2
    for text in ("general_text", "own_answers"):
        assert ours[text].nll.keys() == found.scores.keys()
        for role, nll in theirs[text].nll.items():
            assert ours[text].nll[role] == pytest.approx(nll, rel=0.01)
            assert len(nll) == 3
    assert ours["own_answers"].answers == theirs["own_answers"].answers


@pytest.mark.parametrize(
    ("zero_stage", "num_workers", "memory", "expected"),
    [(3, 2, 10**6, True), (3, 2, None, True), (3, 2, 10**9, False), (2, 2, 10**6, False), (3, 1, 10**6, False)],
)
def test_a_base_is_held_together_where_it_was_trained_so_and_one_worker_cannot(
    config, zero_stage, num_workers, memory, expected
):
    config = changed(config, f"train.zero_stage={zero_stage}", f"ray.num_workers={num_workers}")
    rehearsal = Rehearsal(small(), config.method, reference="small", use_gpu=False)
    assert must_be_shared(config, rehearsal, Device("a worker", memory)) is expected


@dataclass(frozen=True)
class Trouble:
    """A probe that dies, or refuses, the first time that it is asked, or each time."""

    folder: Path
    what: str

    def at(self, rows: Rows) -> "Trouble":
        return self

    def run(self, subject: Subject, findings: Findings) -> Read | None:
        if subject.role != "candidate":
            return None
        is_first = not any(self.folder.glob("asked-*"))
        (self.folder / f"asked-{os.getpid()}").touch()
        if self.what == "refuses":
            raise DataError("no answer is there")
        if is_first or self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return Read([1.0])


def finetuned(config_toml: str, dataset_uri: str, trouble: Trouble) -> tuple[str, ShardResult | None]:
    """In a driver's process: the version that was published, and what its workers measured of it."""
    config = config_file.loads(config_toml)
    planned = plan(config, Store.open(config.registry), run_id="r", dataset_uri=dataset_uri)
    task: Any = replace(planned.task, probes={"trouble": trouble})
    trained, found = finetune.run(config, run_id="r", dataset_uri=dataset_uri, task=task)
    return trained.version, found


@pytest.fixture(scope="module")
def driver() -> Iterator[ProcessPoolExecutor]:
    with own_ray.driver(2) as pool:
        yield pool


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "attempts", "is_measured"),
    [("dies once", 2, True), ("dies", 2, False), pytest.param("refuses", 1, False, marks=pytest.mark.full)],
)
def test_what_was_trained_stands_whatever_happens_to_its_measurement(
    driver, config, store, tmp_path, what, attempts, is_measured
):
    changes = ["evaluate.max_new_tokens=4", "ray.num_workers=1", "ray.max_failures=1", "train.max_steps=2"]
    toml = config_file.dumps(in_store(config, store, *changes))
    data = datasets.publish(store, train=RECORDS[:8], evaluation=RECORDS[8:12]).uri
    version, found = driver.submit(finetuned, toml, data, Trouble(tmp_path, what)).result(timeout=600)
    assert len(list(tmp_path.glob("asked-*"))) == attempts
    assert not store.exists(runs.run_key("r", runs.RESTARTS))  # nobody has trained again
    assert (found is not None) is is_measured
    if found is not None:
        assert found.scores.keys() == {"base", "candidate"}
        assert found.scores["base"] != found.scores["candidate"]
    assert version
