"""`llada`: the dense bidirectional transformer of LLaDA.

Pre-norm blocks with RMSNorm, rotary positions (half-rotation form), SwiGLU, optional grouped-query
attention, an untied output head, no biases, no causal mask and no time embedding. Module names are
those of torchtitan's llama3, whose parallelisation then applies as it is.

Shapes: B rows, L tokens of them on this context-parallel rank, D model, V vocabulary, M scored tokens of this
rank, N of all tensor-parallel ranks. Under tensor parallelism the activations between blocks are
sharded on the sequence, [B, L / tp, D].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.qwen3.model.model import FeedForward
from torchtitan.models.utils import get_dense_model_nparams_and_flops
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from memdlm_dist.compat.torch import wait_if_pending
from memdlm_dist.method.documents import Documents, SetAssignment
from memdlm_dist.method.fast_weights import AdaptedLinear, FastLinear, FastWeights, adapted
from memdlm_dist.method.logit_loss import HeadLoss
from memdlm_dist.models import initial_weights
from memdlm_dist.models.attention import (
    BidirectionalAttention,
    Mask,
    TokenContext,
    attention_method,
    document_mask,
)
from memdlm_dist.models.fsdp_schedule import FSDPSchedule, frozen
from memdlm_dist.models.head import OutputHead, Readout
from memdlm_dist.models.linears import GROUPS, LINEARS, linear_names
from memdlm_dist.models.rope import RopeScaling, rescaled_base, rotary_frequencies
from memdlm_dist.runtime.device import has_grouped_mm


@dataclass
class LLaDAArgs(BaseModelArgs):
    """Sizes of a `llada` backbone; the defaults are LLaDA-8B's."""

    enable_weight_tying: ClassVar[bool] = False  # torchtitan's adapters of Hugging Face names ask

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    hidden_dim: int = 12288
    vocab_size: int = 126464
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    native_length: int = 4096  # of the context that the published weights were trained on
    rope_scaling: float = 1.0  # by which factor the context is longer, and how `rotary_base` goes by it
    rope_scaling_method: RopeScaling = "diffusion_ntk"
    max_seq_len: int = 4096
    attn_type: str = "sdpa"
    # Standard deviation of the blocks' linears at the start. llama3's suits widths of thousands; a narrow model's
    # attention stays flat for long with it, where 1 / sqrt(dim) lets it begin to look things up.
    init_std: float = 0.02
    # The output head starts as the embedding (they are not tied): copying a token then needs no learning of each one.
    head_from_embedding: bool = False
    # Queries and keys are RMS-normalised per head.
    qk_norm: bool = False
    # It predicts the token after each position, as backbones that were converted from autoregressive ones do.
    shifted: bool = False
    # Products of groups of rows with a matrix each are one, in bfloat16, as devices have it that can: of packed
    # documents' fast weights, and of experts.
    grouped: bool = False

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take the length of the context from a configuration; torchtitan's hook."""
        self.max_seq_len = job_config.training.seq_len
        self.rope_scaling = job_config.model.rope_scaling
        self.rope_scaling_method = job_config.model.rope_scaling_method
        self.grouped = has_grouped_mm()

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        """Width of keys, and of values."""
        return self.head_dim * (self.n_kv_heads or self.n_heads)

    @property
    def rotary_base(self) -> float:
        """Base theta of the rotary positions for this context."""
        return rescaled_base(
            self.rope_theta, self.head_dim, self.native_length, self.rope_scaling, self.rope_scaling_method
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return get_dense_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)

    def adapted_linears(self, first_layer: int, targets: Sequence[str]) -> list[AdaptedLinear]:
        """Return the `targets` linears of layers `first_layer .. n_layers - 1`, where fast weights attach.

        Args:
            targets: names of linears and of their groups.
        """
        numbers = {name: number for number, name in enumerate(LINEARS)}
        return [
            AdaptedLinear(
                str(layer),
                name,
                getattr(self, LINEARS[name].reads),
                getattr(self, LINEARS[name].writes),
                LINEARS[name].row_wise,
                number=layer * len(LINEARS) + numbers[name],
            )
            for layer in range(first_layer, self.n_layers)
            for name in linear_names(targets)
        ]


class AdaptableFeedForward(FeedForward):
    """SwiGLU, W_down(silu(W_gate x) * W_up x). Each linear has fast weights if it is given any."""

    def forward(
        self, x: Tensor, fast: dict[str, FastLinear] | None = None, set_assignment: SetAssignment | None = None
    ) -> Tensor:
        fast = fast or {}
        h = F.silu(adapted(self.w1, x, fast.get("gate"), set_assignment)) * adapted(
            self.w3, x, fast.get("up"), set_assignment
        )
        return adapted(self.w2, h, fast.get("down"), set_assignment)


class TransformerBlock(nn.Module):
    """Attention and FFN; a backbone with another FFN replaces `_build_ffn` and `ffn`."""

    moe_enabled = False  # by which torchtitan's recipes tell the kinds of blocks apart

    def __init__(self, args: LLaDAArgs):
        super().__init__()
        self.attention = BidirectionalAttention(args)
        self._build_ffn(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def _build_ffn(self, args: Any) -> None:
        self.feed_forward = AdaptableFeedForward(args.dim, args.hidden_dim)

    def attend(
        self,
        x_BLD: Tensor,
        frequencies: Tensor,
        mask: Mask | None,
        set_assignment: SetAssignment | None,
        fast: dict[str, FastLinear],
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after the attention, and what the FFN reads of it."""
        # Four positional arguments, as llama3's tensor-parallel plan describes the attention's inputs.
        h_BLD = x_BLD + self.attention(
            self.attention_norm(x_BLD), frequencies, mask, None, fast=fast, set_assignment=set_assignment
        )
        return h_BLD, self.ffn_norm(h_BLD)

    def ffn(
        self, x_BLD: Tensor, fast: dict[str, FastLinear], set_assignment: SetAssignment | None, trains: bool
    ) -> Tensor:
        return self.feed_forward(x_BLD, fast=fast, set_assignment=set_assignment)

    def forward(self, x_BLD: Tensor, context: TokenContext, fast: dict[str, FastLinear] | None = None) -> Tensor:
        frequencies, mask, set_assignment, trains = context
        h_BLD, normed_BLD = self.attend(x_BLD, frequencies, mask, set_assignment, _of_group("attention", fast))
        return h_BLD + self.ffn(normed_BLD, _of_group("ffn", fast), set_assignment, trains)


def _of_group(group: str, fast: dict[str, FastLinear] | None) -> dict[str, FastLinear]:
    return {name: linear for name, linear in (fast or {}).items() if name in GROUPS[group]}


class LLaDA(ModelProtocol):
    """The backbone. `forward` is the whole of it; `trunk` and `tail` are its two parts.

    The trunk is everything below the first layer with fast weights, so its activations serve an inner
    step and the outer step alike.
    """

    block: ClassVar[type[TransformerBlock]] = TransformerBlock
    freqs_cis: Tensor
    layers: nn.ModuleDict
    fsdp_schedule = FSDPSchedule()  # its own where FSDP2 shards the backbone
    mixed_precision: torch.dtype | None = None  # which FSDP2 computes in

    def __init__(self, args: LLaDAArgs):
        super().__init__(args)
        self.model_args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.register_buffer("freqs_cis", self._rotary(), persistent=False)
        self.layers = nn.ModuleDict({str(i): self.block(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = OutputHead(args.dim, args.vocab_size, bias=False)

    def _rotary(self) -> Tensor:
        args = self.model_args
        return rotary_frequencies(args.head_dim, args.max_seq_len, args.rotary_base)

    def context(
        self,
        length: int,
        first: int = 0,
        attended_BL: Tensor | None = None,
        documents: Documents | None = None,
        per_document_sets: bool = False,
        sequence_shard: tuple[int, int] = (0, 1),
    ) -> TokenContext:
        """What the layers are told of a micro-batch's tokens.

        Args:
            length: L, of this context-parallel rank.
            first: where these tokens begin in the whole rows.
            attended_BL: bool, of whole rows: the tokens that are attended to; None for all.
            documents: of whole packed rows, on the model's device.
            sets_of_documents: every document has a set of fast weights.
            sequence_shard: this tensor-parallel rank's number, and that of all.
        """
        if documents is None:
            attended_B11L = attended_BL[:, None, None, :] if attended_BL is not None else None
            return TokenContext(self.freqs_cis[first : first + length], attended_B11L)
        assert attended_BL is None
        here = documents.slice(first, length)
        several = per_document_sets and documents.slots > 1
        set_assignment = here.assign_sets(self.model_args.grouped, *sequence_shard) if several else None
        device = documents.number_BL.device.type
        method = attention_method(device, self.model_args.head_dim, self._dtype(device))
        return TokenContext(self.freqs_cis[here.position_BL], document_mask(documents, method), set_assignment)

    def _dtype(self, device_type: str) -> torch.dtype:
        """Return the type that the blocks compute in."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.mixed_precision or next(self.parameters()).dtype

    def extend_rope(self, length: int) -> None:
        """Make the table of rotary positions long enough; beyond the length of training the model extrapolates."""
        if length > len(self.freqs_cis):
            self.model_args = replace(self.model_args, max_seq_len=length)
            with torch.device(self.freqs_cis.device):
                self.freqs_cis = self._rotary()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights by torch's seed, and compute the RoPE table; torchtitan's hook."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._rotary()
        initial_weights.draw(self, self.model_args)

    def forward(
        self,
        tokens_BL: Tensor,
        index_M: Tensor,
        fast: FastWeights | None = None,
        readout: Readout | HeadLoss = "logits",
        context: TokenContext | None = None,
    ) -> Tensor:
        """Pass through the whole model, the head at positions `index_M` of this rank's flattened activations.

        With a gradient it is the training loss's pass. Returns as `tail` does.

        Args:
            context: None for rows of their own, whole and attended to.
        """
        context = (context or self.context(tokens_BL.shape[1]))._replace(trains=torch.is_grad_enabled())
        return self._head(self._layers(self._embed(tokens_BL), 0, fast, context), index_M, readout)

    def trunk(self, inputs: Sequence[Tensor], stop: int, context: TokenContext) -> list[Tensor]:
        """Pass several inputs through embedding and layers `0 .. stop - 1`; returns what layer `stop` reads.

        The inputs go through each layer together, while its parameters are gathered. The first is the outer loss's
        and has a gradient (if that is enabled at all), the others have none.

        Args:
            inputs: tokens `[B, L]` each.
            context: of the tokens.
        """
        # The first goes first in every layer. Some versions of torch leave the casts of a no_grad pass in
        # autocast's cache, and a pass that takes those has no gradient.
        with self.fsdp_schedule.unsharded(0):
            first, others = self._embed(inputs[0]), without_gradient(self._embed, inputs[1:])
        training = context._replace(trains=torch.is_grad_enabled())
        for layer in range(stop):
            block = self.layers[str(layer)]
            with self.fsdp_schedule.unsharded(layer + 1):
                first, others = block(first, training), without_gradient(block, others, context)
        return [first, *others]

    def tail(
        self,
        h_BLD: Tensor,
        start: int,
        index_M: Tensor,
        fast: FastWeights | None,
        readout: Readout | HeadLoss,
        context: TokenContext,
        outer: bool = False,
    ) -> Tensor:
        """Pass the trunk's activations through layers `start .. n - 1`, then the head at `index_M`.

        Args:
            outer: this is the outer loss's pass, not one of the inner loop.

        Returns:
            Losses `[G]` if `readout` describes them; logits `[N, V]`; or the last layer's output `[N, D]`
            before or after the final norm.
        """
        context = context._replace(trains=outer and torch.is_grad_enabled())
        return self._head(self._layers(h_BLD, start, fast, context), index_M, readout)

    @contextmanager
    def inner_steps(self, start: int) -> Iterator[None]:
        """The inner loop's passes through layers `start .. n - 1` and head: their parameters are constants to it."""
        layers = list(self.layers.values())[start:]
        with self.fsdp_schedule.inner_steps(start), frozen([*layers, self.norm, self.output]):
            yield

    def _embed(self, tokens_BL: Tensor) -> Tensor:
        # Under tensor parallelism this is a collective's pending result.
        return wait_if_pending(self.tok_embeddings(tokens_BL))

    def _layers(self, h_BLD: Tensor, start: int, fast: FastWeights | None, context: TokenContext) -> Tensor:
        for layer in range(start, self.model_args.n_layers):
            name = str(layer)
            h_BLD = self.layers[name](h_BLD, context, (fast or {}).get(name))
        return h_BLD

    def _head(self, h_BLD: Tensor, index_M: Tensor, readout: Readout | HeadLoss) -> Tensor:
        # Pick the scored tokens first: the final norm and, under tensor parallelism, the gathering of
        # the sequence shards then touch those alone.
        h_1MD = h_BLD.flatten(0, 1).index_select(0, index_M).unsqueeze(0)
        normed_1MD = self.norm(h_1MD)
        # By keyword: the hook of tensor parallelism replaces all positional arguments by the first.
        out = self.output(h_1MD if readout == "pre_final_norm" else normed_1MD, readout=readout)
        if isinstance(readout, HeadLoss):
            return out.to_local() if isinstance(out, DTensor) else out
        # FSDP2 warns of views that leave it with a gradient, which do no harm here: hidden states are small enough
        # to copy, logits are for tests and tools.
        return out.flatten(0, 1) if readout == "logits" else out.flatten(0, 1).clone()


@torch.no_grad()
def without_gradient(function: Callable[..., Tensor], inputs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Return the function's value of each input."""
    return [function(x, *rest) for x in inputs]
