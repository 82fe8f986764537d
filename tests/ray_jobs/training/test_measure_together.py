"""A base that its workers hold together is measured as one that each of them holds by itself."""

from dataclasses import replace

import pytest
import torch

from components.config import config_file
from components.registry.aliases import promote
from ray_jobs.base import base_model, chat_format
from ray_jobs.evaluate import _contenders
from ray_jobs.planning.capacity import Device, must_be_shared
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.scoring import general_text, own_answers
from ray_jobs.scoring.measure import measure_shard
from ray_jobs.scoring.suites import to_ask
from tests.models.shapes import small
from tests.models.tiny_version import RECORDS, publish
from tests.models.train_group import in_group


def changed(config, *overrides):
    return config_file.loads(config_file.dumps(config), overrides)


def measure_in_rank(contenders, records, texts, questions):
    """What one rank does: its result."""
    import torch
    import torch.distributed as dist

    from ray_jobs.training.group import Worker
    from ray_jobs.training.measure_together import measure_together

    worker = Worker(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return measure_together(contenders, records, texts, questions, worker)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.full), "qlora"])
def test_workers_that_hold_the_base_together_find_the_scores_of_one_that_holds_it_whole(
    config, store, tmp_path, name, monkeypatch
):
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}"]
    config = changed(
        config, *place, f"method.name={name}", "train.zero_stage=3", "ray.num_workers=2", "evaluate.batch_size=3"
    )
    old = publish(changed(config, "train.seed=1"), store, tmp_path / "old", std=0.2)
    new = publish(config, store, tmp_path / "new")
    promote(store, config.adapter.name, old.version)
    contenders = _contenders(config, store, new)
    records = RECORDS[:11]  # no even share for two workers, and of the passages neither
    three = changed(config, "evaluate.general_passages=3", "evaluate.own_answers=3", "evaluate.suites=['refusal']")
    chat = chat_format.load(base_model.resolve(config.model), config.model)
    texts = [kind.to_read(store, chat, three, contenders) for kind in (general_text, own_answers)]
    questions = to_ask(store, chat, three, contenders).at(lambda count: range(5))
    questions = replace(questions, suites=tuple(replace(each, max_new_tokens=4) for each in questions.suites))
    threads = torch.get_num_threads()
    # Sharded, LoRA goes peft's way: here it does too, as a model of chance has ties that rounding breaks.
    monkeypatch.setattr("ray_jobs.adapters.fused.adopt", lambda model: None)
    expected = measure_shard(contenders, records, texts, questions, shard_index=1)
    torch.set_num_threads(threads)
    found, same = in_group(
        measure_in_rank, contenders, records, texts, questions, directory=tmp_path / "logs", num_workers=2
    )
    assert found == same
    assert found.tokens == expected.tokens
    assert found.scores.keys() == {"base", "champion", "candidate"}
    for role, scores in expected.scores.items():
        for ours, theirs in zip(found.scores[role], scores, strict=True):
            assert ours.text == theirs.text
            assert ours.nll == pytest.approx(theirs.nll, rel=0.01)
            assert (ours.other_prompt_nll is None) == (role == "base")
        for ours, theirs in zip(found.texts, expected.texts, strict=True):
            assert ours.nll[role] == pytest.approx(theirs.nll[role], rel=0.01)
            assert len(ours.nll[role]) == 3
        assert found.suite_answers[role] == expected.suite_answers[role]
        assert len(found.suite_answers[role]["refusal"]) == 5
    assert found.texts[1].answers == expected.texts[1].answers


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
