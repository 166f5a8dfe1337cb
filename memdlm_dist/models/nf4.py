"""4-bit base of outer LoRA: NF4 with double quantisation (QLoRA, arXiv 2305.14314), stored in torchao's `NF4Tensor`.

The linears of all layers are quantised; embedding, norms, router and output head are not. Each pass dequantises a
linear's weight to the compute dtype. FSDP2 shards and all-gathers the quantised tensors.

The scales of a tensor are centred on their mean over the whole tensor. A weight is therefore quantised whole and then
sharded along its rows, so that all layouts have the same base. Experts' weights `[E, F, D]` are stored as `[E F, D]`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from memdlm_dist.compat import torchao
from memdlm_dist.compat.torch import local_block
from memdlm_dist.compat.torchao import is_nf4
from memdlm_dist.models.linears import GROUPS, LINEARS

# Elements in the smallest unit of a quantised tensor: 256 blocks of 64 elements, whose scales share one factor.
UNIT = torchao.BLOCK * torchao.SCALES


def quantize_linears(model: nn.Module) -> None:
    """Replace the weights of all layers' linears by quantised ones on the meta device, before parallelisation."""
    for name, weight in list(model.named_parameters()):
        if is_linear(name):
            owner, _, parameter = name.rpartition(".")
            flat = torch.empty(weight.shape, dtype=weight.dtype, device="meta").flatten(0, -2)
            quantized = nn.Parameter(torchao.quantize(flat), requires_grad=False)
            model.get_submodule(owner).register_parameter(parameter, quantized)


def misfit(args: Any, shards: int) -> str:
    """Return the phrase that names a linear whose size does not fit NF4 or the shards; an empty string if all fit.

    Args:
        args: sizes of the backbone, `LLaDAArgs`.
        shards: number of ranks that shard the weights.
    """
    for linear in args.adapted_linears(0, list(GROUPS)):
        rows, columns = linear.out_features * max(1, linear.experts), linear.in_features
        size = f"the linear {linear.target} of {'all experts' if linear.experts else 'a layer'}"
        if rows * columns % UNIT:
            return f"{size} has {rows} x {columns} elements, which {UNIT:,} does not divide"
        if rows % shards or rows * columns // UNIT % shards:
            return (
                f"{size} has {rows} rows in {rows * columns // UNIT} units of {UNIT:,} elements, which {shards} ranks "
                "cannot share evenly"
            )
        # Adapters and exports are sharded by expert.
        if linear.experts % shards:
            return f"a layer has {linear.experts} experts, which {shards} ranks cannot share evenly"
    return ""


def expert_count(args: Any) -> int:
    """Return the number of experts of a layer; 1 without a mixture of experts."""
    count: int = getattr(args, "n_experts", 1)
    return count


def materialize(model: nn.Module) -> None:
    """Complete quantised weights after `Module.to_empty`; call before weights are drawn or loaded."""
    for parameter in model.parameters():
        if is_nf4(parameter):
            torchao.materialize(parameter)


def empty(tensor: Tensor) -> Tensor:
    """Return an empty tensor `[rows, columns]` for the whole weight of a quantised parameter, on its device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=torchao.local(tensor).device)


@torch.no_grad()
def assign(tensor: Tensor, whole: Tensor) -> None:
    """Quantise a whole weight, and store this rank's rows of it.

    Args:
        tensor: quantised parameter, or its entry in a state dict, sharded or not.
        whole: `[rows, columns]`, or `[E, F, D]` for experts.
    """
    _, first = local_block(tensor)
    torchao.write_rows(tensor, torchao.quantize(whole.to(tensor.dtype).flatten(0, -2)), first[0])


def round_trip(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that the model computes with after a whole weight has been quantised from `dtype`."""
    return torchao.dequantize(torchao.quantize(weight.to(dtype).flatten(0, -2))).view(weight.shape)


def dequantized(name: str, tensor: Tensor, experts: int) -> Tensor:
    """Return the weight that a parameter stands for, sharded alike; a parameter that is not quantised as it is.

    Args:
        name: parameter name.
        experts: E, the number of experts of a layer; 1 without a mixture of experts.
    """
    if not is_nf4(tensor):
        return tensor
    shape = stored_shape(name, tensor, experts)
    weight = torchao.dequantize(tensor).view(-1, *shape[1:])
    if not isinstance(tensor, DTensor):
        return weight
    return DTensor.from_local(weight, tensor.device_mesh, tensor.placements, run_check=False)


def stored_shape(name: str, tensor: Tensor, experts: int) -> tuple[int, ...]:
    """Return the shape of a parameter in checkpoints: `[E, F, D]` for the quantised weight of a layer's experts."""
    if is_nf4(tensor) and ".experts." in name:
        return (experts, tensor.shape[0] // experts, tensor.shape[1])
    return tuple(tensor.shape)


def is_linear(name: str) -> bool:
    """Return whether a parameter is the weight of a layer's linear, which NF4 quantises; adapters are not."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return name.startswith("layers.") and last in {linear.weight for linear in LINEARS.values()}
