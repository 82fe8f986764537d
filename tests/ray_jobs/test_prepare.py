"""That Ray Data gives what one process gives: the same records, rejects, reasons and counts, in the same order."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.config.train import DataConfig
from components.prepare import feedback, prepare, workspace
from components.prepare.sources import Source, find_sources
from components.prepare.split import deduplicate, split
from components.prepare.validate import Reader, Rules, Validated, read_here
from components.registry.between_runs import Erased, user_hash
from components.shared.errors import DataError
from ray_jobs import prepare as job
from tests.components.prepare import logged
from tests.doubles.dying import DiesAtItsRecord
from tests.ray_jobs import own_ray

NUM_FILES, ROWS = 5, 1500


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several sizes and formats, with bad rows, repeated ones and personal data."""
    rng = random.Random(0)
    for number in range(NUM_FILES):
        rows = [row(rng) for _ in range(ROWS * (number + 1) ** 2 // 10)]
        if number == 3:
            (tmp_path / "3.json").write_text(json.dumps(rows))
        else:
            (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "empty.jsonl").touch()
    return tmp_path


def row(rng: random.Random) -> Any:
    words = " ".join(rng.choices(["red", "green", "blue", "café", "grün"], k=rng.randint(1, 40)))
    made: dict[str, Any] = {"prompt": words, "completion": rng.choice(["yes", "no", "", " ", "ann@example.org"])}
    if rng.random() < 0.7:
        made["id"] = str(rng.randrange(3 * ROWS))
    if rng.random() < 0.2:
        made = {"instruction": words, "output": "x"}
    return made if rng.random() < 0.97 else rng.choice([None, [], {"prompt": 3}, {"other": words}])


def made(folder: Path, reader: Reader, erased: Erased) -> dict[str, Any]:
    """All that a preparation makes of the files."""
    with workspace.opened(memory_bytes=2**29) as work:
        rules = Rules(DataConfig(source=[], personal="drop"), erased=erased)
        sources = find_sources([str(folder), str(folder / "3.json")])
        read = prepare.read_sources(sources, work.accept, work.reject, rules=rules, reader=reader)
        work.finish()
        unique = deduplicate(work)
        found = split(work, DataConfig(source=[], eval_share=0.2, near_duplicates=0.9, max_reject_share=1.0))
        return {
            "dataset_id": found.parts.dataset_id,
            "unique": unique,
            "rejects": pq.read_table(work.rejects).to_pylist(),
            "counts": vars(read),
        }


def on_ray(folder: Path, erased: Erased) -> dict[str, Any]:
    """The same in a process with a Ray; small blocks, so that each file is the work of several tasks."""
    job.BLOCK_BYTES = 50_000
    return made(folder, job.read_on_ray, erased)


def without_ray(sources: Sequence[Source], rules: Rules) -> Iterator[tuple[int, Validated]]:
    """The two tasks in this process, one after the other."""
    for place, source in enumerate(sources):
        for block in job._read(job._block((place, source)), rules):
            for found in job._validate(block, rules):
                yield from found["item"].to_pylist()


def test_what_the_tasks_make_of_the_rows_is_what_one_process_makes(folder: Path) -> None:
    erased = Erased(frozenset({"nobody"}))
    expected = made(folder, read_here, erased)
    assert made(folder, without_ray, erased) == expected
    assert len(expected["rejects"]) > 100
    assert expected["counts"]["sources"][-1][1].rows
    assert {each["source"] for each in expected["rejects"]} > {str(folder / "0.jsonl")}


def test_logged_requests_and_feedback_become_the_same_by_tasks(tmp_path: Path) -> None:
    made_of = logged.generated(2000, seed=2)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made_of.rows))
    votes = [feedback.vote_of(each, key="", least=None) for each in made_of.feedback]
    rules = Rules(
        feedback={vote.key: feedback.resolved([vote]) for vote in votes}, erased=Erased({user_hash("user 1")})
    )
    sources = find_sources(str(tmp_path / "log.jsonl"))
    here, there = (
        [(each.batch.to_pylist(), each.counts.logged, each.counts.erased) for _, each in read(sources, rules)]
        for read in (read_here, without_ray)
    )
    assert [row for rows, *_ in here for row in rows] == [row for rows, *_ in there for row in rows]
    assert sum((uses for _, uses, _ in here), Counter()) == sum((uses for _, uses, _ in there), Counter())
    assert sum(erased for *_, erased in here) == sum(erased for *_, erased in there) > 0


def test_an_error_of_a_task_comes_where_its_file_would(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "b.json").write_text("[1")
    (source, broken) = find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")])
    given = job._block((0, source), (1, broken))
    first, failed = [found for block in job._read(given, Rules()) for found in block["item"].to_pylist()]
    assert first[:2] == (0, source)
    assert isinstance(failed, DataError)
    (again,) = [found for block in job._validate(job._block(failed), Rules()) for found in block["item"].to_pylist()]
    assert (type(again), str(again)) == (DataError, str(failed))


@pytest.mark.full
@pytest.mark.parametrize(("num_cpus", "dies"), [(1, False), (2, False), (4, False), (2, True)])
def test_so_many_workers_and_one_that_is_killed_make_the_same_dataset(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, num_cpus: int, dies: bool
) -> None:
    marker = tmp_path_factory.mktemp("ray") / "died"
    erased = DiesAtItsRecord({"x"}, ending="7", marker=str(marker), driver=os.getpid()) if dies else Erased({"x"})
    with own_ray.driver(num_cpus) as pool:
        found = pool.submit(on_ray, folder, erased).result()
    assert marker.exists() == dies
    assert found == made(folder, read_here, Erased({"x"}))


@pytest.mark.full
def test_the_first_error_in_order_ends_a_preparation_on_ray(folder: Path) -> None:
    (folder / "1.jsonl.gz").write_bytes(b"not gzip")
    with own_ray.driver(2) as pool, pytest.raises(DataError, match="gz"):
        pool.submit(on_ray_of, str(folder / "1.jsonl.gz")).result()


def on_ray_of(path: str) -> int:
    return sum(each.counts.rows for _, each in job.read_on_ray(find_sources(path), Rules()))
