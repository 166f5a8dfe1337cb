"""Outer LoRA: the base model is frozen, and low-rank adapters of its linears are trained in its place.

y = W x + (alpha / R) B A x. As a torchtitan model converter it acts before the model is spread over ranks, so that
tensor parallelism and FSDP2 shard the adapters as they shard the linears. The fast weights of the inner loop add
their term to what an adapted linear returns. The frozen weights are kept in the type in which they are computed with:
half the memory of a trained model's, and no gathering in float32.

Shapes: R rank.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.config import TORCH_DTYPE_MAP

# How the names of an adapter's two parameters end: those of a linear, and those of a linear of each expert.
A, B = "lora_A", "lora_B"
_ATTENTION = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
_FFN = {"gate": "w1", "down": "w2", "up": "w3"}


class HasAdapters:
    """A module with adapters, which start after the model's weights do."""

    def reset_adapters(self) -> None:
        """A ~ kaiming_uniform(a = sqrt 5), that is U(-1/sqrt(in), 1/sqrt(in)); B = 0: the model starts as the base."""
        for name, parameter in cast(nn.Module, self).named_parameters(recurse=False):
            if name.endswith(A):
                nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)
            elif name.endswith(B):
                nn.init.zeros_(parameter)


class LoRALinear(nn.Linear, HasAdapters):
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


class LoRAConverter:
    """torchtitan's model converter `lora`; see `[lora]` in the configuration."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        self._config = job_config.lora
        self._scale = job_config.lora.alpha / job_config.lora.rank
        self._frozen_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        self._dtype = TORCH_DTYPE_MAP[job_config.training.dtype]

    def convert(self, model: nn.Module) -> None:
        """Freeze the model and give the linears of all its layers adapters."""
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                frozen = parameter.detach().to(self._frozen_dtype)
                module.register_parameter(name, nn.Parameter(frozen, requires_grad=False))
        args: Any = model.model_args
        targets = args.linears_of(self._config.target_modules)
        for layer in cast(nn.ModuleDict, model.layers).values():
            self._adapt(layer.attention, {name: _ATTENTION[name] for name in targets if name in _ATTENTION})
            ffn = {name: _FFN[name] for name in targets if name in _FFN}
            if layer.moe_enabled:
                cast(Any, layer).moe.experts.add_adapters(
                    list(ffn.values()), self._config.rank, self._scale, self._dtype
                )
            else:
                self._adapt(layer.feed_forward, ffn)

    def _adapt(self, parent: Any, linears: Mapping[str, str]) -> None:
        for name in linears.values():
            setattr(parent, name, LoRALinear(getattr(parent, name), self._config.rank, self._scale, self._dtype))

    def post_optimizer_hook(self, model: Any) -> None:
        """Nothing to do after a step."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.endswith((A, B))


def without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict's base model."""
    return {name: value for name, value in state.items() if not is_adapter(name)}


def weight_of(name: str) -> str:
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
            weight = found[weight_of(name)]
            term = state[name[: -len(A)] + B].float() @ state[name].float()
            found[weight_of(name)] = (weight.float() + scale * term).to(weight.dtype)
    return found
