from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ray_jobs.base import attention
from ray_jobs.base.answer_loss import answer_nll
from ray_jobs.base.batching import IGNORED


@pytest.fixture(scope="module")
def model(tiny_base: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of unlike length, padded on the right, with answers at unlike places."""
    torch.manual_seed(0)
    input_ids = torch.randint(0, 250, (2, 12))
    labels = torch.full_like(input_ids, IGNORED)
    labels[0, 4:7] = input_ids[0, 4:7]
    labels[1, 9:12] = input_ids[1, 9:12]
    input_ids[0, 7:] = 256
    return input_ids, labels


def test_the_loss_equals_that_of_the_full_logits(model, batch):
    input_ids, labels = batch
    mask = torch.ones_like(input_ids)
    mask[0, 7:] = 0
    full = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    expected = F.cross_entropy(full.reshape(-1, full.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(answer_nll(model, input_ids, labels).mean(), expected)


def test_the_gradient_equals_that_of_the_full_logits(model, batch):
    input_ids, labels = batch
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    ours = torch.autograd.grad(answer_nll(model, input_ids, labels).mean(), weight)[0]
    full = model(input_ids=input_ids).logits[:, :-1]
    loss = F.cross_entropy(full.reshape(-1, full.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, weight)[0])


def test_the_head_computes_no_row_without_a_label(model, batch):
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: rows.append(output.shape[0]))
    answer_nll(model, *batch)
    handle.remove()
    assert rows == [6]


def test_the_model_is_as_before_afterwards(model, batch):
    answer_nll(model, *batch)
    assert model(input_ids=batch[0]).logits.shape == (2, 12, model.config.vocab_size)


def test_values_come_row_after_row(model, batch):
    input_ids, labels = batch
    nll = answer_nll(model, input_ids, labels)
    alone = torch.cat([answer_nll(model, input_ids[row : row + 1], labels[row : row + 1]) for row in (0, 1)])
    torch.testing.assert_close(nll, alone)


def test_attention_in_float32_gives_the_logits_of_plain_attention(tiny_base, batch):
    ours = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.bfloat16, attn_implementation=attention.register()
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="eager").eval()
    mask = torch.ones_like(batch[0])
    mask[0, :3] = 0  # padded on the left, as for generation
    for attention_mask in (None, mask):
        found = ours(input_ids=batch[0], attention_mask=attention_mask).logits.float()[:, 3:]
        expected = plain(input_ids=batch[0], attention_mask=attention_mask).logits[:, 3:]
        torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)  # bfloat16 keeps 8 bits
