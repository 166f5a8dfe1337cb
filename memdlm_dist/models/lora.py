"""Outer LoRA: trains low-rank adapters of the linears, with a frozen base model.

y = W x + (alpha / R) B A x with rank R. The conversion is a torchtitan model converter and runs before the model is
parallelised, so tensor parallelism and FSDP2 shard the adapters like the linears. Fast weights add their term to the
output of a linear with its adapter. Frozen weights are stored in the compute dtype: that takes half the memory of
trained weights, and all-gathers need no float32. With a 4-bit base they are quantised (see `nf4.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm_dist.method.documents import SetAssignment
from memdlm_dist.method.fast_weights import FastLinear, adapted
from memdlm_dist.method.keyed_dropout import Dropout, TermDropout
from memdlm_dist.models import nf4
from memdlm_dist.models.linears import LINEAR_NUMBERS, LINEARS, ROUTER, adapter_linear_names, weight_names

# Name suffixes of an adapter's parameters: "<linear>.lora_A" for linears, "w1_lora_A" for experts.
A, B = "lora_A", "lora_B"
_ROUTER_WEIGHT = "gate"  # torchtitan's name of the router's linear


class LoRALinear(nn.Linear):
    """A frozen linear with a trained low-rank term."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dtype: torch.dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, dtype=dtype, device=device))
        self.scale = scale  # alpha / R
        # Product of the linear that this module replaces; a router's may be in float32.
        self.product: Callable[[Tensor, Tensor], Tensor] = getattr(linear, "product", F.linear)
        # Dropout of calls without that argument: torchtitan's router calls its gate so.
        self.dropout: Dropout | None = None

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return W x + (alpha / R) B A drop(x); None drops nothing."""
        dropout = self.dropout if dropout is None else dropout
        dropped = x if dropout is None else dropout(x)
        product = self.product
        return product(x, self.weight) + self.scale * product(product(dropped, self.lora_A), self.lora_B)


def adapted_linear(
    linear: nn.Module,
    x_BLi: Tensor,
    target: str,
    fast: Mapping[str, FastLinear],
    set_assignment: SetAssignment | None,
    dropout: TermDropout,
) -> Tensor:
    """Apply a layer's linear with its outer adapter and its fast weights, if it has them; see `fast_weights.adapted`.

    Args:
        target: name of the linear, a key of `LINEARS`.
        fast: fast weights of the layer by linear.
        dropout: dropout of the low-rank terms in this layer.
    """
    own = dropout.at_linear(LINEAR_NUMBERS[target])
    # By keyword: tensor parallelism's input hook keeps only the first positional argument.
    base = partial(linear, dropout=own.adapters) if isinstance(linear, LoRALinear) else linear
    return adapted(base, x_BLi, fast.get(target), set_assignment, own.fast_weights)


@dataclass
class LoRA:
    """Outer LoRA, enabled by model.converters = ["lora"]: freezes the base and trains adapters of its linears."""

    rank: int = 32
    """Rank of the adapters."""

    alpha: float = 64.0
    """Numerator of the adapter's scale, alpha / rank."""

    dropout: float = 0.0
    """Probability that training drops an input feature of an adapter (0: no dropout), in steps of 1/65,536.

    All passes of a step share the masks. Validation and inference drop nothing."""

    target_modules: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    """Linears of every layer that get an adapter.

    ffn (gate, up, down), attention (q, k, v, o), the router of a mixture of experts, linears by name, or all-linear for
    all of these. In a mixture every expert's linears get separate adapters, and the shared expert's too."""

    base: Literal["unquantized", "nf4"] = "unquantized"
    """Storage of the frozen base. unquantized: training.mixed_precision_param. nf4: 4 bits with double quantisation for
    the linears of all layers (needs torchao); checkpoints then hold only the adapters."""

    export: Literal["merged", "adapter"] = "merged"
    """Contents of exports with checkpoint.last_save_in_hf and checkpoint.save_in_hf.

    merged: the whole model with the adapters merged into it. adapter: only the adapters, in PEFT's format."""

    @property
    def scale(self) -> float:
        """Scale of the adapter's term, alpha / rank."""
        return self.alpha / self.rank


def add_adapters(model: nn.Module, lora: LoRA, frozen_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Freeze a backbone and add adapters to the target linears of all layers.

    Args:
        model: the backbone, before it is parallelised.
        lora: targets, rank and alpha.
        frozen_dtype: dtype that the base weights are cast to.
        dtype: dtype of the adapters.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            frozen = parameter.detach().to(frozen_dtype)
            module.register_parameter(name, nn.Parameter(frozen, requires_grad=False))
    for block in cast(nn.ModuleDict, model.layers).values():
        layer: Any = block
        names = adapter_linear_names(lora.target_modules, has_router=layer.moe_enabled)
        ffn = weight_names(names, "ffn")
        _adapt(layer.attention, weight_names(names, "attention"), lora, dtype)
        if layer.moe_enabled:
            _adapt(layer.moe.router, [_ROUTER_WEIGHT] if ROUTER in names else [], lora, dtype)
            layer.moe.experts.add_adapters(ffn, lora.rank, lora.scale, dtype)
            if layer.shared_experts is not None:
                _adapt(layer.shared_experts, ffn, lora, dtype)
        else:
            _adapt(layer.feed_forward, ffn, lora, dtype)
    if lora.base == "nf4":
        nf4.quantize_linears(model)


def _adapt(parent: nn.Module, linears: Sequence[str], lora: LoRA, dtype: torch.dtype) -> None:
    for name in linears:
        linear = cast(nn.Linear, parent.get_submodule(name))
        setattr(parent, name, LoRALinear(linear, lora.rank, lora.scale, dtype))


def is_adapter(name: str) -> bool:
    """Return True if `name` belongs to an adapter's parameter."""
    return name.endswith((A, B))


def without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dict that belong to the base model."""
    return {name: value for name, value in state.items() if not is_adapter(name)}


def base_weight_name(name: str) -> str:
    """Return the name of the base weight that an adapter's parameter belongs to."""
    linear = name[: -len(A)]
    # "wq.lora_A" belongs to "wq.weight", and the experts' "w1_lora_A" to "w1".
    return f"{linear}weight" if linear.endswith(".") else linear.removesuffix("_")


def target_name(name: str) -> str:
    """Return the target, such as "q", "gate" or "router", that an adapter's parameter belongs to."""
    weight = base_weight_name(name).removesuffix(".weight").rpartition(".")[2]
    return ROUTER if weight == _ROUTER_WEIGHT else next(key for key, x in LINEARS.items() if x.weight == weight)


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge the adapters into the base weights: W + (alpha / R) B A, computed in float32.

    Args:
        state: state dict of plain tensors or DTensors.
        scale: alpha / R.

    Returns:
        The state dict of an equivalent model without adapters.
    """
    merged_state = without_adapters(state)
    for name in state:
        if name.endswith(A):
            weight = merged_state[base_weight_name(name)]
            term = state[name[: -len(A)] + B].float() @ state[name].float()
            merged_state[base_weight_name(name)] = (weight.float() + scale * term).to(weight.dtype)
    return merged_state
