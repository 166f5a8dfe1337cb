"""Table of a transformer layer's linears, shared by fast weights, adapters, their checks and FLOP counts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerLinear:
    """One linear of a layer.

    Attributes:
        group: "ffn" or "attention".
        weight: name in torchtitan's modules.
        in_size, out_size: names of the `LLaDAArgs` attributes with its input and output width.
        row_wise: tensor parallelism shards the input dimension; otherwise it shards the output dimension.
        stage: position in execution order; gradients flow from one stage's outputs to earlier stages.
    """

    group: str
    weight: str
    in_size: str
    out_size: str
    row_wise: bool
    stage: int


# The position in this table is part of the keys of fast weights and dropout masks: append new linears at the end.
LINEARS = {
    "gate": LayerLinear("ffn", "w1", "dim", "hidden_dim", False, 2),
    "up": LayerLinear("ffn", "w3", "dim", "hidden_dim", False, 2),
    "down": LayerLinear("ffn", "w2", "hidden_dim", "dim", True, 3),
    "q": LayerLinear("attention", "wq", "dim", "query_dim", False, 0),
    "k": LayerLinear("attention", "wk", "dim", "kv_dim", False, 0),
    "v": LayerLinear("attention", "wv", "dim", "kv_dim", False, 0),
    "o": LayerLinear("attention", "wo", "query_dim", "dim", True, 1),
}
LINEAR_NUMBERS = {name: number for number, name in enumerate(LINEARS)}
# Numbers in the keys of dropout, beyond those of later linears: of the router, and of a shared expert's first linear.
ROUTER_NUMBER, SHARED_NUMBER = 2**15, 2**14
# Prefix of a shared expert's linears among the fast weights of a layer; without it, they are the linears of an FFN.
SHARED = "shared_"
# Targets of outer adapters alone: the router of a mixture of experts, and all linears of a layer.
ROUTER, ALL_LINEAR = "router", "all-linear"
GROUPS = {
    group: tuple(name for name, linear in LINEARS.items() if linear.group == group) for group in ("ffn", "attention")
}


def layer_linear(name: str) -> LayerLinear:
    """Return the description of a linear that has fast weights, which may be a shared expert's."""
    return LINEARS[name.removeprefix(SHARED)]


def linear_names(targets: Sequence[str]) -> list[str]:
    """Return the names of the target linears, with group names replaced by their members."""
    return [name for target in targets for name in GROUPS.get(target, (target,))]


def adapter_linear_names(targets: Sequence[str], has_router: bool) -> list[str]:
    """Return the names of the linears that get an outer adapter.

    Args:
        targets: names of linears or groups, "router" or "all-linear".
        has_router: the layers have a router, so that "all-linear" includes it.
    """
    everything = [*GROUPS, *([ROUTER] if has_router else [])]
    return linear_names([name for target in targets for name in (everything if target == ALL_LINEAR else (target,))])


def weight_names(names: Sequence[str], group: str) -> list[str]:
    """Return the torchtitan names of those linears that belong to `group`."""
    return [LINEARS[name].weight for name in dict.fromkeys(names) if name in GROUPS[group]]
