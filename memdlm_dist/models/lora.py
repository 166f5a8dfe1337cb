"""Outer LoRA: the base model is frozen, and low-rank adapters of its linears are trained in its place.

y = W x + (alpha / R) B A x. As a torchtitan model converter it acts before the model is spread over ranks, so that
tensor parallelism and FSDP2 shard the adapters as they shard the linears. The fast weights of the inner loop add
their term to what an adapted linear returns. The frozen weights are kept in the type in which they are computed with:
half the memory of a trained model's, and no gathering in float32.

Shapes: R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.config import TORCH_DTYPE_MAP

# How the names of an adapter's two parameters end.
A, B = ".lora_A", ".lora_B"
# Target -> the linear in a block.
_LINEARS = {
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "gate": "feed_forward.w1", "down": "feed_forward.w2", "up": "feed_forward.w3",
}  # fmt: skip


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

    def reset_adapter(self) -> None:
        """A ~ kaiming_uniform(a = sqrt 5), B = 0: the model starts as the base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


class LoRAConverter:
    """torchtitan's model converter `lora`; see `[lora]` in the configuration."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        self._config = job_config.lora
        self._frozen_dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
        self._dtype = TORCH_DTYPE_MAP[job_config.training.dtype]

    def convert(self, model: nn.Module) -> None:
        """Freeze the model and give the linears of all its layers adapters."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    frozen = parameter.detach().to(self._frozen_dtype)
                    module._parameters[name] = nn.Parameter(frozen, requires_grad=False)
        args: Any = model.model_args
        targets = args.linears_of(self._config.target_modules)
        for layer in cast(nn.ModuleDict, model.layers).values():
            for target in targets:
                parent, name = layer.get_submodule(_LINEARS[target].split(".")[0]), _LINEARS[target].split(".")[1]
                linear: Any = getattr(parent, name)
                scale = self._config.alpha / self._config.rank
                setattr(parent, name, LoRALinear(linear, self._config.rank, scale, self._dtype))

    def post_optimizer_hook(self, model: Any) -> None:
        """Nothing to do after a step."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.endswith((A, B))


def without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict's base model."""
    return {name: value for name, value in state.items() if not is_adapter(name)}


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of the plain model that computes the same: W + (alpha / R) B A, computed in float32.

    Args:
        state: tensors, sharded or not.
        scale: alpha / R.
    """
    found = without_adapters(state)
    for name in state:
        if name.endswith(A):
            linear = name.removesuffix(A)
            weight = found[f"{linear}.weight"]
            term = state[f"{linear}{B}"].float() @ state[f"{linear}{A}"].float()
            found[f"{linear}.weight"] = (weight.float() + scale * term).to(weight.dtype)
    return found


def adaptable(targets: Sequence[str], moe: bool) -> list[str]:
    """Those of the linears that can have an adapter: the experts' matrices are no linears of their own."""
    return [target for target in targets if not moe or _LINEARS[target].startswith("attention")]
