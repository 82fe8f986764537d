"""Attention with its way back, as the fused layer calls it: of records in rows, or packed in one row.

The way there is in float32, so that losses are exact. So is the way back, but for that of long records, a third of a
step and more, between products in bfloat16: there it is in bfloat16 too, as transformers has both ways, which takes two
thirds of the time and keeps half as much.

Shapes: N records of S tokens, K heads of D; keys and values may have fewer heads. Packed: see `base.packed`.
"""

import torch
from torch import Tensor

from ray_jobs.base.packed import Packing

Saved = tuple[Tensor, ...]
"""Of each call of the kernel: queries, keys, values, what came out, and the logarithms of the sums."""
SAVED = 5

LONG = 512
"""Tokens from which on a record is."""

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q_NSKD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, scaling: float, packing: Packing | None, dtype: torch.dtype
) -> tuple[Tensor, Saved]:
    """What each token finds, (N, S, K, D), and what `backward` needs. All in float32, products around it in `dtype`."""
    if packing is None:
        qkv = [each.transpose(1, 2) for each in (q_NSKD, k_NSKD, v_NSKD)]
        attended, saved = _forth(qkv[0], qkv[1], qkv[2], scaling)
        if q_NSKD.shape[1] >= LONG and dtype is torch.bfloat16:
            saved = (*(each.to(dtype) for each in saved[:-1]), saved[-1])
        return attended.transpose(1, 2), saved
    q, k, v = (packing.apart(each[0]) for each in (q_NSKD, k_NSKD, v_NSKD))
    rest, saved = _forth(q[1], packing.behind(*k), packing.behind(*v), scaling, packing.bias)
    beginning = rest[:1, :, :0]
    if packing.common:
        beginning, of_beginning = _forth(q[0], k[0], v[0], scaling)
        saved += of_beginning
    return packing.together(beginning, rest)[None], saved


def backward(
    gradient_NSKD: Tensor, saved: Saved, scaling: float, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, as they went in."""
    if packing is None:
        q, k, v = (each.float() for each in _back(gradient_NSKD.to(saved[0].dtype).transpose(1, 2), saved, scaling))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    C, (of_common, of_rest) = packing.common, packing.apart(gradient_NSKD[0])
    q, k, v = _back(of_rest, saved[:SAVED], scaling, packing.bias)
    rest = [q, k[:, :, C:], v[:, :, C:]]
    common = [each[:1, :, :0] for each in rest]
    if C:
        common = _back(of_common, saved[SAVED:], scaling)
        for own, from_records in zip(common[1:], (k, v), strict=True):
            own += from_records[:, :, :C].sum(dim=0)  # every record looks at the same beginning
    q, k, v = (packing.together(*pair)[None] for pair in zip(common, rest, strict=True))
    return q, k, v


def _forth(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Tensor, Saved]:
    attended, sums = kernel(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scaling)
    return attended, (q, k, v, attended, sums)


def _back(gradient: Tensor, saved: Saved, scaling: float, bias: Tensor | None = None) -> list[Tensor]:
    return list(kernel_backward(gradient, *saved, 0.0, bias is None, attn_mask=bias, scale=scaling))
