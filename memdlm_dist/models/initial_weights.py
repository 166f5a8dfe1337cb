"""Initial weights: every number is a function of (seed, name of the parameter, row, column).

So each rank draws its own shard, and every layout starts with the same weights. The distributions are those of
torchtitan's llama3 and of its experts, scaled: it cuts the linears off at 100 standard deviations, which is not at all.

Shapes: a parameter is `[..., C]`, of which this rank has R rows of c columns.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from memdlm_dist.compat.torch import local_block
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.models.lora import A, is_adapter

# Numbers that are drawn together: what a CPU's cache holds, and what keeps a GPU busy.
_TOGETHER = {"cpu": 1 << 16}
_TOGETHER_ON_GPU = 1 << 22

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Linears of a block: does their standard deviation fall with the layer, as 1 / sqrt(2 (layer + 1))?
_FALLS = {"wq": False, "wk": False, "wv": False, "wo": True, "w1": False, "w2": True, "w3": True, "gate": True}


class Sizes(Protocol):
    """What the distributions depend on; see `LLaDAArgs`."""

    dim: int
    init_std: float
    head_from_embedding: bool


@dataclass(frozen=True)
class Normal:
    """N(0, std^2), truncated at `cut` standard deviations."""

    std: float
    cut: float = math.inf

    def transform(self, u: Tensor) -> Tensor:
        """Map numbers that are uniform on (-1, 1), in place: the inverse of the distribution function."""
        return u.mul_(math.erf(self.cut / math.sqrt(2))).erfinv_().mul_(math.sqrt(2) * self.std)


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def transform(self, u: Tensor) -> Tensor:
        """Map numbers that are uniform on (-1, 1), in place."""
        return u.mul_(self.bound)


Distribution = Normal | Uniform | float  # float: a constant


def distribution(name: str, shape: torch.Size, sizes: Sizes) -> Distribution:
    """Return the distribution of a backbone's parameter."""
    if is_adapter(name):
        return adapter_distribution(name, shape)
    if name == EMBEDDING:
        return Normal(1.0)
    if name == HEAD:
        std = sizes.dim**-0.5
        return Normal(std) if sizes.head_from_embedding else Normal(std, cut=3.0)
    linear = name.removesuffix(".weight").rpartition(".")[2]
    if linear.endswith("norm"):
        return 1.0
    layer = int(name.split(".")[1])
    return Normal(sizes.init_std / math.sqrt(2 * (layer + 1)) if _FALLS[linear] else sizes.init_std)


def adapter_distribution(name: str, shape: torch.Size) -> Distribution:
    """Return the distribution of an adapter: A ~ kaiming_uniform(a = sqrt 5), that is U(-1/sqrt(in), 1/sqrt(in));
    B = 0, so that the model starts as the base."""
    return Uniform(shape[-1] ** -0.5) if name.endswith(A) else 0.0


@torch.no_grad()
def draw(model: nn.Module, sizes: Sizes) -> None:
    """Draw all parameters, each rank its shards, by torch's seed: torchtitan gives all ranks the same one."""
    for name, parameter in _parameters(model).items():
        # A head that starts as the embedding has its numbers, at another scale.
        numbers = EMBEDDING if name == HEAD and sizes.head_from_embedding else name
        _fill(parameter, numbers, distribution(name, parameter.shape, sizes))


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """Draw the adapters alone, as `draw` does."""
    for name, parameter in _parameters(model).items():
        if is_adapter(name):
            _fill(parameter, name, adapter_distribution(name, parameter.shape))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    # A state dict's names are free of what activation checkpointing and compilation wrap the modules in.
    return cast(dict[str, Tensor], get_model_state_dict(model))


def _fill(parameter: Tensor, numbers: str, chosen: Distribution) -> None:
    """Fill this rank's shard of a parameter.

    Args:
        numbers: the name that its random numbers are keyed by.
    """
    local, first = local_block(parameter)
    if isinstance(chosen, float):
        local.fill_(chosen)
        return
    if local.numel() == 0:
        return
    row_R = torch.zeros((), dtype=torch.int64, device=local.device)  # the rows' numbers in the whole parameter
    for start, count, whole in zip(first[:-1], local.shape[:-1], parameter.shape[:-1], strict=True):
        row_R = row_R.unsqueeze(-1) * whole + torch.arange(start, start + count, device=local.device)
    start, columns = first[-1], local.shape[-1]
    # Numbers come in pairs, of which a shard may begin or end with a half.
    pair = torch.arange(start // 2, (start + columns + 1) // 2, device=local.device)
    own = slice(start % 2, start % 2 + columns)
    number = int.from_bytes(hashlib.blake2b(numbers.encode(), digest_size=8).digest())
    keys_R = keyed_random.key(torch.initial_seed(), Stream.WEIGHTS, number, row_R.flatten())
    rows = max(1, _TOGETHER.get(local.device.type, _TOGETHER_ON_GPU) // columns)
    for keys_r, out_rc in zip(keys_R.split(rows), local.view(-1, columns).split(rows), strict=True):
        out_rc.copy_(chosen.transform(keyed_random.symmetric(keys_r, pair))[:, own])
