"""Fingerprint of a model's weights, which names them independently of where they lie and how they are sharded."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from memdlm_dist.compat.torch import local_block
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.models import lora, nf4

_ROWS_AT_ONCE = 2**22  # elements, of 8 bytes each while they are summed
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(state: Mapping[str, Tensor], experts: int) -> str:
    """Return the fingerprint of a state dict's names, shapes, dtypes and bits; a collective call.

    Each tensor is the sum of its elements' bits modulo 2^64, multiplied by odd hashes of the row and of the place in
    the row. Integer sums are exact, so every layout gives the same fingerprint. It tells different weights apart; it
    does not protect against somebody who looks for equal ones. An adapter whose B is zero is left out: it adds nothing,
    and its A is drawn anew by every process.

    Args:
        state: tensors by name, sharded or not.
        experts: experts of a layer, see `nf4.dequantized`.
    """
    described: dict[str, tuple[list[int], str, int]] = {}
    for name, tensor in sorted(state.items()):
        weight = nf4.dequantized(name, tensor, experts)
        total = _local_sum(weight)
        if isinstance(weight, DTensor):
            placements = [Replicate() if p.is_replicate() else Partial() for p in weight.placements]
            total = DTensor.from_local(total, weight.device_mesh, placements, run_check=False).full_tensor()
        described[name] = (list(weight.shape), str(weight.dtype), int(total))
    for name in [name for name, (_, _, total) in described.items() if name.endswith(lora.B) and not total]:
        del described[name], described[name.removesuffix(lora.B) + lora.A]
    return hashlib.sha256(json.dumps(sorted(described.items())).encode()).hexdigest()[:32]


def _local_sum(weight: Tensor) -> Tensor:
    """Return the weighted sum of the bits of this rank's part, a scalar."""
    local, first = local_block(weight)
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    if not local.numel():
        return total
    # As a matrix: the first dimension, and all others.
    columns = weight.numel() // max(1, len(weight)) if weight.dim() else 1
    index = torch.zeros(local.shape[1:], dtype=torch.int64, device=local.device)
    for dim in range(1, weight.dim()):
        offset = torch.arange(local.shape[dim], device=local.device) + first[dim]
        index = index * weight.shape[dim] + offset.view(-1, *[1] * (weight.dim() - 1 - dim))
    factor_c = _hash(1, index.flatten())
    rows = local.reshape(len(local) if local.dim() else 1, -1).contiguous().view(_BITS[local.itemsize])
    step = max(1, _ROWS_AT_ONCE // max(1, columns))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].long()
        index_r = torch.arange(len(part), device=part.device) + start + (first[0] if first else 0)
        total += ((part * factor_c).sum(1) * _hash(0, index_r)).sum()
    return total


def _hash(number: int, index: Tensor) -> Tensor:
    """Return odd int64 numbers, the `number`-th hash of some indices."""
    return keyed_random.key(0, Stream.FINGERPRINT, number, index) | 1
