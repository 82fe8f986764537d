"""`fineloop adapters check` as a command under kfp.local: real steps, a real store; the Ray jobs are stubs."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from components.config import config_file
from components.registry import aliases
from components.registry.audit import audit
from components.registry.event_log import events
from components.shared.errors import ConfigError
from components.store.store import Store
from pipelines.cli import main
from pipelines.local.past_runs import own_config
from pipelines.local.run import Place, run
from tests.doubles.jobs_api import JobsApi
from tests.pipelines.command_line import publish_sums, require_documented, sums


def newer(folder: Path, first: int, count: int) -> str:
    path = folder / f"from-{first}.jsonl"
    path.write_text(sums(first, first + count))
    return str(path)


def registry_of(store: Store) -> list[str]:
    return [f"--set=registry.{key}={json.dumps(getattr(store, key))}" for key in ("bucket", "prefix")]


@pytest.fixture
def two(forked: None, stub_cluster: JobsApi, store: Store, make_config: Any, tmp_path: Path) -> list[str]:
    """Versions with a loss of 0.5 and 0.9; the worse one is in production, put there by hand."""
    place = Place(tmp_path / "home", io.StringIO())
    made = [run(make_config(f"train.weight_decay={loss}"), place, what="train").version for loss in (0.5, 0.9)]
    for version in made:
        aliases.promote(store, "sums", str(version))
    return [str(version) for version in made]


def test_production_that_is_worse_is_said_to_be_and_goes_back_where_that_is_asked(
    two: list[str],
    store: Store,
    config_path: Path,
    stub_cluster: JobsApi,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = registry_of(store)

    def checks(line: str, *arguments: str) -> dict[str, Any]:
        words = [*line.split(), *arguments, "--home", str(tmp_path / "home"), "--json"]
        assert main(words) == 0
        printed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        require_documented(words, printed)
        return printed

    # Without -c the config is that of production's own run, whose data has nothing new.
    nothing = checks("adapters check sums", *where)
    assert "verdict" not in nothing
    jobs = len(stub_cluster.jobs)

    look = checks("adapters check sums", "--data", newer(tmp_path, 100, 40), *where)
    assert (look["version"], look["against"], look["verdict"], look["records"]) == (two[1], two[0], "worse", 40)
    assert (look["can_roll_back"], look["moved"]) == (True, None)
    assert look["fresh"] == pytest.approx(0.9)
    assert len(stub_cluster.jobs) == jobs + 1
    kinds = [event.kind for event in events(store, "sums")]

    same = checks("adapters check sums", "--data", newer(tmp_path, 100, 40), *where)
    said = ("verdict", "gain", "lower", "upper", "records")
    assert [same[key] for key in said] == [look[key] for key in said]
    assert same["new_records"] == 0
    assert [event.kind for event in events(store, "sums")] == kinds

    base = checks("adapters check sums", "--data", newer(tmp_path, 100, 40), "--against", "base", *where)
    assert (base["verdict"], base["against"], base["new_records"]) == ("still better", "base", 40)

    taken_back = ["--set", "check.roll_back=true", "-c", str(config_path)]
    back = checks("adapters check sums", "--data", newer(tmp_path, 200, 40), "--worse-by", "0.05", *taken_back)
    assert (back["verdict"], back["records"], back["moved"]["to"]) == ("worse", 80, two[0])
    pointer = aliases.read_alias(store, "sums", "production")
    assert pointer is not None
    assert (pointer.version, pointer.kind) == (two[0], "rolled_back")
    assert audit(store, "sums").findings == ()
    # The old version's look begins anew, against its base, as nothing was in production before it.
    assert checks("adapters check sums", "--data", newer(tmp_path, 100, 40), *where)["against"] == "base"


def test_a_mistake_is_said_before_any_cluster_is_asked(stub_cluster, published, config_path, tmp_path, capsys):
    for words, message in (
        (["others"], "is of the adapter sums, not of others"),
        (["sums", "--worse-by", "much"], "check.worse_by"),
        (["sums", "--against", "v00000000"], "v00000000"),
        (["sums", "--against", published[0]], "name another version"),
    ):
        home = ["--home", str(tmp_path / "home"), "-c", str(config_path), "--json"]
        assert main(["adapters", "check", *words, *home]) == 2
        assert message in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]
    assert stub_cluster.jobs == {}


def test_production_brings_no_cluster_and_no_image_to_run_in(store, make_config, tmp_path, capsys):
    elsewhere = make_config("ray.cluster.kind=rayjob", "ray.cluster.image=registry.example/theirs:1")
    version = publish_sums(store, "weights", run_id="theirs", config=config_file.as_table(elsewhere))
    aliases.promote(store, "sums", version)
    assert main(["adapters", "check", "sums", *registry_of(store), "--home", str(tmp_path / "home"), "--json"]) == 2
    assert "another cluster" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]


def test_the_config_of_productions_own_run_allows_no_code_that_ours_does_not(make_config: Any) -> None:
    lineage = {"config": config_file.as_table(make_config("model.trust_remote_code=true"))}
    with pytest.raises(ConfigError, match="comes with Python code of its own"):
        own_config(lineage, make_config(), [], origin="lineage")
    allowed = own_config(lineage, make_config("model.trust_remote_code=true"), ["check.worse_by=0.3"], origin="lineage")
    assert (allowed.model.trust_remote_code, allowed.check.worse_by) == (True, 0.3)
