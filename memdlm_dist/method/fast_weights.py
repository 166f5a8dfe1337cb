"""Fast weights: the parametric memory, a tree of tensors that the inner loop updates.

Fast weights are arguments of the forward pass, never parameters or module state. So the optimizer, FSDP2, checkpoints
and `state_dict` do not see them, and they are freed at the end of the step.

Mixture of experts: every set has one term per expert. The leading dimension of these tensors is E G instead of G,
with the expert as the slower index.

Shared sets: G sets of fast weights serve B rows, G <= B: consecutive rows have the same set.

Packed rows: a row has s sets of fast weights, each for one or several documents, and a token gets the term of its
document's set. With grouped matrix products a token is multiplied by that set only. Without them it is multiplied by
all sets of its row, and a mask selects its own set.

Shapes: G sets of fast weights (see `sets.Sets`), B rows, L tokens, s sets per row, R rank of the low-rank term,
E local experts, S routed tokens (each token once per selected expert), sorted by expert, P rows of the buffer of a
grouped matrix product.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import all_gather_into_tensor, broadcast, get_global_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memdlm_dist.compat.torch import grouped_mm
from memdlm_dist.method import keyed_random
from memdlm_dist.method.documents import GroupedTokens, SetAssignment
from memdlm_dist.method.keyed_dropout import Dropout
from memdlm_dist.method.keyed_random import Stream


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear of the backbone that has fast weights."""

    layer: str
    target: str
    in_features: int
    out_features: int
    row_wise: bool  # tensor-parallel style: row-wise shards `in`, column-wise shards `out`
    number: int  # unique among all linears of the backbone, adapted or not; keys the initial draw
    # Number of experts that have this linear; 0 for a linear outside a mixture of experts. Each expert has its own
    # term; `number + e` keys the draw of expert e.
    experts: int = 0
    experts_per_token: int = 1  # experts that a token passes through


# Product of routed tokens `[S, i]` with one matrix per expert `[E, o, i]`, or one per expert and set `[E G, o, i]`:
# returns `[S, o]`.
ExpertProduct = Callable[[Tensor, Tensor], Tensor]


class WriteNorms:
    """Squared norms of a linear's fast-weight term and of its own output, added up by the passes that read it.

    Only tokens with a term other than 0 count. Activation checkpointing adds both norms twice.

    Not a tuple or dataclass: in these, FSDP2 would replace the float32 tensor with a copy in the parameters' dtype.
    """

    def __init__(self, device: torch.device):
        self.squares_2 = torch.zeros(2, device=device)

    @torch.no_grad()
    def add(self, term: Tensor, own: Tensor) -> None:
        """Add the norms of local outputs `[..., o]`."""
        term_n, own_n = (
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (term, own)
        )
        squares = [term_n.square().sum(), torch.where(term_n > 0, own_n, 0.0).square().sum()]
        self.squares_2.add_(torch.stack([x.float() for x in squares]))


class LowRank(NamedTuple):
    """Low-rank fast weights of one linear: y = W x + (alpha / R) B (A x).

    Under tensor parallelism, a column-wise linear has A replicated and B sharded on its rows. A row-wise linear has
    A sharded on its columns and B replicated.
    """

    A_GRi: Tensor
    B_GoR: Tensor
    scale: float  # alpha / R
    norms: WriteNorms | None = None  # None: do not measure

    @classmethod
    def start(
        cls, linear: AdaptedLinear, rank: int, alpha: float, keys_G: Tensor, tp_mesh: DeviceMesh | None
    ) -> "LowRank":
        """Draw A ~ kaiming_uniform(a = sqrt 5) = U(-1/sqrt(in), 1/sqrt(in)) and set B = 0.

        A tensor-parallel rank draws its shard of A only.
        """
        rows, columns = _local_sizes(linear, tp_mesh)
        first = columns * tp_mesh.get_local_rank() if tp_mesh is not None and linear.row_wise else 0
        column = torch.arange(first, first + columns, device=keys_G.device)
        element_Ri = torch.arange(rank, device=keys_G.device).unsqueeze(1) * linear.in_features + column
        u_Gn = keyed_random.uniform(keys_G, element_Ri.flatten(), torch.float32)
        # A tensor, so that CUDA divides by it. It would multiply by the rounded reciprocal of a Python number, and the
        # result would differ from the CPU's in the last bit.
        root = u_Gn.new_full((), math.sqrt(linear.in_features))
        A_GRi = ((2 * u_Gn - 1) / root).unflatten(1, (rank, columns))
        B_GoR = torch.zeros(len(keys_G), rows, rank, device=keys_G.device)
        a_placement, b_placement = (Shard(2), Replicate()) if linear.row_wise else (Replicate(), Shard(1))
        return cls(_to_dtensor(A_GRi, tp_mesh, a_placement), _to_dtensor(B_GoR, tp_mesh, b_placement), alpha / rank)

    def term(self, x_BLi: Tensor, assignment: SetAssignment | None = None) -> Tensor:
        """Compute (alpha / R) B (A x); see `adapted`.

        A row-wise linear reduces the rank-R intermediate A x over the tensor-parallel group, not the full output.

        Without grouped products, the s sets of a packed row act as one term of rank s R. A mask on the intermediate
        keeps the R entries of the token's own set.
        """
        row_wise = isinstance(self.A_GRi, DTensor) and self.A_GRi.placements[0].is_shard()
        A_GRi, B_GoR = self.A_GRi, self.B_GoR
        if assignment is not None:
            if (dtype := _grouped_dtype(assignment, x_BLi, A_GRi, B_GoR)) is not None:
                return self.scale * self._grouped(x_BLi.to(dtype), assignment, row_wise)
            mask_BLs = assignment.mask()
            A_GRi = A_GRi.unflatten(0, (-1, assignment.slots)).flatten(1, 2)
            B_GoR = B_GoR.unflatten(0, (-1, assignment.slots)).transpose(1, 2).flatten(2, 3)
        z_BLR = _project(_input_dtensor(x_BLi, A_GRi, row_wise), A_GRi)
        if row_wise:
            z_BLR = cast(DTensor, z_BLR).redistribute(placements=[Shard(1)])
        if assignment is not None:
            mask_BLR = mask_BLs.repeat_interleave(self.A_GRi.shape[1], dim=-1)
            z_BLR = z_BLR * _redistribute_like(mask_BLR.type_as(z_BLR), z_BLR)
        return _local_output(self.scale * _project(z_BLR, B_GoR), row_wise)

    def _grouped(self, x_BLi: Tensor, assignment: SetAssignment, row_wise: bool) -> Tensor:
        """Compute B (A x) as grouped products: each token is multiplied by its own set only."""
        assert assignment.grouped is not None and assignment.grouped_shard is not None
        A_GRi, B_GoR = _to_local(self.A_GRi), _to_local(self.B_GoR)
        x_BLi = _to_local(_input_dtensor(x_BLi, self.A_GRi, row_wise))
        if not row_wise:
            return _multiply_grouped(assignment.grouped, x_BLi, A_GRi, B_GoR)
        z_BLR = _reduce_scatter(
            _multiply_grouped(assignment.grouped, x_BLi, A_GRi), cast(DTensor, self.A_GRi).device_mesh
        )
        return _multiply_grouped(assignment.grouped_shard, z_BLR, B_GoR)

    def expert_term(self, x_Si: Tensor, product: ExpertProduct) -> Tensor:
        """Compute the experts' low-rank terms for routed tokens, `[S, o]`; see `adapted_experts`."""
        return self.scale * product(product(x_Si, _to_local(self.A_GRi)), _to_local(self.B_GoR))


class Full(NamedTuple):
    """Full-matrix fast weights of one linear: y = (W + delta) x.

    Under tensor parallelism delta is sharded like the linear's weight.
    """

    delta_Goi: Tensor
    norms: WriteNorms | None = None  # None: do not measure

    @classmethod
    def start(
        cls, linear: AdaptedLinear, rank: int, alpha: float, keys_G: Tensor, tp_mesh: DeviceMesh | None
    ) -> "Full":
        """Set delta = 0; `rank`, `alpha` and the values of `keys_G` are unused."""
        delta_Goi = torch.zeros(len(keys_G), *_local_sizes(linear, tp_mesh), device=keys_G.device)
        return cls(_to_dtensor(delta_Goi, tp_mesh, Shard(2 if linear.row_wise else 1)))

    def term(self, x_BLi: Tensor, assignment: SetAssignment | None = None) -> Tensor:
        """Compute delta x; see `adapted`.

        A row-wise linear reduces the full output over the tensor-parallel group, like the linear itself.

        Without grouped products, every set of a packed row is multiplied by all tokens of the row.
        """
        row_wise = isinstance(self.delta_Goi, DTensor) and self.delta_Goi.placements[0].is_shard(2)
        if assignment is not None and (dtype := _grouped_dtype(assignment, x_BLi, self.delta_Goi)) is not None:
            assert assignment.grouped is not None
            x_BLi = _to_local(_input_dtensor(x_BLi.to(dtype), self.delta_Goi, row_wise))
            y_BLo = _multiply_grouped(assignment.grouped, x_BLi, _to_local(self.delta_Goi))
            return _reduce_scatter(y_BLo, cast(DTensor, self.delta_Goi).device_mesh) if row_wise else y_BLo
        x_BLi = _input_dtensor(x_BLi, self.delta_Goi, row_wise)
        if assignment is None:
            return _local_output(_project(x_BLi, self.delta_Goi), row_wise)
        deltas_sBoi = self.delta_Goi.unflatten(0, (-1, assignment.slots)).unbind(1)
        mask_sBL1 = assignment.mask().unsqueeze(-1).unbind(2)
        # Mask before the product: the sum of the partial outputs then needs a single reduction.
        terms = [
            _project(x_BLi * _redistribute_like(mask_BL1.type_as(x_BLi), x_BLi), delta_Boi)
            for mask_BL1, delta_Boi in zip(mask_sBL1, deltas_sBoi, strict=True)
        ]
        return _local_output(torch.stack(terms).sum(0), row_wise)

    def expert_term(self, x_Si: Tensor, product: ExpertProduct) -> Tensor:
        """Compute the experts' full-matrix terms for routed tokens, `[S, o]`; see `adapted_experts`."""
        return product(x_Si, _to_local(self.delta_Goi))


# A fast-weight type is a named tuple of tensors. `start` builds their initial values; `term` (in a mixture of experts,
# `expert_term`) computes what they add to the output of the linear.
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
    shares_sets: bool = False,
) -> FastWeights:
    """Draw initial fast weights, float32; their terms are zero, so the model starts unchanged.

    Args:
        fast_weight_type: a key of `FAST_WEIGHT_TYPES`.
        linears: linears to adapt.
        rank: R of the low-rank term.
        alpha: the low-rank term is multiplied by alpha / R.
        keys_G: one key per set, from `keys`; its device is the device of the fast weights.
        tp_mesh: one-dimensional mesh; the fast weights become DTensors on it.
        ep_mesh: one-dimensional mesh; each of its ranks draws its local experts' terms of the sets of all ranks.
        shares_sets: the ranks of `ep_mesh` share the sets of its rank 0; otherwise each has sets of its own.
    """
    keys_A = keys_G  # of the sets whose experts' terms this rank stores
    if ep_mesh is not None:
        group = ep_mesh.get_group()
        if shares_sets:
            keys_A = keys_G = keys_G.clone()
            broadcast(keys_G, get_global_rank(group, 0), group)
        elif any(linear.experts for linear in linears):
            keys_A = keys_G.new_empty(ep_mesh.size() * len(keys_G))
            all_gather_into_tensor(keys_A, keys_G.contiguous(), group)
    fast: FastWeights = {}
    for linear in linears:
        keys = (keys_A if linear.experts else keys_G) + linear.number
        if linear.experts:
            ep_size, ep_rank = (ep_mesh.size(), ep_mesh.get_local_rank()) if ep_mesh is not None else (1, 0)
            n_local = linear.experts // ep_size
            expert_E1 = torch.arange(ep_rank * n_local, (ep_rank + 1) * n_local, device=keys.device).unsqueeze(1)
            keys = (keys + expert_E1).flatten()
        new = FAST_WEIGHT_TYPES[fast_weight_type].start(linear, rank, alpha, keys, tp_mesh)
        fast.setdefault(linear.layer, {})[linear.target] = new
    return fast


def keys(seed: int, step: int, sample_ids_G: Tensor) -> Tensor:
    """Return the keys of the draw, int64 `[G]`, from the id of each set's first sample."""
    return keyed_random.key(seed, Stream.FAST_WEIGHTS, step, sample_ids_G)


def adapted(
    linear: Callable[[Tensor], Tensor],
    x_BLi: Tensor,
    fast: FastLinear | None,
    assignment: SetAssignment | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Apply a linear and add the term of its fast weights, `[B, L, out]`.

    Under tensor parallelism, input and output are local tensors in the linear's own layout. A column-wise linear takes
    a replicated input and returns its output sharded on `out`. A row-wise linear takes its input sharded on `in` and
    returns its output sharded on the sequence.

    Args:
        fast: fast weights of the linear; None adds nothing.
        assignment: assignment of all tokens to the sets of their row, equal on every tensor-parallel rank. None if
            each row has one set, its own or one that it shares with others.
        dropout: dropout of the term's input; None drops nothing.
    """
    y_BLo = linear(x_BLi)
    if fast is None:
        return y_BLo
    x_BLi = _drop(x_BLi, fast, dropout)
    n_sets, rows = len(fast[0]), len(x_BLi)
    if assignment is None and 1 < n_sets < rows:
        term_BLo = _unfold_rows(fast.term(_fold_rows(x_BLi, rows // n_sets)), rows // n_sets)
    else:
        term_BLo = fast.term(x_BLi, assignment)
    if fast.norms is not None:
        fast.norms.add(term_BLo, y_BLo)
    return y_BLo + term_BLo.type_as(y_BLo)


def _fold_rows(x_BLi: Tensor, n: int) -> Tensor:
    """Concatenate every n rows into one, `[B / n, L n, i]`, token by token: a sequence shard stays one."""
    return x_BLi.unflatten(0, (-1, n)).transpose(1, 2).flatten(1, 2)


def _unfold_rows(y_GLo: Tensor, n: int) -> Tensor:
    """Undo `_fold_rows`, `[B, L, o]`."""
    return y_GLo.unflatten(1, (-1, n)).transpose(1, 2).flatten(0, 1)


def adapted_experts(
    weight_Eoi: Tensor,
    x_Si: Tensor,
    fast: FastLinear | None,
    product: ExpertProduct,
    n_slots: Tensor,
    dropout: Dropout | None = None,
) -> Tensor:
    """Apply the experts' linears to routed tokens and add the experts' fast terms, `[S, out]`.

    All tensors are local. Under tensor parallelism a row-wise linear's output and its term are partial sums, which the
    caller reduces together.

    Args:
        n_slots: number of routed tokens, scalar; the rows of `x_Si` after them are padding.
        dropout: dropout of the term's input, with one key per slot; None drops nothing.
    """
    y_So = product(x_Si, weight_Eoi)
    if fast is None:
        return y_So
    term_So = fast.expert_term(_drop(x_Si, fast, dropout), product)
    if fast.norms is not None:
        # Grouped products leave the rows of the padding undefined.
        is_slot_S1 = (torch.arange(len(x_Si), device=x_Si.device) < n_slots).unsqueeze(1)
        fast.norms.add(torch.where(is_slot_S1, term_So, 0.0), y_So)
    return y_So + term_So.type_as(y_So)


def _drop(x: Tensor, fast: FastLinear, dropout: Dropout | None) -> Tensor:
    """Apply dropout to a linear's local input, which a row-wise linear has sharded on its features."""
    if dropout is None:
        return x
    first = cast(DTensor, fast[0]).device_mesh.get_local_rank() * x.shape[-1] if _is_row_wise(fast) else 0
    return dropout(x, first)


def _is_row_wise(fast: FastLinear) -> bool:
    """Return whether tensor parallelism shards the input features of a linear."""
    weight = fast[0]  # A or delta; both have the input features last
    return isinstance(weight, DTensor) and weight.placements[0].is_shard(2)


def _to_local(x: Tensor) -> Tensor:
    """Return the local tensor of a fast weight; the gradient of a replicated one is a partial sum."""
    if not isinstance(x, DTensor):
        return x
    return x.to_local(grad_placements=[Partial() if x.placements[0].is_replicate() else x.placements[0]])


def _grouped_dtype(assignment: SetAssignment, x_BLi: Tensor, *weights: Tensor) -> torch.dtype | None:
    """Return the dtype in which grouped products compute the term; None if they cannot.

    Accelerators support grouped products in bfloat16 only, with rows of a multiple of 16 bytes.
    """
    if assignment.grouped is None:
        return None
    device = x_BLi.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BLi.dtype
    supported = dtype == torch.bfloat16 or (device == "cpu" and dtype == torch.float32)
    return dtype if supported and _fit_groups(size for x in weights for size in _to_local(x).shape[1:]) else None


def _fit_groups(sizes: Iterable[int]) -> bool:
    return all(size % 8 == 0 for size in sizes)


def can_group(fast_weight_type: str, linear: AdaptedLinear, rank: int, tp_mesh: DeviceMesh | None) -> bool:
    """Return whether grouped products support the local sizes of a linear's fast weights."""
    return _fit_groups([*_local_sizes(linear, tp_mesh), *([rank] if fast_weight_type == "lora" else [])])


def _multiply_grouped(grouped: GroupedTokens, x_BLi: Tensor, *weights: Tensor) -> Tensor:
    """Multiply each token by its set's matrices, one after the other, `[B, L, o]`; all tensors are local."""
    y_Po = grouped.scatter(x_BLi)
    for weight_Goi in weights:
        y_Po = grouped_mm(y_Po, weight_Goi.type_as(y_Po), grouped.offsets_U)
    return grouped.gather(y_Po, len(x_BLi))


def _reduce_scatter(partial_BLo: Tensor, mesh: DeviceMesh) -> Tensor:
    """Reduce-scatter partial sums over the tensor-parallel group, to this rank's sequence shard."""
    return (
        DTensor.from_local(partial_BLo, mesh, [Partial()], run_check=False)
        .redistribute(placements=[Shard(1)])
        .to_local()
    )


def _local_sizes(linear: AdaptedLinear, tp_mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return the local (out, in) of a linear's weight on a tensor-parallel rank."""
    size = tp_mesh.size() if tp_mesh is not None else 1
    if linear.row_wise:
        return linear.out_features, linear.in_features // size
    return linear.out_features // size, linear.in_features


def _to_dtensor(local: Tensor, tp_mesh: DeviceMesh | None, placement: Placement) -> Tensor:
    return local if tp_mesh is None else DTensor.from_local(local, tp_mesh, [placement], run_check=False)


def _input_dtensor(x_BLi: Tensor, like: Tensor, row_wise: bool) -> Tensor:
    """Wrap a linear's local input as a DTensor if its fast weights are DTensors."""
    if not isinstance(like, DTensor) or isinstance(x_BLi, DTensor):
        return x_BLi
    placement: Placement = Shard(x_BLi.ndim - 1) if row_wise else Replicate()
    return DTensor.from_local(x_BLi, like.device_mesh, [placement], run_check=False)


def _redistribute_like(replicated: Tensor, x: Tensor) -> Tensor:
    """Redistribute a replicated tensor to the placement of `x`."""
    if not isinstance(x, DTensor):
        return replicated
    # A last dimension of size 1 broadcasts and cannot be sharded.
    stays_replicated = x.placements[0].is_shard(x.ndim - 1) and replicated.shape[-1] == 1
    placement = Replicate() if stays_replicated else x.placements[0]
    return DTensor.from_local(replicated, x.device_mesh, [Replicate()], run_check=False).redistribute(
        placements=[placement]
    )


def _local_output(term_BLo: Tensor, row_wise: bool) -> Tensor:
    if not isinstance(term_BLo, DTensor):
        return term_BLo
    return term_BLo.redistribute(placements=[Shard(1) if row_wise else Shard(2)]).to_local()


def _project(x_BLi: Tensor, weight_Goi: Tensor) -> Tensor:
    if weight_Goi.shape[0] == 1:
        return F.linear(x_BLi, weight_Goi.squeeze(0))
    return torch.bmm(x_BLi, weight_Goi.transpose(1, 2))
