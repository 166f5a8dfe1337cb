"""Backbones with a mixture of experts in place of most FFNs, on torchtitan's components.

What distinguishes one such backbone from another is a value of `MixtureArgs`: scores, groups and bias of the router, a
shared expert, leading dense layers. Fast weights are separate for each expert's gate, up and down linear; the shared
expert has its own.

Shapes: B rows, L tokens, N = B L, G sets of fast weights, D model dim, k experts per token, E experts of this rank,
S = N k slots: the pairs of a token and one of its experts, sorted by expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.utils import get_moe_model_nparams_and_flops

from memdlm_dist.errors import require
from memdlm_dist.method.documents import SetAssignment
from memdlm_dist.method.fast_weights import AdaptedLinear, FastLinear
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.models.attention import TokenContext
from memdlm_dist.models.experts import AdaptableExperts
from memdlm_dist.models.linears import GROUPS, LINEARS, ROUTER_NUMBER, SHARED, SHARED_NUMBER
from memdlm_dist.models.llada import AdaptableFeedForward, LLaDA, LLaDAArgs, TransformerBlock, compile_methods
from memdlm_dist.models.lora import LoRALinear

RouterScore = Literal["softmax", "sigmoid"]


@dataclass
class MixtureArgs(LLaDAArgs):
    """Sizes of a backbone with a mixture of experts; `hidden_dim` is the width of one expert.

    Attributes:
        n_experts: experts per layer.
        experts_per_token: experts that the router selects for a token.
        router_score: function that turns the router's logits into scores, over all experts.
        normalizes_scores: divide the scores of a token's experts by their sum.
        score_scale: factor of the scores.
        expert_groups: equal groups of neighbouring experts; None without groups.
        groups_per_token: groups that a token's experts may come from: those with the largest sums of their two best
            scores.
        has_expert_bias: a bias per expert is added to the scores that select groups and experts, and only to these.
        load_balance_coeff: change of the bias in each step, towards a balanced load (arXiv 2408.15664); None keeps it.
        float32_router: the router multiplies in float32; otherwise in the compute dtype.
        shared_hidden_dim: width of the shared expert, an FFN that all tokens pass through; 0 without.
        n_dense_layers: leading layers with an FFN in place of the mixture.
        dense_hidden_dim: width of that FFN.
    """

    n_experts: int = 8
    experts_per_token: int = 2
    router_score: RouterScore = "softmax"
    normalizes_scores: bool = False
    score_scale: float = 1.0
    expert_groups: int | None = None
    groups_per_token: int | None = None
    has_expert_bias: bool = False
    load_balance_coeff: float | None = None
    float32_router: bool = False
    shared_hidden_dim: int = 0
    n_dense_layers: int = 0
    dense_hidden_dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        groups, chosen = self.expert_groups or 1, self.groups_per_token or 1
        size = self.n_experts // groups
        require(
            self.n_experts % groups == 0 and (groups == 1 or size >= 2) and chosen <= groups,
            f"{self.n_experts} experts cannot be divided into {groups} groups of which a token uses {chosen}; choose "
            "equal groups of at least 2 experts.",
        )
        require(
            self.experts_per_token <= chosen * size,
            f"A token cannot use {self.experts_per_token} of the {chosen * size} experts in {chosen} groups; use more "
            "groups or fewer experts per token.",
        )

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take the settings of a configuration; torchtitan's hook."""
        super().update_from_config(job_config, **kwargs)
        self.load_balance_coeff = job_config.model.load_balance_coeff

    @property
    def moe_args(self) -> MoEArgs:
        """Arguments of torchtitan's MoE components."""
        return MoEArgs(
            num_experts=self.n_experts,
            num_shared_experts=0,  # it is a module of the block
            score_func=self.router_score,
            route_norm=self.normalizes_scores,
            route_scale=self.score_scale,
            score_before_experts=False,
            top_k=self.experts_per_token,
            num_expert_groups=self.expert_groups,
            num_limited_groups=self.groups_per_token,
            use_grouped_mm=self.grouped,
            # torchtitan makes the bias if there is a coefficient; `MixtureOfExperts` sets the true one.
            load_balance_coeff=1.0 if self.has_expert_bias else None,
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the number of parameters and the training FLOPs per token, as torchtitan counts them for MFU."""
        return get_moe_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)

    def layer_linears(self, layer: int, names: Sequence[str]) -> list[AdaptedLinear]:
        """Return the linears of a layer as `LLaDAArgs` does.

        In a layer with a mixture, a name of an FFN's linear stands for that linear of all experts, and of the shared
        expert.
        """
        if layer < self.n_dense_layers:
            return [self._linear(layer, name, self.dense_hidden_dim) for name in names]
        linears = []
        for name in names:
            in_experts = name in GROUPS["ffn"]
            linears += self._expert_linears(layer, name) if in_experts else super().layer_linears(layer, [name])
        return linears

    def _expert_linears(self, layer: int, name: str) -> list[AdaptedLinear]:
        """Return a linear of all experts, and of the shared expert if there is one."""
        linear, has_shared = self._linear(layer, name, self.hidden_dim), bool(self.shared_hidden_dim)
        # The numbers start after all linears outside mixtures. Each linear takes one per expert, the shared one last.
        first = (linear.number + self.n_layers * len(LINEARS)) * (self.n_experts + has_shared)
        routed = replace(linear, number=first, experts=self.n_experts, experts_per_token=self.experts_per_token)
        if not has_shared:
            return [routed]
        shared = self._linear(layer, name, self.shared_hidden_dim)
        return [routed, replace(shared, target=SHARED + name, number=first + self.n_experts)]


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear in float32, whatever the dtype of the arguments and of autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class Float32Linear(nn.Linear):
    """A linear that computes in float32; its weight keeps its dtype."""

    product = staticmethod(float32_linear)  # for an adapter that replaces this module

    def forward(self, x: Tensor) -> Tensor:
        """Return W x, float32."""
        return self.product(x, self.weight)


class Routed(NamedTuple):
    """Routing of a micro-batch: the experts' inputs, and the indices and scores that combine their outputs."""

    x_SD: Tensor  # inputs of the slots
    slot_S: Tensor  # int64: index of each slot in the flattened (N, k) pairs
    score_Nk: Tensor  # router weights
    load_E: Tensor  # tokens by expert, over all experts of the layer, also those on other ranks
    counts_n: Tensor  # slots by expert, or with several sets of fast weights by expert and set; in the slots' order
    dropout: TermDropout  # with one key per slot


class MixtureOfExperts(MoE):
    """torchtitan's mixture of experts, with experts that take fast weights."""

    experts: AdaptableExperts
    expert_bias: Tensor | None  # float32 [E of all ranks]; persistent
    tokens_per_expert: Tensor  # since the last optimizer step; counted only if the bias is trained
    load: Tensor  # tokens per expert since the last `LLaDAMixture.take_load`

    def __init__(self, args: MixtureArgs):
        super().__init__(args.moe_args, args.dim, args.hidden_dim)
        self.load_balance_coeff = args.load_balance_coeff if args.has_expert_bias else None
        self.experts = AdaptableExperts(args.dim, args.hidden_dim, args.n_experts, args.grouped)
        if args.float32_router:
            self.router.gate = Float32Linear(args.dim, args.n_experts, bias=False)
        self.register_buffer("load", torch.zeros_like(self.tokens_per_expert), persistent=False)
        # Set in `expert_parallel.py` under tensor and expert parallelism.
        self.tp_mesh: DeviceMesh | None = None
        self.local_experts = args.n_experts
        self.ep_rank, self.ep_size = 0, 1

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
                self.load.add_(routed.load_E)
                if self.load_balance_coeff is not None:
                    self.tokens_per_expert.add_(routed.load_E)
        out_SD = self.experts(routed.x_SD, routed.counts_n, fast=fast or None, dropout=routed.dropout)
        return self.combine(out_SD, routed.slot_S, routed.score_Nk).view_as(x)

    def route(
        self, x_BLD: Tensor, sets: int, set_assignment: SetAssignment | None, dropout: TermDropout = NO_DROPOUT
    ) -> Routed:
        """Select each token's experts, and sort the slots by expert.

        Args:
            x_BLD: tokens.
            sets: number of sets whose terms the experts hold: 1, or G for each rank of the expert-parallel group.
            set_assignment: see `TokenContext`.
            dropout: dropout of the low-rank terms in this layer.
        """
        x_ND = x_BLD.flatten(0, 1)
        gate, own = self.router.gate, dropout.at_linear(ROUTER_NUMBER).adapters
        if own is None or not isinstance(gate, LoRALinear):
            score_Nk, expert_Nk, load_E = self.router(x_ND, self.expert_bias)
        else:
            gate.dropout = own._replace(key_BL=own.key_BL.flatten())
            score_Nk, expert_Nk, load_E = self.router(x_ND, self.expert_bias)
            gate.dropout = None
        if self.tp_mesh is not None:
            # Each rank weights its partial outputs of the experts, so the gradient of the scores is a partial sum.
            score = DTensor.from_local(score_Nk, self.tp_mesh, [Replicate()], run_check=False)
            score_Nk = score.to_local(grad_placements=[Partial()])
        _, slot_S, counts_n = self.reorderer(score_Nk, expert_Nk)
        if sets > 1:
            counts_n = self._counts_of_sets(expert_Nk, x_BLD.shape[:2], sets, set_assignment).type_as(counts_n)
        slot_dropout = dropout.at_slots(slot_S, expert_Nk)
        return Routed(x_ND[slot_S // self.router.top_k], slot_S, score_Nk, load_E, counts_n, slot_dropout)

    def combine(self, out_SD: Tensor, slot_S: Tensor, score_Nk: Tensor) -> Tensor:
        """Return the router-weighted sums of the experts' outputs, `[N, 1, D]`."""
        # Reorder and then sum: scattering additions into the tokens would not be deterministic.
        out_NkD = out_SD.new_zeros(score_Nk.numel(), out_SD.shape[-1]).index_copy(0, slot_S, out_SD)
        out_NkD = out_NkD.unflatten(0, score_Nk.shape)
        return torch.bmm(score_Nk.unsqueeze(1), out_NkD.float()).type_as(out_SD)

    def _counts_of_sets(
        self, expert_Nk: Tensor, shape: torch.Size, sets: int, set_assignment: SetAssignment | None
    ) -> Tensor:
        """Count the slots of each expert by set, experts first; the sets of other ranks have none here.

        The slots of an expert keep the order of the tokens, so they are sorted by set already. To expert parallelism's
        token exchange each pair of an expert and a set is an expert of its own: it sorts the received tokens by local
        expert and set.
        """
        rows, length = shape
        own = sets // self.ep_size
        row_B1 = torch.arange(rows, device=expert_Nk.device).unsqueeze(1)
        if set_assignment is None:
            set_BL = (row_B1 * own // rows).expand(rows, length)
        else:
            set_BL = row_B1 * set_assignment.slots + set_assignment.slot_BL
        group_S = (expert_Nk * sets + self.ep_rank * own + set_BL.reshape(-1, 1)).flatten()
        counts = torch.zeros(len(self.tokens_per_expert) * sets, dtype=torch.int64, device=group_S.device)
        return counts.scatter_add(0, group_S, torch.ones_like(group_S))


class MixtureBlock(TransformerBlock):
    """A block with a mixture of experts, named `moe` as torchtitan's recipes expect, and maybe a shared expert.

    The shared expert is a module of the block, not of the mixture: tensor parallelism then shards it like an FFN, whose
    outputs are sharded on the sequence as the terms of fast weights are.
    """

    moe_enabled = True

    def _build_ffn(self, args: MixtureArgs) -> None:
        self.moe = MixtureOfExperts(args)
        shared = args.shared_hidden_dim
        self.shared_experts = AdaptableFeedForward(args.dim, shared) if shared else None

    def ffn(self, x_BLD: Tensor, fast: dict[str, FastLinear], context: TokenContext) -> Tensor:
        """Return the outputs of the mixture and of the shared expert, added, `[B, L, D]`, for normalised input."""
        sets, dropout = context.set_assignment, context.dropout
        routed = {name: linear for name, linear in fast.items() if not name.startswith(SHARED)}
        out = self.moe(x_BLD, fast=routed, set_assignment=sets, trains=context.trains, dropout=dropout)
        if self.shared_experts is None:
            return cast(Tensor, out)
        shared = {name.removeprefix(SHARED): linear for name, linear in fast.items() if name.startswith(SHARED)}
        # All tokens pass through it, and its masks of dropout differ from those of the experts.
        dropout = dropout.at_linear(SHARED_NUMBER)
        return cast(Tensor, out + self.shared_experts(x_BLD, fast=shared, set_assignment=sets, dropout=dropout))

    def compile_parts(self, backend: str | Callable[..., Any]) -> None:
        """Compile the attention, the routing, the combination of the outputs and the shared expert, as functions.

        The experts stay eager: the number of tokens per expert changes with every batch, and FSDP2 and expert
        parallelism install hooks on the experts.
        """
        parts: list[tuple[nn.Module, str]] = [(self, "attend"), (self.moe, "route"), (self.moe, "combine")]
        parts += [(self.shared_experts, "forward")] if self.shared_experts is not None else []
        compile_methods(parts, backend)


class LLaDAMixture(LLaDA):
    """A backbone whose layers have mixtures of experts, except for leading dense ones."""

    model_args: MixtureArgs

    def _build_block(self, args: Any, layer: int) -> TransformerBlock:
        if layer < args.n_dense_layers:
            return TransformerBlock(replace(args, hidden_dim=args.dense_hidden_dim))
        return MixtureBlock(args)

    def mixtures(self) -> list[MixtureOfExperts]:
        """Return the mixtures of all layers that have one, in order."""
        return [cast(Any, block).moe for block in self.layers.values() if block.moe_enabled]

    def expert_biases(self) -> list[Tensor]:
        """Return the experts' biases that training changes, by layer."""
        trained = [mixture for mixture in self.mixtures() if mixture.load_balance_coeff is not None]
        return [mixture.expert_bias for mixture in trained if mixture.expert_bias is not None]

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights from torch's seed, and reset the RoPE table, biases and expert load; torchtitan's hook."""
        super().init_weights(buffer_device)
        for mixture in self.mixtures():
            for name, buffer in list(mixture.named_buffers(recurse=False)):
                setattr(mixture, name, torch.zeros_like(buffer, device=buffer_device))

    def take_load(self) -> Tensor:
        """Return this rank's tokens per expert since the last call, `[X, E]` for X layers, and reset the counts.

        Only passes of the training loss count. Activation checkpointing counts every token of its layers twice.
        """
        load_XE = torch.stack([mixture.load for mixture in self.mixtures()])
        for mixture in self.mixtures():
            mixture.load.zero_()
        return load_XE
