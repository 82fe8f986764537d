"""What a fault costs a training: `python -m benchmarks.faults FOLDER [--fault NAME] [--times N] [--minutes N]`.

Two workers train a tiny base on a cluster of a head and three nodes on this machine. Again and again, after a random
number of steps, one of them is struck, or what it stands on. What is published in the end is compared with what a
training that nobody struck has published, and so is the loss of each step that was taken after a strike. Each training
leaves a file in FOLDER, so that a call goes on where the one before it ended; each prints the table.

drain      `ray drain-node` of a worker's node, as an autoscaler drains a spot node that goes in a minute
sigterm    SIGTERM of a worker
worker     kill -9 of a worker
node       kill -9 of the raylet of a worker's node
head       kill -9 of the head's processes and of the driver; the workers' nodes are left to themselves, and a second
           attempt begins at once on a new cluster
mistake    one worker alone raises a ConfigError: seconds are those until the driver ends, which has to be with its
           words and exit code 2; by itself, with --fault mistake
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import struck
from benchmarks.struck import Note
from components.config import config_file
from components.config.schema import RegistryConfig
from components.records import runs
from components.store.store import Store
from pipelines.commands.arguments import table
from pipelines.local import seaweedfs, server
from tests.models.tiny import build_base
from tests.ray_jobs import own_cluster
from tests.ray_jobs.conftest import CONFIG

NUM_NODES = 3
NUM_STEPS = 400
BETWEEN = range(5, 35)
"""Steps from one strike to the next."""
LAST = NUM_STEPS - 100
"""After this step nothing is struck: a drain is seen some seconds later."""
SETTINGS = (
    f"train.max_steps={NUM_STEPS}",
    "train.checkpoint_every_steps=10",
    "ray.max_failures=100",
    "ray.cpu_matmul_dtype=float32",  # what is fastest here may be another one in the next call
)
UNBROKEN = "unbroken"


@dataclass(frozen=True)
class Strike:
    """What one did."""

    fault: str
    step: int
    """After which it came."""
    equal: bool
    """Whether the published weights are those of the unbroken training, and the losses of all steps taken since."""
    steps_lost: int
    """Taken before and again."""
    seconds: float
    """From the last step before it to the next one."""
    unaware: int = 0
    """Steps that the workers of a lost head have taken since."""
    said: str = ""


@dataclass
class Bench:
    """A store, a cluster that is kept up, and what they have been used for."""

    folder: Path
    store: Store
    lost: list[str] = field(default_factory=list)
    """Nodes."""
    nodes: ProcessPoolExecutor | None = None
    """The process that starts them."""
    driver: ProcessPoolExecutor | None = None
    cluster: struck.Cluster | None = None
    starters: list[int] = field(default_factory=list)
    """Process groups of clusters whose head is gone; their nodes may still run."""
    dataset_uri: str | None = None

    @property
    def config_toml(self) -> str:
        config = config_file.loads(CONFIG.format(base=self.folder / "base"))
        return own_cluster.toml_of(config, self.store, self.folder, *SETTINGS)

    def notes(self, run_id: str) -> list[Note]:
        return struck.read(self.folder, run_id)

    def up(self) -> struck.Cluster:
        """The cluster, with all its nodes."""
        if self.nodes is None:
            self.nodes = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=own_cluster.start, initargs=(NUM_NODES, True)
            )
        self.cluster = self.nodes.submit(struck.fill, NUM_NODES, self.lost).result()
        return self.cluster

    def down(self) -> None:
        """End all that is left, whatever it is at."""
        self.kill_head()
        for process in self.starters:
            end_all_of(process)

    def kill_head(self) -> None:
        """With the driver, which lies on it."""
        starters = [*self.nodes._processes] if self.nodes else []
        drivers = [*self.driver._processes] if self.driver else []
        for pid in [*drivers, *starters, *(self.cluster.head if self.cluster else [])]:
            with contextlib.suppress(ProcessLookupError):  # one that had ended before
                os.kill(pid, signal.SIGKILL)
        self.starters += starters
        self.nodes = self.driver = self.cluster = None

    def train(self, run_id: str) -> Future[dict[str, Any]]:
        address = self.up().address
        if self.driver is None:
            self.driver = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=struck.connect, initargs=(address,)
            )
        return self.driver.submit(struck.finetuned, self.config_toml, run_id, self.dataset_uri)

    def published(self, run_id: str) -> bytes:
        """The weights."""
        uri = self.store.get_json(runs.run_key(run_id, "finetune.json"))["version_uri"]
        return self.store.get(self.store.key(f"{uri}/adapter_model.safetensors"))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fault", action="append", choices=[*STRIKES, "mistake"], help="this one; again for another")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="one training, and no strike later than so long after its start")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    (options.folder / "s3").mkdir(parents=True, exist_ok=True)
    faults = options.fault or list(STRIKES)
    with bench(options.folder.absolute()) as found:
        while wanted := missing(options.folder, faults, options.times):
            run_id = f"struck-{time.time_ns()}"
            strikes = (
                [mistake(found, run_id)] if "mistake" in wanted else trained(found, run_id, wanted, options.minutes)
            )
            (options.folder / f"{run_id}.json").write_text(json.dumps([asdict(strike) for strike in strikes]))
            print(*strikes, sep="\n", flush=True)
            if options.minutes:
                break
    show(options.folder)


@contextlib.contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """With the unbroken training in its store."""
    os.environ[struck.FOLDER] = str(folder)
    running = server.start(seaweedfs.SeaweedFS(folder / "s3", "faults"))
    try:
        os.environ |= seaweedfs.Endpoint.read(running.endpoint).environment()
        found = Bench(folder, Store.open(RegistryConfig(bucket="faults")))
        if not (folder / "base" / "config.json").exists():
            build_base(folder / "base")
        try:
            if not found.store.exists(runs.run_key(UNBROKEN, "finetune.json")):
                found.train(UNBROKEN).result()
            found.dataset_uri = found.store.get_json(runs.run_key(UNBROKEN, "finetune.json"))["dataset_uri"]
            yield found
        finally:
            found.down()
    finally:
        running.stop()


def missing(folder: Path, faults: list[str], times: int) -> list[str]:
    """The faults that are still to strike, each as often as it is missing."""
    done = [strike.fault for strike in recorded(folder)]
    return [fault for fault in faults for _ in range(times - done.count(fault))]


def recorded(folder: Path) -> list[Strike]:
    return [Strike(**each) for file in sorted(folder.glob("struck-*.json")) for each in json.loads(file.read_text())]


def trained(found: Bench, run_id: str, wanted: list[str], minutes: float | None) -> list[Strike]:
    """One training, struck as often as it lasts long enough for."""
    chance = random.Random(run_id)
    chance.shuffle(wanted)
    training, struck_at, step = found.train(run_id), [], chance.choice(BETWEEN)
    wait_for(found, run_id, training)
    ends = time.monotonic() + 60 * (minutes or 1e9)
    for fault in wanted:
        at = wait_for(found, run_id, training, step=step)
        if at is None or step > LAST or time.monotonic() > ends:
            break
        before = {note.pid for note in found.notes(run_id)}
        if fault == "head":
            training = head(found, run_id, training)
        else:
            rank = chance.randrange(2)
            STRIKES[fault](found, next(note for note in reversed(found.notes(run_id)) if note.rank == rank))
        struck_at.append((fault, at, before))
        at = wait_for(found, run_id, training, but=before)
        if at is None:
            break
        found.up()
        step = at.step + chance.choice(BETWEEN)
    training.result()
    return outcomes(found, run_id, struck_at)


def wait_for(
    found: Bench, run_id: str, training: Future[dict[str, Any]], *, step: int = 0, but: Set[int] = frozenset()
) -> Note | None:
    """The newest note, once one is there of that step or a later one, by no worker of `but`; None where none comes."""
    while not (notes := found.notes(run_id)) or notes[-1].step < step or notes[-1].pid in but:
        if training.done():
            return None
        time.sleep(0.02)
    return notes[-1]


def drain(found: Bench, victim: Note) -> None:
    assert found.cluster is not None
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [
            *(ray, "drain-node", "--address", found.cluster.address, "--node-id", victim.node_id),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "60"),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found.lost.append(victim.node_id)


def kill_node(found: Bench, victim: Note) -> None:
    os.kill(victim.raylet, signal.SIGKILL)
    found.lost.append(victim.node_id)


def head(found: Bench, run_id: str, training: Future[dict[str, Any]]) -> Future[dict[str, Any]]:
    """Kill it, and begin the second attempt."""
    found.kill_head()
    with contextlib.suppress(BrokenProcessPool):
        training.result()
    return found.train(run_id)


def mistake(found: Bench, run_id: str) -> Strike:
    """By a driver whose exit code can be seen."""
    address = found.up().address
    assert found.dataset_uri is not None
    config = found.folder / "mistake.toml"
    config.write_text(found.config_toml)
    with tempfile.TemporaryFile("w+") as log:
        driver = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.struck", "--config", config),
                *("--run-id", run_id, "--dataset", found.dataset_uri),
            ],
            env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        step = random.Random(run_id).choice(BETWEEN)
        while driver.poll() is None and (not (notes := found.notes(run_id)) or notes[-1].step < step):
            time.sleep(0.02)
        struck.refusal(found.folder, run_id).touch()
        began, exit_code = time.monotonic(), driver.wait()
        seconds = time.monotonic() - began
        log.seek(0)
        said = [line for line in log.read().splitlines() if "failed {" in line]
    is_right = exit_code == 2 and len(said) == 1 and struck.REFUSAL in said[0]
    return Strike("mistake", step, is_right, 0, round(seconds, 1), said=f"exit {exit_code}: {' '.join(said)}")


STRIKES: dict[str, Callable[[Bench, Note], None]] = {
    "drain": drain,
    "sigterm": lambda _, victim: os.kill(victim.pid, signal.SIGTERM),
    "worker": lambda _, victim: os.kill(victim.pid, signal.SIGKILL),
    "node": kill_node,
    "head": lambda _, victim: None,  # `head`
}


def end_all_of(driver: int) -> None:
    """Whatever is left of the clusters that this process began: Ray names their folders after it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if re.search(rf"/session_[\d_-]+_{driver}/", (process / "cmdline").read_text()):
                os.kill(int(process.name), signal.SIGKILL)


def outcomes(found: Bench, run_id: str, struck_at: list[tuple[str, Note, set[int]]]) -> list[Strike]:
    """What became of a training that was struck, each time after that note, with these workers so far."""
    notes, losses = found.notes(run_id), {note.step: note.loss for note in found.notes(UNBROKEN)}
    is_same = found.published(run_id) == found.published(UNBROKEN)
    strikes = []
    for (fault, at, before), following in itertools.zip_longest(struck_at, struck_at[1:]):
        until = following[2] if following else {note.pid for note in notes}
        after = [note for note in notes if note.pid in until - before]
        unaware = [note for note in notes if note.pid in before and note.at > at.at] if fault == "head" else []
        last = max((note for note in notes if note.pid in before and note not in unaware), key=lambda note: note.step)
        strikes.append(
            Strike(
                fault,
                at.step,
                is_same and all(note.loss == losses[note.step] for note in after),
                # A drain that came too late to be seen ended nothing; and the workers of a lost head may have written a
                # checkpoint since.
                max(0, last.step + 1 - after[0].step) if after else 0,
                round(after[0].at - last.at, 1) if after else 0.0,
                max((note.step for note in unaware), default=last.step) - last.step,
            )
        )
    return strikes


def show(folder: Path) -> None:
    """The table of all that FOLDER has."""
    rows = [("fault", "times", "equal", "steps lost: median", "most", "seconds: median", "most")]
    for fault in [*STRIKES, "mistake"]:
        found = [strike for strike in recorded(folder) if strike.fault == fault]
        if found:
            lost, seconds = [each.steps_lost for each in found], [each.seconds for each in found]
            rows.append((
                fault, str(len(found)), str(sum(each.equal for each in found)), f"{median(lost):g}", str(max(lost)),
                f"{median(seconds):.0f}", f"{max(seconds):.0f}",
            ))  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    main()
