"""LoftQ for one weight: W = Q + L R approximated by alternating, Q in NF4, L R of rank r (arXiv:2310.08659).

Shapes: M rows and N columns of the weight, R rank, K columns of a trial basis. All arithmetic is float32.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ray_jobs.base import four_bits

# Must match the settings that `base_model.load_model` quantises with.
NF4: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "compress_statistics": True,
    "quant_storage": torch.bfloat16,
}
OVERSAMPLING = 32
FIRST_POWERS = 4
MORE_POWERS = 1


@dataclass(frozen=True)
class Split:
    """A weight that has been split. All tensors are on the CPU."""

    packed: dict[str, torch.Tensor]
    """Q as bitsandbytes serialises it: `weight` and the quantisation statistics."""
    left_MR: torch.Tensor
    right_RN: torch.Tensor
    """L and R in float32, balanced to similar norms, without the adapter's scaling."""
    weight_norm2: float
    nf4_norm2: float
    """Squared Frobenius norm of W - NF4(W), the error that QLoRA starts with."""
    loftq_norm2: float
    """Squared Frobenius norm of W - Q - L R, with L and R in bfloat16 as training holds them."""

    def as_tensors(self) -> dict[str, torch.Tensor]:
        """All of the split, to be sent between workers."""
        norms = torch.tensor([self.weight_norm2, self.nf4_norm2, self.loftq_norm2], dtype=torch.float64)
        factors = {"left_MR": self.left_MR.contiguous(), "right_RN": self.right_RN.contiguous()}
        return self.packed | factors | {"norms": norms}

    @classmethod
    def of_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Split":
        """The split that these tensors hold."""
        left_MR, right_RN, norms = (tensors.pop(name) for name in ("left_MR", "right_RN", "norms"))
        return cls(tensors, left_MR, right_RN, *norms.tolist())


def split(weight_MN: torch.Tensor, *, rank: int, steps: int, name: str) -> Split:
    """Alternate `steps` times between Q = NF4(W - L R) and L R = the best rank-`rank` fit of W - Q; keep the best pair.

    Runs on the weight's device. `name` seeds the random start, so every worker splits a layer in the same way.
    """
    weight_MN = weight_MN.float()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    num_trials = min(rank + OVERSAMPLING, *weight_MN.shape)
    basis_NK = torch.randn(weight_MN.shape[1], num_trials, generator=generator).to(weight_MN.device)
    target_MN = weight_MN
    best: Split | None = None
    nf4_norm2 = 0.0
    for step in range(steps):
        packed, quantized_MN = quantize(target_MN)
        residual_MN = weight_MN - quantized_MN
        if step == 0:
            nf4_norm2 = _norm2(residual_MN)
        powers = MORE_POWERS if step else FIRST_POWERS
        left_MR, right_RN, basis_NK = low_rank(residual_MN, rank, basis_NK, powers=powers)
        loftq_norm2 = _norm2(residual_MN - left_MR.bfloat16().float() @ right_RN.bfloat16().float())
        if best is None or loftq_norm2 < best.loftq_norm2:
            best = Split(packed, left_MR.cpu(), right_RN.cpu(), _norm2(weight_MN), nf4_norm2, loftq_norm2)
        target_MN = weight_MN - left_MR @ right_RN
    assert best is not None
    return best


def quantize(weight_MN: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weight in NF4, as `Split.packed` describes it, and its dequantised float32 values."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    four_bits.register()
    # bfloat16 first, as transformers loads a weight before quantising it; dequantisation returns to that dtype.
    stored = Params4bit(weight_MN.bfloat16(), requires_grad=False, **NF4).to(weight_MN.device)
    packed = {"weight": stored.data, **stored.quant_state.as_dict(packed=True)}
    return {key: tensor.cpu() for key, tensor in packed.items()}, dequantize_4bit(
        stored.data, stored.quant_state
    ).float()


def low_rank(
    matrix_MN: torch.Tensor, rank: int, start_NK: torch.Tensor, *, powers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left and right factor of the best rank-`rank` fit, and their basis: a good start for a similar matrix.

    Randomised subspace iteration, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    basis_NK = start_NK
    for _ in range(powers + 1):
        basis_MK = torch.linalg.qr(matrix_MN @ basis_NK).Q
        basis_NK, triangle_KK = torch.linalg.qr(matrix_MN.T @ basis_MK)
    # matrix ~ basis_M triangle.T basis_N.T, so only the small triangular matrix needs an SVD
    u_KK, s_K, vh_KK = torch.linalg.svd(triangle_KK.T)
    roots_R = s_K[:rank].sqrt()
    left_MR = basis_MK @ (u_KK[:, :rank] * roots_R)
    right_RN = (roots_R[:, None] * vh_KK[:rank]) @ basis_NK.T
    beyond = rank - len(roots_R)  # the rank may exceed the matrix's own
    return pad(left_MR, (0, beyond)), pad(right_RN, (0, 0, 0, beyond)), basis_NK


def _norm2(matrix_MN: torch.Tensor) -> float:
    return matrix_MN.double().square().sum().item()
