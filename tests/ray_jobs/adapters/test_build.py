import json
import zlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from components.config.schema import MethodConfig
from components.shared.errors import ConfigError
from ray_jobs.adapters import build, dora
from tests.models.bases import dense, load, logits
from tests.models.train_group import in_group

REFERENCE = "s3://models/tiny"
ADAPTERS = ("lora", "rslora", "dora", "vera", "dvora")
"""The rows of the table that differ in more than the base that they stand on."""


def adapted_base(path: Path, method: MethodConfig, *, seed: int = 0):
    return build.attach(dense(path), method, base_reference=REFERENCE, seed=seed).eval()


def fill(model) -> None:
    """An update that does something, as after training; the same in every process."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def save_all(base: Path, directory: Path) -> int:
    """One folder for each adapter, and the logits that it must give; what this process makes of a text's hash."""
    for name in ADAPTERS:
        model = adapted_base(base, MethodConfig(name=name, rank=4))
        fill(model)
        build.save(model, directory / name)
        save_file({"logits": logits(model)}, directory / f"{name}.logits")
    return hash("q_proj")


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> tuple[Path, Path]:
    """Every adapter's folder as this process writes it, and as another does, whose sets have another order."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    (another_hash,) = in_group(save_all, tiny_base, theirs, directory=theirs / "log", num_workers=1)
    assert save_all(tiny_base, ours) != another_hash
    return ours, theirs


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_files_give_peft_the_same_logits(name, saved, tiny_base):
    written = load_file(saved[1] / f"{name}.logits")["logits"]
    for read in (PeftModel.from_pretrained, build.load):
        assert torch.equal(logits(read(dense(tiny_base), saved[1] / name)), written)
    assert (written - logits(dense(tiny_base))).abs().max() > 0.1


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_adapter_is_written_as_the_same_bytes_by_every_process(name, saved):
    one, other = ({p.name: p.read_bytes() for p in (directory / name).iterdir()} for directory in saved)
    assert one == other
    assert set(one) == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("method", "spelled"),
    [
        (MethodConfig(name="lora", rank=4), {"lora_alpha": 8.0}),
        (MethodConfig(name="qdora", dropout=0.1), {"r": 16, "lora_dropout": 0.1}),
        (MethodConfig(name="vera", dropout=0.1), {"r": 256, "vera_dropout": 0.1, "save_projection": True}),
    ],
    ids=["lora", "qdora", "vera"],
)
def test_a_row_of_the_table_is_spelled_as_peft_spells_it(method, spelled, tiny_base, tmp_path):
    build.save(adapted_base(tiny_base, method), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: saved[key] for key in spelled} == spelled
    assert (saved["task_type"], saved["base_model_name_or_path"]) == ("CAUSAL_LM", REFERENCE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_nothing_yet(name, tiny_base):
    fresh = logits(adapted_base(tiny_base, MethodConfig(name=name, rank=4)))
    torch.testing.assert_close(fresh, logits(dense(tiny_base)))


@pytest.mark.parametrize(("base", "name"), [("nf4", "vera"), ("bf16", "dvora"), ("int8", "dvora")])
def test_veras_matrices_have_the_type_of_its_vectors_and_are_there_once(base, name, tiny_base, tmp_path):
    adapted = build.attach(load(tiny_base, base), MethodConfig(name=name, rank=4), base_reference=REFERENCE, seed=0)
    magnitudes = {*dora.magnitudes(adapted)}
    vectors = {parameter for parameter in adapted.parameters() if parameter.requires_grad} - magnitudes
    shared = [buffer for key, buffer in adapted.named_buffers(remove_duplicate=False) if ".vera_" in key]
    assert {tensor.dtype for tensor in (*vectors, *shared)} == {torch.bfloat16}
    assert {magnitude.dtype for magnitude in magnitudes} == ({torch.float32} if name == "dvora" else set())
    assert len({buffer.data_ptr() for buffer in shared}) == 2
    assert len(shared) == 2 * (1 + 14)
    adapted(input_ids=torch.arange(12)[None]).logits.sum().backward()
    # And so when they are loaded: what is measured is what was trained.
    fill(adapted)
    build.save(adapted, tmp_path)
    assert torch.equal(logits(build.load(load(tiny_base, base), tmp_path)), logits(adapted))


def test_the_seed_alone_decides_the_first_weights(tiny_base):
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)  # whatever was drawn before
        weights = dict(adapted_base(tiny_base, MethodConfig(rank=4), seed=seed).named_parameters())
        return next(weight for name, weight in weights.items() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("name", "targets"),
    [("qlora", ["no_such_layer"]), ("vera", "no_such_layer"), ("dvora", ["q_proj", "input_layernorm"])],
)
def test_layers_that_the_base_does_not_have_are_the_users_mistake(name, targets, tiny_base):
    message = r"method\.target_modules .* (does not fit|fits no layer of) s3://models/tiny"
    with pytest.raises(ConfigError, match=message):
        adapted_base(tiny_base, MethodConfig(name=name, rank=4, target_modules=targets))
