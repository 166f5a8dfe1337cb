"""Fast weights: the parametric memory, a tree of plain tensors that the inner loop writes.

They are arguments of the forward pass, never parameters or module state. So the optimizer, FSDP2,
checkpoints and `state_dict` know nothing of them, and they are gone when the step is over.

A mixture of experts has a term for each expert in every set: where other tensors have G entries, theirs have
E G, expert by expert.

A packed row has a set for every slot of its documents; what a token is given is then the term of its own document.
Where the device multiplies groups of rows in one product, a token passes through the set of its document alone;
elsewhere it passes through all of its row's sets, and keeps its own.

Shapes: G sets of fast weights (one per sample, or one per micro-batch), B rows, L tokens, s sets of a row,
R rank, E experts of this rank, S slots (a token as often as experts see it), sorted by expert.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import broadcast, get_global_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memdlm_dist.compat.torch import grouped_mm
from memdlm_dist.method import keyed_random
from memdlm_dist.method.documents import GroupedTokens, SetAssignment
from memdlm_dist.method.keyed_random import Stream


@dataclass(frozen=True)
class AdaptedLinear:
    """Where fast weights attach: one linear of the backbone."""

    layer: str
    target: str
    in_features: int
    out_features: int
    row_wise: bool  # tensor-parallel style: row-wise shards `in`, column-wise shards `out`
    number: int  # its own among all linears of the backbone, whichever are adapted: the key of its draw
    # Of a mixture of experts: this linear of each of so many experts, with a term of its own for each (their numbers
    # follow on), of which so many apply to a token. 0 for a linear that all tokens pass through.
    experts: int = 0
    experts_per_token: int = 1


# Slots `[S, i]`, sorted by expert, times matrices `[E, o, i]`, one for each expert, or `[E G, o, i]`, one for each
# expert and each set: `[S, o]`.
ExpertProduct = Callable[[Tensor, Tensor], Tensor]


class LowRank(NamedTuple):
    """Low-rank fast weights of one linear: y = W x + (alpha / R) B (A x).

    Under tensor parallelism, A is replicated and B sharded on its rows for column-wise linears, A sharded
    on its columns and B replicated for row-wise ones.
    """

    A_GRi: Tensor
    B_GoR: Tensor
    scale: float  # alpha / R

    @classmethod
    def start(
        cls, linear: AdaptedLinear, rank: int, alpha: float, keys_G: Tensor, tp_mesh: DeviceMesh | None
    ) -> "LowRank":
        """A ~ kaiming_uniform(a = sqrt 5), that is U(-1/sqrt(in), 1/sqrt(in)); B = 0. Ranks draw only their part."""
        rows, columns = _local_sizes(linear, tp_mesh)
        first = columns * tp_mesh.get_local_rank() if tp_mesh is not None and linear.row_wise else 0
        column = torch.arange(first, first + columns, device=keys_G.device)
        element_Ri = torch.arange(rank, device=keys_G.device).unsqueeze(1) * linear.in_features + column
        u_Gn = keyed_random.uniform(keys_G, element_Ri.flatten(), torch.float32)
        # A tensor: CUDA multiplies by a number's rounded reciprocal, and would differ from a CPU in the last bit.
        root = u_Gn.new_full((), math.sqrt(linear.in_features))
        A_GRi = ((2 * u_Gn - 1) / root).unflatten(1, (rank, columns))
        B_GoR = torch.zeros(len(keys_G), rows, rank, device=keys_G.device)
        a_placement, b_placement = (Shard(2), Replicate()) if linear.row_wise else (Replicate(), Shard(1))
        return cls(_place(A_GRi, tp_mesh, a_placement), _place(B_GoR, tp_mesh, b_placement), alpha / rank)

    def term(self, x_BLi: Tensor, assignment: SetAssignment | None = None) -> Tensor:
        """(alpha / R) B (A x); see `adapted`. For a row-wise linear only the rank-R intermediate is reduced.

        Without grouped products the sets of a packed row are one of rank s R, of whose intermediate a token keeps what
        is its own set's.
        """
        row_wise = isinstance(self.A_GRi, DTensor) and self.A_GRi.placements[0].is_shard()
        A_GRi, B_GoR = self.A_GRi, self.B_GoR
        if assignment is not None:
            if (dtype := _grouped_dtype(assignment, x_BLi, A_GRi, B_GoR)) is not None:
                return self.scale * self._grouped(x_BLi.to(dtype), assignment, row_wise)
            own_BLs = assignment.mask()
            A_GRi = A_GRi.unflatten(0, (-1, assignment.slots)).flatten(1, 2)
            B_GoR = B_GoR.unflatten(0, (-1, assignment.slots)).transpose(1, 2).flatten(2, 3)
        z_BLR = _project(_layout(x_BLi, A_GRi, row_wise), A_GRi)
        if row_wise:
            z_BLR = cast(DTensor, z_BLR).redistribute(placements=[Shard(1)])
        if assignment is not None:
            own_BLR = own_BLs.repeat_interleave(self.A_GRi.shape[1], dim=-1)
            z_BLR = z_BLR * _beside(own_BLR.type_as(z_BLR), z_BLR)
        return _local_output(self.scale * _project(z_BLR, B_GoR), row_wise)

    def _grouped(self, x_BLi: Tensor, assignment: SetAssignment, row_wise: bool) -> Tensor:
        """B (A x), each token's by its own set alone."""
        assert assignment.grouped is not None and assignment.grouped_shard is not None
        A_GRi, B_GoR = _part(self.A_GRi), _part(self.B_GoR)
        x_BLi = _part(_layout(x_BLi, self.A_GRi, row_wise))
        if not row_wise:
            return _products(assignment.grouped, x_BLi, A_GRi, B_GoR)
        z_BLR = _scattered(_products(assignment.grouped, x_BLi, A_GRi), cast(DTensor, self.A_GRi).device_mesh)
        return _products(assignment.grouped_shard, z_BLR, B_GoR)

    def expert_term(self, x_Si: Tensor, product: ExpertProduct) -> Tensor:
        """The term for each expert; see `adapted_experts`."""
        return self.scale * product(product(x_Si, _part(self.A_GRi)), _part(self.B_GoR))


class Full(NamedTuple):
    """Full-matrix fast weights of one linear: y = (W + delta) x.

    Under tensor parallelism delta is sharded as the linear's own weight is.
    """

    delta_Goi: Tensor

    @classmethod
    def start(
        cls, linear: AdaptedLinear, rank: int, alpha: float, keys_G: Tensor, tp_mesh: DeviceMesh | None
    ) -> "Full":
        """delta = 0; rank, alpha and the keys' values play no part."""
        delta_Goi = torch.zeros(len(keys_G), *_local_sizes(linear, tp_mesh), device=keys_G.device)
        return cls(_place(delta_Goi, tp_mesh, Shard(2 if linear.row_wise else 1)))

    def term(self, x_BLi: Tensor, assignment: SetAssignment | None = None) -> Tensor:
        """delta x; see `adapted`. For a row-wise linear the whole output is reduced, as the linear's own is.

        Without grouped products every set of a packed row is a matrix product with all of its tokens.
        """
        row_wise = isinstance(self.delta_Goi, DTensor) and self.delta_Goi.placements[0].is_shard(2)
        if assignment is not None and (dtype := _grouped_dtype(assignment, x_BLi, self.delta_Goi)) is not None:
            assert assignment.grouped is not None
            x_BLi = _part(_layout(x_BLi.to(dtype), self.delta_Goi, row_wise))
            y_BLo = _products(assignment.grouped, x_BLi, _part(self.delta_Goi))
            return _scattered(y_BLo, cast(DTensor, self.delta_Goi).device_mesh) if row_wise else y_BLo
        x_BLi = _layout(x_BLi, self.delta_Goi, row_wise)
        if assignment is None:
            return _local_output(_project(x_BLi, self.delta_Goi), row_wise)
        deltas_sBoi = self.delta_Goi.unflatten(0, (-1, assignment.slots)).unbind(1)
        own_sBL1 = assignment.mask().unsqueeze(-1).unbind(2)
        # Selected before the product: the sum of partial outputs can then be reduced as one.
        terms = [
            _project(x_BLi * _beside(own_BL1.type_as(x_BLi), x_BLi), delta_Boi)
            for own_BL1, delta_Boi in zip(own_sBL1, deltas_sBoi, strict=True)
        ]
        return _local_output(torch.stack(terms).sum(0), row_wise)

    def expert_term(self, x_Si: Tensor, product: ExpertProduct) -> Tensor:
        """The term for each expert; see `adapted_experts`."""
        return product(x_Si, _part(self.delta_Goi))


# An adapter is a named tuple of tensors with two functions: how they start, and what they add to a linear.
FastLinear = LowRank | Full
FAST_WEIGHT_TYPES: dict[str, type[LowRank] | type[Full]] = {"lora": LowRank, "full": Full}

# Layer name -> target name ("gate", "q", ...) -> fast weights of that linear.
FastWeights = dict[str, dict[str, FastLinear]]


def draw(
    fast_weight_type: str,
    linears: Sequence[AdaptedLinear],
    rank: int,
    alpha: float,
    keys_G: Tensor,
    tp_mesh: DeviceMesh | None = None,
    ep_mesh: DeviceMesh | None = None,
) -> FastWeights:
    """Fresh fast weights, with which the model is as without them.

    Args:
        adapter: a key of `FAST_WEIGHT_TYPES`.
        linears: the linears to adapt.
        rank, alpha: of the low-rank term.
        keys_G: one key per set, from `keys`; the draw lands on its device, in float32.
        tp_mesh: one-dimensional; makes DTensors.
        ep_mesh: one-dimensional; each rank draws its own experts' terms, from the keys of the first one's set.
    """
    if ep_mesh is not None:
        keys_G, group = keys_G.clone(), ep_mesh.get_group()
        broadcast(keys_G, get_global_rank(group, 0), group)
    fast: FastWeights = {}
    for linear in linears:
        keys = keys_G + linear.number
        if linear.experts:
            ranks, place = (ep_mesh.size(), ep_mesh.get_local_rank()) if ep_mesh is not None else (1, 0)
            count = linear.experts // ranks
            expert_E1 = torch.arange(place * count, (place + 1) * count, device=keys.device).unsqueeze(1)
            keys = (keys + expert_E1).flatten()
        new = FAST_WEIGHT_TYPES[fast_weight_type].start(linear, rank, alpha, keys, tp_mesh)
        fast.setdefault(linear.layer, {})[linear.target] = new
    return fast


def keys(seed: int, step: int, sample_ids_B: Tensor, per_sample: bool) -> Tensor:
    """Keys of the draw, `[G]`: one per sequence, or the first sequence's for the whole micro-batch."""
    return keyed_random.key(seed, Stream.FAST_WEIGHTS, step, sample_ids_B if per_sample else sample_ids_B[:1])


def adapted(
    linear: nn.Module, x_BLi: Tensor, fast: FastLinear | None, assignment: SetAssignment | None = None
) -> Tensor:
    """The linear's output `[B, L, out]`, with the term of its fast weights added if it has any.

    Under tensor parallelism the input is what the linear gets (replicated if column-wise, sharded on
    `in` if row-wise) and the output what it returns (sharded on `out`, or on the sequence), as local
    tensors.

    Args:
        own: which of its row's sets is a token's, of all tokens on every tensor-parallel rank; None where each row has
            one set, or all have one together.
    """
    y_BLo = linear(x_BLi)
    return y_BLo if fast is None else y_BLo + fast.term(x_BLi, assignment).type_as(y_BLo)


def adapted_experts(weight_Eoi: Tensor, x_Si: Tensor, fast: FastLinear | None, product: ExpertProduct) -> Tensor:
    """The output `[S, out]` of a linear that each expert has of its own, with the fast term of each expert added.

    All tensors are this rank's. Under tensor parallelism the output of a row-wise linear is a partial sum, and
    so is the term's: the caller reduces both at once.
    """
    y_So = product(x_Si, weight_Eoi)
    return y_So if fast is None else y_So + fast.expert_term(x_Si, product).type_as(y_So)


def _part(x: Tensor) -> Tensor:
    """This rank's part of a fast tensor; the gradient of one that is replicated is what this rank adds to it."""
    if not isinstance(x, DTensor):
        return x
    return x.to_local(grad_placements=[Partial() if x.placements[0].is_replicate() else x.placements[0]])


def _grouped_dtype(assignment: SetAssignment, x_BLi: Tensor, *weights: Tensor) -> torch.dtype | None:
    """Return in which type the term is computed as grouped products; None if it is not.

    Accelerators have them in bfloat16, on rows of a multiple of 16 bytes.
    """
    if assignment.grouped is None:
        return None
    device = x_BLi.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BLi.dtype
    known = dtype == torch.bfloat16 or (device == "cpu" and dtype == torch.float32)
    return dtype if known and _fit_groups(size for x in weights for size in _part(x).shape[1:]) else None


def _fit_groups(sizes: Iterable[int]) -> bool:
    return all(size % 8 == 0 for size in sizes)


def can_group(fast_weight_type: str, linear: AdaptedLinear, rank: int, tp_mesh: DeviceMesh | None) -> bool:
    """Return whether grouped products take the sizes of a linear's fast weights on one rank."""
    return _fit_groups([*_local_sizes(linear, tp_mesh), *([rank] if fast_weight_type == "lora" else [])])


def _products(grouped: GroupedTokens, x_BLi: Tensor, *weights: Tensor) -> Tensor:
    """Multiply each token by its own set's matrices in turn, `[B, L, o]`; all tensors are this rank's."""
    y_Po = grouped.scatter(x_BLi)
    for weight_Goi in weights:
        y_Po = grouped_mm(y_Po, weight_Goi.type_as(y_Po), grouped.offsets_U)
    return grouped.gather(y_Po, len(x_BLi))


def _scattered(partial_BLo: Tensor, mesh: DeviceMesh) -> Tensor:
    """Add up all tensor-parallel ranks' parts; returns this rank's sequence shard."""
    return (
        DTensor.from_local(partial_BLo, mesh, [Partial()], run_check=False)
        .redistribute(placements=[Shard(1)])
        .to_local()
    )


def _local_sizes(linear: AdaptedLinear, tp_mesh: DeviceMesh | None) -> tuple[int, int]:
    """This rank's part of (out, in) of the linear's weight."""
    size = tp_mesh.size() if tp_mesh is not None else 1
    if linear.row_wise:
        return linear.out_features, linear.in_features // size
    return linear.out_features // size, linear.in_features


def _place(local: Tensor, tp_mesh: DeviceMesh | None, placement: Placement) -> Tensor:
    return local if tp_mesh is None else DTensor.from_local(local, tp_mesh, [placement], run_check=False)


def _layout(x_BLi: Tensor, like: Tensor, row_wise: bool) -> Tensor:
    """The linear's input as a DTensor, where the fast weights are."""
    if not isinstance(like, DTensor) or isinstance(x_BLi, DTensor):
        return x_BLi
    placement: Placement = Shard(x_BLi.ndim - 1) if row_wise else Replicate()
    return DTensor.from_local(x_BLi, like.device_mesh, [placement], run_check=False)


def _beside(whole: Tensor, x: Tensor) -> Tensor:
    """A tensor that every tensor-parallel rank has, laid out as `x` so that the two can be multiplied."""
    if not isinstance(x, DTensor):
        return whole
    # On the last dimension it broadcasts, and has nothing to shard.
    replicated = x.placements[0].is_shard(x.ndim - 1) and whole.shape[-1] == 1
    placement = Replicate() if replicated else x.placements[0]
    return DTensor.from_local(whole, x.device_mesh, [Replicate()], run_check=False).redistribute(placements=[placement])


def _local_output(term_BLo: Tensor, row_wise: bool) -> Tensor:
    if not isinstance(term_BLo, DTensor):
        return term_BLo
    return term_BLo.redistribute(placements=[Shard(1) if row_wise else Shard(2)]).to_local()


def _project(x_BLi: Tensor, weight_Goi: Tensor) -> Tensor:
    if weight_Goi.shape[0] == 1:
        return F.linear(x_BLi, weight_Goi.squeeze(0))
    return torch.bmm(x_BLi, weight_Goi.transpose(1, 2))


def leaves(fast: FastWeights) -> list[Tensor]:
    """All tensors of the tree in a fixed order."""
    return [x for layer in fast.values() for linear in layer.values() for x in linear if isinstance(x, Tensor)]


def map_leaves(function: Callable[..., Tensor], fast: FastWeights, *others: Sequence[Tensor]) -> FastWeights:
    """The tree with `function(leaf, *corresponding entries of others)` in place of every leaf."""
    rows = zip(leaves(fast), *others, strict=True)
    new = iter([function(*row) for row in rows])

    def rebuilt(linear: FastLinear) -> FastLinear:
        values: Any = [next(new) if isinstance(x, Tensor) else x for x in linear]
        return type(linear)(*values)

    return {layer: {target: rebuilt(linear) for target, linear in targets.items()} for layer, targets in fast.items()}


def select(fast: FastWeights, index_B: Sequence[int], n_sets: int) -> FastWeights:
    """Sets by their numbers, in any order and as often as they are named, of as many as there are."""

    def picked(x: Tensor) -> Tensor:
        local = x.to_local() if isinstance(x, DTensor) else x
        chosen = local.unflatten(0, (-1, n_sets))[:, list(index_B)].flatten(0, 1)
        if not isinstance(x, DTensor):
            return chosen
        return DTensor.from_local(chosen, x.device_mesh, x.placements, run_check=False)

    return map_leaves(picked, fast)
