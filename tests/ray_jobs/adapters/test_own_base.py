"""A base of an adapter's own in the store: made once, found by everybody, never two makings mixed."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from components.config import config_file
from components.config.schema import RunConfig
from components.registry.versions import Version, read_lineage
from components.shared.errors import IntegrityError, ObjectMissing
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import loftq, own_base
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.evaluate import _contenders
from ray_jobs.export import ExportRequest, export
from ray_jobs.scoring.measure import measure_shard
from ray_jobs.sweeping import trial
from ray_jobs.talking import speaker
from tests.models import tiny_version
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group
from tests.ray_jobs.training.in_store import in_store, stood

ANOTHER = "0" * 16


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def changed(config: RunConfig, store: Store) -> Callable[..., RunConfig]:
    """LoftQ on the tiny base, with some keys changed."""
    return functools.partial(in_store, config, store, "method.name=loftq")


def test_a_second_run_pulls_what_the_first_one_made(changed, store, cache, capsys):
    first = stood(changed(), store)
    assert "splitting 14 weights" in capsys.readouterr().out
    shutil.rmtree(cache)  # another machine
    second = stood(changed("method.alpha=5", "train.seed=3"), store)
    assert "splitting" not in capsys.readouterr().out
    assert second == first == own_base.find(changed(), base_model.resolve(changed().model), store, sha256="")
    assert second.reference.startswith(store.uri("bases/"))


def test_of_two_unequal_bases_everybody_stands_on_the_first_and_neither_is_mixed(changed, store):
    config, otherwise = changed(), changed("method.loftq_steps=1")
    first, original = stood(config, store), base_model.resolve(config.model)
    splits = loftq.compute(otherwise, original, rank=0, num_workers=1, group=None)
    key = own_base.folder_key(config.method, original)
    # As by a run on other hardware that began before the first one ended.
    own_base._publish(config, original, store, splits)
    assert stood(config, store) == own_base.find(config, original, store, sha256="") == first
    contents = list(store.folders(f"{key}/"))
    assert len(contents) == 2
    for content in contents:
        folders.verify(store, f"{key}/{content}")


def test_a_reader_never_makes_a_base(changed, store):
    with pytest.raises(ObjectMissing, match="bases/"):
        own_base.find(changed(), base_model.resolve(changed().model), store, sha256="")


def test_a_sweep_makes_the_base_before_its_trials(changed, store):
    trial.make_base(config_file.dumps(changed()))
    assert own_base.find(changed(), base_model.resolve(changed().model), store, sha256="")


def test_a_cached_base_that_was_changed_is_refused(changed, store):
    base = stood(changed(), store)
    (base.path / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"loftq-.* is not .*bases/.* delete it"):
        stood(changed(), store)


MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
class MarkedForCausalLM(LlamaForCausalLM):
    Path({ran!r}).touch()
"""


@pytest.fixture
def with_code(changed, tiny_base, tmp_path) -> tuple[RunConfig, Path]:
    """LoftQ on a base that comes with code, which the config trusts; and the file that the code writes when it runs."""
    base, ran = shutil.copytree(tiny_base, tmp_path / "marked"), tmp_path / "ran"
    (base / "modeling_marked.py").write_text(MODELING.format(ran=str(ran)))
    described = json.loads((base / "config.json").read_text())
    described |= {"architectures": ["MarkedForCausalLM"]}
    described |= {"auto_map": {"AutoModelForCausalLM": "modeling_marked.MarkedForCausalLM"}}
    (base / "config.json").write_text(json.dumps(described))
    return changed(f"model.base={base}", "model.trust_remote_code=true"), ran


def replaced(store: Store, base: Base, changes: dict[str, bytes]) -> None:
    """What someone who may write to the bucket does: another base in place of the chosen one, with sound digests."""
    key = store.key(base.reference).rpartition("/")[0]
    files = {path.name: path.read_bytes() for path in base.path.iterdir() if path.name != folders.MANIFEST}
    manifest = folders.publish(store, f"{key}/{ANOTHER}", {**files, **changes})
    chosen = {"format": 1, "folder": ANOTHER, "manifest_sha256": manifest.sha256}
    store.put_json(f"{key}/{own_base.CHOSEN}", chosen)


def test_consent_to_a_bases_code_is_not_for_what_lies_in_the_bucket(with_code, store, tmp_path):
    config, ran = with_code
    base, evil = stood(config, store), tmp_path / "evil"
    loaded = base_model.load_model(base, config.model, "nf4", use_gpu=False)
    assert (ran.exists(), type(loaded).__name__) == (True, "MarkedForCausalLM")
    described = json.loads((base.path / "config.json").read_text())
    elsewhere = {**described, "auto_map": {"AutoModelForCausalLM": "org/evil--modeling_marked.MarkedForCausalLM"}}
    for changes, file in (
        ({"modeling_marked.py": MODELING.format(ran=str(evil)).encode()}, "modeling_marked.py"),
        ({"more.py": b""}, "more.py"),
        ({"custom_generate/generate.py": b""}, "custom_generate/generate.py"),
        ({"config.json": json.dumps(elsewhere).encode()}, "config.json AutoModelForCausalLM"),
    ):
        store.delete([info.key for info in store.list(store.key(base.reference).rpartition("/")[0] + f"/{ANOTHER}/")])
        replaced(store, base, changes)
        with pytest.raises(IntegrityError, match=f"comes with code that is not that of .*, in {file}: "):
            own_base.find(config, base_model.resolve(config.model), store, sha256="")
    assert not evil.exists()


def chat(config: RunConfig, store: Store, version: Version, folder: Path) -> None:
    speaker.load(config, store, version, "colours", with_base=False)


def evaluate(config: RunConfig, store: Store, version: Version, folder: Path) -> None:
    measure_shard(_contenders(config, store, version)[1:], tiny_version.RECORDS[:2], shard_index=0)


def goes_on(config_toml: str, version: Version) -> None:
    """What one rank does: train from a version."""
    fit_in_rank(config_file.loads(config_toml), colour_rows(16), run_id="r", start=version)


def train_from(config: RunConfig, store: Store, version: Version, folder: Path) -> None:
    in_group(goes_on, config_file.dumps(config), version, directory=folder / "log", num_workers=1)


def export_merged(config: RunConfig, store: Store, version: Version, folder: Path) -> None:
    export(config, version.name, ExportRequest("merged", folder / "out", dtype="float32"))


@pytest.mark.parametrize("reader", [chat, evaluate, export_merged, train_from])
def test_a_version_is_run_on_the_base_that_it_was_trained_on_alone(changed, store, tmp_path, reader):
    config = changed()
    version = tiny_version.publish(config, store, tmp_path)
    sha256 = read_lineage(store, version)["recipe"]["stands_on_sha256"]
    base = own_base.find(config, base_model.resolve(config.model), store, sha256=sha256)
    weights = load_file(base.path / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0)
    replaced(store, base, {"model.safetensors": save(weights, {"format": "pt"})})
    told = f"whose manifest has sha256 {sha256}, and today that is .* put the one"
    with pytest.raises((IntegrityError, RuntimeError), match=told):  # a rank's own error is told by its group
        reader(config, store, version, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("folder", value) for value in ("/../../../victim", 7, "0" * 15 + "\n")),
        *(("manifest_sha256", value) for value in (None, "0" * 63 + "/")),
    ],
)
def test_a_pointer_to_a_base_that_leads_elsewhere_is_refused(changed, store, tmp_path, field, value):
    original = base_model.resolve(changed().model)
    key = own_base.folder_key(changed().method, original)
    chosen = {"format": 1, "folder": "0" * 16, "manifest_sha256": "0" * 64, field: value}
    store.put_json(f"{key}/{own_base.CHOSEN}", chosen)
    with pytest.raises(IntegrityError, match="names no base of format 1"):
        stood(changed(), store)
    assert [path.name for path in tmp_path.iterdir() if "cache" not in path.name] == []


def test_other_methods_stand_on_the_original(changed, store):
    config = changed("method.name=qlora")
    original = base_model.resolve(config.model)
    assert stood(config, store) == original
    assert own_base.find(config, original, store, sha256="") is original
    assert own_base.recipe(config, original) == {}
