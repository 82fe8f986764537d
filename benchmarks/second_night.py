"""Does the loop turn on anybody's data: `python -m benchmarks.second_night`.

For each of three sets, taken from packages of PyPI: `fineloop init` and nothing else, then eight nights with the
config as it was written. The first has three quarters of the rows and the second all of them: both should promote. In
the third the answers are shuffled among all rows: it should hold. Five more are the second again: of these equal ones
two should promote. Each night is a run of its own, some three minutes on two cores; what has been run is not run again,
so that the command can be stopped, and called once a night.

Then nights are simulated by what the equal ones measured of each record: candidates that are as good as production, or
truly worse by the margin, under the gate's rules on production. Once by the config as `init` wrote it, and once as it
was before `init` chose margin and start: from the base each night, which differs by twice as much as half the way from
production, by 2 points or 0.02 nats, on four fifths of what 0.3 of the rows, or 200, hold out.
"""

import csv
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.example import parser
from benchmarks.gate_errors import decided
from components.config import config_file
from components.config.gate import GateConfig
from components.config.schema import RegistryConfig
from components.gate.comparisons import parse_evidence
from components.records.steps import Role
from components.shared import paired
from components.shared.metrics import METRICS
from components.shared.paired import Pairs
from components.store.store import Store
from pipelines.local.local_services import local_services

PINNED = """\
vaderSentiment==3.3.2 --hash=sha256:3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311
chatterbot-corpus==1.3.3 --hash=sha256:86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154
gender-guesser==0.4.0 --hash=sha256:7cb01ce5d8d43b94573498bc02c959b622872abd399622ca67d1b73ba6e7e222
"""
NIGHTS, FIRST_NIGHTS, SHUFFLED = 8, 2, 3
"""Of eight nights the first two have more rows each, the third wrong answers, the others what the second had."""
FIRST_SHARE = 0.75

Row = dict[str, Any]


def words(packages: Path) -> Iterator[Row]:
    """Words that people judged to be good or bad (VADER, Hutto and Gilbert, ICWSM 2014): two classes."""
    for line in (packages / "vaderSentiment" / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        if word.isalpha() and len(word) > 3 and abs(float(mean)) >= 1:
            yield {"text": word, "label": "positive" if float(mean) > 0 else "negative"}


def talk(packages: Path) -> Iterator[Row]:
    """Exchanges of chatterbot's English corpus: free text."""
    import yaml

    for file in sorted((packages / "chatterbot_corpus" / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            said = [str(turn) for turn in turns][: len(turns) // 2 * 2]
            if said:
                speakers = [("human", "gpt")[place % 2] for place in range(len(said))]
                yield {
                    "conversations": [{"from": who, "value": text} for who, text in zip(speakers, said, strict=True)]
                }


def names(packages: Path) -> Iterator[Row]:
    """First names of the world, by who bears them (Michael's list, 2007): two classes."""
    genders: dict[str, set[str]] = {}
    lines = (packages / "gender_guesser" / "data" / "nam_dict.txt").read_text(encoding="utf-8").splitlines()
    for gender, name in ((line[:2].strip(), line[3:29].strip()) for line in lines if not line.startswith("#")):
        if name.isalpha() and len(name) > 3:
            genders.setdefault(name, set()).add(gender)
    for name, of_it in genders.items():
        if of_it in ({"M"}, {"F"}):
            yield {"question": name, "answer": "male" if of_it == {"M"} else "female"}


@dataclass(frozen=True)
class DataSet:
    """Rows of a package, in a format that people have them in."""

    name: str
    rows: Callable[[Path], Iterator[Row]]
    count: int
    ending: str

    def written(self, rows: Sequence[Row]) -> str:
        if self.ending == "json":
            return json.dumps(rows, ensure_ascii=False)
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def of_night(self, rows: Sequence[Row], night: int) -> list[Row]:
        if night == 1:
            return list(rows[: round(FIRST_SHARE * len(rows))])
        if night != SHUFFLED:
            return list(rows)
        answers = [_answer(row) for row in rows]
        random.Random(night).shuffle(answers)
        return [_with_answer(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _answer(row: Row) -> Any:
    return row["conversations"][-1] if "conversations" in row else row[[*row][-1]]


def _with_answer(row: Row, answer: Any) -> Row:
    if "conversations" in row:
        return {"conversations": [*row["conversations"][:-1], answer]}
    return {**row, [*row][-1]: answer}


SETS = {
    each.name: each
    for each in (
        DataSet("words", words, 800, "csv"),
        DataSet("talk", talk, 2000, "json"),
        DataSet("names", names, 10_000, "json"),
    )
}


def packages_in(folder: Path) -> Path:
    """Fetch the packages that hold the rows, each as its hash pins it, into the folder, unless they are there."""
    target, requirements = folder / "packages", folder / "requirements.txt"
    if not requirements.exists() or requirements.read_text() != PINNED:
        pinned = folder / "pinned.txt"
        pinned.write_text(PINNED)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--upgrade"]
        subprocess.run([*pip, "--target", str(target), "-r", str(pinned)], check=True)
        pinned.rename(requirements)
    return target


def fineloop(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """What a command prints with --json.

    Raises:
        RuntimeError: it did not end well.
    """
    program = [sys.executable, "-m", "pipelines.cli"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*program, *words, "--json"], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    body: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return body


def run_nights(data: DataSet, folder: Path, packages: Path, nights: int) -> list[dict[str, Any]]:
    """The outcome of each night so far, in order; those that are missing are run now."""
    here = folder / data.name
    here.mkdir(parents=True, exist_ok=True)
    rows = list(data.rows(packages))
    random.Random(0).shuffle(rows)
    rows, source = rows[: data.count], f"{data.name}.{data.ending}"
    kept, outcomes = here / "nights.json", []
    if kept.exists():
        outcomes = json.loads(kept.read_text())
    for night in range(len(outcomes) + 1, nights + 1):
        (here / source).write_text(data.written(data.of_night(rows, night)), encoding="utf-8")
        if not (here / f"{data.name}.toml").exists():
            (here / "init.json").write_text(json.dumps(fineloop(["init", source, "--no-plan"], here), indent=1))
        ended = fineloop(["run", "-c", f"{data.name}.toml"], here)
        outcomes.append({"night": night, **_measured(ended, here)})
        kept.write_text(json.dumps(outcomes, indent=1))
        print(_line(data.name, outcomes[-1]), flush=True)
    return outcomes[:nights]


def _measured(ended: Mapping[str, Any], here: Path) -> dict[str, Any]:
    """What is kept of a night; the records that it was decided by lie beside it."""
    services = local_services(here / ".fineloop", bucket="fineloop", ray=False)
    with services as environment, mock.patch.dict(os.environ, environment):
        body = Store.open(RegistryConfig()).get(f"runs/{ended['run_id']}/evaluation_records.parquet")
    (here / f"{ended['run_id']}.parquet").write_bytes(body)
    evidence, metric = parse_evidence(body, ended["run_id"]), config_file.load(here / f"{here.name}.toml").gate.metric
    pairs = evidence.pairs(METRICS[metric], "champion")
    kept = {"run_id": ended["run_id"], "verdict": ended["verdict"], "promoted": ended["promoted"]}
    kept |= {"metric": metric, "records": len(evidence.tokens), "seconds": round(ended["timings_s"]["total"])}
    if pairs is not None:
        kept |= _differences(pairs)
    return kept


def _differences(pairs: Pairs) -> dict[str, float]:
    """Gain over production, and what differs from record to record: the share of answers, or nats per token."""
    sign = -1.0 if pairs.lower_is_better else 1.0
    differences, weights = sign * (pairs.ours - pairs.theirs), pairs.weights
    gain = differences.sum() / weights.sum()
    if pairs.are_binary:
        return {"gain": round(float(gain), 4), "spread": round(float((differences != 0).mean()), 4)}
    error = np.sqrt(((differences - gain * weights) ** 2).sum()) / weights.sum()
    return {"gain": round(float(gain), 4), "spread": round(float(error * np.sqrt(pairs.num_effective)), 4)}


def _line(name: str, night: Mapping[str, Any]) -> str:
    compared = f"{night['gain']:+.4f} | {night['spread']:.3f}" if "gain" in night else " | "
    cells = (name, night["night"], night["verdict"], night["metric"], night["records"], compared, night["seconds"])
    return f"| {' | '.join(map(str, cells))} |"


RESAMPLES = 400
"""Of each bound of a loss; the gate takes ten times as many."""


def simulated(data: DataSet, folder: Path, nights: Sequence[Mapping[str, Any]], repetitions: int) -> dict[str, Any]:
    """Of a hundred nights, how many are promoted whose candidate is equal, and how many that is worse by the margin."""
    config = config_file.load(folder / data.name / f"{data.name}.toml")
    equal = [night for night in nights if night["night"] > SHUFFLED and "spread" in night]
    read = [
        parse_evidence((folder / data.name / f"{night['run_id']}.parquet").read_bytes(), "").pairs(
            METRICS[config.gate.metric], "champion"
        )
        for night in equal
    ]
    measured = [pairs for pairs in read if pairs is not None]
    before = min(0.3, max(0.1, 200 / data.count)) * data.count * 0.8
    paired.RESAMPLES, paired.PER_TAIL = RESAMPLES, RESAMPLES // 100
    worlds = {
        "before": (GateConfig(metric=config.gate.metric), round(before), 1 / (1 - config.train.start_share)),
        "after": (config.gate, nights[1]["records"], 1.0),
    }
    shares: dict[str, Any] = {}
    for name, (policy, records, apart) in worlds.items():
        random_ = np.random.default_rng(records)
        for what, worse_by in (("equal", 0.0), ("worse by the margin", policy.worse_than_champion_by)):
            drawn = (_drawn(measured, policy, records, apart, worse_by, random_) for _ in range(repetitions))
            passed = [decided(policy, *each)[1] for each in drawn]
            shares.setdefault(name, {"records": records})[what] = round(100 * float(np.mean(passed)), 1)
    return shares


def _drawn(
    measured: Sequence[Pairs],
    policy: GateConfig,
    records: int,
    apart: float,
    worse_by: float,
    drawing: np.random.Generator,
) -> tuple[np.ndarray, dict[Role, np.ndarray]]:
    """Weights, and the values of production and of a candidate that is worse on the whole: its differences are those of
    a night, of either sign, as many times as large, or of right and wrong answers as many times as frequent."""
    pairs = measured[drawing.integers(len(measured))]
    rows = drawing.integers(0, len(pairs.weights), records)
    champion, weights = pairs.theirs[rows], pairs.weights[rows]
    if not METRICS[policy.metric].lower_is_better:
        changed = max(worse_by, apart * float((pairs.ours != pairs.theirs).mean()))
        gains = drawing.choice([1, -1, 0], records, p=[(changed - worse_by) / 2, (changed + worse_by) / 2, 1 - changed])
        champion = np.where(gains == 0, champion, gains < 0).astype(float)
        return weights, {"champion": champion, "candidate": champion + gains}
    differences = pairs.ours - pairs.theirs
    differences -= pairs.weights * differences.sum() / pairs.weights.sum()
    lost = apart * drawing.choice([-1, 1]) * differences[rows] + worse_by * weights
    return weights, {"champion": champion, "candidate": champion + lost}


def main() -> None:
    arguments = parser("second_night", __doc__)
    arguments.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    arguments.add_argument("--nights", type=int, default=NIGHTS, help="run up to this one")
    arguments.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "fineloop" / "second_night")
    arguments.add_argument("--repetitions", type=int, default=1000, help="nights that are simulated")
    options = arguments.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    packages = packages_in(options.folder)
    print("| set | night | verdict | metric | records | gain over production | spread | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    result: dict[str, Any] = {}
    for name in options.sets:
        nights = run_nights(SETS[name], options.folder, packages, options.nights)
        result[name] = {"nights": nights, "kept": kept(nights)}
        if len(nights) > SHUFFLED:
            result[name]["simulated"] = simulated(SETS[name], options.folder, nights, options.repetitions)
    print("\n| set | config | records | equal: promoted of 100 | worse by the margin: promoted of 100 |")
    print("|---|---|---|---|---|")
    for name, of_set in result.items():
        for when, of in of_set.get("simulated", {}).items():
            print(f"| {name} | {when} | {of['records']} | {of['equal']} | {of['worse by the margin']} |")
    print(json.dumps(result))


def kept(nights: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What the nights should show, of those that have been run."""
    promoted = [night["promoted"] for night in nights]
    claims = {
        "the first and the second promote": (FIRST_NIGHTS, all(promoted[:FIRST_NIGHTS])),
        "shuffled answers are held": (SHUFFLED, not any(promoted[FIRST_NIGHTS:SHUFFLED])),
        "of five equal ones two promote": (NIGHTS, sum(promoted[SHUFFLED:]) >= 2),
    }
    return {claim: shown for claim, (last, shown) in claims.items() if len(nights) >= last}


if __name__ == "__main__":
    main()
