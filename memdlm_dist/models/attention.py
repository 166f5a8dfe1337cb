"""Bidirectional attention with rotary positions, which every backbone has.

Shapes: B sequences, L tokens, H heads, d head, j pairs of a head's dimensions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model.model import Attention

from memdlm_dist.fast_weights import FastLinear, adapted


def rotary_frequencies(head_dim: int, length: int, theta: float) -> Tensor:
    """exp(i p theta^(-2j/d)) for position p and pair j, complex64 `[L, d/2]`.

    Complex, as in torchtitan's llama3, so that mixed precision leaves it in float32.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(length).float(), inverse)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BLHd: Tensor, frequencies_Lj: Tensor) -> Tensor:
    """Rotary positions in the half-rotation form: pairs are (x_j, x_{j + d/2}); in float32 at least."""
    cos, sin = (part[:, None, :] for part in torch.view_as_real(frequencies_Lj).unbind(-1))
    x = x_BLHd.to(torch.promote_types(x_BLHd.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x_BLHd)


class BidirectionalAttentionKernel(ScaledDotProductAttentionWrapper):
    """torchtitan's wrapper around scaled dot-product attention, which is causal unless told otherwise.

    It takes no mask either: where some tokens must not be attended to, torch's function is called directly.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, attended_BL: Tensor | None = None
    ) -> Tensor:
        if attended_BL is None:
            return super().forward(q, k, v, enable_gqa=enable_gqa, is_causal=False)
        mask_B11L = attended_BL[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11L, enable_gqa=enable_gqa)


class BidirectionalAttention(Attention):
    """Every token attends to every token of its sequence. Projections and initialisation are llama3's.

    Each projection has fast weights if it is given any: "q", "k", "v", "o".

    Args:
        args: a `LLaDAArgs`; with `qk_norm`, queries and keys are RMS-normalised per head before they are rotated.
    """

    def __init__(self, args: Any):
        super().__init__(args)
        self.inner_attention = BidirectionalAttentionKernel()
        self.qk_norm: bool = args.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Tensor | None = None,
        positions: None = None,
        fast: dict[str, FastLinear] | None = None,
    ) -> Tensor:
        """`attention_masks` is bool `[B, L]`, the tokens that are attended to; None for all."""
        # The signature is that of llama3's tensor-parallel plan; see `TransformerBlock.forward`.
        fast = fast or {}
        batch, length, _ = x.shape
        projections = (("q", self.wq), ("k", self.wk), ("v", self.wv))
        # -1 heads: tensor parallelism leaves each rank a part of them.
        q, k, v = (
            adapted(linear, x, fast.get(name)).view(batch, length, -1, self.head_dim) for name, linear in projections
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, freqs_cis[:length]), rotate(k, freqs_cis[:length])
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y_BHLd = self.inner_attention(q, k, v, enable_gqa=self.enable_gqa, attended_BL=attention_masks)
        return adapted(self.wo, y_BHLd.transpose(1, 2).reshape(batch, length, -1), fast.get("o"))

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        if self.qk_norm:
            self.q_norm.reset_parameters()
            self.k_norm.reset_parameters()
