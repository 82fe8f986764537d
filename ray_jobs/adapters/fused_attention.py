"""Attention with its way back, as the fused layer calls it: of records in rows, or packed in one row.

Shapes: N records of S tokens, K heads of D; keys and values may have fewer heads. Packed: see `base.packed`.
"""

import torch
from torch import Tensor

from ray_jobs.base.packed import Packing

Saved = tuple[Tensor, ...]
"""Of each call of the kernel: queries, keys, values, what came out, and the logarithms of the sums."""
SAVED = 5

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q_NSKD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, scaling: float, packing: Packing | None
) -> tuple[Tensor, Saved]:
    """What each token finds, (N, S, K, D), and what `backward` needs. All in float32."""
    if packing is None:
        q, k, v = (each.transpose(1, 2) for each in (q_NSKD, k_NSKD, v_NSKD))
        attended, saved = _forth(q, k, v, scaling)
        return attended.transpose(1, 2), saved
    C = packing.common
    queries, *own = (packing.padded(each[0, C:]) for each in (q_NSKD, k_NSKD, v_NSKD))
    q, k, v = (each[:, :C].transpose(1, 2) for each in (q_NSKD, k_NSKD, v_NSKD))
    keys, values = (packing.behind(beginning, rest) for beginning, rest in zip((k, v), own, strict=True))
    attended, saved = _forth(queries, keys, values, scaling, packing.bias)
    rest_RKD = packing.packed(attended)
    if not C:
        return rest_RKD[None], saved
    beginning, of_beginning = _forth(q, k, v, scaling)
    return torch.cat([beginning[0].transpose(0, 1), rest_RKD])[None], saved + of_beginning


def backward(
    gradient_NSKD: Tensor, saved: Saved, scaling: float, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, as they went in."""
    if packing is None:
        q, k, v = _back(gradient_NSKD.transpose(1, 2), saved, scaling)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    C = packing.common
    q, k, v = _back(packing.padded(gradient_NSKD[0, C:]), saved[:SAVED], scaling, packing.bias)
    rest = [packing.packed(each) for each in (q, k[:, :, C:], v[:, :, C:])]
    if not C:
        return rest[0][None], rest[1][None], rest[2][None]
    common = _back(gradient_NSKD[:, :C].transpose(1, 2), saved[SAVED:], scaling)
    for own, from_records in zip(common[1:], (k, v), strict=True):
        own += from_records[:, :, :C].sum(dim=0)  # every record looks at the same beginning
    q, k, v = (torch.cat([own[0].transpose(0, 1), each])[None] for own, each in zip(common, rest, strict=True))
    return q, k, v


def _forth(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None = None) -> tuple[Tensor, Saved]:
    attended, sums = kernel(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scaling)
    return attended, (q, k, v, attended, sums)


def _back(gradient: Tensor, saved: Saved, scaling: float, bias: Tensor | None = None) -> list[Tensor]:
    return list(kernel_backward(gradient, *saved, 0.0, bias is None, attn_mask=bias, scale=scaling))
