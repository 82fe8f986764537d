"""A pipeline of the real one's shape whose steps take no time: what it does is what its parameters say."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, dsl

from components.config import config_file
from components.config.schema import RunConfig
from components.step.step import COMPONENT


@dsl.component(**COMPONENT)
def prepare(config: dict[str, Any], job_id: str, folder: str, seconds: float, fails: bool) -> str:
    """Leave a trace, take a while, fail on request."""
    import os
    import time
    from pathlib import Path

    if folder:
        (Path(folder) / f"{job_id}.pid").write_text(str(os.getpid()))
    time.sleep(seconds)
    if fails:
        raise ValueError("told to fail")
    return str(config)


@dsl.component(**COMPONENT)
def finetune(dataset: str, adapter: dsl.Output[dsl.Model]) -> str:
    """An adapter."""
    from pathlib import Path

    Path(adapter.path).write_text(dataset)
    return dataset


@dsl.component(**COMPONENT)
def gate(version: str, rows: int) -> bool:
    """The verdict."""
    return rows > 0


@dsl.component(**COMPONENT)
def promote() -> str:
    """The one branch."""
    return "promoted"


@dsl.component(**COMPONENT)
def hold() -> str:
    """The other branch."""
    return "held"


@dsl.pipeline(name="fineloop-retrain", description="Retrain nothing.")
def small(
    config: dict[str, Any],
    folder: str = "",
    seconds: float = 0.0,
    fails: bool = False,
    rows: int = 3,
    mode: str = "full",
) -> None:
    """The flow of the real pipeline."""
    data = prepare(config=config, job_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER, folder=folder, seconds=seconds, fails=fails)
    candidate = finetune(dataset=data.output)
    decision = gate(version=candidate.outputs["Output"], rows=rows)
    with dsl.If(decision.output == True, name="passed"):  # noqa: E712 - kfp overloads ==
        promote()
    with dsl.Else(name="refused"):
        hold()


def compile_small(config: RunConfig, *, image: str = "", default: RunConfig | None = None) -> str:
    """In place of `compile_pipeline`; `mode` has literals, which kfp's compiler cannot say."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.yaml"
        compiler.Compiler().compile(small, str(path))
        spec: dict[str, Any] = yaml.safe_load(path.read_text())
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    parameters["config"]["defaultValue"] = config_file.as_table(default or config)
    parameters["mode"]["literals"] = ["full", "quick"]
    if image:
        for executor in spec["deploymentSpec"]["executors"].values():
            executor["container"]["image"] = image
    return yaml.safe_dump(spec)
