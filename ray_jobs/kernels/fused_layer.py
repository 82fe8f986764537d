"""A decoder layer of Llama's architecture, with LoRA on all its linear layers, as one autograd function on CPUs.

    n = norm(x)     q, k, v = products of n            y = x + product of attention(q, k, v)
    m = norm(y)     gate, up = products of m           z = y + product of (silu(gate) up)

Additions are fused into matrix products, and the layers that share an input have their W, A and B in one matrix M:

    y = [x, x s A^T] [W, B]^T          gradient of x: [g, g B] [W; s A]          M = [W, B; s A, 0]

The trained, stored and published parameters are peft's own. What this does not cover goes a layer's own way: `_form`.

Shapes: N records of S tokens, T = N S, U tokens that are read, H hidden, I input, O output, R ranks, X heads of size D,
the first K of them queries. A + stands for the additional columns of the factors, R rounded up. Outside attention,
packed records (see `text.answer_loss`) count as one record with all their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ray_jobs.base import attention
from ray_jobs.base.packing import Packing
from ray_jobs.kernels import float32_layers, fused, fused_attention
from ray_jobs.kernels.fused import Adapted
from ray_jobs.kernels.fused_attention import Heads

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Decoder layer classes whose forward pass is the formula above."""
STEP = 32
"""The number of factor columns is padded to a multiple of this, AMX's step through the inner dimension of a 16-bit
product: 16 more columns cost a third of the product's time, 32 cost 3 %."""
TOKENS = 16
"""The number of rows of 16-bit products is padded to a multiple of this, the height of AMX's tiles: oneDNN compiles a
kernel for each new shape, which takes as long as another product. float32 mostly uses a BLAS, which does not."""

silu_backward = torch.ops.aten.silu_backward


class Joined:
    """M of the layers that share one input, and views of it for the products."""

    def __init__(self, layers: Sequence[Adapted]) -> None:
        """Build M; dense weights are moved into it for good, so that memory holds them once."""
        outputs, inputs = sum(len(layer.B) for layer in layers), layers[0].A.shape[1]
        more = _columns(layers)
        M = layers[0].A.new_zeros(outputs + more, inputs + more, dtype=layers[0].dtype)
        self.forth, self.back = M[:outputs].T, M[:, :inputs]
        """Views of M: [W, B]^T (I+, O) and [W; s A] (O+, I)."""
        self.A_IR, B_OR = M[outputs:, :inputs].T, M[:outputs, inputs:]
        self.rows, self.ranks = _slices(layers, "B"), _slices(layers, "A")
        """Slices of each layer's outputs, and of each layer's ranks."""
        self.A = [self.A_IR.T[ranks] for ranks in self.ranks]
        self.B = [B_OR[rows, ranks] for rows, ranks in zip(self.rows, self.ranks, strict=True)]
        self.filled_by: Products | None = None
        """The products whose factors were copied into M last; None before the first copy."""
        self.weights = [M[rows, :inputs] for rows in self.rows]
        # The shape is compared too: under ZeRO-3, 4-bit weights are stored with dtype bfloat16.
        self.is_kept = all(
            layer.weight.dtype is M.dtype and layer.weight.shape == own.shape
            for layer, own in zip(layers, self.weights, strict=True)
        )
        for layer, place in zip(layers, self.weights, strict=True):
            for block, weight in layer.blocks(layer.weight):
                place[block] = weight
            if self.is_kept:
                layer.weight.data = place

    def holds(self, layers: Sequence[Adapted]) -> bool:
        return all(
            layer.weight.untyped_storage() is own.untyped_storage()
            and layer.weight.storage_offset() == own.storage_offset()
            for layer, own in zip(layers, self.weights, strict=True)
        )


class Products:
    """The matrix products of the layers that share one input. The joint B is block-diagonal: zero between one layer's
    outputs and another's ranks."""

    def __init__(self, layers: Sequence[Adapted], kept: dict[str, Joined], name: str) -> None:
        """`kept` caches M by `name`; for quantised weights M is built anew for each product."""
        self.layers, self.dtype, self.scaling = layers, layers[0].dtype, layers[0].scaling
        self.inputs, self.outputs = layers[0].A.shape[1], sum(len(layer.B) for layer in layers)
        self.more = _columns(layers)
        self._kept, self._name = kept, name

    def weights(self) -> list[Tensor]:
        """The trained factors, in the order in which `backward` returns their gradients."""
        return [factor for layer in self.layers for factor in (layer.A, layer.B)]

    def room(self, num_tokens: int, width: int) -> Tensor:
        """Allocate an operand (T, width+) with zeros in the factors' columns. They must be initialised: oneDNN reads
        past the end of another operand and multiplies that by zero, and zero times NaN is NaN."""
        rows = self.layers[0].A.new_empty(num_tokens, width + self.more, dtype=self.dtype)
        rows[:, width:] = 0
        return rows

    def joined(self, *, backward: bool = False) -> Joined:
        """M with the current factors copied in. The backward pass reuses the forward pass's copy, unless there was
        another forward pass in between."""
        joined = self._kept.get(self._name)
        if joined is None or not joined.holds(self.layers):
            joined = Joined(self.layers)
            if joined.is_kept:
                self._kept[self._name] = joined
        if backward and joined.filled_by is self:
            return joined
        joined.filled_by = self
        for layer, A_RI, B_OR in zip(self.layers, joined.A, joined.B, strict=True):
            A_RI.copy_(layer.A)
            B_OR.copy_(layer.B)
        joined.A_IR *= self.scaling
        return joined

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Compute the outputs (T, O) from x (T, I+), whose factor columns it fills; `onto` (T, O) is added."""
        M = self.joined()
        torch.mm(x[:, : self.inputs], M.A_IR, out=x[:, self.inputs :])
        y = torch.mm(x, M.forth) if onto is None else torch.addmm(onto, x, M.forth)
        for layer, rows in zip(self.layers, M.rows, strict=True):
            if layer.bias is not None:
                y[:, rows] += layer.bias
        return y

    def backward(self, g: Tensor, x: Tensor, *, down: bool = True) -> tuple[Tensor | None, list[Tensor]]:
        """Compute the gradients of the input (T, I) and of the factors from g (T, O+), whose factor columns it fills,
        and the x of `forward`.

        With `down` false, the input's gradient is None.
        """
        M, g_TO, g_TR = self.joined(backward=True), g[:, : self.outputs], g[:, self.outputs :]
        for B_OR, rows, ranks in zip(M.B, M.rows, M.ranks, strict=True):
            torch.mm(g_TO[:, rows], B_OR, out=g_TR[:, ranks])
        A_RI = (g_TR.T @ x[:, : self.inputs]).mul_(self.scaling)
        gradients = []
        for layer, rows, ranks in zip(self.layers, M.rows, M.ranks, strict=True):
            B_OR = g_TO[:, rows].T @ x[:, self.inputs :][:, ranks]
            gradients += [A_RI[ranks].to(layer.A.dtype), B_OR.to(layer.B.dtype)]
        return torch.mm(g, M.back) if down else None, gradients


def _columns(layers: Sequence[Adapted]) -> int:
    """Number of factor columns: all layers' ranks, padded to a multiple of STEP except in float32."""
    ranks = sum(len(layer.A) for layer in layers)
    return ranks if layers[0].dtype is torch.float32 else -(-ranks // STEP) * STEP


def _slices(layers: Sequence[Adapted], factor: str) -> list[slice]:
    """Slice of each layer's rows of A or B among the concatenated rows of all layers."""
    ends = list(accumulate(len(getattr(layer, factor)) for layer in layers))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Form:
    """The parts and options of one decoder layer."""

    qkv: Products
    out: Products
    gate_up: Products
    down: Products
    norm_before_attention: Any
    norm_before_mlp: Any
    heads: Heads
    packing: Packing | None
    read: Tensor | None
    """Indices of the tokens that are read after this layer, int64 (U,); None for all."""

    def rows(self, tokens: int) -> int:
        """Number of rows of the products for `tokens` tokens: padded to a multiple of TOKENS, except in float32."""
        step = 1 if self.qkv.dtype is torch.float32 else TOKENS
        return -(-tokens // step) * step


class Layer(torch.autograd.Function):
    """The formula above."""

    @staticmethod
    @float32_layers.by_onednn()
    def forward(ctx: Any, hidden_NSH: Tensor, cos: Tensor, sin: Tensor, form: Form, *weights: Tensor) -> Tensor:
        N, S, H = hidden_NSH.shape
        cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
        x = _filled_up(hidden_NSH.reshape(N * S, H), form.rows(N * S), form.qkv.dtype)
        n, inverse_n = _norm(x, form.norm_before_attention, form.qkv)
        qkv_NSXD = form.qkv.forward(n)[: N * S].view(N, S, form.heads.queries + 2 * form.heads.keys, -1).float()
        _rotate(qkv_NSXD, form.heads, cos, sin)
        attended_NSKD, of_attention = fused_attention.forward(qkv_NSXD, form.heads, form.packing)
        attended, residual = attended_NSKD.reshape(N * S, -1), x
        if form.read is not None:
            attended = attended[form.read]
            residual = _filled_up(x[form.read], form.rows(len(attended)), x.dtype)
        U, T = len(attended), len(residual)
        a = form.out.room(T, form.out.inputs)
        a[:U, : form.out.inputs] = attended
        a[U:] = 0
        y = form.out.forward(a, onto=residual)
        m, inverse_m = _norm(y, form.norm_before_mlp, form.gate_up)
        gate, up = form.gate_up.forward(m).chunk(2, dim=1)
        i = form.down.room(T, form.down.inputs)
        torch.mul(F.silu(gate), up, out=i[:, : form.down.inputs])
        z = form.down.forward(i, onto=y)
        ctx.form = form
        ctx.save_for_backward(cos, sin, x, n, inverse_n, a, y, m, inverse_m, gate, up, i, *of_attention, *weights)
        ctx.num_of_attention = len(of_attention)
        return _spread(z[:U].to(hidden_NSH.dtype), form.read, N * S).view(N, S, H)

    @staticmethod
    @float32_layers.by_onednn()
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NSH,), form = gradients, ctx.form
        cos, sin, x, n, inverse_n, a, y, m, inverse_m, gate, up, i, *others = ctx.saved_tensors
        of_attention = tuple(others[: ctx.num_of_attention])
        N, S, H = gradient_NSH.shape
        gradient = gradient_NSH.reshape(N * S, H)
        if form.read is not None:
            gradient = gradient[form.read]
        U, T, inner = len(gradient), len(y), form.down.inputs
        g = form.down.room(T, H)
        g[:U, :H] = gradient
        g[U:] = 0
        g_i, down_factors = form.down.backward(g, i)
        g_gate_up = form.gate_up.room(T, 2 * inner)
        torch.mul(g_i, F.silu(gate), out=g_gate_up[:, inner : 2 * inner])
        silu_backward.grad_input(g_i.mul_(up), gate, grad_input=g_gate_up[:, :inner])
        g_m, gate_up_factors = form.gate_up.backward(g_gate_up, m)
        _add_norm_gradient(g[:, :H], g_m, y, inverse_m, form.norm_before_mlp)
        g_a, out_factors = form.out.backward(g, a)
        g_attended_NSKD = _spread(g_a[:U].float(), form.read, N * S).view(N, S, form.heads.queries, -1)
        g_NSXD = fused_attention.backward(g_attended_NSKD, of_attention, form.heads, form.packing, form.qkv.dtype)
        _rotate(g_NSXD, form.heads, cos, -sin)
        g_qkv = form.qkv.room(len(x), form.qkv.outputs)
        g_qkv[: N * S, : form.qkv.outputs] = g_NSXD.reshape(N * S, -1)
        g_qkv[N * S :] = 0
        goes_down = ctx.needs_input_grad[0]  # False in the first trained layer, below which nothing needs gradients
        g_n, qkv_factors = form.qkv.backward(g_qkv, n, down=goes_down)
        x_gradient = None
        if goes_down:
            g_x = g[:, :H] if form.read is None else _spread(g[:U, :H], form.read, len(x))
            _add_norm_gradient(g_x, g_n, x, inverse_n, form.norm_before_attention)
            x_gradient = g_x[: N * S].reshape(N, S, H).to(gradient_NSH.dtype)
        return x_gradient, None, None, None, *qkv_factors, *out_factors, *gate_up_factors, *down_factors


def adopt(model: nn.Module) -> None:
    """Convert a model's layers in LAYERS to use the function above; converted ones stay as they are."""
    for module in model.modules():
        module.__class__ = ADOPTED.get(type(module), type(module))


def part(model: nn.Module) -> None:
    """Undo the joining of weights in M: give each layer its own contiguous weights again, as they were loaded."""
    for module in model.modules():
        if kept := module.__dict__.pop("_joined", None):
            moved = {weight.data_ptr() for joined in kept.values() for weight in joined.weights}
            for parameter in module.parameters():
                if parameter.data_ptr() in moved:
                    parameter.data = parameter.data.contiguous()


def _adopted(layer_class: Any) -> type:
    """A subclass of `layer_class` that uses the function above where it applies, and otherwise its own forward."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        form = None if args else _form(self, hidden_states, **kwargs)
        if form is None:
            plain: Tensor = layer_class.forward(self, hidden_states, *args, **kwargs)
            return plain
        products = (form.qkv, form.out, form.gate_up, form.down)
        weights = [weight for product in products for weight in product.weights()]
        result: Tensor = Layer.apply(hidden_states, *kwargs["position_embeddings"], form, *weights)
        return result

    return type(layer_class.__name__, (layer_class,), {"forward": forward, "__module__": __name__})


ADOPTED = {layer_class: _adopted(layer_class) for layer_class in LAYERS}


def _form(
    layer: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> Form | None:
    """The form of a layer; None where it must use its own forward: gradients are disabled, some linear layer is not
    adapted or not covered by `fused`, there is an attention mask (other than that of packed records), a KV cache,
    attention dropout or another attention kernel, a module has hooks, or the layer uses gradient checkpointing: memory
    is short then, and this function holds all activations of a layer at once."""
    attn, mlp = layer.self_attn, layer.mlp
    if not torch.is_grad_enabled() or cache is not None or use_cache:
        return None
    if attention_mask is not None and packing is None:
        return None
    if position_embeddings is None or position_embeddings[0].shape[-1] != attn.head_dim:
        return None
    if not attention.is_float32(attn.config) or attn.config.hidden_act not in ("silu", "swish"):
        return None
    if (attn.training and attn.attention_dropout) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in layer.modules()
    ):
        return None
    if layer.gradient_checkpointing:
        return None
    modules = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if any(type(module) not in fused.LAYERS.values() for module in modules):
        return None
    adapted = [lora for module in modules if (lora := fused.adapted(module, hidden_states)) is not None]
    if len(adapted) < len(modules) or len({lora.dtype for lora in adapted}) > 1:
        return None
    kept = layer.__dict__.setdefault("_joined", {})
    is_last = attn.layer_idx == attn.config.num_hidden_layers - 1
    return Form(
        qkv=Products(adapted[:3], kept, "qkv"),
        out=Products(adapted[3:4], kept, "out"),
        gate_up=Products(adapted[4:6], kept, "gate_up"),
        down=Products(adapted[6:], kept, "down"),
        norm_before_attention=layer.input_layernorm,
        norm_before_mlp=layer.post_attention_layernorm,
        heads=Heads(attn.config.num_attention_heads, attn.config.num_key_value_heads, attn.scaling),
        packing=packing,
        read=packing.read if is_last and packing is not None else None,
    )


def _norm(x: Tensor, norm: Any, reader: Products) -> tuple[Tensor, Tensor]:
    """Compute norm(x) as an operand (T, I+), and 1 / rms of each token, float32 (T, 1)."""
    wide = x.float()
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    n = reader.room(len(x), reader.inputs)
    torch.mul((wide * inverse).to(x.dtype), norm.weight.to(x.dtype), out=n[:, : reader.inputs])
    return n, inverse


def _add_norm_gradient(g: Tensor, g_n: Tensor, x: Tensor, inverse: Tensor, norm: Any) -> None:
    """Add the gradient of a norm's input to `g`: r (w g_n) - x r^3 mean(x w g_n), with r = `inverse`."""
    wide_x, wide = x.float(), g_n.float().mul_(norm.weight)
    back = torch.linalg.vecdot(wide, wide_x).unsqueeze(-1).mul_(inverse.pow(3)).div_(x.shape[-1])
    g += wide.mul_(inverse).addcmul_(wide_x, back, value=-1).to(g.dtype)  # adding two dtypes takes four times as long


def _filled_up(x: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Cast `x` to `dtype` and append rows of zeros up to `num_rows`."""
    return F.pad(x.to(dtype), (0, 0, 0, num_rows - len(x))) if num_rows > len(x) else x.to(dtype)


def _spread(x_UH: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """Scatter x to the places `rows` among `num_rows` rows, with zeros elsewhere; None returns x as it is."""
    return x_UH if rows is None else x_UH.new_zeros(num_rows, x_UH.shape[1]).index_copy_(0, rows, x_UH)


def _rotate(qkv_NSXD: Tensor, heads: Heads, cos: Tensor, sin: Tensor) -> None:
    """Apply Llama's rotary embedding, which pairs the two halves of a head, in place; -sin gives the backward pass."""
    first, second = qkv_NSXD[:, :, : heads.queries + heads.keys].chunk(2, dim=-1)
    (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    before = first.clone()
    first.mul_(cos_first).addcmul_(second, sin_first, value=-1)
    second.mul_(cos_second).addcmul_(before, sin_second)
