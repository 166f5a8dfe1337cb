"""Bidirectional attention with rotary positions, which every backbone has.

Shapes: B rows, L tokens, S slots for a row's documents, H heads, d head, j pairs of a head's dimensions.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.attention import (
    FlexAttentionWrapper,
    ScaledDotProductAttentionWrapper,
    create_attention_mask,
)
from torchtitan.models.llama3.model.model import Attention

from memdlm_dist.compat.torch import varlen_attention
from memdlm_dist.method.documents import Documents, SetAssignment
from memdlm_dist.method.fast_weights import FastLinear, adapted
from memdlm_dist.models.rope import rotate
from memdlm_dist.runtime.device import has_flash_attention


class VarlenSequences(NamedTuple):
    """Sequences that all rows, laid end to end, consist of; a token attends to its own."""

    cu_seqlens: Tensor  # int32: where each ends, behind a 0
    max_seqlen: int  # no sequence is longer


# What attention is restricted to: bool, True where a token attends, that broadcasts to [B, H, L, L]; blocks of it; or
# sequences.
Mask = Tensor | BlockMask | VarlenSequences
Method = Literal["varlen", "blocks", "dense"]


class TokenContext(NamedTuple):
    """What the layers are told of the tokens besides their states; the same for all passes of a micro-batch."""

    frequencies: Tensor  # complex64 [L, j], or [B, L, j] for packed rows: rotary positions of this rank's tokens
    mask: Mask | None = None  # over whole rows; None: every token attends to its whole row
    set_assignment: SetAssignment | None = None  # None where a row has one set of fast weights
    trains: bool = False  # this pass is the training loss's, not one of the inner loop or of validation


def attention_method(device_type: str, head_dim: int, dtype: torch.dtype) -> Method:
    """Return how attention within documents is computed: the first of these that runs.

    - "varlen": torch's variable-length attention, flash kernels that CUDA has for 16 bits and some widths of a head.
    - "blocks": flex attention, which has no backward pass on a CPU, and no kernel for narrower heads.
    - "dense": scaled dot-product attention with a mask.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if device_type == "cuda" and fits and has_flash_attention():
        return "varlen"
    return "blocks" if device_type != "cpu" and head_dim >= 16 else "dense"


def document_mask(documents: Documents, method: Method) -> Mask:
    """Restrict attention to documents; a row's padding is one more.

    Args:
        documents: of whole rows.
    """
    number_BL = documents.number_BL
    batch, length = number_BL.shape
    if method == "varlen":
        return VarlenSequences(documents.cu_seqlens(), length)
    if method == "dense":
        return (number_BL.unsqueeze(2) == number_BL.unsqueeze(1)).unsqueeze(1)

    def within_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return number_BL[b, query] == number_BL[b, key]

    mask: BlockMask = create_attention_mask(within_document, batch, None, length, length, device=number_BL.device)
    return mask


class BidirectionalAttentionKernel(ScaledDotProductAttentionWrapper):
    """torchtitan's wrapper around scaled dot-product attention, which is causal unless told otherwise.

    It takes no mask either: a dense one goes to torch's function directly, blocks to torchtitan's wrapper around flex
    attention, sequences to torch's variable-length attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flex = FlexAttentionWrapper()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, mask: Mask | None = None) -> Tensor:
        if mask is None:
            return super().forward(q, k, v, enable_gqa=enable_gqa, is_causal=False)
        if isinstance(mask, BlockMask):
            return self.flex(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
        if isinstance(mask, VarlenSequences):
            # Autocast does not know it: what follows a norm may be in float32.
            q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            return varlen_attention(q, k, v, *mask).unflatten(0, (-1, mask.max_seqlen)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


class BidirectionalAttention(Attention):
    """Every token attends to every token of its sequence or document. The projections are llama3's.

    Each projection has fast weights if it is given any: "q", "k", "v", "o".

    Args:
        args: a `LLaDAArgs`; with `qk_norm`, queries and keys are RMS-normalised per head before they are rotated.
    """

    def __init__(self, args: Any):
        super().__init__(args)
        self.inner_attention: nn.Module = BidirectionalAttentionKernel()
        self.qk_norm: bool = args.qk_norm
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        attention_masks: Mask | None = None,
        positions: None = None,
        fast: dict[str, FastLinear] | None = None,
        set_assignment: SetAssignment | None = None,
    ) -> Tensor:
        """`freqs_cis`, `attention_masks` and `set_assignment` are the fields of `TokenContext`."""
        # The signature is that of llama3's tensor-parallel plan; see `TransformerBlock.forward`.
        fast = fast or {}
        batch, length, _ = x.shape
        projections = (("q", self.wq), ("k", self.wk), ("v", self.wv))
        # -1 heads: tensor parallelism leaves each rank a part of them.
        q, k, v = (
            adapted(linear, x, fast.get(name), set_assignment).view(batch, length, -1, self.head_dim)
            for name, linear in projections
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y_BHLd = self.inner_attention(q, k, v, enable_gqa=self.enable_gqa, mask=attention_masks)
        return adapted(self.wo, y_BHLd.transpose(1, 2).reshape(batch, length, -1), fast.get("o"), set_assignment)
