"""LoftQ's bases: made together, found again, and files that plain transformers and peft load; and one weight's split
against the paper's algorithm with a full SVD, in float64.
"""

import dataclasses
import functools
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config import config_file
from components.config.schema import ModelConfig, RunConfig
from components.shared.errors import ConfigError
from components.store import folders
from components.store.store import Store
from ray_jobs.adapters import build, own_base
from ray_jobs.adapters.loftq import NF4, Split, find_layers, shares, split
from ray_jobs.base import base_model
from ray_jobs.base.base_model import Base
from ray_jobs.planning.capacity import before_training
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import collate, tokenize
from tests.doubles.datasets import validate
from tests.models import zoo
from tests.models.bases import rewritten
from tests.models.tiny import colour_rows
from tests.models.train_group import fit_in_rank, in_group
from tests.ray_jobs.training.in_store import in_store, stood

RANK = 8
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
RECORDS = [validate(row).record for row in colour_rows(48)]
INPUT_IDS = torch.arange(24).view(2, 12)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def learned_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, taught the colours whole, so that its weights matter to a loss."""
    path = tmp_path_factory.mktemp("learned-base")
    shutil.copytree(tiny_base, path, dirs_exist_ok=True)
    tokens = batch(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(40):
        answer_nll(model, tokens["input_ids"], tokens["labels"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def changed(config: RunConfig, learned_base: Path, store: Store) -> Callable[..., RunConfig]:
    """LoftQ on the base that learned, with some keys changed."""
    settings = [f"model.base={learned_base}", "method.name=loftq", f"method.rank={RANK}"]
    return functools.partial(in_store, config, store, *settings)


def batch(base: Path) -> dict[str, torch.Tensor]:
    chat = chat_format.load(Base("base", base, {}), ModelConfig(base=str(base)))
    return collate(tokenize(RECORDS, chat, 64), list(range(len(RECORDS))), chat.pad)


def projections(base: Path) -> dict[str, torch.Tensor]:
    """The weight of each layer that gets an adapter."""
    weights = load_file(base / "model.safetensors")
    return {name.removesuffix(".weight"): weight for name, weight in weights.items() if "_proj" in name}


def loaded(base: Base, config: RunConfig, base_format: Any = "nf4") -> Any:
    return base_model.load_model(base, config.model, base_format, use_gpu=False).eval()


def adapted(base: Base, config: RunConfig) -> Any:
    """The model as training starts with it."""
    model = build.attach(loaded(base, config), config.method, base_reference=base.reference, seed=0)
    own_base.begin(config, model, base)
    return model.eval()


def bytes_of(layer: Any) -> dict[str, torch.Tensor]:
    """A 4-bit layer's tensors as bytes: packed bfloat16 holds bits that are no number."""
    tensors = {"weight": layer.weight.data, **layer.weight.quant_state.as_dict(packed=True)}
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=INPUT_IDS).logits.float()


def test_an_adapted_model_starts_nearer_to_the_original_than_qlora(changed, store):
    config = changed()
    original = base_model.resolve(config.model)
    dense, plain = (loaded(original, config, base_format) for base_format in ("bf16", "nf4"))
    ours = adapted(stood(config, store), config)
    assert (logits(ours) - logits(dense)).norm() < 0.8 * (logits(plain) - logits(dense)).norm()
    tokens = batch(original.path)
    with torch.inference_mode():
        losses = [answer_nll(model, tokens["input_ids"], tokens["labels"]).mean() for model in (dense, ours, plain)]
    assert losses[0] < losses[1] < losses[2]


def test_the_scaling_is_divided_out_whatever_it_is(changed, store):
    for changes in ((), ("method.alpha=3",), ("method.scaling=rslora", "method.alpha=1")):
        config = changed(*changes)
        base = stood(config, store)
        init = load_file(base.path / "loftq_init.safetensors")
        model = adapted(base, config)
        assert len(model.targeted_module_names) == 14
        for name in model.targeted_module_names:
            product = init[f"{name}.lora_B"] @ init[f"{name}.lora_A"]
            torch.testing.assert_close(model.get_base_model().get_submodule(name).get_delta_weight("default"), product)


def test_plain_transformers_load_the_published_base_bit_for_bit(changed, store):
    config = changed()
    base = stood(config, store)
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    ours = loaded(base, config)
    init = load_file(base.path / "loftq_init.safetensors")
    for name, weight in projections(Path(config.model.base)).items():
        found = split(weight, rank=RANK, steps=5, name=name)
        expected = {key: tensor.contiguous().view(torch.uint8) for key, tensor in found.packed.items()}
        for model in (plain, ours):
            stored = bytes_of(model.get_submodule(name))
            assert stored.keys() == expected.keys()
            assert all(torch.equal(stored[key], expected[key]) for key in stored)
        assert torch.equal(init[f"{name}.lora_A"], found.right_RN)
        assert torch.equal(init[f"{name}.lora_B"], found.left_MR)
    templates = [AutoTokenizer.from_pretrained(each).chat_template for each in (base.path, config.model.base)]
    assert templates[0] == templates[1]


def test_layers_without_an_adapter_keep_plain_nf4(changed, store):
    config = changed('method.target_modules=["q_proj"]')
    plain, ours = loaded(base_model.resolve(config.model), config), loaded(stood(config, store), config)
    for name, same in (("self_attn.q_proj", False), ("self_attn.v_proj", True), ("mlp.up_proj", True)):
        theirs, found = (bytes_of(model.get_submodule(f"model.layers.0.{name}"))["weight"] for model in (plain, ours))
        assert torch.equal(theirs, found) == same


def test_a_base_is_named_after_what_changes_it_and_nothing_else(changed):
    original = Base("anywhere", Path("anywhere"), {"kind": "hub", "commit": "c0"})

    def key(*changes: str, base: Base = original) -> str:
        return own_base.folder_key(changed(*changes).method, base)

    for same in (("method.alpha=5",), ("method.scaling=rslora",), ("train.seed=9", "method.dropout=0.1")):
        assert key(*same) == key()
    assert key(base=dataclasses.replace(original, reference="elsewhere", path=Path("elsewhere"))) == key()
    targets = 'method.target_modules=["{}", "{}"]'
    assert key(targets.format("q_proj", "k_proj")) == key(targets.format("k_proj", "q_proj"))
    others = [key("method.rank=4"), key("method.loftq_steps=1"), key('method.target_modules=["q_proj"]')]
    others.append(key(base=dataclasses.replace(original, identity={"kind": "hub", "commit": "c1"})))
    assert len({key(), *others}) == 5


@pytest.fixture
def exact_base(learned_base: Path, tmp_path: Path) -> Path:
    """In k_proj every block of 64 has an absmax of 1, and every value is one of NF4's sixteen."""
    folder = shutil.copytree(learned_base, tmp_path / "exact")
    code = quantize_4bit(torch.ones(64), **NF4)[1].code.bfloat16()
    with rewritten(folder) as weights:
        for name, weight in weights.items():
            if "k_proj" in name:
                weights[name] = code.repeat(weight.numel() // 16).view(weight.shape)
    return folder


def test_weights_that_nf4_holds_exactly_are_refused_by_all_workers_and_nothing_is_published(
    changed, store, exact_base, tmp_path
):
    toml = config_file.dumps(changed(f"model.base={exact_base}"))
    one, other = in_group(stand_on_rank, toml, directory=tmp_path / "group", num_workers=2)
    assert one == other
    assert re.search(r"LoftQ gains nothing on k_proj: .* method\.target_modules", one)
    assert not list(store.list("bases/"))
    assert stood(changed(f"model.base={exact_base}", 'method.target_modules=["v_proj"]'), store)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("Llama, untied", "lm_head", r"lm_head .* is not quantised.*method\.target_modules"),
        ("GPT-2", "c_fc", r"c_fc .* is a Conv1D, whose weight lies the other way round .* set method\.init"),
    ],
)
def test_a_layer_that_cannot_be_split_is_refused_before_any_worker_starts(kind, target, message, changed, tmp_path):
    base = zoo.build(kind, tmp_path)
    config = changed(f"model.base={base}", f'method.target_modules=["{target}"]')
    chat = chat_format.load(Base(kind, base, {}), config.model)
    with pytest.raises(ConfigError, match=message):
        before_training(config, base, tokenize(RECORDS, chat, 64), [])


def test_a_base_that_is_quantised_already_is_refused(changed, store):
    base = stood(changed(), store)
    with pytest.raises(ConfigError, match="is quantised already"):
        stood(changed(f"model.base={base.path}"), store)


def test_a_checkpoint_without_the_head_is_read_by_its_shorter_names(changed, learned_base, tmp_path):
    shutil.copytree(learned_base, tmp_path / "headless")
    with rewritten(tmp_path / "headless") as weights:
        for name in [*weights]:
            weights[name.removeprefix("model.")] = weights.pop(name)
    config = changed(f"model.base={tmp_path / 'headless'}")
    layers, expected = find_layers(config, base_model.resolve(config.model)), projections(learned_base)
    assert layers.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(layers[name].read(torch.device("cpu")), weight)


def stand_on_rank(config_toml: str) -> str:
    """What one worker does; gives the address that it stands on."""
    torch.set_num_threads(1)
    config = config_file.loads(config_toml)
    store = Store.open(config.registry)
    original = base_model.resolve(config.model)
    rank, num_workers = dist.get_rank(), dist.get_world_size()
    try:
        return own_base.prepare(config, original, store, rank=rank, num_workers=num_workers).reference
    except ConfigError as exc:
        return str(exc)


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_bit(changed, store, tmp_path):
    digests = []
    for num_workers in (1, 2):
        config = changed(f"registry.prefix={store.prefix}/{num_workers}")
        toml, logs = config_file.dumps(config), tmp_path / str(num_workers)
        uris = in_group(stand_on_rank, toml, directory=logs, num_workers=num_workers)
        assert len(set(uris)) == 1
        own = Store.open(config.registry)
        digests.append(folders.read_manifest(own, own.key(uris[0])).files)
    assert digests[0] == digests[1]


def train_and_save(config_toml: str, rows: list[dict[str, str]], folder: str) -> dict[str, Any]:
    """Train, and on rank 0 save the adapter as it is published; gives the trained model's own logits."""
    fitted = fit_in_rank(config_file.loads(config_toml), rows, run_id="run")
    if fitted.worker.rank == 0:
        build.save(fitted.adapted, Path(folder))
    return {"logits": logits(fitted.adapted.eval()).numpy(), "recipe": fitted.recipe}


def test_two_workers_train_and_plain_peft_on_the_pulled_base_gives_their_logits(changed, store, tmp_path):
    config = changed("train.max_steps=6", "train.evals_per_epoch=0", "train.learning_rate=1e-3")
    arguments = (config_file.dumps(config), colour_rows(64), str(tmp_path / "adapter"))
    trained = in_group(train_and_save, *arguments, directory=tmp_path / "group", num_workers=2)[0]

    stands_on = trained["recipe"]["stands_on"]
    peft_config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert stands_on == peft_config.base_model_name_or_path
    named = trained["recipe"]["stands_on_sha256"]
    folders.pull(store, store.key(stands_on), tmp_path / "base", manifest_sha256=named)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    before = logits(base.train())  # in evaluation mode, bitsandbytes would repack the weights
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    found, theirs = torch.from_numpy(trained["logits"]), logits(plain)
    torch.testing.assert_close(theirs, found, atol=0.15, rtol=0.02)
    assert (found - before).abs().max() > 5 * (theirs - found).abs().max()
    lost_shares = trained["recipe"]["loftq"]["lost_shares"]
    assert lost_shares.keys() == KINDS
    assert all(0 < kind["loftq"] < kind["nf4"] < 0.2 for kind in lost_shares.values())

    # Six small steps lead away from where LoftQ starts, and not far.
    name = "model.layers.1.mlp.up_proj.lora_A"
    begun = load_file(tmp_path / "base" / "loftq_init.safetensors")[name]
    ended = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[f"base_model.model.{name}.weight"]
    assert 0.9 < torch.cosine_similarity(begun.flatten(), ended.float().flatten(), dim=0) < 0.9999


def of_paper(weight: torch.Tensor, rank: int, steps: int) -> list[float]:
    """Algorithm 1 of arXiv:2310.08659 with a full SVD, in float64: norm(W - Q - A B) after each step."""
    weight, low_rank, norms = weight.double(), torch.zeros_like(weight).double(), []
    for _ in range(steps):
        data, state = quantize_4bit((weight - low_rank).bfloat16(), **NF4)
        quantised = dequantize_4bit(data, state).double()
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        low_rank = u[:, :rank] * s[:rank] @ vh[:rank]
        norms.append((weight - quantised - low_rank).norm().item())
    return norms


def qlora_loses(weight: torch.Tensor) -> float:
    """What QLoRA starts with: norm(W - NF4(W))."""
    data, state = quantize_4bit(weight.bfloat16(), **NF4)
    return (weight.double() - dequantize_4bit(data, state).double()).norm().item()


def loses(weight: torch.Tensor, found: Split) -> float:
    """Measured on what is stored."""
    statistics = dict(found.packed)
    data = statistics.pop("weight")
    quantised = dequantize_4bit(data, QuantState.from_dict(statistics, torch.device("cpu"))).double()
    return (weight.double() - quantised - found.left_MR.double() @ found.right_RN.double()).norm().item()


def test_a_split_is_as_good_as_the_papers_algorithm_with_a_full_svd_and_better_with_more_steps(tiny_base):
    for name, weight in projections(tiny_base).items():
        one, five = (loses(weight, split(weight, rank=RANK, steps=steps, name=name)) for steps in (1, 5))
        assert five < one < qlora_loses(weight)
        assert one <= 1.01 * min(of_paper(weight, RANK, 1))
        assert five <= 1.01 * min(of_paper(weight, RANK, 5))


def test_a_split_knows_what_it_loses(tiny_base):
    weight = projections(tiny_base)["model.layers.1.mlp.up_proj"]
    found = split(weight, rank=RANK, steps=5, name="up_proj")
    assert found.weight_norm2**0.5 == pytest.approx(weight.double().norm().item(), rel=1e-5)
    assert found.nf4_norm2**0.5 == pytest.approx(qlora_loses(weight), rel=1e-5)
    rounded = dataclasses.replace(found, left_MR=found.left_MR.bfloat16(), right_RN=found.right_RN.bfloat16())
    assert found.loftq_norm2**0.5 == pytest.approx(loses(weight, rounded), rel=1e-5)


def test_the_best_step_is_kept_where_a_later_one_is_worse():
    # With most of the rank in A and B, what is left to quantise is noise, and the alternation wanders.
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = [loses(weight, split(weight, rank=60, steps=steps, name="w")) for steps in range(1, 9)]
    assert any(later > earlier for earlier, later in itertools.pairwise(of_paper(weight, 60, 8)))
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(norms))


def test_a_rank_above_a_layers_own_is_filled_with_zeros():
    found = split(torch.randn(32, 64), rank=40, steps=1, name="k_proj")
    assert (found.left_MR.shape, found.right_RN.shape) == ((32, 40), (40, 64))
    assert not found.left_MR[:, 32:].any()


def test_layers_are_shared_out_by_size_and_always_in_the_same_way():
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}
    assert shares(sizes, 2) == [["a", "d"], ["b", "c", "e"]]
    assert shares(dict(reversed(sizes.items())), 2) == shares(sizes, 2)
    assert shares({"a": 1}, 2) == [["a"], []]
