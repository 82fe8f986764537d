"""`fineloop sweep` on a tiny base and a real Ray head: its job is killed, and it goes on from where it was."""

import contextlib
import os
import shlex
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from components.records import runs
from components.records.sweep import SweepResult, Trial
from components.store.store import Store
from tests.e2e.conftest import Tiny
from tests.journeys.conftest import Done, Person

pytestmark = [pytest.mark.e2e, pytest.mark.full]

RUN = f"cut-{uuid.uuid4().hex[:8]}"
RATES = [1e-3, 3e-3, 3e-2]
SWEEP = ["--set", f"tune.learning_rates={RATES}", "--set", "tune.max_steps=20"]
SWEEP += ["--set", f"ray.cpus_per_worker={os.cpu_count()}", "--run-id", RUN]


@pytest.fixture(scope="module")
def killed(tiny: Tiny, store: Store) -> tuple[Done, dict[str, Trial]]:
    """A sweep whose job was killed when its first trial had ended, and the trials that had ended by then."""
    command = shlex.join(tiny.home.command("sweep", "--methods", "lora", *tiny.settings, *SWEEP))
    printed = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = Person(tiny.home.path.parent).starts(command, **printed)
    output = ""
    for line in process.stderr:
        output += line
        if "20/20  finished in" in line:
            os.killpg(os.getpgid(_driver()), signal.SIGKILL)
            break
    output += process.communicate(timeout=300)[1]
    return Done(process.returncode, "", output), {trial.name: trial for trial in runs.trials(store, RUN)}


def _driver() -> int:
    """The sweep's process on the Ray head."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # no process, or one that has ended meanwhile
            if {b"ray_jobs.sweep", RUN.encode()} <= set((entry / "cmdline").read_bytes().split(b"\0")):
                return int(entry.name)
    raise AssertionError("no sweep is running")


@pytest.fixture(scope="module")
def resumed(tiny: Tiny, killed: object) -> Done:
    """The same command once more."""
    return tiny.home.does("sweep", "--methods", "lora", *tiny.settings, *SWEEP)


def test_a_sweep_whose_job_is_killed_says_so(killed: tuple[Done, dict[str, Trial]]):
    done, ended = killed
    assert done.exit_code == 1
    assert f"fineloop-{RUN}-sweep" in done.screen
    assert "Traceback" not in done.screen
    assert 1 <= len(ended) < len(RATES)


def test_it_goes_on_without_the_trials_that_have_ended(
    killed: tuple[Done, dict[str, Trial]], resumed: Done, store: Store
):
    before, after = killed[1], {trial.name: trial for trial in runs.trials(store, RUN)}
    assert len(after) == len(RATES)
    assert {name: after[name] for name in before} == before  # with the seconds that they took
    rows = [line for line in resumed.screen.splitlines() if line.startswith("[tune]") and "/20  " in line]
    assert len(rows) == len(RATES) - len(before)
    assert f"going on after {len(before)} trials that have ended" in resumed.screen


def test_it_ends_with_the_rate_whose_loss_is_lowest(resumed: Done, store: Store):
    result = runs.read(store, RUN, SweepResult)
    assert [trial.learning_rate for trial in result.trials] == RATES
    assert {trial.status for trial in result.trials} <= {"finished", "stopped"}
    losses = {trial.learning_rate: trial.loss for trial in result.trials}
    assert resumed.answer["best"]["learning_rate"] == min(losses, key=losses.__getitem__)
    assert Path(resumed.answer["picture"]).read_text().startswith("<svg")
