"""An auditor who trusts nobody that may write to the bucket: what lies behind a promotion is exchanged there, object by
object, with plain boto3. The judge of each is the bucket itself: what was put there, and nothing else, is named.
"""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.journeys.bucket import Bucket
from tests.journeys.conftest import Person

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
AUDIT = "fineloop adapters audit colours --json"
LOFTQ = '[method]\nname = "loftq"\nrank = 4\n'
"""A method that makes a base of its own, which lies in the bucket too."""


@pytest.fixture(scope="module")
def bucket(person: Person) -> Bucket:
    """After one run, which promoted what it trained."""
    person.has_colours(more=LOFTQ)
    assert person.does("fineloop run -c colours.toml --json").answer["promoted"]
    return Bucket.of(person)


def says(**other: Any) -> Callable[[bytes], bytes]:
    """A JSON document with other values of some keys."""
    return lambda body: json.dumps(json.loads(body) | other).encode()


def flattered(body: bytes) -> bytes:
    """An evaluation with another loss of the candidate's."""
    content: dict[str, Any] = json.loads(body)
    content["models"]["candidate"]["metrics"]["loss"] /= 2
    return json.dumps(content).encode()


def reordered(body: bytes) -> bytes:
    """The same Parquet records the other way round."""
    table, turned = pq.read_table(io.BytesIO(body)), io.BytesIO()
    pq.write_table(table.take(list(reversed(range(table.num_rows)))), turned)
    return turned.getvalue()


EXCHANGED: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("runs/", "/decision.json", says(reasons=["Better in all."])),
    ("runs/", "/evaluation.json", flattered),
    ("runs/", "/evaluation_records.parquet", reordered),
    ("datasets/", ".parquet", reordered),
    ("bases/", "/model.safetensors", lambda weights: weights[:-1] + bytes([weights[-1] ^ 1])),
    ("bases/", "/chosen.json", says(folder="0" * 16)),
]


def found(person: Person, *, exit_code: int) -> list[str]:
    done = person.types(AUDIT)
    assert done.exit_code == exit_code, done.screen
    return [f"{each['where']} {each['what']}" for each in done.answer["findings"]]


def test_what_nobody_touched_has_no_findings(person: Person, bucket: Bucket) -> None:
    assert found(person, exit_code=0) == []


@pytest.mark.parametrize(("folder", "ending", "exchange"), EXCHANGED)
def test_an_exchanged_object_is_named_alone(
    person: Person, bucket: Bucket, folder: str, ending: str, exchange: Callable[[bytes], bytes]
) -> None:
    key = next(key for key in bucket.keys(folder) if key.endswith(ending))
    body = bucket.read(key)
    assert exchange(body) != body
    bucket.write(key, exchange(body))
    try:
        (finding,) = found(person, exit_code=1)
    finally:
        bucket.write(key, body)
    # Of a file in a folder with a manifest, the folder is the address.
    assert key.rpartition("/")[2] in finding
    assert key.split("/")[1] in finding


def test_a_whole_set_of_evidence_that_fits_together_is_not_what_the_log_names(person: Person, bucket: Bucket) -> None:
    """Records, and the evaluation and the decision made to fit: neither an audit nor a replay takes them."""
    decision, evaluation, records = (
        next(key for key in bucket.keys("runs/") if key.endswith(ending)) for _, ending, _ in EXCHANGED[:3]
    )
    kept = {key: bucket.read(key) for key in (decision, evaluation, records)}
    bucket.write(records, reordered(kept[records]))
    digest = hashlib.sha256(bucket.read(records)).hexdigest()
    bucket.write(evaluation, says(records_sha256=digest)(kept[evaluation]))
    digest = hashlib.sha256(bucket.read(evaluation)).hexdigest()
    bucket.write(decision, says(evaluation_sha256=digest)(kept[decision]))
    (finding,) = found(person, exit_code=1)
    assert decision in finding
    replayed = person.types(f"fineloop replay {decision.split('/')[1]}")
    assert replayed.exit_code == 1
    assert "decision.json has sha256" in replayed.screen
    for key, body in kept.items():
        bucket.write(key, body)
    assert found(person, exit_code=0) == []
    assert person.does(f"fineloop replay {decision.split('/')[1]} --json").answer["same"]


def test_evidence_that_is_gone_is_named(person: Person, bucket: Bucket) -> None:
    key = next(key for key in bucket.keys("runs/") if key.endswith("/decision.json"))
    body = bucket.read(key)
    bucket.remove(key)
    (finding,) = found(person, exit_code=1)
    bucket.write(key, body)
    assert key in finding
    assert "is gone" in finding
