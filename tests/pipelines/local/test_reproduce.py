"""`fineloop reproduce`, with real steps and stub jobs: an adapter there is one number, train.weight_decay."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from components.config.schema import RunConfig
from components.prepare.dataset import Message, Record
from components.records import runs
from components.records.steps import TrainResult
from components.registry.between_runs import erase
from components.registry.versions import publish_version, read_lineage, resolve
from components.shared.errors import ConfigError, DataError, ObjectMissing
from components.store.store import Store
from pipelines.local.past_runs import recipe_of
from pipelines.local.run import Place, run
from tests.doubles import datasets
from tests.doubles.jobs_api import JobsApi
from tests.pipelines.command_line import body, fineloop

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def trained(stub_cluster: JobsApi, make_config: Callable[..., RunConfig], tmp_path: Path) -> str:
    outcome = run(make_config(), Place(tmp_path / "first", io.StringIO()), what="train")
    assert outcome.version
    return outcome.version


@pytest.mark.slow
def test_a_version_is_trained_again_on_its_dataset_though_its_sources_are_gone(
    trained: str, store: Store, config_path: Path, data_path: Path, tmp_path: Path
) -> None:
    data_path.unlink()
    done = fineloop("reproduce", f"sums@{trained}", "-c", config_path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = body(done)
    assert (printed["reproduced_as"], printed["same"], printed["agrees"]) == (trained, True, True)
    assert "reproduced, byte by byte" in done.stderr
    first = read_lineage(store, resolve(store, f"sums@{trained}"))
    again = runs.read(store, printed["run_id"], TrainResult)
    assert again.dataset_uri == first["dataset"]["uri"]
    assert b"reproduces sums@" in store.get(runs.run_key(printed["run_id"], runs.CONFIG))
    other = fineloop(
        *("reproduce", f"sums@{trained}", "-c", config_path, "--set", "train.weight_decay=1.25", "--json"), cwd=tmp_path
    )
    assert other.returncode == 1, other.stderr
    found = body(other)
    assert (found["same"], found["agrees"]) == (False, False)
    gain = found["compared"]["gains"]["loss"]
    assert (gain["gain"], gain["upper"]) == (-0.25, -0.25)


def test_what_the_recipe_lacks_or_does_not_allow_is_said_before_anything_runs(store, make_config):
    records = [Record(str(place), [Message("user", f"question {place}")], "answer") for place in range(9)]
    dataset = datasets.publish(store, train=records[:6], evaluation=records[6:])
    config = make_config()
    lineage = {
        "config": make_config("train.start_from=production", "tune.when=always").model_dump(mode="json"),
        "dataset": {"uri": dataset.uri},
        "base": {"identity": {"commit": "c" * 40}},
        "parents": [f"{dataset.uri}/", store.uri("adapters/sums/versions/v1")],
    }
    files = {"adapter_model.safetensors": b"one", "adapter_config.json": b"{}"}
    version = publish_version(store, "sums", files, lineage=lineage)
    made = recipe_of(store, version, config, [], note="again").config
    assert (made.adapter.note, made.tune.when, made.model.revision) == ("again", "never", "c" * 40)
    assert made.train.start_from == "sums@v1"  # whatever is in production by now
    with pytest.raises(ConfigError, match=r"measured by my\.module:metric"):
        recipe_of(store, version, config, ['evaluate.metrics=["my.module:metric"]'], note="")
    erase(store, "1", by="ann")
    erase(store, "8", by="ann")
    with pytest.raises(
        DataError, match=rf"sums {version.version} cannot be reproduced: .* holds 2 records that were era"
    ):
        recipe_of(store, version, config, [], note="")
    store.delete([info.key for info in store.list(f"{store.key(dataset.uri).rstrip('/')}/")])
    with pytest.raises(ObjectMissing, match=f"which sums {version.version} was trained on, is gone"):
        recipe_of(store, version, config, [], note="")
