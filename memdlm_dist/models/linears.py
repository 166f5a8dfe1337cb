"""The linears of a transformer layer, listed once: for fast weights, adapters, their checks and the FLOPs of a step."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerLinear:
    """One linear of a layer.

    Attributes:
        group: "ffn" or "attention".
        weight: its name in torchtitan's modules.
        reads, writes: the attributes of `LLaDAArgs` that are its input's and its output's width.
        row_wise: tensor parallelism shards its input, not its output.
        stage: when it runs; a gradient of one stage's outputs reaches the inputs of the stages before it.
    """

    group: str
    weight: str
    reads: str
    writes: str
    row_wise: bool
    stage: int


# The order numbers the keys of the fast weights' draws: new ones go to the end.
LINEARS = {
    "gate": LayerLinear("ffn", "w1", "dim", "hidden_dim", False, 2),
    "up": LayerLinear("ffn", "w3", "dim", "hidden_dim", False, 2),
    "down": LayerLinear("ffn", "w2", "hidden_dim", "dim", True, 3),
    "q": LayerLinear("attention", "wq", "dim", "dim", False, 0),
    "k": LayerLinear("attention", "wk", "dim", "kv_dim", False, 0),
    "v": LayerLinear("attention", "wv", "dim", "kv_dim", False, 0),
    "o": LayerLinear("attention", "wo", "dim", "dim", True, 1),
}
GROUPS = {
    group: tuple(name for name, linear in LINEARS.items() if linear.group == group) for group in ("ffn", "attention")
}


def linear_names(targets: Sequence[str]) -> list[str]:
    """Return the names of linears, with the groups among `targets` spelt out."""
    return [name for target in targets for name in GROUPS.get(target, (target,))]


def linear_weight_names(targets: Sequence[str], group: str) -> list[str]:
    """Return torchtitan's names of the linears of one group that are among `targets`."""
    names = dict.fromkeys(linear_names(targets))
    return [LINEARS[name].weight for name in names if LINEARS[name].group == group]
