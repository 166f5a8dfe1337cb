"""Outer LoRA: the base model is frozen, and low-rank adapters of its linears are trained in its place.

y = W x + (alpha / R) B A x. As a torchtitan model converter it acts before the model is spread over ranks, so that
tensor parallelism and FSDP2 shard the adapters as they shard the linears. The fast weights of the inner loop add
their term to what an adapted linear returns. The frozen weights are kept in the type in which they are computed with:
half the memory of a trained model's, and no gathering in float32.

Shapes: R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm_dist.models.linears import linear_weight_names

# How the names of an adapter's two parameters end: those of a linear, and those of a linear of each expert.
A, B = "lora_A", "lora_B"


class LoRALinear(nn.Linear):
    """A frozen linear with a trained low-rank term."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dtype: torch.dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, dtype=dtype, device=device))
        self.scale = scale  # alpha / R

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


@dataclass
class LoRA:
    """Outer LoRA, with model.converters = ["lora"]: the base is frozen and adapters of its linears are trained."""

    rank: int = 32
    """Rank of the adapters."""

    alpha: float = 64.0
    """The adapter's term is multiplied by alpha / rank."""

    target_modules: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    """Linears of all layers that get an adapter: ffn (which is gate, up, down), attention (q, k, v, o), or any of
    these linears by name. In llada_moe ffn gives each expert's linears adapters of their own."""

    export: Literal["merged", "adapter"] = "merged"
    """What the last save writes with checkpoint.last_save_in_hf: the whole model with the adapters merged into it, or
    the adapters alone in PEFT's layout."""

    @property
    def scale(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank


def add_adapters(model: nn.Module, lora: LoRA, frozen_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Freeze a backbone and give the linears of all its layers adapters.

    Args:
        frozen_dtype: of the base, from here on.
        dtype: of the adapters.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            frozen = parameter.detach().to(frozen_dtype)
            module.register_parameter(name, nn.Parameter(frozen, requires_grad=False))
    ffn = linear_weight_names(lora.target_modules, "ffn")
    for block in cast(nn.ModuleDict, model.layers).values():
        layer: Any = block
        _adapt(layer.attention, linear_weight_names(lora.target_modules, "attention"), lora, dtype)
        if layer.moe_enabled:
            layer.moe.experts.add_adapters(ffn, lora.rank, lora.scale, dtype)
        else:
            _adapt(layer.feed_forward, ffn, lora, dtype)


def _adapt(parent: nn.Module, linears: Sequence[str], lora: LoRA, dtype: torch.dtype) -> None:
    for name in linears:
        linear = cast(nn.Linear, parent.get_submodule(name))
        setattr(parent, name, LoRALinear(linear, lora.rank, lora.scale, dtype))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.endswith((A, B))


def without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict's base model."""
    return {name: value for name, value in state.items() if not is_adapter(name)}


def base_weight_name(name: str) -> str:
    """The name of the weight that an adapter's parameter belongs to."""
    linear = name[: -len(A)]
    # A linear's parameters are below its name, an expert's beside its weight's.
    return f"{linear}weight" if linear.endswith(".") else linear.removesuffix("_")


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of the plain model that computes the same: W + (alpha / R) B A, computed in float32.

    Args:
        state: tensors, sharded or not.
        scale: alpha / R.
    """
    found = without_adapters(state)
    for name in state:
        if name.endswith(A):
            weight = found[base_weight_name(name)]
            term = state[name[: -len(A)] + B].float() @ state[name].float()
            found[base_weight_name(name)] = (weight.float() + scale * term).to(weight.dtype)
    return found
