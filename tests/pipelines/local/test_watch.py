"""What a person hears of a pipeline: the lines of its steps, whatever they are called."""

import sys
from pathlib import Path

from components.shared.protocol import Line
from pipelines.local.job import watch
from pipelines.local.server import ROOT

PIPELINE = """
import sys
sys.path.insert(0, sys.argv[1])
from components.shared.errors import DataError
from components.shared.protocol import say, say_failure
say("library", "speaks as steps do, and is none")
say("distil", "started")
say("distil", "1/2")
print("(RayTrainWorker pid=7, ip=10.0.0.7) [distil] 1/2")
print("unfinished", end="")
print()
say_failure("distil", DataError("the first"))
say_failure("report", DataError("of a step that never began"))
sys.stdout.write("the end, without a new line")
sys.exit(3)
"""


def test_every_line_of_a_step_that_has_started_is_heard_once_and_everything_is_in_the_log(tmp_path: Path) -> None:
    heard: list[Line] = []
    log_path = tmp_path / "log"
    ended = watch(
        [sys.executable, "-c", PIPELINE, str(ROOT)],
        environment={},
        directory=tmp_path,
        log_path=log_path,
        on_line=heard.append,
        on_tick=lambda: None,
    )
    assert [(line.step, line.text) for line in heard[:-1]] == [("distil", "started"), ("distil", "1/2")]
    assert heard[-1].failure is not None
    assert (ended.exit_code, ended.failed_step) == (3, "distil")
    assert ended.failure is not None
    assert ended.failure.message == "the first"
    log = log_path.read_text().splitlines()
    assert log[0] == "[library] speaks as steps do, and is none"
    assert log[-1] == "the end, without a new line"
