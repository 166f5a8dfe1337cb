"""`llada_moe`: LLaDA with a mixture of experts in place of every FFN, on torchtitan's components.

The router applies a float32 softmax over all experts and does not renormalise the weights of the selected ones. There
is no shared expert. Queries and keys are RMS-normalised per head. Fast weights are separate for each expert's gate, up
and down linear.

Shapes: B rows, L tokens, N = B L, G sets of fast weights, D model dim, F expert width, k experts per token, E experts
of this rank, S = N k slots: the pairs of a token and one of its experts, sorted by expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.moe.moe import GroupedExperts
from torchtitan.models.utils import get_moe_model_nparams_and_flops

from memdlm_dist.compat.torch import grouped_mm
from memdlm_dist.compat.torchao import is_nf4
from memdlm_dist.compat.torchtitan import run_padded
from memdlm_dist.method.documents import SetAssignment
from memdlm_dist.method.fast_weights import AdaptedLinear, ExpertProduct, FastLinear, adapted_experts
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.models import nf4
from memdlm_dist.models.attention import TokenContext
from memdlm_dist.models.linears import GROUPS, LINEAR_NUMBERS, LINEARS, ROUTER_NUMBER
from memdlm_dist.models.llada import LLaDA, LLaDAArgs, TransformerBlock
from memdlm_dist.models.lora import LoRALinear


@dataclass
class LLaDAMoEArgs(LLaDAArgs):
    """Sizes of a `llada_moe` backbone; the defaults are LLaDA-MoE-7B-A1B's, `hidden_dim` is the expert width."""

    dim: int = 2048
    n_layers: int = 16
    n_heads: int = 16
    hidden_dim: int = 1024
    vocab_size: int = 157184
    rope_theta: float = 50_000.0
    native_length: int = 8192
    qk_norm: bool = True
    n_experts: int = 64
    experts_per_token: int = 8

    @property
    def moe_args(self) -> MoEArgs:
        """Arguments of torchtitan's MoE components."""
        return MoEArgs(
            num_experts=self.n_experts,
            num_shared_experts=0,
            score_func="softmax",
            route_norm=False,
            score_before_experts=False,
            top_k=self.experts_per_token,
            use_grouped_mm=self.grouped,
            load_balance_coeff=None,  # no routing bias: the published model has none
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters and the training FLOPs per token, as torchtitan counts them for MFU."""
        return get_moe_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)

    def adapted_linears(self, first_layer: int, targets: Sequence[str]) -> list[AdaptedLinear]:
        """Return the adapted linears as `LLaDAArgs` does; an FFN entry stands for that linear in all experts."""
        dense = super().adapted_linears(first_layer, targets)
        return [self._expert_linear(linear) if linear.target in GROUPS["ffn"] else linear for linear in dense]

    def _expert_linear(self, linear: AdaptedLinear) -> AdaptedLinear:
        # The numbers start after all dense linears; each linear takes `n_experts` consecutive numbers.
        first = (linear.number + self.n_layers * len(LINEARS)) * self.n_experts
        return AdaptedLinear(
            linear.layer, linear.target, linear.in_features, linear.out_features, linear.row_wise, first,
            self.n_experts, self.experts_per_token,
        )  # fmt: skip


class AdaptableExperts(GroupedExperts):
    """torchtitan's experts, W_down(silu(W_gate x) * W_up x), with optional fast weights and outer LoRA adapters.

    Each expert's linears have separate adapters, A `[E, R, in]` and B `[E, out, R]`.
    """

    w1: nn.Parameter  # gate [E, F, D]
    w2: nn.Parameter  # down [E, D, F]
    w3: nn.Parameter  # up   [E, F, D]
    adapter_scale: float = 0.0  # alpha / R; 0 without adapters

    def add_adapters(self, weights: Sequence[str], rank: int, scale: float, dtype: torch.dtype) -> None:
        """Add adapters to the named weights, of "w1", "w2" and "w3"; `scale` multiplies the adapter terms."""
        for name in weights:
            experts, out_features, in_features = (weight := self.get_parameter(name)).shape
            A_ERi = torch.empty(experts, rank, in_features, dtype=dtype, device=weight.device)
            B_EoR = torch.empty(experts, out_features, rank, dtype=dtype, device=weight.device)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A_ERi))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B_EoR))
            self.adapter_scale = scale

    def forward(
        self,
        x: Tensor,
        num_tokens_per_expert: Tensor,
        fast: dict[str, FastLinear] | None = None,
        counts_EG: Tensor | None = None,
        dropout: TermDropout = NO_DROPOUT,
    ) -> Tensor:
        """Return the experts' outputs `[S, D]`; under tensor parallelism a partial sum over this rank's share of F.

        Args:
            x: inputs of the slots `[S, D]`, sorted by expert.
            num_tokens_per_expert: number of slots by expert, `[E]`.
            fast: fast weights by linear, with one set or one set per sample.
            counts_EG: number of slots by expert and sample; slots of an expert are sorted by sample. Required with
                several sets.
            dropout: dropout of the low-rank terms, with one key per slot.
        """
        # torchtitan's expert parallelism fixes the first two arguments: its hooks replace them.
        if fast is None and not self.adapter_scale and not is_nf4(self.w1):
            return cast(Tensor, super().forward(x, num_tokens_per_expert))
        weights = {
            name: w.to_local() if isinstance(w, DTensor) else nf4.dequantized(f".experts.{name}", w, self.num_experts)
            for name, w in self.named_parameters(recurse=False)
        }
        counts = num_tokens_per_expert if counts_EG is None else counts_EG.flatten()
        # A grouped product needs a multiple of 8 slots in every group. Expert parallelism's token exchange has already
        # padded the groups.
        padded = isinstance(self.w1, DTensor) and "ep" in (self.w1.device_mesh.mesh_dim_names or ())
        if not self.use_grouped_mm or padded:
            return self._run(weights, x, counts, fast or {}, dropout)

        def run(x: Tensor, counts: Tensor, *keys: Tensor) -> Tensor:
            return self._run(weights, x, counts, fast or {}, dropout.with_keys(keys))

        return run_padded(run, x, counts, 1, len(counts), *dropout.keys())

    def _run(
        self,
        weights: dict[str, Tensor],
        x_SD: Tensor,
        counts: Tensor,
        fast: dict[str, FastLinear],
        dropout: TermDropout,
    ) -> Tensor:
        product = (_grouped if self.use_grouped_mm else _loop)(counts)

        def linear(name: str, x_Si: Tensor, target: str) -> Tensor:
            own = dropout.at_linear(LINEAR_NUMBERS[target])
            y_So = adapted_experts(weights[name], x_Si, fast.get(target), product, own.fast_weights)
            if f"{name}_lora_A" not in weights:
                return y_So
            x_Si = x_Si if own.adapters is None else own.adapters(x_Si)
            term_So = product(product(x_Si, weights[f"{name}_lora_A"]), weights[f"{name}_lora_B"])
            return y_So + (self.adapter_scale * term_So).type_as(y_So)

        h_SF = F.silu(linear("w1", x_SD, "gate")) * linear("w3", x_SD, "up")
        return linear("w2", h_SF, "down").type_as(x_SD)


def _grouped(counts: Tensor) -> ExpertProduct:
    """Return the experts' matrix product as one grouped product in bfloat16."""

    def product(x_Si: Tensor, weight_noi: Tensor) -> Tensor:
        ends_n = counts.view(len(weight_noi), -1).sum(1).cumsum(0, dtype=torch.int32)
        return grouped_mm(x_Si.bfloat16(), weight_noi.bfloat16(), ends_n)

    return product


def _loop(counts: Tensor) -> ExpertProduct:
    """Return the experts' matrix product as a loop over experts; reading the counts is a device-to-host sync."""
    group_sizes = counts.tolist()

    def product(x_Si: Tensor, weight_noi: Tensor) -> Tensor:
        n_groups = len(group_sizes) // len(weight_noi)  # groups per matrix
        sizes = [sum(group_sizes[i : i + n_groups]) for i in range(0, len(group_sizes), n_groups)]
        # Slots after the last group are padding and belong to no expert.
        chunks = x_Si.split([*sizes, len(x_Si) - sum(sizes)])
        outputs = [F.linear(chunk, weight) for chunk, weight in zip(chunks, weight_noi.unbind(), strict=False)]
        padding = chunks[-1].new_zeros(len(chunks[-1]), weight_noi.shape[1], dtype=outputs[0].dtype)
        return torch.cat([*outputs, padding])

    return product


class Routed(NamedTuple):
    """Routing of a micro-batch: the experts' inputs, and the indices and scores that combine their outputs."""

    x_SD: Tensor  # inputs of the slots
    slot_S: Tensor  # int64: index of each slot in the flattened (N, k) pairs
    score_Nk: Tensor  # router weights
    load_E: Tensor  # tokens by expert, over all experts of the layer, also those on other ranks
    counts_E: Tensor  # slots by expert, in the order of the slots
    counts_EG: Tensor | None  # slots by expert and sample; None with one set of fast weights
    dropout: TermDropout  # with one key per slot


class MixtureOfExperts(MoE):
    """torchtitan's mixture of experts, with experts that take fast weights."""

    experts: AdaptableExperts
    tokens_per_expert: Tensor

    def __init__(self, args: LLaDAMoEArgs):
        super().__init__(args.moe_args, args.dim, args.hidden_dim)
        self.experts = AdaptableExperts(args.dim, args.hidden_dim, args.n_experts, args.grouped)
        # Set in `expert_parallel.py` under tensor and expert parallelism.
        self.tp_mesh: DeviceMesh | None = None
        self.local_experts = args.n_experts

    def forward(
        self,
        x: Tensor,
        fast: dict[str, FastLinear] | None = None,
        set_assignment: SetAssignment | None = None,
        trains: bool = False,
        dropout: TermDropout = NO_DROPOUT,
    ) -> Tensor:
        """Return the sum of the experts' outputs, weighted by the router, `[B, L, D]`.

        Under tensor parallelism the input is replicated and the output is a partial sum.

        Args:
            x: tokens, `[B, L, D]`.
            fast: the experts' fast weights by linear; None or empty without memory.
            set_assignment: see `TokenContext`.
            trains: this is a pass of the training loss: add its tokens to the expert load.
            dropout: dropout of the low-rank terms in this layer.
        """
        sets = len(next(iter(fast.values()))[0]) // self.local_experts if fast else 1
        routed = self.route(x, sets, set_assignment, dropout)
        if trains:
            with torch.no_grad():
                self.tokens_per_expert.add_(routed.load_E)
        out_SD = self.experts(
            routed.x_SD, routed.counts_E, fast=fast or None, counts_EG=routed.counts_EG, dropout=routed.dropout
        )
        return self.combine(out_SD, routed.slot_S, routed.score_Nk).view_as(x)

    def route(
        self, x_BLD: Tensor, sets: int, set_assignment: SetAssignment | None, dropout: TermDropout = NO_DROPOUT
    ) -> Routed:
        """Select each token's experts, and sort the slots by expert.

        Args:
            x_BLD: tokens.
            sets: number of sets of fast weights: 1, or one per sample.
            set_assignment: see `TokenContext`.
            dropout: dropout of the low-rank terms in this layer.
        """
        x_ND = x_BLD.flatten(0, 1)
        gate, own = self.router.gate, dropout.at_linear(ROUTER_NUMBER).adapters
        if own is None or not isinstance(gate, LoRALinear):
            score_Nk, expert_Nk, load_E = self.router(x_ND)
        else:
            gate.dropout = own._replace(key_BL=own.key_BL.flatten())
            score_Nk, expert_Nk, load_E = self.router(x_ND)
            gate.dropout = None
        if self.tp_mesh is not None:
            # Each rank weights its partial outputs of the experts, so the gradient of the scores is a partial sum.
            score = DTensor.from_local(score_Nk, self.tp_mesh, [Replicate()], run_check=False)
            score_Nk = score.to_local(grad_placements=[Partial()])
        _, slot_S, counts_E = self.reorderer(score_Nk, expert_Nk)
        counts_EG = self._counts_of_sets(expert_Nk, x_BLD.shape[:2], sets, set_assignment) if sets > 1 else None
        slot_dropout = dropout.at_slots(slot_S, expert_Nk)
        return Routed(x_ND[slot_S // self.router.top_k], slot_S, score_Nk, load_E, counts_E, counts_EG, slot_dropout)

    def combine(self, out_SD: Tensor, slot_S: Tensor, score_Nk: Tensor) -> Tensor:
        """Return the router-weighted sums of the experts' outputs, `[N, 1, D]`."""
        # Reorder and then sum: scattering additions into the tokens would not be deterministic.
        out_NkD = out_SD.new_zeros(score_Nk.numel(), out_SD.shape[-1]).index_copy(0, slot_S, out_SD)
        out_NkD = out_NkD.unflatten(0, score_Nk.shape)
        return torch.bmm(score_Nk.unsqueeze(1), out_NkD.float()).type_as(out_SD)

    def _counts_of_sets(
        self, expert_Nk: Tensor, shape: torch.Size, sets: int, set_assignment: SetAssignment | None
    ) -> Tensor:
        """Count the slots of each expert by sample, `[E, G]`.

        The slots of an expert keep the order of the tokens, so they are sorted by sample already.
        """
        rows, length = shape
        set_BL = torch.arange(rows, device=expert_Nk.device).unsqueeze(1).expand(rows, length)
        if set_assignment is not None:
            set_BL = set_BL * set_assignment.slots + set_assignment.slot_BL
        group_S = (expert_Nk * sets + set_BL.reshape(-1, 1)).flatten()
        counts = torch.zeros(self.experts.num_experts * sets, dtype=torch.int64, device=group_S.device)
        return counts.scatter_add(0, group_S, torch.ones_like(group_S)).view(-1, sets)


class MoEBlock(TransformerBlock):
    """A block whose FFN is a mixture of experts, named `moe` as torchtitan's recipes expect."""

    moe_enabled = True

    def _build_ffn(self, args: Any) -> None:
        self.moe = MixtureOfExperts(args)

    def ffn(self, x_BLD: Tensor, fast: dict[str, FastLinear], context: TokenContext) -> Tensor:
        """Return the mixture's output `[B, L, D]` for normalised input."""
        out = self.moe(
            x_BLD,
            fast=fast,
            set_assignment=context.set_assignment,
            trains=context.trains,
            dropout=context.dropout,
        )
        return cast(Tensor, out)

    def compile_around_experts(self, backend: str | Callable[..., Any]) -> None:
        """Compile the attention, the routing and the combination of the outputs, as three functions.

        The experts stay eager: the number of tokens per expert changes with every batch, and FSDP2 and expert
        parallelism install hooks on the experts.
        """
        for owner, name in ((self, "attend"), (self.moe, "route"), (self.moe, "combine")):
            setattr(owner, name, torch.compile(getattr(owner, name), backend=backend, fullgraph=True))


class LLaDAMoE(LLaDA):
    """The mixture-of-experts backbone: LLaDA with `MoEBlock`s."""

    block = MoEBlock
    model_args: LLaDAMoEArgs

    def mixtures(self) -> list[MixtureOfExperts]:
        """Return the mixtures of all layers, in order."""
        return [cast(MoEBlock, block).moe for block in self.layers.values()]

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights from torch's seed, and reset the RoPE table and the expert load; torchtitan's hook."""
        super().init_weights(buffer_device)
        for mixture in self.mixtures():
            mixture.tokens_per_expert = torch.zeros_like(mixture.tokens_per_expert, device=buffer_device)

    def take_load(self) -> Tensor:
        """Return this rank's tokens per expert since the last call, `[X, E]` for X layers, and reset the counts.

        Only passes of the training loss count. Activation checkpointing counts every token of its layers twice.
        """
        load_XE = torch.stack([mixture.tokens_per_expert for mixture in self.mixtures()])
        for mixture in self.mixtures():
            mixture.tokens_per_expert.zero_()
        return load_XE
