from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from ray_jobs.text import answer_loss
from ray_jobs.text.answer_loss import answer_nll
from ray_jobs.text.batching import IGNORED
from tests.models.tiny import SHAPE

# Models that do something to their logits after the head, by the name of it in their config, and one that does nothing.
AFTER_HEAD = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 16}),
    "cohere": (CohereConfig, {"logit_scale": 0.3}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
}


@pytest.fixture(params=AFTER_HEAD)
def small(request):
    kind, more = AFTER_HEAD[request.param]
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = kind(**shape, **special, initializer_range=0.3, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def long_answers() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(3, 97, (3, 24))
    labels = input_ids.clone()
    labels[0, :5] = labels[1, :20] = labels[2, :11] = IGNORED
    return input_ids, labels


@pytest.mark.parametrize("positions", [1, 7, 100])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits_at_once(small, positions, monkeypatch):
    input_ids, labels = long_answers()
    weight = small.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(True)
    scale = torch.linspace(0.1, 2.0, int((labels[:, 1:] != IGNORED).sum()))  # each loss counts by its own factor
    full = small(input_ids=input_ids).logits[:, :-1].reshape(-1, 97)
    expected = F.cross_entropy(full, labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="none")
    expected = expected[labels[:, 1:].reshape(-1) != IGNORED]
    (expected_gradient,) = torch.autograd.grad((expected * scale).sum(), weight)

    monkeypatch.setattr(answer_loss, "CHUNK_LOGITS", positions * 97)
    found = answer_nll(small, input_ids, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * scale).sum(), weight)[0], expected_gradient)
    with torch.inference_mode():
        torch.testing.assert_close(answer_nll(small, input_ids, labels), expected.detach())
    assert "forward" not in small.get_output_embeddings().__dict__


def test_no_more_than_a_chunk_of_logits_is_computed_at_once(small, monkeypatch):
    monkeypatch.setattr(answer_loss, "CHUNK_LOGITS", 7 * 97)
    linear = mock.Mock(side_effect=F.linear)
    monkeypatch.setattr(F, "linear", linear)
    input_ids, labels = long_answers()
    answer_nll(small, input_ids, labels)
    computed = [len(rows) for rows, weight, *_ in (call.args for call in linear.call_args_list) if len(weight) == 97]
    assert max(computed) == 7
    assert sum(computed) == int((labels[:, 1:] != IGNORED).sum()) + 2  # one position to learn what follows the head


def test_a_head_that_is_trained_and_a_model_nobody_knows_keep_all_their_logits(small, monkeypatch):
    input_ids, labels = long_answers()
    expected = answer_nll(small, input_ids, labels)
    monkeypatch.setattr(answer_loss, "CHUNK_LOGITS", 7 * 97)
    head = small.get_output_embeddings()
    head.weight.requires_grad_(True)
    found = answer_nll(small, input_ids, labels)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert head.weight.grad is not None
    head.weight.requires_grad_(False)

    forward = small.forward

    def squared(*arguments, **named):
        output = forward(*arguments, **named)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(small, "forward", squared)
    monkeypatch.setattr(answer_loss, "_after_head", {})
    assert not torch.allclose(answer_nll(small, input_ids, labels), expected)
    full = small(input_ids=input_ids).logits[:, :-1][labels[:, 1:] != IGNORED]
    expected = F.cross_entropy(full, labels[:, 1:][labels[:, 1:] != IGNORED], reduction="none")
    torch.testing.assert_close(answer_nll(small, input_ids, labels), expected)
