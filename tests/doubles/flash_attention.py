"""Flash attention over sequences of different lengths, for machines without a GPU, as PyTorch and flash-attn have it.

It computes one sequence after the other by the formula, its causal diagonal at the bottom right (pytorch#193630,
flash-attention#1298), and refuses what the kernels refuse: mha_varlen_fwd of flash_api.cpp in either.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class FlashAttention:
    """The functions by their names and signatures, and how often they were called; `dtypes` are what they take."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
        self.dtypes = dtypes
        self.calls = 0

    def varlen_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch 2.13, torch/nn/attention/varlen.py."""
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        assert window_size == (-1, 0), "only causal attention is computed here"
        return self._attend(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
        block_table: Any = None,
    ) -> Tensor:
        """flash-attn 2.8, flash_attn/flash_attn_interface.py."""
        assert causal
        assert not dropout_p
        assert not softcap
        return self._attend(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The same over a batch of sequences of one length (B, T, heads, D)."""
        ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        q2, k2, v2 = (states.flatten(0, 1) for states in (q, k, v))
        return self.flash_attn_varlen_func(q2, k2, v2, ends, ends, q.shape[1], q.shape[1], **options).view(q.shape)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], most: tuple[int, int], scale: float | None
    ) -> Tensor:
        self._require(q, k, v, ends, most)
        self.calls += 1
        outputs = []
        for states in zip(*(_parts(each, of) for each, of in ((q, ends[0]), (k, ends[1]), (v, ends[1]))), strict=True):
            mine, keys, values = (each.transpose(0, 1).float() if each.dtype in HALF else each.transpose(0, 1)
                                  for each in states)  # fmt: skip
            keys, values = (each.repeat_interleave(len(mine) // len(each), dim=0) for each in (keys, values))
            scores = mine @ keys.transpose(1, 2) * (scale or 1 / math.sqrt(q.shape[-1]))
            later = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + keys.shape[1] - mine.shape[1])
            outputs.append((scores.masked_fill(later, -math.inf).softmax(-1) @ values).transpose(0, 1).to(q.dtype))
        return torch.cat(outputs)

    def _require(self, q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], most: tuple[int, int]) -> None:
        if q.dtype not in self.dtypes or {k.dtype, v.dtype} != {q.dtype}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if any(end.device != q.device for end in ends):
            raise RuntimeError("cu_seqlens must be on CUDA")
        if not all(end.dtype is torch.int32 and end.is_contiguous() for end in ends):
            raise RuntimeError("cu_seqlens must have dtype int32, and be contiguous")
        if any(states.dim() != 3 or states.stride(-1) != 1 for states in (q, k, v)):
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if q.shape[-1] > 256 or q.shape[-1] % 8 or {k.shape, v.shape} != {(len(k), k.shape[1], q.shape[-1])}:
            raise RuntimeError("head_size must be a multiple of 8, at most 256, and that of keys and values")
        if q.shape[1] % k.shape[1]:
            raise RuntimeError("Number of heads in key/value must divide number of heads in query")
        for states, end, longest in zip((q, k), ends, most, strict=True):
            # The kernels read past the end, and leave out what is longer, without an error.
            assert type(longest) is int
            assert int(end[-1]) == len(states)
            assert int(end.diff().max()) == longest


def _parts(states: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return states.split(ends.diff().tolist())


@contextlib.contextmanager
def installed(flash: FlashAttention) -> Iterator[None]:
    """Within, this process has the package flash-attn."""
    from transformers import modeling_flash_attention_utils as theirs

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    absent: Callable[..., Any] = lambda *_, **__: None  # noqa: E731 - what serving alone calls
    vars(package).update(
        flash_attn_func=flash.flash_attn_func,
        flash_attn_varlen_func=flash.flash_attn_varlen_func,
        flash_attn_with_kvcache=absent,
    )
    vars(padding).update(pad_input=theirs._pad_input, unpad_input=theirs._unpad_input)
    with contextlib.ExitStack() as ends:
        ends.enter_context(mock.patch.dict(sys.modules, {"flash_attn": package, "flash_attn.bert_padding": padding}))
        ends.enter_context(mock.patch.object(theirs, "is_flash_attn_2_available", return_value=True))
        ends.enter_context(mock.patch.object(theirs, "_loaded_implementation", None))
        yield
