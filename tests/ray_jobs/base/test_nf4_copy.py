"""A base's copy in NF4 in the store: what is downloaded, and that nothing but the download changes.

The judge of the weights is transformers with bitsandbytes on the original, and of a training the same training without
a copy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import ConfigError, IntegrityError
from components.store import folders
from components.store.store import Store
from ray_jobs.base import base_model, made_base, nf4_copy, stored_format
from ray_jobs.sweeping import trial
from ray_jobs.text import chat_format
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group

Changed = Callable[..., RunConfig]
BF16 = torch.bfloat16


@pytest.fixture
def uploaded(store: Store, tiny_base: Path) -> str:
    """The tiny base in two files of weights, as a large base lies in many, and in S3."""
    weights = load_file(tiny_base / "model.safetensors")
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        index |= dict.fromkeys(part, file)
        store.put(f"bases/tiny/{file}", save({name: weights[name] for name in part}, metadata={"format": "pt"}))
    store.put_json("bases/tiny/model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for path in tiny_base.iterdir():
        if path.suffix != ".safetensors":
            store.put(f"bases/tiny/{path.name}", path)
    return store.uri("bases/tiny")


@pytest.fixture
def changed(config: RunConfig, store: Store, uploaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Changed:
    """QLoRA on the base in S3 with a copy in the store, with some keys changed; the cache is empty."""
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "first-machine"))
    place = [f"registry.bucket={store.bucket}", f"registry.prefix={store.prefix}", f"model.base={uploaded}"]
    text = config_file.dumps(config)
    return lambda *changes: config_file.loads(text, [*place, "method.name=qlora", "model.keep_nf4=true", *changes])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the files of weights that are downloaded from the real server."""
    downloaded: list[str] = []
    download = Store.download

    def counted(self: Store, key: str, path: Path) -> None:
        if key.endswith(".safetensors"):
            downloaded.append(key)
        download(self, key, path)

    monkeypatch.setattr(Store, "download", counted)
    return downloaded


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / name))


def by_transformers(folder: Path, dtype: torch.dtype = BF16) -> PreTrainedModel:
    """The base in NF4 as QLoRA has it, read by transformers alone."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings)
    return model


def require_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
    assert [name for name in ours if not torch.equal(_bytes(ours[name]), _bytes(theirs[name]))] == []


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Codes that lie in bfloat16's bits may be no numbers, which are equal to nothing."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_machine_reads_the_copy_alone_and_has_what_transformers_makes_of_the_original(
    changed, store, read, tiny_base, tmp_path, monkeypatch, dtype
):
    config = changed()
    made = nf4_copy.prepare(config, store, dtype=dtype)
    assert [key.partition("bases/")[2].partition("/")[0] for key in read[:2]] == ["tiny", "tiny"]
    read.clear()
    on_another_machine(monkeypatch, tmp_path, "second")
    base = nf4_copy.resolve(config, store, recorded=made.identity, dtype=dtype)
    assert read
    assert all(store.uri(key).startswith(base.copy.uri) for key in read)
    assert (base.reference, base.identity) == (config.model.base, base_model.resolve(config.model).identity)
    require_equal(
        base_model.load_model(base, config.model, "nf4", use_gpu=False, dtype=dtype), by_transformers(tiny_base, dtype)
    )

    read.clear()
    assert nf4_copy.prepare(config, store, recorded=made.identity, dtype=dtype) == base
    assert read == []
    assert chat_format.load(base, config.model).pad == chat_format.load(made, config.model).pad
    assert not any(path.name.endswith(".index.json") for path in base.path.iterdir())  # of the original's two files
    assert nf4_copy.recipe(base) == {"nf4_copy": base.copy.uri, "nf4_copy_sha256": base.copy.manifest_sha256}
    folders.verify(store, store.key(base.copy.uri), manifest_sha256=base.copy.manifest_sha256)


def test_a_copy_is_for_one_dtype(changed, store):
    nf4_copy.prepare(changed(), store, dtype=torch.bfloat16)
    assert nf4_copy.resolve(changed(), store, dtype=torch.bfloat16).copy
    assert nf4_copy.resolve(changed(), store, dtype=torch.float16).copy is None


@pytest.mark.parametrize(
    "change",
    [
        "model.keep_nf4=false",
        "method.name=lora",
        "method.name=loftq",
        "train.zero_stage=3",
        "model.trust_remote_code=true",
    ],
)
def test_nothing_is_kept_where_training_reads_the_original_or_a_base_of_its_own(changed, store, change):
    base = nf4_copy.prepare(changed(change), store, dtype=BF16)
    assert base == base_model.resolve(changed().model)
    assert not any(made_base.CHOSEN in info.key for info in store.list("bases/"))


def test_a_base_that_is_in_nf4_already_is_read_as_it_is(changed, store, tiny_base, tmp_path):
    by_transformers(tiny_base).save_pretrained(tmp_path / "quantised")
    config = changed(f"model.base={tmp_path / 'quantised'}")
    base = nf4_copy.prepare(config, store, dtype=BF16)
    assert (base.path, base.copy) == (tmp_path / "quantised", None)
    assert stored_format.stored_as(by_transformers(tiny_base).config) == "nf4"


def test_a_copy_that_loads_as_another_model_is_refused_and_not_kept(changed, store, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(ConfigError, match=r"1 tensors, such as model\.norm\.weight\): set model\.keep_nf4=false"):
        nf4_copy.prepare(changed(), store, dtype=BF16)
    assert not any(made_base.CHOSEN in info.key for info in store.list("bases/"))


def test_a_damaged_copy_is_refused_in_the_store_and_in_the_cache(changed, store, tmp_path, monkeypatch):
    base = nf4_copy.prepare(changed(), store, dtype=BF16)
    (base.path / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"nf4-.* is not .*bases/.* delete it"):
        nf4_copy.resolve(changed(), store, dtype=BF16)
    store.put(f"{store.key(base.copy.uri)}/config.json", b"{}")
    on_another_machine(monkeypatch, tmp_path, "second")
    with pytest.raises(IntegrityError, match=r"bases/.* is damaged: config\.json has 2 bytes"):
        nf4_copy.resolve(changed(), store, dtype=BF16)


def test_a_sweep_makes_the_copy_before_its_trials(changed, store):
    trial.make_base(config_file.dumps(changed()))
    assert nf4_copy.resolve(changed(), store, dtype=BF16).copy


def trained(config_toml: str, rows: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one rank does: train; gives the adapter's final weights and the recipe."""
    from ray_jobs.training import checkpoint

    fitted = fit_in_rank(config_file.loads(config_toml), rows, run_id="run")
    weights = {name: each.detach().float().numpy() for name, each in checkpoint.trainable(fitted.adapted).items()}
    return weights, fitted.recipe


@pytest.fixture
def trainings(changed, tmp_path, monkeypatch) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """A training of two workers on a machine of that name."""

    def train(machine: str, *changes: str) -> tuple[dict[str, Any], dict[str, Any]]:
        on_another_machine(monkeypatch, tmp_path, machine)
        config = changed("train.max_steps=3", "train.evals_per_epoch=0", *changes)
        found = in_group(
            trained, config_file.dumps(config), colour_rows(64), directory=tmp_path / f"{machine}-log", num_workers=2
        )
        weights, recipe = found[0]
        return weights, recipe

    return train


def test_two_workers_train_the_same_bits_on_the_copy_as_on_the_original(trainings):
    plain, recipe = trainings("without", "model.keep_nf4=false")
    assert "nf4_copy" not in recipe
    for machine in ("maker", "fresh"):
        weights, on_copy = trainings(machine)
        assert weights.keys() == plain.keys()
        assert [name for name in weights if (weights[name] != plain[name]).any()] == []
        named = {key: on_copy.pop(key) for key in ("nf4_copy", "nf4_copy_sha256")}
        assert named["nf4_copy"].startswith("s3://")
        assert on_copy == recipe


def spoil(patched: pytest.MonkeyPatch) -> None:
    """Have transformers save a model with other weights than it has."""
    saves = PreTrainedModel.save_pretrained

    def spoiled(self: PreTrainedModel, folder: Path, **how: Any) -> None:
        saves(self, folder, **how)
        (file,) = Path(folder).glob("*.safetensors")
        weights = load_file(file)
        weights["model.norm.weight"] = -weights["model.norm.weight"]
        save_file(weights, file, metadata={"format": "pt"})

    patched.setattr(PreTrainedModel, "save_pretrained", spoiled)


def refused(config_toml: str) -> str:
    """What one rank does: fail to make the copy, which rank 0 alone tries; gives the error."""
    import torch.distributed as dist

    config = config_file.loads(config_toml)
    together = {"rank": dist.get_rank(), "num_workers": dist.get_world_size()}
    with pytest.MonkeyPatch.context() as patched:
        spoil(patched)
        with pytest.raises(ConfigError) as raised:
            nf4_copy.prepare(config, Store.open(config.registry), dtype=BF16, **together)
    return str(raised.value)


def test_what_rank_0_fails_at_ends_all_workers_with_its_words(changed, tmp_path):
    said = in_group(refused, config_file.dumps(changed()), directory=tmp_path / "log", num_workers=2)
    assert said[0] == said[1]
    assert "set model.keep_nf4=false" in said[0]
