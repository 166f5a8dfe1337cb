"""`llada_moe`: LLaDA with a mixture of experts in place of every FFN, on torchtitan's components.

The router's softmax is over all experts, in float32; the weights of the chosen ones are not normalised again,
and there is no shared expert. Queries and keys are RMS-normalised per head. Each expert's gate, up and down
linear has fast weights of its own.

Shapes: B rows, L tokens, G sets of fast weights, D model, F width of an expert, N = B L tokens, k experts of a
token, E experts of this rank, S slots: the N k pairs of a token and an expert, sorted by expert.
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
from memdlm_dist.compat.torchtitan import run_padded
from memdlm_dist.method.documents import SetAssignment
from memdlm_dist.method.fast_weights import AdaptedLinear, ExpertProduct, FastLinear, adapted_experts
from memdlm_dist.models.linears import GROUPS, LINEARS
from memdlm_dist.models.llada import LLaDA, LLaDAArgs, TransformerBlock


@dataclass
class LLaDAMoEArgs(LLaDAArgs):
    """Sizes of a `llada_moe` backbone; the defaults are LLaDA-MoE-7B-A1B's. `hidden_dim` is an expert's width."""

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
        """What torchtitan's components are told."""
        return MoEArgs(
            num_experts=self.n_experts,
            num_shared_experts=0,
            score_func="softmax",
            route_norm=False,
            score_before_experts=False,
            top_k=self.experts_per_token,
            use_grouped_mm=self.grouped,
            load_balance_coeff=None,  # a bias of the routing, which the published model does not have
        )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        return get_moe_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)

    def adapted_linears(self, first_layer: int, targets: Sequence[str]) -> list[AdaptedLinear]:
        dense = super().adapted_linears(first_layer, targets)
        return [self._of_experts(linear) if linear.target in GROUPS["ffn"] else linear for linear in dense]

    def _of_experts(self, linear: AdaptedLinear) -> AdaptedLinear:
        # Numbers beyond those of the dense linears, as many for each linear as there are experts.
        first = (linear.number + self.n_layers * len(LINEARS)) * self.n_experts
        return AdaptedLinear(
            linear.layer, linear.target, linear.in_features, linear.out_features, linear.row_wise, first,
            self.n_experts, self.experts_per_token,
        )  # fmt: skip


class AdaptableExperts(GroupedExperts):
    """torchtitan's experts, W_down(silu(W_gate x) * W_up x) each, with fast weights where they are given any.

    Outer LoRA gives each expert's linears adapters of their own, A `[E, R, in]` and B `[E, out, R]`.
    """

    w1: nn.Parameter  # gate [E, F, D]
    w2: nn.Parameter  # down [E, D, F]
    w3: nn.Parameter  # up   [E, F, D]
    adapter_scale: float = 0.0  # alpha / R; 0 without adapters

    def add_adapters(self, weights: Sequence[str], rank: int, scale: float, dtype: torch.dtype) -> None:
        """Give these of "w1", "w2", "w3" adapters, whose terms are multiplied by `scale`."""
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
    ) -> Tensor:
        """Output `[S, D]` of the slots `x`, of which each expert has `num_tokens_per_expert` in turn.

        Under tensor parallelism it is the part that this rank's share of F adds.

        Args:
            fast: with one set, or with one for each sample.
            counts_EG: each expert's number of slots of each sample, which come in turn; needed with several sets.
        """
        # The signature is that of torchtitan's expert parallelism, whose hooks replace the first two arguments.
        if fast is None and not self.adapter_scale:
            return cast(Tensor, super().forward(x, num_tokens_per_expert))
        own = {name: w.to_local() if isinstance(w, DTensor) else w for name, w in self.named_parameters(recurse=False)}
        counts = num_tokens_per_expert if counts_EG is None else counts_EG.flatten()
        # A grouped product needs every group's number of slots to be a multiple of 8; with expert parallelism the
        # exchange of tokens has filled them up.
        filled = isinstance(self.w1, DTensor) and "ep" in (self.w1.device_mesh.mesh_dim_names or ())
        if not self.use_grouped_mm or filled:
            return self._run(own, x, counts, fast or {})
        return run_padded(lambda x, counts: self._run(own, x, counts, fast or {}), x, counts, 1, len(counts))

    def _run(self, own: dict[str, Tensor], x_SD: Tensor, counts: Tensor, fast: dict[str, FastLinear]) -> Tensor:
        product = (_grouped if self.use_grouped_mm else _loop)(counts)

        def linear(name: str, x_Si: Tensor, target: str) -> Tensor:
            y_So = adapted_experts(own[name], x_Si, fast.get(target), product)
            if f"{name}_lora_A" not in own:
                return y_So
            term_So = product(product(x_Si, own[f"{name}_lora_A"]), own[f"{name}_lora_B"])
            return y_So + (self.adapter_scale * term_So).type_as(y_So)

        h_SF = F.silu(linear("w1", x_SD, "gate")) * linear("w3", x_SD, "up")
        return linear("w2", h_SF, "down").type_as(x_SD)


def _grouped(counts: Tensor) -> ExpertProduct:
    def product(x_Si: Tensor, weight_noi: Tensor) -> Tensor:
        ends_n = counts.view(len(weight_noi), -1).sum(1).cumsum(0, dtype=torch.int32)
        return grouped_mm(x_Si.bfloat16(), weight_noi.bfloat16(), ends_n)

    return product


def _loop(counts: Tensor) -> ExpertProduct:
    numbers = counts.tolist()

    def product(x_Si: Tensor, weight_noi: Tensor) -> Tensor:
        several = len(numbers) // len(weight_noi)  # groups that one matrix is for
        sizes = [sum(numbers[i : i + several]) for i in range(0, len(numbers), several)]
        # What lies behind the last group's slots fills up, and is of no expert.
        parts = x_Si.split([*sizes, len(x_Si) - sum(sizes)])
        outputs = [F.linear(part, weight) for part, weight in zip(parts, weight_noi.unbind(), strict=False)]
        rest = parts[-1].new_zeros(len(parts[-1]), weight_noi.shape[1], dtype=outputs[0].dtype)
        return torch.cat([*outputs, rest])

    return product


class Routed(NamedTuple):
    """Where the tokens go, and what the experts read."""

    x_SD: Tensor  # the slots' tokens
    slot_S: Tensor  # int64: the slots' places among the pairs (N, k)
    score_Nk: Tensor
    load_E: Tensor  # tokens of every expert, which may be on other ranks
    counts_E: Tensor  # slots of every expert, as they are sorted
    counts_EG: Tensor | None  # and of each sample, if every sample has a set of fast weights


class MixtureOfExperts(MoE):
    """torchtitan's router, reorderer and experts; the experts take fast weights."""

    experts: AdaptableExperts
    tokens_per_expert: Tensor

    def __init__(self, args: LLaDAMoEArgs):
        super().__init__(args.moe_args, args.dim, args.hidden_dim)
        self.experts = AdaptableExperts(args.dim, args.hidden_dim, args.n_experts, args.grouped)
        # Set where tensor and expert parallelism apply: `expert_parallel.py`.
        self.tp_mesh: DeviceMesh | None = None
        self.local_experts = args.n_experts

    def forward(
        self,
        x: Tensor,
        fast: dict[str, FastLinear] | None = None,
        set_assignment: SetAssignment | None = None,
        trains: bool = False,
    ) -> Tensor:
        """Return the sum over a token's experts of router weight times the expert's output, `[B, L, D]`.

        Under tensor parallelism the input is whole and the output a partial sum.

        Args:
            fast: of the experts; None, or none of them, without.
            trains: count the experts' tokens, as of a pass of the training loss.
        """
        sets = len(next(iter(fast.values()))[0]) // self.local_experts if fast else 1
        routed = self.route(x, sets, set_assignment)
        if trains:
            with torch.no_grad():
                self.tokens_per_expert.add_(routed.load_E)
        out_SD = self.experts(routed.x_SD, routed.counts_E, fast=fast or None, counts_EG=routed.counts_EG)
        return self.combine(out_SD, routed.slot_S, routed.score_Nk).view_as(x)

    def route(self, x_BLD: Tensor, sets: int, set_assignment: SetAssignment | None) -> Routed:
        """Choose the tokens' experts, and sort the slots by expert.

        Args:
            sets: of the experts' fast weights: one, or one of each sample.
            own_set: see `TokenContext`.
        """
        x_ND = x_BLD.flatten(0, 1)
        score_Nk, expert_Nk, load_E = self.router(x_ND)
        if self.tp_mesh is not None:
            # Each rank weights what it has of the experts' outputs, so that the score's gradient is a partial sum.
            score = DTensor.from_local(score_Nk, self.tp_mesh, [Replicate()], run_check=False)
            score_Nk = score.to_local(grad_placements=[Partial()])
        _, slot_S, counts_E = self.reorderer(score_Nk, expert_Nk)
        counts_EG = self._counts_of_sets(expert_Nk, x_BLD.shape[:2], sets, set_assignment) if sets > 1 else None
        return Routed(x_ND[slot_S // self.router.top_k], slot_S, score_Nk, load_E, counts_E, counts_EG)

    def combine(self, out_SD: Tensor, slot_S: Tensor, score_Nk: Tensor) -> Tensor:
        """Return the weighted sums of the experts' outputs, `[N, 1, D]`."""
        # Back in the tokens' order, which unlike adding them up at their places gives the same sums every time.
        out_NkD = out_SD.new_zeros(score_Nk.numel(), out_SD.shape[-1]).index_copy(0, slot_S, out_SD)
        out_NkD = out_NkD.unflatten(0, score_Nk.shape)
        return torch.bmm(score_Nk.unsqueeze(1), out_NkD.float()).type_as(out_SD)

    def _counts_of_sets(
        self, expert_Nk: Tensor, shape: torch.Size, sets: int, set_assignment: SetAssignment | None
    ) -> Tensor:
        """Each expert's number of slots of each sample, `[E, G]`.

        The slots of an expert are in the tokens' order, so those of a sample follow each other already.
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

    def ffn(
        self, x_BLD: Tensor, fast: dict[str, FastLinear], set_assignment: SetAssignment | None, trains: bool
    ) -> Tensor:
        return cast(Tensor, self.moe(x_BLD, fast=fast, set_assignment=set_assignment, trains=trains))

    def compile_around_experts(self, backend: str | Callable[..., Any]) -> None:
        """Compile what runs before the experts and after them, in three functions.

        The experts themselves stay eager: the number of an expert's tokens changes with every batch, and FSDP2 and
        expert parallelism have hooks on them.
        """
        for owner, name in ((self, "attend"), (self.moe, "route"), (self.moe, "combine")):
            setattr(owner, name, torch.compile(getattr(owner, name), backend=backend, fullgraph=True))


class LLaDAMoE(LLaDA):
    """The backbone; everything but its blocks is LLaDA's."""

    block = MoEBlock
    model_args: LLaDAMoEArgs

    def mixtures(self) -> list[MixtureOfExperts]:
        """Those of all layers, in order."""
        return [cast(MoEBlock, block).moe for block in self.layers.values()]

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        for mixture in self.mixtures():
            mixture.tokens_per_expert = torch.zeros_like(mixture.tokens_per_expert, device=buffer_device)

    def take_load(self) -> Tensor:
        """Tokens of every expert `[X, E]` of X layers in the training passes since the last call, on this rank.

        Activation checkpointing counts its layers twice, evenly.
        """
        load_XE = torch.stack([mixture.tokens_per_expert for mixture in self.mixtures()])
        for mixture in self.mixtures():
            mixture.tokens_per_expert.zero_()
        return load_XE
