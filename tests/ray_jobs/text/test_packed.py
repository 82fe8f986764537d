"""Packed micro-batches against each record alone, through transformers' and peft's own modules in float64."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from components.config.schema import RunConfig
from ray_jobs.base import attention
from ray_jobs.base.architecture import auto_class
from ray_jobs.base.packing import Packing
from ray_jobs.text import answer_loss
from ray_jobs.text.batching import IGNORED, TokenizedSplit
from tests.doubles.flash_attention import FlashAttention, installed
from tests.models import zoo
from tests.models.spec import changed
from tests.models.splits import split_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPU = torch.device("cpu")
ANSWER = 3
SPLITS = {
    "a common beginning": (12, [9, 5, 14, 6]),
    "a beginning longer than what follows": (40, [5, 6]),
    "nothing in common": (0, [30, 5, 8]),
}
WINDOWED = ["Cohere 2", "Gemma 3, text", "Gemma 3n", "Gemma 4", "Mistral"]
"""Bases whose windows are narrower in the zoo than these records."""
NOT_TAKEN = {
    *WINDOWED,
    *("Ministral 3, with vision", "Qwen3-VL", "Gemma 3, with vision", "Gemma 4, with vision and sound"),
    *("Qwen3.5", "Gemma 2", "gpt-oss", "Falcon", "BLOOM"),
}
"""WINDOWED, and models with images, recurrent states, or positions that the kernel does not know."""


def beginning_alike(common: int, rests: list[int]) -> TokenizedSplit:
    draw = np.random.default_rng(1)
    begin = draw.integers(zoo.EOS, size=common)
    rows = [np.concatenate([begin, draw.integers(zoo.EOS, size=rest)]) for rest in rests]
    return split_of(*((row[:-ANSWER], row[-ANSWER:]) for row in rows))


def adapted(kind: str, kernel: str = attention.FLOAT32):
    config = zoo.KINDS[kind].config()
    torch.manual_seed(0)
    attention.register(kernel)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=torch.float64)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    losses.sum().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def assert_alike(model, found: torch.Tensor, expected: torch.Tensor, *, atol: float) -> None:
    """Losses, and their gradients."""
    torch.testing.assert_close(found, expected.float(), atol=atol, rtol=atol)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), atol=atol, rtol=10 * atol)


def alone(model, split: TokenizedSplit) -> torch.Tensor:
    """Each record in a pass of its own, with the loss as it is written in books."""
    losses = []
    for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        tokens = torch.from_numpy(split.tokens[start:end].astype(np.int64))
        log_p = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        chosen = log_p[torch.arange(len(tokens) - 1), tokens[1:]]
        losses.append(-chosen[torch.from_numpy(split.labelled[start + 1 : end])])
    return torch.cat(losses)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("kind", ["Llama, tied", "Qwen3"])
@pytest.mark.parametrize("kernel", [attention.FLOAT32, attention.RECORDS])
def test_losses_and_gradients_are_those_of_each_record_alone(kernel, kind, name):
    split, model = beginning_alike(*SPLITS[name]), adapted(kind, kernel)
    rows = range(len(split))
    assert answer_loss.pack(split, rows) is not None
    found = answer_loss.records_nll(model, split, rows, 0, device=CPU)
    assert_alike(model, found, alone(model, split), atol=1e-5)


def whole_mask(packing: Packing) -> torch.Tensor:
    """Which token of the row attends to which, written out: (1, 1, T, T)."""
    record = torch.repeat_interleave(torch.arange(1, len(packing.rests) + 1), torch.tensor(packing.rests))
    record = torch.cat([torch.zeros(packing.common, dtype=torch.long), record])
    return ((record[:, None] == record) | (record == 0)).tril()[None, None]


def by_mask(model, split: TokenizedSplit) -> torch.Tensor:
    """The losses of the packed row by a kernel that knows nothing of records."""
    row, kernel = answer_loss.pack(split, range(len(split))), model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    inputs = {"input_ids": row.input_ids, "position_ids": row.packing.positions}
    logits = model(**inputs, attention_mask=whole_mask(row.packing), use_cache=False).logits
    model.config._attn_implementation = kernel
    found = F.cross_entropy(logits[0], row.targets[0], ignore_index=IGNORED, reduction="none")
    return found[row.targets[0] != IGNORED]


def test_a_kernel_that_knows_nothing_of_records_gets_the_same_from_the_mask():
    split, model = beginning_alike(12, [9, 5, 14, 6]), adapted("Llama, tied")
    expected = answer_loss.records_nll(model, split, range(4), 0, device=CPU)
    torch.testing.assert_close(by_mask(model, split).float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("kind", ["Llama, tied", "Qwen3"])
@pytest.mark.parametrize("kernel", [attention.RECORDS, attention.FLASH])
def test_flash_attention_computes_what_the_mask_says(kernel, kind, name, monkeypatch):
    """Through PyTorch's and the package's function, in float64, which the double takes for this."""
    flash, split, model = FlashAttention((torch.float64,)), beginning_alike(*SPLITS[name]), adapted(kind)
    monkeypatch.setattr(varlen, "varlen_attn", flash.varlen_attn)
    monkeypatch.setattr(attention, "has_flash", lambda *_: True)
    model.config._attn_implementation = attention.register(kernel)
    with installed(flash):
        found = answer_loss.records_nll(model, split, range(len(split)), 0, device=CPU)
    assert flash.calls == model.config.num_hidden_layers
    assert_alike(model, found, by_mask(model, split), atol=1e-6)


def test_flash_attention_takes_what_every_gpu_that_has_it_computes(monkeypatch):
    def takes(*, width: int = 128, of_values: int = 128, dtype: torch.dtype = torch.bfloat16, cuda=(8, 0), **options):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: cuda)
        query, value = (SimpleNamespace(is_cuda=True, dtype=dtype, device=CPU, shape=(1, 2, 8, each))
                        for each in (width, of_values))  # fmt: skip
        return attention.has_flash(query, value, options)

    assert takes()
    assert takes(dtype=torch.float16, softcap=None, dropout=0.0)
    assert not takes(cuda=(7, 5))
    assert not takes(dtype=torch.float32)
    assert not takes(width=256, of_values=256)  # not backward on an L4
    assert not takes(width=20, of_values=20)
    assert not takes(dropout=0.1)
    assert not takes(softcap=30.0)
    assert not attention.has_flash(torch.zeros(1, 2, 8, 128).bfloat16(), torch.zeros(1, 2, 8, 128), {})


@pytest.mark.parametrize("kernel", [attention.FLOAT32, attention.RECORDS, attention.FLASH])
def test_an_attention_that_is_not_told_of_the_packing_is_refused(kernel):
    split, model = beginning_alike(12, [9, 5, 14, 6]), adapted("Llama, tied")
    model.config._attn_implementation = attention.register(kernel)
    row = answer_loss.pack(split, range(4))
    mask = row.packing.mask()
    assert mask.shape == (1, 1, 46, 46)
    assert mask.untyped_storage().nbytes() == 1
    with pytest.raises(AssertionError, match="LlamaAttention is not told"):
        model(input_ids=row.input_ids, attention_mask=mask, use_cache=False)


def test_what_is_to_be_learned_is_no_common_beginning():
    split = beginning_alike(12, [9, 5])
    split.labelled[split.offsets[1] + 7] = True  # an earlier answer, which begins with the second record's 8th token
    row = answer_loss.pack(split, range(2))
    assert row.packing.common == 6
    assert int((row.targets != IGNORED).sum()) == int(split.labelled.sum())


@pytest.mark.parametrize(
    "split",
    [
        pytest.param(beginning_alike(0, [20, 20, 19]), id="hardly anything is saved"),
        pytest.param(beginning_alike(0, [answer_loss.MOST_TOKENS, 5]), id="a row too long for a mask"),
        pytest.param(beginning_alike(9, [7]), id="a record alone"),
    ],
)
def test_records_are_padded_where_packing_does_not_pay(split):
    assert answer_loss.pack(split, range(len(split))) is None


def test_dropout_keeps_records_apart(config: RunConfig):
    assert answer_loss.may_pack(config)
    assert not answer_loss.may_pack(changed(config, "method.dropout=0.1"))


def assert_each_has_what_it_has_alone(base: "PretrainedConfig", *, is_packed: bool) -> None:
    torch.manual_seed(0)
    chosen = attention.choose(base, "auto", use_gpu=False)
    model = auto_class(base).from_config(base, attn_implementation=attention.for_text(base, chosen))
    split = beginning_alike(12, [9, 5, 14, 6])
    assert answer_loss.can_pack(model, int(split.lengths.max())) == is_packed
    with torch.no_grad():
        found, expected = answer_loss.records_nll(model.eval(), split, range(4), 0, device=CPU), alone(model, split)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_every_architecture_gives_each_record_what_it_has_alone(kind):
    assert_each_has_what_it_has_alone(zoo.KINDS[kind].config(), is_packed=kind not in NOT_TAKEN)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_holds_every_record_hides_nothing(kind):
    base = zoo.KINDS[kind].config()
    base.sliding_window = 26
    assert_each_has_what_it_has_alone(base, is_packed=True)
    assert not attention.looks_at_all_before(base, 27)


def test_a_base_whose_attention_grows_with_the_place_in_a_row_is_not_packed():
    base = zoo.KINDS["Llama 4, text"].config()
    base.floor_scale = 16  # in steps of so many tokens; in the published ones none ends within a row
    assert_each_has_what_it_has_alone(base, is_packed=False)
