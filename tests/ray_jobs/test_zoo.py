"""Every architecture of the zoo with every method: planned, trained, scored, saved, read by plain peft and merged."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from components.config import config_file
from components.config.schema import RunConfig
from components.shared.errors import ConfigError
from components.store.store import Store
from pipelines.local import seaweedfs
from ray_jobs.adapters import build, merge, own_base
from ray_jobs.base import attention, base_model
from ray_jobs.base.architecture import auto_class
from ray_jobs.base.base_model import Base
from ray_jobs.planning.capacity import before_training
from ray_jobs.planning.rehearsal import Rehearsal
from ray_jobs.scoring.generation import greedy, score
from ray_jobs.text import chat_format
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import collate, tokenize
from tests.doubles.datasets import validate
from tests.models import zoo
from tests.models.plain import plain_training
from tests.models.splits import split_of
from tests.models.tiny import colour_rows
from tests.models.tiny_version import on_its_base
from tests.models.train_group import train_all
from tests.ray_jobs.conftest import CONFIG

RECORDS = [validate(row).record for row in colour_rows(8)]
STEPS = 8

# bitsandbytes says once for each layer that int8 rounds its inputs, and peft mends by itself what GPT-2's weights are.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """The tiny model of an architecture, made once."""
    return functools.cache(lambda name: zoo.build(name, tmp_path_factory.mktemp("base")))


@pytest.fixture
def configured(folder, s3_server: seaweedfs.Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FINELOOP_CACHE", str(tmp_path / "cache"))

    def config(name: str, method: str, *more: str) -> RunConfig:
        row = zoo.METHOD_CONFIGS[method]
        place = [f"registry.bucket={s3_server.bucket}", "registry.prefix=tests/zoo"]
        settings = [f"method.name={row.name}", f"method.base={row.row.base}", f"method.rank={row.rank}"]
        return config_file.loads(CONFIG.format(base=folder(name)), [*place, *settings, *more])

    return config


TIERS: list[Any] = [[], pytest.mark.slow, pytest.mark.full, pytest.mark.full, pytest.mark.full, pytest.mark.slow]
ONE_IN_SIX = [pytest.param(name, marks=TIERS[index % 6]) for index, name in enumerate(zoo.KINDS)]


def in_turn(choices: Iterable[Any]) -> list[Any]:
    """Every architecture with every choice: one in forty slow, so that each has its turn, and the others full."""
    pairs = [(name, choice) for choice in choices for name in zoo.KINDS]
    marks = [pytest.mark.full if index % 40 else pytest.mark.slow for index in range(len(pairs))]
    return [pytest.param(*pair, marks=mark) for pair, mark in zip(pairs, marks, strict=True)]


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits.float()


def goes_all_the_way(config: RunConfig, tmp_path: Path) -> None:
    """One architecture with one method, from the plan to what a user does with the published files."""
    store = Store.open(config.registry)
    shape = base_model.read_config(config.model)
    rehearsal = Rehearsal(shape, config.method, reference="zoo", use_gpu=False)
    assert not rehearsal.step(2, 32, checkpointing=True).is_estimate

    original = base_model.resolve(config.model)
    base = own_base.prepare(config, original, store)
    chat = chat_format.load(base, config.model)
    split = tokenize(RECORDS, chat, config.model.max_length)
    model = base_model.load_model(base, config.model, config.method.row.base, use_gpu=False)
    adapted = build.attach(model, config.method, base_reference=base.reference, seed=0).train()
    own_base.begin(config, adapted, base)
    assert adapted.get_nb_trainable_parameters()[0] == rehearsal.stats.trainable
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    batch = collate(split, range(len(split)), chat.pad)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = answer_nll(adapted, batch["input_ids"], batch["labels"]).mean()
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        last = {name: parameter.grad for name, parameter in trained.items()}
        optimizer.zero_grad()
    assert losses[-1] < losses[0], losses
    assert [name for name, gradient in last.items() if not gradient.any()] == []

    scores = score(adapted.eval(), chat, RECORDS, split, marks={}, batch_size=4, max_new_tokens=4)
    expected = answer_nll(adapted, batch["input_ids"], batch["labels"]).sum().item()
    assert math.isclose(sum(each.nll for each in scores), expected, rel_tol=0.02)

    build.save(adapted, tmp_path / "adapter")
    tokens = batch["input_ids"][:, :24]
    reloads_in_plain_peft(adapted, config, base, tmp_path / "adapter", tokens)
    merges(config, store, tmp_path, tokens)


def reloads_in_plain_peft(adapted, config: RunConfig, base: Base, folder: Path, tokens: torch.Tensor) -> None:
    """The published files on the base as transformers loads it by itself, in the arithmetic of the training."""
    if config.method.row.adapter not in ("lora", "vera") or config.method.row.base != "bf16":
        return  # our own arithmetic of magnitudes, and of quantised weights: `merges` compares what those are
    kernel = attention.for_text(base_model.read_config(config.model), adapted.config._attn_implementation)
    plain = auto_class(adapted.config).from_pretrained(base.path, dtype=torch.bfloat16, attn_implementation=kernel)
    plain = PeftModel.from_pretrained(plain, folder)
    ours = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}  # VeRA's A and B are buffers
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        tensor.data = tensor.data.to(ours[name].dtype)
    assert torch.equal(logits(plain, tokens), logits(adapted, tokens))


def merges(config: RunConfig, store: Store, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Merged and read by plain transformers, and as plain LoRA where it is one, it says what the adapter says."""
    adapted = on_its_base(config, store, tmp_path / "adapter")
    expected = logits(adapted, tokens)
    if config.method.row.adapter in ("lora", "vera"):
        plain = merge.as_lora(on_its_base(config, store, tmp_path / "adapter"))
        torch.testing.assert_close(logits(plain, tokens), expected, rtol=0, atol=1e-4)
    if config.method.row.adapter != "dvora":  # which peft knows from us alone
        plain = on_its_base(config, store, tmp_path / "adapter", load=PeftModel.from_pretrained)
        torch.testing.assert_close(logits(plain, tokens), expected, rtol=0, atol=1e-4)
    merge.merge(adapted).save_pretrained(tmp_path / "merged")
    merged = auto_class(adapted.config).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ONE_IN_SIX)
def test_an_architecture_goes_all_the_way_with_lora(name, configured, tmp_path):
    goes_all_the_way(configured(name, "lora"), tmp_path)


@pytest.mark.parametrize("name", ONE_IN_SIX)
def test_padded_batches_read_and_answer_as_transformers_does_a_record_at_a_time(name, configured, folder):
    """Its own loss and its own logits, in eager float32, with a mask, without padding and without a cache."""
    config = configured(name, "lora")
    base = base_model.resolve(config.model)
    chat = chat_format.load(base, config.model)
    split = tokenize(RECORDS, chat, config.model.max_length)
    model = base_model.load_model(base, config.model, "bf16", use_gpu=False).float().eval()
    plain = auto_class(model.config).from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager")
    batch = collate(split, range(len(split)), chat.pad)
    with torch.inference_mode():
        found = answer_nll(model, batch["input_ids"], batch["labels"]).split(split.num_answer_tokens.tolist())
    answers = greedy(model, chat, split, len(split), 4)
    for index, nll in enumerate(found):
        tokens = torch.from_numpy(split.take([index]).tokens).long()[None]
        prompt = int(split.num_prompt_tokens[index])
        labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < prompt, -100)
        with torch.inference_mode():
            expected = plain(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False)
        assert nll.mean().item() == pytest.approx(expected.loss.item(), abs=1e-4)
        said = tokens[:, :prompt]
        for _ in range(4):
            said = torch.cat([said, logits(plain, said)[:, -1:].argmax(-1)], dim=1)
            if said[0, -1].item() in chat.stops:
                break
        kept = [token for token in said[0, prompt:].tolist() if token not in {*chat.stops, chat.pad}]
        assert answers[index] == chat.tokenizer.decode(kept).strip()


@pytest.mark.parametrize("name", zoo.KINDS)
def test_what_the_table_has_no_mark_for_is_refused_before_a_worker_starts(name, folder, configured):
    for method in zoo.METHOD_CONFIGS:
        if zoo.refusal(name, method, folder(name)):
            config = configured(name, method)
            with pytest.raises(ConfigError, match=r"method\.(base|adapter|init) .* set method\.(base|adapter|init)="):
                before_training(config, folder(name), split_of(([0] * 4, [0] * 4)), [])


@pytest.mark.parametrize(("name", "method"), in_turn(method for method in zoo.METHOD_CONFIGS if method != "lora"))
def test_what_the_table_has_a_mark_for_goes_all_the_way(name, method, folder, configured, tmp_path):
    if not zoo.refusal(name, method, folder(name)):
        goes_all_the_way(configured(name, method), tmp_path)


@pytest.mark.parametrize(("name", "zero_stage"), in_turn([2, 3]))
def test_two_workers_take_the_steps_of_a_plain_loop(name, zero_stage, configured, tmp_path):
    config = configured(name, "lora", f"train.zero_stage={zero_stage}", "ray.cpu_matmul_dtype=bfloat16")
    shape = base_model.read_config(config.model)
    if zero_stage == 3 and Rehearsal.of(configured(name, "lora"), shape).adapts_experts:
        with pytest.raises(ConfigError, match=r"set train\.zero_stage=2, or adapt the other layers alone"):
            Rehearsal.of(config, shape)
        others = "method.target_modules=['q_proj', 'v_proj']"
        config = configured(name, "lora", "train.zero_stage=3", "ray.cpu_matmul_dtype=bfloat16", others)
    toml = config_file.dumps(config)
    rows = colour_rows(36)
    found = train_all({f"{name}-{zero_stage}".replace(" ", "-"): toml}, rows, tmp_path, num_workers=2)
    (trained,) = found.values()
    assert trained.losses == pytest.approx(plain_training(toml, rows).losses, abs=0.05)


def test_the_page_of_base_models_is_what_the_code_does(folder):
    assert zoo.TABLE.read_text(encoding="utf-8") == zoo.page(folder), "run `python -m tests.models.zoo`"
