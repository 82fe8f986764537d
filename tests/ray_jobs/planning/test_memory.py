"""Memory of a training, planned: against the papers, measured ones of tiny bases, and trainings that were published."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import LlamaForCausalLM

from components.config.methods import METHODS
from components.config.ray import GPUS
from components.config.schema import MethodConfig
from ray_jobs.base.base_model import Base
from ray_jobs.planning.memory import (
    FLOAT32,
    GIB,
    LOGIT_BYTES,
    MARGIN,
    Layout,
    Parts,
    adapter_bytes,
    buffer_bytes,
    logits_bytes,
    plan,
    reading,
    speed,
    weight_bytes,
)
from ray_jobs.planning.rehearsal import ModelStats, Rehearsal, StepMemory
from ray_jobs.text.answer_loss import chunk_positions
from tests.models import shapes, zoo
from tests.models.measured_step import load, measure, measure_reading
from tests.models.published import KEPT_BACK, MEMORY, QLORA_65B, ROUGH_SPEED, SPEED, Memory
from tests.models.shapes import LLAMA_2_7B, llama, small

ALONE = Layout(num_workers=1, zero_stage=0)
BATCH, LENGTH, ANSWERS = 4, 96, 12

# (outputs, inputs) of the linear layers of Llama-2-7B, 32 times.
LAYERS_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
BASE_7B = 32 * (sum(o * i for o, i in LAYERS_7B) + 2 * 4096) + 2 * 32000 * 4096 + 4096


@cache
def rehearsal(name: str) -> Rehearsal:
    return rehearsed_on(LLAMA_2_7B, name)


def rehearsed_on(shape, name: str = "lora", *, use_gpu: bool = True, **settings) -> Rehearsal:
    return Rehearsal(shape, MethodConfig(name=name, **settings), reference="x", use_gpu=use_gpu)


def without_a_step(stats: ModelStats, layout: Layout = ALONE, base: str = "bf16", **how) -> Parts:
    """The plan of what a training holds between its steps."""
    return plan(stats, StepMemory(kept=0, workspace=0), base=base, answers=0, layout=layout, **how)


def trained_7b(name: str) -> int:
    """From the papers: r inputs and outputs for LoRA, one magnitude an output for DoRA, r + outputs for VeRA."""
    row = METHODS[name]
    per_layer = {"lora": lambda o, i: row.rank * (o + i), "vera": lambda o, i: row.rank + o}
    kind = "lora" if row.adapter in ("lora", "dora") else "vera"
    magnitude = row.adapter in ("dora", "dvora")
    return 32 * sum(per_layer[kind](o, i) + magnitude * o for o, i in LAYERS_7B)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_of_llama_2_7b_is_what_the_papers_say(name):
    assert rehearsal(name).stats.trainable == trained_7b(name)


def test_vera_shares_one_pair_of_matrices_that_is_as_large_as_the_largest_layer():
    assert rehearsal("vera").stats.frozen_adapter == 256 * (11008 + 11008)
    assert rehearsal("lora").stats.frozen_adapter == 0


def test_a_dense_base_takes_four_bytes_a_weight_of_its_layers_and_its_head():
    stats, linear, embedding = rehearsal("qlora").stats, 32 * sum(o * i for o, i in LAYERS_7B), 32000 * 4096
    assert stats.parameters == BASE_7B == 6_738_415_616
    layouts = ALONE, replace(ALONE, dense_base=True)
    quantised, dense = (without_a_step(stats, layout, "nf4", use_gpu=False).weights for layout in layouts)
    # The embeddings stay bfloat16; the head, which is in 16 bits on an NF4 base too, is dense beside them.
    assert dense == 4 * linear + 4 * embedding + 2 * (BASE_7B - linear)
    assert dense > 6 * quantised


def test_checkpointing_keeps_one_hidden_state_for_each_layer():
    four, five = (rehearsed_on(small(layers)).step(4, 64, checkpointing=True).kept for layers in (4, 5))
    assert five - four == pytest.approx(4 * 64 * 128 * 2, rel=0.01)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    path: Path = tmp_path_factory.mktemp("small-base")
    torch.manual_seed(0)
    LlamaForCausalLM(small()).to(torch.bfloat16).save_pretrained(path)
    return Base(str(path), path, {})


@pytest.mark.parametrize(
    ("settings", "checkpointing"),
    [
        ({"name": "lora"}, False),
        pytest.param({"name": "lora"}, True, marks=pytest.mark.slow),
        pytest.param({"name": "lora", "dropout": 0.1}, False, marks=pytest.mark.slow),
        ({"name": "qlora"}, False),
        pytest.param({"name": "lora", "base": "int8"}, True, marks=pytest.mark.slow),
        pytest.param({"name": "qdora"}, True, marks=pytest.mark.slow),
        pytest.param({"name": "vera", "base": "nf4", "rank": 16}, False, marks=pytest.mark.slow),
        pytest.param({"name": "dvora", "rank": 16}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_is_what_a_step_really_allocates(settings, checkpointing, small_base):
    method = MethodConfig(**settings)
    real = measure(load(small_base, method, checkpointing=checkpointing), batch=BATCH, length=LENGTH, answers=ANSWERS)
    rehearsed = rehearsed_on(small(), **settings, use_gpu=False)
    stats, step = rehearsed.stats, rehearsed.step(BATCH, LENGTH, checkpointing=checkpointing)
    answers = BATCH * ANSWERS
    parts = plan(stats, step, base=method.row.base, answers=answers, layout=ALONE, use_gpu=False)
    saved_logits = answers * stats.vocabulary * FLOAT32
    assert step.kept + saved_logits == pytest.approx(real.kept, rel=0.1)
    buffers = buffer_bytes(stats, method.row.base, ALONE, trains_base=False)
    assert parts.activations + parts.logits + buffers == pytest.approx(real.peak, rel=0.1)
    assert parts.weights == pytest.approx(real.weights, rel=0.01)
    assert parts.adapter == pytest.approx(real.adapter, rel=0.01)


def test_a_step_with_sharded_weights_is_planned_as_layers_with_hooks_take_it(small_base):
    adapted = load(small_base, MethodConfig(name="lora"), checkpointing=False)
    for module in adapted.modules():  # as DeepSpeed has at stage 3
        module.register_forward_pre_hook(lambda *_: None)
    real = measure(adapted, batch=BATCH, length=LENGTH, answers=ANSWERS)
    rehearsed = rehearsed_on(small(), use_gpu=False)
    step = rehearsed.step(BATCH, LENGTH, checkpointing=False, sharded=True)
    assert step.kept + BATCH * ANSWERS * rehearsed.stats.vocabulary * FLOAT32 == pytest.approx(real.kept, rel=0.1)
    assert step.kept > 1.2 * rehearsed.step(BATCH, LENGTH, checkpointing=False).kept


def test_gradients_and_optimizer_are_what_adamw_holds(small_base):
    adapted = load(small_base, MethodConfig(name="lora"), checkpointing=False)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in trained]
    optimizer = torch.optim.AdamW(masters)
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    parts = without_a_step(rehearsed_on(small()).stats)
    assert parts.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert parts.optimizer == sum(tensor.nbytes for tensor in [*masters, *moments])


def test_moments_of_8_bits_take_what_bitsandbytes_holds():
    master = torch.nn.Parameter(torch.randn(256 * 1000))
    master.grad = torch.ones_like(master)
    optimizer = bitsandbytes.optim.AdamW8bit([master])
    optimizer.step()
    held = {name: tensor for name, tensor in optimizer.state[master].items() if isinstance(tensor, torch.Tensor)}
    del held["qmap1"], held["qmap2"]  # shared by all
    stats = replace(rehearsal("lora").stats, trainable=master.numel())
    optimizers = ("adamw", "adamw_8bit", "paged_adamw_8bit")
    wide, small_ones, paged = (without_a_step(stats, replace(ALONE, optimizer=name)) for name in optimizers)
    moments = sum(tensor.nbytes for tensor in held.values())
    assert small_ones.optimizer == master.nbytes + moments
    assert (paged.optimizer, paged.host - small_ones.host) == (master.nbytes, moments)
    assert small_ones.optimizer < 0.51 * wide.optimizer


@pytest.mark.parametrize(
    ("stage", "partitioned"),
    [
        (0, set()),
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "adapter", "weights"}),
    ],
)
def test_each_zero_stage_shares_out_one_thing_more(stage, partitioned):
    stats = rehearsal("lora").stats
    whole, shared = (without_a_step(stats, Layout(4, zero_stage)).as_json() for zero_stage in (0, stage))
    for part in ("weights", "adapter", "gradients", "optimizer"):
        assert shared[part] == math.ceil(whole[part] / (4 if part in partitioned else 1)), part


def test_every_worker_keeps_the_constants_of_an_nf4_base_at_stage_3():
    stats = rehearsal("qlora").stats
    quarter = weight_bytes(stats, "nf4", Layout(4, 3)) - weight_bytes(stats, "nf4", ALONE) / 4
    assert quarter == pytest.approx(3 / 4 * 6_476_005_376 / 64, rel=0.02)


def test_offloading_moves_the_optimizer_to_the_host_and_at_stage_3_the_base():
    stats = rehearsal("lora").stats
    here, moved = without_a_step(stats, Layout(2, 2)), without_a_step(stats, Layout(2, 2, cpu_offload=True))
    assert (moved.optimizer, moved.host - here.host) == (0, here.optimizer)
    assert here.total - moved.total == here.optimizer
    base_too = without_a_step(stats, Layout(2, 3, cpu_offload=True))
    assert base_too.weights == 0
    assert base_too.host > moved.host + 6e9
    # Not a base in four bits: ZeRO-3 with QLoRA and offloading takes more GPU memory than without (PEFT's guide,
    # accelerate/deepspeed.md).
    stats = rehearsal("qlora").stats
    here, moved = (without_a_step(stats, Layout(2, 3, cpu_offload=moves), "nf4") for moves in (False, True))
    assert moved.weights == here.weights
    assert moved.host - here.host == here.optimizer + here.weights


def test_evaluation_holds_the_whole_base_and_a_cache_of_every_record():
    # The shape of Llama-2-7B: 32 layers, keys and values of 4,096 elements of 16 bits each, for every token.
    stats = rehearsal("qlora").stats
    found = reading(stats, 0, base="nf4", records=32, length=1280, answers=256)
    assert found.cache == 32 * 1280 * 32 * 2 * 4096 * 2
    assert found.weights == weight_bytes(stats, "nf4", ALONE)
    assert found.total == sum(size for name, size in found.as_json().items() if name != "total")
    grouped = rehearsed_on(llama(4, 128, 320, 1000, 4, 2)).stats
    assert grouped.cached == 2 * 4 * 2 * 32  # two heads of 32 for the four that ask


def test_what_a_pass_needs_that_keeps_nothing_is_what_it_really_allocates(small_base):
    adapted = load(small_base, MethodConfig(name="qlora"), checkpointing=False)
    real = measure_reading(adapted, batch=BATCH, length=LENGTH)
    rehearsed = rehearsed_on(small(), "qlora", use_gpu=False)
    buffers = buffer_bytes(rehearsed.stats, "nf4", ALONE, trains_base=False)
    assert rehearsed.reading(BATCH, LENGTH) + buffers == pytest.approx(real, rel=0.1)


def test_parts_add_up_and_the_two_peaks_do_not():
    stats = rehearsal("lora").stats
    logits = logits_bytes(100, stats, 100)
    calm = plan(stats, StepMemory(10 * GIB, logits // 2), base="bf16", answers=100, layout=ALONE)
    busy = plan(stats, StepMemory(10 * GIB, 3 * logits), base="bf16", answers=100, layout=ALONE)
    assert calm.activations == 10 * GIB
    assert busy.activations + busy.logits == 10 * GIB + 3 * logits
    for parts in (calm, busy):
        assert sum(size for name, size in parts.as_json().items() if name != "total") == parts.total


@pytest.mark.slow
def test_a_7b_takes_ten_to_twenty_times_less_memory_than_full_fine_tuning():
    full = Rehearsal(LLAMA_2_7B, None, reference="llama-2-7b")
    settings = {"answers": 512, "layout": ALONE}
    whole = plan(full.stats, full.step(1, 512, checkpointing=True), base="bf16", trains_base=True, **settings)
    qlora = rehearsal("qlora")
    small_part = plan(qlora.stats, qlora.step(1, 512, checkpointing=True), base="nf4", **settings)
    assert 10 < whole.total / small_part.total < 20
    assert whole.states == 16 * BASE_7B  # arXiv:1910.02054: 2 + 2 + 12 bytes a parameter
    assert adapter_bytes(qlora.stats) < whole.weights / 100


def test_an_architecture_that_cannot_be_rehearsed_gets_a_formula(monkeypatch):
    rehearsed = rehearsed_on(small())
    monkeypatch.setattr(rehearsed._model, "get_decoder", lambda: torch.nn.Identity())
    step = rehearsed.step(2, 64, checkpointing=False)
    assert step.is_estimate
    assert step.kept == pytest.approx(rehearsed_on(small()).step(2, 64, checkpointing=False).kept, rel=0.5)


def test_heads_that_are_wider_in_some_layers_count_with_their_mean():
    # Gemma 4's full-attention layers: here one of two layers, four heads of 32 instead of 16.
    kind = zoo.KINDS["Gemma 4"]
    fewer = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}  # and, in the larger ones, fewer keys there
    rehearsed = rehearsed_on(replace(kind, text={**kind.text, **fewer}).config())
    assert rehearsed.stats.attention_width == (4 * 16 + 4 * 32) / 2
    assert rehearsed.stats.cached == 2 * 2 * (2 * 16 + 1 * 32) / 2
    assert not rehearsed.step(2, 32, checkpointing=False).is_estimate


def test_layers_whose_weights_lie_the_other_way_round_are_rehearsed_too():
    rehearsed = rehearsed_on(zoo.KINDS["GPT-2"].config(), "qlora")
    assert not rehearsed.step(2, 32, checkpointing=True).is_estimate


def test_logits_are_there_a_chunk_at_a_time_but_where_the_head_is_shared_or_trained():
    stats = rehearsal("lora").stats
    chunk = chunk_positions(stats.vocabulary)
    settings = {"base": "bf16", "use_gpu": False}

    def logits(answers, layout=ALONE, **more):
        parts = plan(stats, StepMemory(0, 0), answers=answers, layout=layout, **settings, **more)
        return parts.logits - answers * 2 * 2 * stats.width  # of the hidden states, and of their gradients

    one = chunk * LOGIT_BYTES * stats.vocabulary
    assert logits(chunk) == logits(3 * chunk) == logits(3 * chunk, Layout(2, 2)) == one
    assert logits(3 * chunk, Layout(2, 3)) == logits(3 * chunk, trains_base=True) == 3 * one
    assert logits(3 * chunk, in_chunks=False) == 3 * one


@cache
def rehearsal_of(shape: str, rank: int, targets="all-linear", base="bf16") -> Rehearsal:
    targets = list(targets) if isinstance(targets, tuple) else targets
    return rehearsed_on(getattr(shapes, shape), rank=rank, base=base, target_modules=targets)


def planned_gb(published: Memory) -> float:
    base = "int8" if published.base == "int8" else "bf16"
    rehearsed = rehearsal_of(published.shape, published.rank, published.targets, base)
    step = rehearsed.step(published.batch, published.length, checkpointing=published.checkpointing)
    parts = plan(
        rehearsed.stats,
        step,
        base=published.base,
        answers=published.batch * published.length * published.all_logits,
        layout=Layout(published.num_workers, published.zero_stage, published.cpu_offload),
        in_chunks=False,
    )
    return parts.total / 1e9


FIRST = 3  # how many of the published trainings `make test` plans; `make slow` plans the others


@pytest.mark.parametrize(
    "published",
    [*MEMORY[:FIRST], *(pytest.param(row, marks=pytest.mark.slow) for row in MEMORY[FIRST:])],
    ids=lambda row: f"{row.who[:12]}-{row.base}-{row.batch}x{row.length}",
)
def test_published_memory_is_planned_within_a_fifth(published):
    assert planned_gb(published) == pytest.approx(published.gb, rel=0.2), published.why


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # peft, of experts
def test_nine_in_ten_published_figures_lie_below_the_plan_and_its_margin():
    rows = [*MEMORY, *KEPT_BACK]
    ratios = [planned_gb(row) / row.gb for row in rows]
    covered = sum(ratio * (1 + MARGIN) >= 1 for ratio in ratios)
    assert covered >= 0.9 * len(rows)
    # And it is no larger than it must be.
    assert sum(ratio * (1 + MARGIN - 0.05) >= 1 for ratio in ratios) < 0.9 * len(rows)
    # What lies further off than a third says why.
    assert [row for row, ratio in zip(rows, ratios, strict=True) if not 0.75 <= ratio <= 4 / 3 and not row.why] == []


@pytest.mark.slow
def test_65b_fits_on_one_gpu_of_48_gb_once_its_optimizer_may_be_paged_out():
    rehearsed = rehearsal_of(QLORA_65B.shape, QLORA_65B.rank)
    step = rehearsed.step(QLORA_65B.batch, QLORA_65B.length, checkpointing=True)
    parts = plan(rehearsed.stats, step, base="nf4", answers=512, layout=Layout(1, 1, cpu_offload=True))
    assert 36 < parts.total / 1e9 < QLORA_65B.gb < (parts.total + parts.host) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    "published", [*SPEED, *ROUGH_SPEED], ids=lambda row: f"{row.who[:12]}-{row.gpu}-{row.base}-{row.length}"
)
def test_published_speed_is_planned_within_a_third_or_the_plan_is_called_rough(published):
    expected = speed(
        rehearsal_of(published.shape, published.rank).stats,
        GPUS[published.gpu],
        num_gpus=1,
        base=published.base,
        adapter="lora",
        length=published.length,
        answer_share=1.0,
        checkpointing=published.checkpointing,
    )
    assert expected.is_rough is (published in ROUGH_SPEED)
    assert 0.5 < expected.tokens_per_s / published.tokens_per_s < 2
    if not expected.is_rough:
        assert expected.tokens_per_s == pytest.approx(published.tokens_per_s, rel=1 / 3)
