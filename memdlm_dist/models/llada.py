"""`llada`: the dense bidirectional transformer of LLaDA.

Pre-norm blocks with RMSNorm, RoPE (half-rotation form), SwiGLU, optional grouped-query attention, an untied output
head, no biases, no causal mask and no time embedding. Module names follow torchtitan's llama3, so that its parallelism
plans apply unchanged.

Shapes: B rows, L tokens per row on this context-parallel rank, D model dim, V vocabulary, M scored tokens of this rank,
N scored tokens of all tensor-parallel ranks. Under tensor parallelism the activations between blocks are sharded on the
sequence dimension, [B, L / tp_size, D].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from memdlm_dist.errors import require
from memdlm_dist.method.documents import Documents, SetAssignment
from memdlm_dist.method.fast_weights import AdaptedLinear, FastLinear, FastWeights
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.method.logit_loss import HeadLoss
from memdlm_dist.models import initial_weights, nf4
from memdlm_dist.models.attention import (
    BidirectionalAttention,
    Mask,
    TokenContext,
    attention_method,
    document_mask,
)
from memdlm_dist.models.fsdp_schedule import FSDPSchedule, frozen
from memdlm_dist.models.head import OutputHead, Readout
from memdlm_dist.models.key_value_cache import CachedPass
from memdlm_dist.models.linears import LINEAR_NUMBERS, LINEARS, layer_linear, linear_names
from memdlm_dist.models.lora import adapted_linear
from memdlm_dist.models.rope import RopeScaling, rescaled_base, rotary_frequencies
from memdlm_dist.models.token_choice import TokenChoice
from memdlm_dist.runtime.device import has_grouped_mm


@dataclass
class LLaDAArgs(BaseModelArgs):
    """Sizes of a `llada` backbone; the defaults are LLaDA-8B's."""

    enable_weight_tying: ClassVar[bool] = False  # read by torchtitan's state-dict adapters
    fused_linears: ClassVar[tuple[str, ...]] = ()  # linears that are one tensor in the published weights

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    hidden_dim: int = 12288
    vocab_size: int = 126464
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    native_length: int = 4096  # context length on which the published weights were trained
    rope_scaling: float = 1.0  # context length over native length; 1 keeps the native RoPE base
    rope_scaling_method: RopeScaling = "diffusion_ntk"  # how `rotary_base` is rescaled
    max_seq_len: int = 4096
    attn_type: str = "sdpa"
    # Initial standard deviation of the blocks' linears. llama3's 0.02 suits widths in the thousands. In a narrow model
    # it keeps attention nearly uniform for many steps; with 1 / sqrt(dim) attention becomes selective early.
    init_std: float = 0.02
    # Initialise the output head from the embedding (they are not tied), so that the model need not learn separately for
    # each token how to copy it.
    head_from_embedding: bool = False
    # RMS-normalise queries and keys per head.
    qk_norm: bool = False
    # Width of one attention head; None: dim / n_heads.
    head_width: int | None = None
    # Share of a head's dimensions that RoPE rotates, the first ones.
    partial_rotary_factor: float = 1.0
    # The output at a position predicts the next token, as in backbones converted from autoregressive models.
    shifted: bool = False
    # Use grouped matrix products for experts and for the fast weights of packed documents: bfloat16, on devices that
    # support them.
    grouped: bool = False

    def __post_init__(self) -> None:
        require(
            self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim,
            f"RoPE cannot rotate {self.rotary_dim} of a head's {self.head_dim} dimensions (it rotates pairs); choose "
            "another head width or partial rotary factor.",
        )

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take context length and RoPE scaling from a configuration, and detect grouped products; torchtitan's hook."""
        self.max_seq_len = job_config.training.seq_len
        self.rope_scaling = job_config.model.rope_scaling
        self.rope_scaling_method = job_config.model.rope_scaling_method
        self.grouped = has_grouped_mm()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """Number of a head's dimensions that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def query_dim(self) -> int:
        """Total width of all query heads."""
        return self.head_dim * self.n_heads

    @property
    def kv_dim(self) -> int:
        """Total width of all key heads, which is also the width of all value heads."""
        return self.head_dim * (self.n_kv_heads or self.n_heads)

    @property
    def rotary_base(self) -> float:
        """RoPE base theta for this context length."""
        return rescaled_base(
            self.rope_theta, self.rotary_dim, self.native_length, self.rope_scaling, self.rope_scaling_method
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters and the training FLOPs per token, as torchtitan counts them for MFU."""
        return get_dense_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)

    def adapted_linears(self, first_layer: int, targets: Sequence[str]) -> list[AdaptedLinear]:
        """Return the linears of layers `first_layer .. n_layers - 1` that get fast weights.

        Args:
            first_layer: lowest adapted layer.
            targets: names of linears ("gate", "q", ...) or of groups ("ffn", "attention").
        """
        layers = range(first_layer, self.n_layers)
        return [linear for layer in layers for linear in self.layer_linears(layer, linear_names(targets))]

    def layer_linears(self, layer: int, names: Sequence[str]) -> list[AdaptedLinear]:
        """Return the linears of a layer with these names, as linears that have fast weights."""
        return [self._linear(layer, name, self.hidden_dim) for name in names]

    def _linear(self, layer: int, name: str, hidden_dim: int) -> AdaptedLinear:
        """Return a layer's linear; that of an FFN has the width `hidden_dim`."""
        spec, sizes = LINEARS[name], {"hidden_dim": hidden_dim}
        width_in, width_out = (sizes.get(size) or getattr(self, size) for size in (spec.in_size, spec.out_size))
        number = layer * len(LINEARS) + LINEAR_NUMBERS[name]
        return AdaptedLinear(str(layer), name, width_in, width_out, spec.row_wise, number)


class AdaptableFeedForward(FeedForward):
    """SwiGLU FFN, W_down(silu(W_gate x) * W_up x), with optional fast weights for each linear."""

    def forward(
        self,
        x: Tensor,
        fast: dict[str, FastLinear] | None = None,
        set_assignment: SetAssignment | None = None,
        dropout: TermDropout = NO_DROPOUT,
    ) -> Tensor:
        """Return the FFN's output `[B, L, D]`; `fast` maps "gate", "up" and "down" to fast weights."""
        fast = fast or {}
        gate = adapted_linear(self.w1, x, "gate", fast, set_assignment, dropout)
        h = F.silu(gate) * adapted_linear(self.w3, x, "up", fast, set_assignment, dropout)
        return adapted_linear(self.w2, h, "down", fast, set_assignment, dropout)


class TransformerBlock(nn.Module):
    """Pre-norm block of attention and FFN; a backbone with another FFN overrides `_build_ffn` and `ffn`."""

    moe_enabled = False  # read by torchtitan's recipes

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
        dropout: TermDropout,
        cache: CachedPass | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after the attention, and its normalised copy, the input of the FFN."""
        # llama3's tensor-parallel plan expects four positional arguments of the attention.
        h_BLD = x_BLD + self.attention(
            self.attention_norm(x_BLD),
            frequencies,
            mask,
            None,
            fast=fast,
            set_assignment=set_assignment,
            dropout=dropout,
            cache=cache,
        )
        return h_BLD, self.ffn_norm(h_BLD)

    def ffn(self, x_BLD: Tensor, fast: dict[str, FastLinear], context: TokenContext) -> Tensor:
        """Return the FFN's output `[B, L, D]` for normalised input."""
        return self.feed_forward(x_BLD, fast=fast, set_assignment=context.set_assignment, dropout=context.dropout)

    def compile_parts(self, backend: str | Callable[..., Any]) -> None:
        """Compile the attention and the FFN as two functions, for a dense layer of a backbone with mixtures."""
        compile_methods([(self, "attend"), (self.feed_forward, "forward")], backend)

    def forward(self, x_BLD: Tensor, context: TokenContext, fast: dict[str, FastLinear] | None = None) -> Tensor:
        """Return the residual stream after the block, `[B, L, D]`; `fast` has this layer's fast weights by linear."""
        frequencies, mask, set_assignment, _, dropout, cache, ffn_tokens = context
        attention_fast, ffn_fast = (_select_group(group, fast) for group in ("attention", "ffn"))
        h_BLD, normed_BLD = self.attend(x_BLD, frequencies, mask, set_assignment, attention_fast, dropout, cache)
        if ffn_tokens is None or normed_BLD.shape[:2].numel() <= ffn_tokens:
            return h_BLD + self.ffn(normed_BLD, ffn_fast, context)
        return h_BLD + self._ffn_in_chunks(normed_BLD, ffn_fast, context, ffn_tokens)

    def _ffn_in_chunks(self, x_BLD: Tensor, fast: dict[str, FastLinear], context: TokenContext, tokens: int) -> Tensor:
        """Return the FFN's output for normalised input, from products of at most `tokens` tokens, or of one per row.

        Without gradients the FFN's hidden states are the largest activations of a long row. With tensor parallelism
        each rank divides its sequence shard, and the ranks' chunks are gathered as whole shards are.
        """
        if not isinstance(x_BLD, DTensor):
            chunks = x_BLD.split(max(1, tokens // len(x_BLD)), dim=1)
        else:
            mesh, placements = x_BLD.device_mesh, x_BLD.placements
            locals_ = x_BLD.to_local().split(max(1, tokens // (len(x_BLD) * mesh.size())), dim=1)
            chunks = tuple(DTensor.from_local(x, mesh, placements, run_check=False) for x in locals_)
        return torch.cat([self.ffn(chunk, fast, context) for chunk in chunks], dim=1)


def _select_group(group: str, fast: dict[str, FastLinear] | None) -> dict[str, FastLinear]:
    return {name: linear for name, linear in (fast or {}).items() if layer_linear(name).group == group}


def compile_methods(parts: Iterable[tuple[nn.Module, str]], backend: str | Callable[..., Any]) -> None:
    """Compile methods of modules, each as one graph."""
    for owner, name in parts:
        setattr(owner, name, torch.compile(getattr(owner, name), backend=backend, fullgraph=True))


class LLaDA(ModelProtocol):
    """The dense backbone: `forward` runs the whole model, `trunk` and `tail` its two parts.

    The trunk consists of the embedding and the layers below the first adapted one. Its activations do not depend on
    fast weights, so inner steps and the outer step share them.
    """

    freqs_cis: Tensor
    layers: nn.ModuleDict
    fsdp_schedule = FSDPSchedule()  # without effect; `parallelize` replaces it if FSDP2 shards the backbone
    mixed_precision: torch.dtype | None = None  # FSDP2's compute dtype; None without FSDP2

    def __init__(self, args: LLaDAArgs):
        super().__init__(args)
        self.model_args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.register_buffer("freqs_cis", self._rotary(), persistent=False)
        self.layers = nn.ModuleDict({str(i): self._build_block(args, i) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = OutputHead(args.dim, args.vocab_size, bias=False)

    def _build_block(self, args: Any, layer: int) -> TransformerBlock:
        return TransformerBlock(args)

    def _rotary(self) -> Tensor:
        args = self.model_args
        return rotary_frequencies(args.rotary_dim, args.max_seq_len, args.rotary_base)

    def context(
        self,
        length: int,
        first: int = 0,
        attended_BL: Tensor | None = None,
        documents: Documents | None = None,
        documents_per_set: int | None = None,
        sequence_shard: tuple[int, int] = (0, 1),
        dropout: TermDropout = NO_DROPOUT,
    ) -> TokenContext:
        """Build the per-token arguments of the layers for a micro-batch.

        Args:
            length: L, tokens per row on this context-parallel rank.
            first: position of this rank's first token in the whole row.
            attended_BL: bool, over whole rows: True for tokens that may be attended to; None for all.
            documents: documents of whole packed rows, on the model's device; `attended_BL` must then be None.
            documents_per_set: consecutive documents of a row that share a set of fast weights; None: the row has one.
            sequence_shard: (tp_rank, tp_size).
            dropout: dropout of the low-rank terms, for this rank's tokens.
        """
        if documents is None:
            attended_B11L = attended_BL[:, None, None, :] if attended_BL is not None else None
            return TokenContext(self.freqs_cis[first : first + length], attended_B11L, dropout=dropout)
        assert attended_BL is None
        local_documents = documents.slice(first, length)
        groups = local_documents.grouped_by(documents_per_set or documents.slots)
        assigns = groups.slots > 1
        set_assignment = groups.assign_sets(self.model_args.grouped, *sequence_shard) if assigns else None
        device = documents.number_BL.device.type
        method = attention_method(device, self.model_args.head_dim, self._dtype(device))
        return TokenContext(
            self.freqs_cis[local_documents.position_BL],
            document_mask(documents, method),
            set_assignment,
            dropout=dropout,
        )

    def _dtype(self, device_type: str) -> torch.dtype:
        """Return the compute dtype of the blocks."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.mixed_precision or next(self.parameters()).dtype

    def extend_rope(self, length: int) -> None:
        """Extend the RoPE table to at least `length` positions; beyond the training length the model extrapolates."""
        if length > len(self.freqs_cis):
            self.model_args = replace(self.model_args, max_seq_len=length)
            with torch.device(self.freqs_cis.device):
                self.freqs_cis = self._rotary()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights from torch's seed, and compute the RoPE table; torchtitan's hook."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._rotary()
        nf4.materialize(self)
        initial_weights.draw(self, self.model_args)

    def forward(
        self,
        tokens_BL: Tensor,
        index_M: Tensor,
        fast: FastWeights | None = None,
        readout: Readout = "logits",
        context: TokenContext | None = None,
    ) -> Tensor:
        """Run the whole model, and the output head at `index_M`.

        With gradients enabled, this is a pass of the training loss (`TokenContext.trains`).

        Args:
            tokens_BL: token ids, int64.
            index_M: positions of the scored tokens in this rank's flattened activations.
            fast: fast weights by layer and linear; None without memory.
            readout: kind of output.
            context: per-token arguments; None for whole rows without documents in which all tokens are attended to.

        Returns:
            See `tail`.
        """
        context = (context or self.context(tokens_BL.shape[1]))._replace(trains=torch.is_grad_enabled())
        return self._head(self._layers(self._embed(tokens_BL), 0, fast, context), index_M, readout)

    def trunk(
        self, inputs: Sequence[Tensor], stop: int, context: TokenContext, others_context: TokenContext | None = None
    ) -> list[Tensor]:
        """Run several inputs through embedding and layers `0 .. stop - 1`, and return the inputs of layer `stop`.

        All inputs pass through a layer while its parameters are gathered. The first input is the anchor, which the
        outer loss reads; its activations carry gradients if these are enabled. The other inputs' never do.

        Args:
            inputs: token ids, `[B, L]` each.
            stop: number of layers in the trunk.
            context: per-token arguments of the first input.
            others_context: those of the other inputs; None if they are the same.
        """
        others_context = others_context or context
        # In every layer the first input runs before the others. Some versions of torch keep the casts of a no_grad pass
        # in autocast's cache, and a later pass that reuses them has no gradient.
        with self.fsdp_schedule.unsharded(0):
            first, others = self._embed(inputs[0]), without_gradient(self._embed, inputs[1:])
        training = context._replace(trains=torch.is_grad_enabled())
        for layer in range(stop):
            block = self.layers[str(layer)]
            with self.fsdp_schedule.unsharded(layer + 1):
                first = block(first, training.at_layer(layer))
                others = without_gradient(block, others, others_context.at_layer(layer))
        return [first, *others]

    def tail(
        self,
        h_BLD: Tensor,
        start: int,
        index_M: Tensor,
        fast: FastWeights | None,
        readout: Readout,
        context: TokenContext,
        outer: bool = False,
    ) -> Tensor:
        """Run the trunk's activations through layers `start .. n - 1`, and the output head at `index_M`.

        Args:
            h_BLD: output of `trunk`.
            start: first layer of the tail.
            index_M: positions of the scored tokens in this rank's flattened activations.
            fast: fast weights by layer and linear; None without memory.
            readout: kind of output.
            context: per-token arguments.
            outer: True in the pass of the outer loss, False in passes of the inner loop.

        Returns:
            Losses `[G]` if `readout` is a `HeadLoss`; else logits `[N, V]`, or the last layer's output `[N, D]` before
            or after the final norm.
        """
        context = context._replace(trains=outer and torch.is_grad_enabled())
        return self._head(self._layers(h_BLD, start, fast, context), index_M, readout)

    @contextmanager
    def inner_steps(self, start: int) -> Iterator[None]:
        """Freeze layers `start .. n - 1`, the final norm and the head in this context, for the inner loop's passes."""
        layers = list(self.layers.values())[start:]
        with self.fsdp_schedule.inner_steps(start), frozen([*layers, self.norm, self.output]):
            yield

    def _embed(self, tokens_BL: Tensor) -> Tensor:
        # Under tensor parallelism the embedding returns the pending result of a collective.
        return wait_if_pending(self.tok_embeddings(tokens_BL))

    def _layers(self, h_BLD: Tensor, start: int, fast: FastWeights | None, context: TokenContext) -> Tensor:
        for layer in range(start, self.model_args.n_layers):
            name = str(layer)
            h_BLD = self.layers[name](h_BLD, context.at_layer(layer), (fast or {}).get(name))
        return h_BLD

    def _head(self, h_BLD: Tensor, index_M: Tensor, readout: Readout) -> Tensor:
        # Select the scored tokens first, so that the final norm and, under tensor parallelism, the all-gather of the
        # sequence shards process only these.
        h_1MD = h_BLD.flatten(0, 1).index_select(0, index_M).unsqueeze(0)
        normed_1MD = self.norm(h_1MD)
        # `readout` by keyword: tensor parallelism's input hook keeps only the first positional argument.
        out = self.output(h_1MD if readout == "pre_final_norm" else normed_1MD, readout=readout)
        if isinstance(readout, HeadLoss):
            return out.to_local() if isinstance(out, DTensor) else out
        if isinstance(readout, TokenChoice):
            return out.to_local().clone() if isinstance(out, DTensor) else out
        # FSDP2 warns about returned views. Chosen tokens and hidden states are small enough to copy. Logits stay a
        # view, which is harmless: only tests and tools read them.
        return out.flatten(0, 1) if readout == "logits" else out.flatten(0, 1).clone()


@torch.no_grad()
def without_gradient(function: Callable[..., Tensor], inputs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Apply a function to each input under no_grad."""
    return [function(x, *rest) for x in inputs]
