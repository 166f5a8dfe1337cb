"""Bidirectional attention with RoPE, shared by all backbones.

Shapes: B rows, L tokens, H heads, d head dim, j = d / 2 RoPE pairs of a head.
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
from memdlm_dist.method.fast_weights import FastLinear
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.models.key_value_cache import CachedPass
from memdlm_dist.models.lora import adapted_linear
from memdlm_dist.models.rope import rotate
from memdlm_dist.runtime.device import has_flash_attention


class VarlenSequences(NamedTuple):
    """Sequence boundaries in the concatenated rows of a batch; a token attends to its own sequence."""

    cu_seqlens: Tensor  # int32, cumulative sequence lengths, starting with 0
    max_seqlen: int  # upper bound of a sequence's length


# Restriction of attention: a dense bool mask that broadcasts to [B, H, L, L] (True: attend), a block mask, or sequence
# boundaries.
Mask = Tensor | BlockMask | VarlenSequences
Method = Literal["varlen", "blocks", "dense"]


class TokenContext(NamedTuple):
    """Per-token arguments of the layers, shared by all passes of a micro-batch."""

    frequencies: Tensor  # RoPE table for this rank's tokens: complex64 [L, j], or [B, L, j] where rows differ
    mask: Mask | None = None  # over whole rows; None: every token attends to its whole row
    set_assignment: SetAssignment | None = None  # None: one set of fast weights per row or per micro-batch
    trains: bool = False  # True in passes of the training loss, False in the inner loop and in validation
    dropout: TermDropout = NO_DROPOUT  # of the low-rank terms' inputs, one mask for all passes
    cache: CachedPass | None = None  # in decoding: keys and values of earlier passes
    ffn_tokens: int | None = None  # largest number of tokens in a product of the FFN; None: all tokens at once

    def at_layer(self, layer: int) -> "TokenContext":
        """Return the arguments of a layer, whose number selects its part of the cache and of the dropout's keys."""
        cache = self.cache._replace(number=layer) if self.cache is not None else None
        return self._replace(dropout=self.dropout.at_layer(layer), cache=cache)


def attention_method(device_type: str, head_dim: int, dtype: torch.dtype) -> Method:
    """Choose the implementation of attention within documents: the first in this list that the device supports.

    - "varlen": torch's variable-length attention. CUDA only: flash kernels for 16-bit dtypes, with a head dim that is a
      multiple of 8 and at most 256.
    - "blocks": flex attention. It has no backward pass on CPU and no kernel for a head dim below 16.
    - "dense": scaled dot-product attention with a mask.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if device_type == "cuda" and fits and has_flash_attention():
        return "varlen"
    return "blocks" if device_type != "cpu" and head_dim >= 16 else "dense"


def document_mask(documents: Documents, method: Method) -> Mask:
    """Build the mask that restricts attention to documents; the padding of a row counts as one more document.

    Args:
        documents: documents of whole rows, not of a context-parallel slice.
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


def block_causal_mask(length: int, block: int, query_RT: Tensor | None = None) -> Tensor:
    """Build the dense mask of block-causal attention: a token attends to its block and to all blocks before it.

    Blocks are counted from position 0.

    Args:
        length: L, number of keys.
        block: tokens of a block.
        query_RT: positions of the queries; None for all positions, in order, on torch's default device.

    Returns:
        bool `[R, 1, T, L]`; `[1, 1, L, L]` for all positions.
    """
    key_L = torch.arange(length, device=None if query_RT is None else query_RT.device)
    query_RT = key_L.unsqueeze(0) if query_RT is None else query_RT
    return key_L // block <= (query_RT // block)[:, None, :, None]


class BidirectionalAttentionKernel(ScaledDotProductAttentionWrapper):
    """Attention kernel without causal masking, which dispatches on the type of the mask.

    torchtitan's wrapper around scaled dot-product attention is causal by default and takes no mask. Dense masks
    therefore go to torch's function directly, block masks to torchtitan's wrapper around flex attention, and sequence
    boundaries to torch's variable-length attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flex = FlexAttentionWrapper()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, mask: Mask | None = None) -> Tensor:
        """Return the attention output `[B, H, L, d]`; `k` and `v` may have fewer heads with `enable_gqa`."""
        if mask is None:
            return super().forward(q, k, v, enable_gqa=enable_gqa, is_causal=False)
        if isinstance(mask, BlockMask):
            return self.flex(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
        if isinstance(mask, VarlenSequences):
            # Autocast does not cover this operator, and queries and keys from a norm may be in float32.
            q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
            return varlen_attention(q, k, v, *mask).unflatten(0, (-1, mask.max_seqlen)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


class BidirectionalAttention(Attention):
    """llama3's attention without causal mask: a token attends to all tokens of its row or document.

    Fast weights can attach to the projections "q", "k", "v" and "o".

    Args:
        args: a `LLaDAArgs`. With `qk_norm`, queries and keys are RMS-normalised per head before RoPE.
    """

    def __init__(self, args: Any):
        super().__init__(args)
        self.head_dim: int = args.head_dim
        if args.query_dim != args.dim:  # llama3 divides the width among the heads
            self.wq, self.wo = (
                nn.Linear(*sizes, bias=False) for sizes in ((args.dim, args.query_dim), (args.query_dim, args.dim))
            )
            self.wk, self.wv = (nn.Linear(args.dim, args.kv_dim, bias=False) for _ in range(2))
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
        dropout: TermDropout = NO_DROPOUT,
        cache: CachedPass | None = None,
    ) -> Tensor:
        """Return the attention output `[B, L, D]`.

        Args:
            freqs_cis: `TokenContext.frequencies`.
            attention_masks: `TokenContext.mask`.
            fast: fast weights by projection.
            set_assignment: `TokenContext.set_assignment`.
            dropout: `TokenContext.dropout` of this layer.
            cache: `TokenContext.cache` of this layer.
        """
        # llama3's tensor-parallel plan fixes the order of the arguments; see `TransformerBlock.attend`.
        fast = fast or {}
        batch, length, _ = x.shape
        projections = (("q", self.wq), ("k", self.wk), ("v", self.wv))
        # -1 heads: under tensor parallelism a rank has only some of them.
        q, k, v = (
            adapted_linear(linear, x, name, fast, set_assignment, dropout).view(batch, length, -1, self.head_dim)
            for name, linear in projections
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v)
        y_BHLd = self.inner_attention(q, k, v, enable_gqa=self.enable_gqa, mask=attention_masks)
        y_BLD = y_BHLd.transpose(1, 2).reshape(batch, length, -1)
        return adapted_linear(self.wo, y_BLD, "o", fast, set_assignment, dropout)
