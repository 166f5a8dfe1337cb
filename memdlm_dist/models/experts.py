"""Experts of a mixture, on torchtitan's grouped experts: with fast weights and outer LoRA adapters for each expert.

Shapes: G sets of fast weights, D model dim, F expert width, E experts of this rank, S slots: the pairs of a token and
one of its experts, sorted by expert.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.moe.moe import GroupedExperts

from memdlm_dist.compat.torch import grouped_mm
from memdlm_dist.compat.torchao import is_nf4
from memdlm_dist.compat.torchtitan import run_padded
from memdlm_dist.method.fast_weights import ExpertProduct, FastLinear, adapted_experts
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.models import nf4
from memdlm_dist.models.linears import LINEAR_NUMBERS


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
        dropout: TermDropout = NO_DROPOUT,
    ) -> Tensor:
        """Return the experts' outputs `[S, D]`; under tensor parallelism a partial sum over this rank's share of F.

        Args:
            x: inputs of the slots `[S, D]`, sorted by expert.
            num_tokens_per_expert: number of slots by expert, `[E]`; with several sets of fast weights by expert and
                set, `[E G]`, where the slots of an expert are sorted by set.
            fast: fast weights by linear.
            dropout: dropout of the low-rank terms, with one key per slot.
        """
        # torchtitan's expert parallelism fixes the first two arguments: its hooks replace them.
        if fast is None and not self.adapter_scale and not is_nf4(self.w1):
            return cast(Tensor, super().forward(x, num_tokens_per_expert))
        weights = {
            name: w.to_local() if isinstance(w, DTensor) else nf4.dequantized(f".experts.{name}", w, self.num_experts)
            for name, w in self.named_parameters(recurse=False)
        }
        counts = num_tokens_per_expert
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
        product, n_slots = (_grouped if self.use_grouped_mm else _loop)(counts), counts.sum()

        def linear(name: str, x_Si: Tensor, target: str) -> Tensor:
            own = dropout.at_linear(LINEAR_NUMBERS[target])
            y_So = adapted_experts(weights[name], x_Si, fast.get(target), product, n_slots, own.fast_weights)
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
