"""Answers by vLLM, here a double of it over transformers and peft; `make served` has the real one."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest

from components.config.schema import RunConfig
from components.report.run_files import RunFiles
from components.report.sections import run_facts
from components.shared.errors import ConfigError, JobError
from ray_jobs.evaluate import compared, plan
from ray_jobs.scoring import vllm_engine
from ray_jobs.scoring.measure import measure_shard, of_version
from tests.doubles import vllm_llm
from tests.models.spec import changed
from tests.models.tiny_version import RECORDS, contenders, publish
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("cache")
Changed = Callable[..., RunConfig]


@pytest.fixture
def of(placed: Changed) -> Changed:
    return lambda *more: placed("evaluate.max_new_tokens=4", "evaluate.batch_size=16", *more)


def test_the_answers_are_vllms_and_the_evaluation_says_how_many_differ(of, store, tmp_path, monkeypatch):
    """By two engines, as one cannot serve both ranks; of each call the first answer ends before its time."""
    vllm_llm.python_with_it(tmp_path, monkeypatch)
    monkeypatch.setenv(vllm_llm.ERRS, "1")
    low, high = (of("evaluate.engine=vllm", f"method.rank={rank}") for rank in (4, 24))
    champion, candidate = publish(low, store, tmp_path / "low"), publish(high, store, tmp_path / "high", std=0.2)
    base, _, after = contenders(high, champion, candidate)
    models, records = [base, of_version("champion", high, store, champion), after], RECORDS[:18]
    result = measure_shard(models, records, shard_index=1)
    without = [replace(model, config=changed(model.config, "evaluate.engine=transformers")) for model in models]
    alone = measure_shard(without, records, shard_index=1).scores
    for role, scores in result.scores.items():
        differ = [score.text != own.text for score, own in zip(scores, alone[role], strict=True)]
        assert differ[0]
        assert sum(differ) < 10  # bfloat16 on random weights has ties; without its adapter all of a model's differ
        assert [score.differs for score in scores] == [*differ[:16], None, None]
        for score, own in zip(scores, alone[role], strict=True):
            assert score.nll == pytest.approx(own.nll, rel=0.01)
            assert score.text != own.text or score.marks == own.marks
    evaluation = compared(high, models, records, list(result.tokens.values()), result.scores, run_id="r")
    differing = sum(score.differs is True for scores in result.scores.values() for score in scores)
    how = {"max_new_tokens": 4, "decoding": "greedy", "engine": "vllm", "compared": 48, "differing": differing}
    assert evaluation.generation == how
    facts = dict(run_facts(RunFiles("r", "tiny", evaluation=evaluation)))
    assert facts["Answers"] == f"by vLLM; the engine of training differs in {differing} of 48"


def test_what_vllm_says_when_it_fails_is_passed_on(monkeypatch):
    monkeypatch.setenv(vllm_engine.PYTHON, "")
    with pytest.raises(JobError, match=r"engine vllm: (?s:.*)ended with 127: (?s:.*)No such file"):
        vllm_engine.answers([("{}", ["job"])])


@pytest.mark.parametrize(
    ("settings", "loads"),
    [
        (["method.name=lora"], True),
        (["method.name=rslora", "method.rank=512"], True),
        (["method.name=lora", "method.rank=513"], False),
        (["method.name=loftq"], False),
        (["method.name=qlora"], False),
        (["method.name=qlora", "ray.use_gpu=true"], True),
        (["method.base=int8"], False),
        (["method.name=dora"], False),
        (["method.name=vera"], False),
        (["train.zero_stage=3"], False),
    ],
)
def test_a_config_whose_adapter_vllm_does_not_load_is_refused(of, settings, loads):
    config = of(*settings)  # nobody asks for vLLM
    if loads:
        assert of(*settings, "evaluate.engine=vllm").method == config.method
    else:
        with pytest.raises(ConfigError, match=r"LoRA up to rank 512 .* Set evaluate\.engine=transformers"):
            of(*settings, "evaluate.engine=vllm")


def test_so_is_a_champion_that_it_does_not_load(of, store, tmp_path):
    dora = of("method.name=dora")
    version = publish(dora, store, tmp_path)
    assert of_version("champion", dora, store, version).config.method == dora.method
    with pytest.raises(ConfigError, match=rf"champion {version.version}: evaluate\.engine vllm .* not for dora"):
        of_version("champion", of("evaluate.engine=vllm"), store, version)


@pytest.mark.parametrize(("python", "why"), [("", "No such file"), (sys.executable, "No module named 'vllm'")])
def test_an_image_without_vllm_is_refused_before_the_training(of, store, monkeypatch, python, why):
    monkeypatch.setenv(vllm_engine.PYTHON, python)
    with pytest.raises(ConfigError, match=rf"FINELOOP_VLLM_PYTHON names, (?s:.*){why}"):
        plan(of("evaluate.engine=vllm"), store, run_id="run", dataset_uri="s3://none")


def test_its_process_ends_with_the_worker_that_is_killed(tmp_path, monkeypatch):
    vllm_llm.python_with_it(tmp_path, monkeypatch, real=True)
    monkeypatch.setenv(vllm_llm.HANGS, str(tmp_path / "pid"))
    code = "from ray_jobs.scoring import in_vllm, vllm_engine; vllm_engine.run(in_vllm.__file__, '{}', work=['job'])"
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        worker.kill()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, pid)
