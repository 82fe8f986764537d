"""Somebody trains on a base whose chat template never ends: at once, or only for one of their records.

The step that trains is started as `ray job submit` would start it. The judge is the kernel: how long the whole command
lived by the wall's clock, and which processes /proc still has afterwards.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.journeys.conftest import Person
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LONGEST_S = 300
"""Ten for the template, the rest for importing PyTorch on a busy machine; the power would take years."""
MARK = "FINELOOP_TEST_JOURNEY"
NESTED = "{% set n = namespace(a=[1], b=[1]) %}" + "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}" * 60
SOUND = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
HOSTILE = {
    "a power": "{{ 7 ** 9999999 ** 3 }}",
    "lists for one record": SOUND + "{% if '6 snow' in messages[0].content %}" + NESTED + "{{ n.a == n.b }}{% endif %}",
}


def processes(mark: str) -> list[int]:
    """Everything that runs in the environment of those who have this mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def commands(mark: str) -> list[str]:
    return [Path(f"/proc/{each}/cmdline").read_text().replace("\0", " ") for each in processes(mark)]


def config_on(person: Person, name: str, template: str) -> str:
    """A config whose base has this template, as a key of its tokenizer_config.json."""
    person.has_colours()
    base = person.folder / name.replace(" ", "-")
    shutil.copytree(person.folder / "base", base, dirs_exist_ok=True)
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    text = (person.folder / "colours.toml").read_text()
    return person.has(f"{base.name}.toml", text.replace(f'{person.folder / "base"}"', f'{base}"')).name


@pytest.fixture(scope="module")
def trainer(person: Person) -> Person:
    """Somebody whose store is up."""
    lines = person.does("fineloop store up && fineloop store env").stdout.splitlines()
    exported = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
    return person.with_variables(**{name: value.strip("'\"") for name, value in exported.items()})


def test_a_hostile_template_ends_with_one_sentence_and_leaves_no_process(trainer: Person) -> None:
    configs = {name: config_on(trainer, name, template) for name, template in HOSTILE.items()}

    def trains(name: str) -> tuple[float, int, str]:
        began = time.monotonic()
        somebody = trainer.with_variables(**{MARK: configs[name]})
        done = somebody.types(f"python -m ray_jobs.finetune --config {configs[name]}", timeout_s=2 * LONGEST_S)
        return time.monotonic() - began, done.exit_code, done.stdout + done.screen

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(configs, pool.map(trains, configs), strict=True))
    for name, (seconds, exit_code, screen) in found.items():
        assert exit_code == 2, screen
        assert "the chat template of model.base does not come to an end in 10 s and 128 MiB" in screen, screen
        assert seconds < LONGEST_S, (name, seconds)
        wait_until(lambda mark=configs[name]: not processes(mark), lambda mark=configs[name]: commands(mark))


@pytest.mark.full
def test_who_is_killed_while_a_template_goes_on_leaves_no_process_for_long(trainer: Person) -> None:
    config = config_on(trainer, "killed", HOSTILE["a power"])
    command = ["python", "-m", "ray_jobs.finetune", "--config", config]
    environment = {**trainer.environment, MARK: config}
    with subprocess.Popen(command, cwd=trainer.folder, env=environment, stderr=subprocess.DEVNULL) as training:

        def renders() -> bool:
            children = set(processes(config)) - {training.pid}
            return any(_seconds_of_processor(child) > 2 for child in children)

        wait_until(renders)
        os.kill(training.pid, signal.SIGKILL)
    wait_until(lambda: not processes(config), lambda: commands(config))


def _seconds_of_processor(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
