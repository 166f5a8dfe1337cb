"""Initial weights: every element is a function of (seed, parameter name, row, column).

Each rank draws its shard of a parameter, and all layouts start with the same weights. The distributions follow
torchtitan's llama3 and its experts, with a configurable scale. torchtitan truncates the linears at 100 standard
deviations, which has no effect; here they are not truncated.

Shapes: a parameter is `[..., C]`; this rank holds R rows of c columns.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from memdlm_dist.compat.torch import local_block
from memdlm_dist.compat.torchao import is_nf4
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.models import nf4
from memdlm_dist.models.lora import A, is_adapter

# Elements drawn at once: they fit a CPU's cache, or keep a GPU busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 16}
_CHUNK_ELEMENTS_ON_GPU = 1 << 22

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
# Linears of a block: True if the standard deviation is scaled with depth, by 1 / sqrt(2 (layer + 1)).
_DEPTH_SCALED = {"wq": False, "wk": False, "wv": False, "wo": True, "w1": False, "w2": True, "w3": True, "gate": True}


class Sizes(Protocol):
    """Sizes that determine the distributions; see `LLaDAArgs`."""

    dim: int
    init_std: float
    head_from_embedding: bool


@dataclass(frozen=True)
class Normal:
    """N(0, std^2), truncated at `cut` standard deviations."""

    std: float
    cut: float = math.inf

    def transform(self, u: Tensor) -> Tensor:
        """Map uniform numbers on (-1, 1) in place, by the inverse of the cumulative distribution function."""
        return u.mul_(math.erf(self.cut / math.sqrt(2))).erfinv_().mul_(math.sqrt(2) * self.std)


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float

    def transform(self, u: Tensor) -> Tensor:
        """Map uniform numbers on (-1, 1) in place."""
        return u.mul_(self.bound)


Distribution = Normal | Uniform | float  # float: a constant


def distribution(name: str, shape: torch.Size, sizes: Sizes) -> Distribution:
    """Return the initial distribution of a backbone's parameter, by its name in the state dict."""
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
    if linear == "expert_bias":
        return 0.0
    layer = int(name.split(".")[1])
    return Normal(sizes.init_std / math.sqrt(2 * (layer + 1)) if _DEPTH_SCALED[linear] else sizes.init_std)


def adapter_distribution(name: str, shape: torch.Size) -> Distribution:
    """Return the initial distribution of an adapter's parameter.

    A ~ kaiming_uniform(a = sqrt 5), that is U(-1/sqrt(in), 1/sqrt(in)). B = 0, so the model starts as the base model.
    """
    return Uniform(shape[-1] ** -0.5) if name.endswith(A) else 0.0


@torch.no_grad()
def draw(model: nn.Module, sizes: Sizes, seed: int | None = None) -> None:
    """Draw this rank's shards of all parameters.

    Args:
        model: the backbone, with any layout.
        sizes: sizes that determine the distributions.
        seed: None for torch's seed, which torchtitan sets equally on all ranks.
    """
    fill(_parameters(model), sizes, seed)


@torch.no_grad()
def fill(state: Mapping[str, Tensor], sizes: Sizes, seed: int | None = None) -> None:
    """Draw this rank's shards of all parameters in a state dict in place; see `draw`."""
    for name, parameter in state.items():
        # A head that starts from the embedding uses the embedding's random numbers, with its own scale.
        key_name = EMBEDDING if name == HEAD and sizes.head_from_embedding else name
        initial = distribution(name, parameter.shape, sizes)
        if not is_nf4(parameter):
            _fill(parameter, key_name, initial, seed)
            continue
        whole = nf4.empty(parameter)
        _fill(whole, key_name, initial, seed)
        nf4.assign(parameter, whole)


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """Draw this rank's shards of the adapters only; the other parameters keep their values."""
    for name, parameter in _parameters(model).items():
        if is_adapter(name):
            _fill(parameter, name, adapter_distribution(name, parameter.shape))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    # State-dict names, unlike those of `named_parameters`, have no prefixes of checkpointing or compilation wrappers.
    return cast(dict[str, Tensor], get_model_state_dict(model))


def _fill(parameter: Tensor, key_name: str, initial: Distribution, seed: int | None = None) -> None:
    """Draw this rank's shard of a parameter in place.

    Args:
        parameter: a plain tensor or a DTensor.
        key_name: parameter name that the random numbers are keyed by.
        initial: distribution of the elements.
        seed: None for torch's seed.
    """
    seed = torch.initial_seed() if seed is None else seed
    local, first = local_block(parameter)
    if isinstance(initial, float):
        local.fill_(initial)
        return
    if local.numel() == 0:
        return
    row_R = torch.zeros((), dtype=torch.int64, device=local.device)  # row numbers in the full parameter
    for start, count, size in zip(first[:-1], local.shape[:-1], parameter.shape[:-1], strict=True):
        row_R = row_R.unsqueeze(-1) * size + torch.arange(start, start + count, device=local.device)
    start, columns = first[-1], local.shape[-1]
    # Random numbers come in pairs of columns; the local columns may begin or end in the middle of a pair.
    pair = torch.arange(start // 2, (start + columns + 1) // 2, device=local.device)
    local_columns = slice(start % 2, start % 2 + columns)
    name_hash = int.from_bytes(hashlib.blake2b(key_name.encode(), digest_size=8).digest())
    keys_R = keyed_random.key(seed, Stream.WEIGHTS, name_hash, row_R.flatten())
    rows = max(1, _CHUNK_ELEMENTS.get(local.device.type, _CHUNK_ELEMENTS_ON_GPU) // columns)
    for keys_r, out_rc in zip(keys_R.split(rows), local.view(-1, columns).split(rows), strict=True):
        out_rc.copy_(initial.transform(keyed_random.symmetric(keys_r, pair))[:, local_columns])
