"""Estimate of a step's memory, communication and FLOPs on one rank, before anything runs.

Sharded sizes come from a backbone on the meta device, parallelised as for training. Activations and communication
follow from these sizes and from the passes of the bi-level step. Peak memory is the sum of everything that is in memory
when the outer backward pass is in the last layer, where all of these tensors coexist. The estimate leaves out the
allocator's fragmentation, library workspaces and validation.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.job_config import Training

from memdlm_dist.compat.torchao import is_nf4, stored_bytes
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.method.documents import GROUP_ROWS, power_of_two
from memdlm_dist.method.fast_weights import AdaptedLinear
from memdlm_dist.method.logit_loss import chunk_length
from memdlm_dist.method.passes import Passes, planned_passes
from memdlm_dist.method.sets import Sets
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.mixture import MixtureArgs
from memdlm_dist.training.backbone import get_lora
from memdlm_dist.training.objective import (
    build_objective,
    first_adapted_layer,
    get_inner_loss,
    get_plan,
    get_samples_per_set,
)

# Mesh dimensions of FSDP2 and HSDP: a gathered parameter is not sharded over these.
_DATA_PARALLEL = ("dp_replicate", "fsdp", "efsdp")
_NOISE_LEVELS = 8  # a row's FLOPs are averaged over this number of noise levels


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the step's peak."""

    weights: float  # sharded, in their storage dtype
    gradients: float
    optimizer: float  # AdamW's two moments
    gathered: float  # all-gathered parameters: tail and head, and two layers of the trunk; all if none are resharded
    gathered_gradients: float  # gradients of the layer that is being reduced
    activations: float
    head: float  # one chunk of logits with the loss's temporaries, and the sum of the head weight's gradient
    fast_weights: float  # current fast weights, their gradients and the updated fast weights
    dequantized: float  # weights of a 4-bit base in the compute dtype, and the temporaries of dequantising one

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in an optimizer step, with ring algorithms; field names are keys of the JSON output."""

    gather: float  # FSDP2 all-gathers
    reduce: float  # FSDP2 reduce-scatters
    replicate: float  # HSDP all-reduces
    tensor: float  # tensor parallelism
    context: float  # context parallelism: exchange of tokens for heads, and all-reduces of the fast weights' gradients
    experts: float  # expert parallelism: exchange of tokens, and gradients of shared fast weights

    @property
    def total(self) -> float:
        """Sum of all parts, in bytes."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """Estimate of a configuration at one number of ranks; field names are keys of the JSON output."""

    parameters: int
    trained: int  # trained parameters
    active: int  # parameters that one token passes through
    replicas: int  # HSDP replicas of the parameters
    sequences: int  # rows per micro-batch
    micro_batches: int  # per optimizer step
    memory: MemoryEstimate
    communication: Communication
    across_nodes: list[str]  # fields of `communication` whose process groups span nodes
    flops: float  # matrix products of an optimizer step on one rank


@dataclass(frozen=True)
class _LayerPasses:
    """Number of passes of a micro-batch through one layer."""

    forward: int
    backward: int

    def communicating(self, recomputed: bool) -> int:
        """Count the passes that communicate; a checkpointed layer repeats the forward pass before each backward."""
        return self.forward + self.backward * (2 if recomputed else 1)


def estimate(
    model: LLaDA,
    args: LLaDAArgs,
    dims: Layout,
    config: JobConfig,
    node_size: int | None = None,
    documents: int = 1,
) -> Estimate:
    """Estimate the memory, communication and FLOPs of a configuration.

    Args:
        model: the backbone on the meta device, parallelised over `dims`.
        args: the backbone's sizes.
        dims: the parallel layout.
        config: a configuration from `launch.resolve`.
        node_size: ranks per node; None for a single node.
        documents: maximum number of documents in a packed row.
    """
    training, slots = config.training, power_of_two(documents)
    micro_batches = training.global_batch_size // (training.local_batch_size * dims.dp_replicate * dims.dp_shard)
    first = first_adapted_layer(config.parametric_memory, args) if config.parametric_memory.enable else args.n_layers
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        active=_active_parameters(model, args),
        replicas=dims.dp_replicate,
        sequences=training.local_batch_size,
        micro_batches=micro_batches,
        memory=_memory(model, args, dims, config, first, slots),
        communication=_communication(model, args, dims, config, first, micro_batches, slots),
        across_nodes=_across_nodes(dims, node_size) if node_size else [],
        flops=micro_batches * training.local_batch_size * _row_flops(args, dims, config),
    )


def _active_parameters(model: LLaDA, args: LLaDAArgs) -> int:
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = args.experts_per_token / args.n_experts if isinstance(args, MixtureArgs) else 1.0
    return int(sum(p.numel() for p in model.parameters()) - experts * (1 - share))


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _gathered_elements(parameters: Iterable[Tensor]) -> int:
    """Count this rank's elements of all-gathered parameters, which only tensor and expert parallelism shard."""
    total = 0
    for p in parameters:
        degree = 1
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            for name, size, placement in zip(names, p.device_mesh.shape, p.placements, strict=True):
                degree *= size if name not in _DATA_PARALLEL and placement.is_shard() else 1
        total += p.numel() // degree
    return total


def _gathered_bytes(parameters: Iterable[Tensor], compute: int) -> float:
    """Return the bytes of all-gathered parameters: quantised as they are stored, others in the compute dtype."""
    return sum(_gathered_elements([p]) * _gathered_itemsize(p, compute) for p in parameters)


def _gathered_itemsize(p: Tensor, compute: int) -> float:
    return stored_bytes(p) / _local(p).numel() if is_nf4(p) else compute


def _stored_bytes(p: Tensor) -> int:
    return stored_bytes(p) if is_nf4(p) else _local(p).numel() * p.itemsize


# torchao's temporaries while it dequantises a tensor, in bytes per element: indices in int64, values and scales.
_DEQUANTIZING = 14


def _dequantized(model: LLaDA, config: JobConfig, compute: int) -> float:
    """Return the bytes of dequantised weights at the step's peak.

    A dense linear dequantises its weight once for each product. Autograd saves the dequantised weights of experts: of
    all layers, or with activation checkpointing of the layer that is being recomputed.
    """
    quantized = {name: p.numel() for name, p in model.named_parameters() if is_nf4(p)}
    experts = compute * sum(count for name, count in quantized.items() if ".experts." in name)
    saved = experts / len(model.layers) if config.activation_checkpoint.mode == "full" else experts
    return saved + _DEQUANTIZING * max(quantized.values(), default=0)


def _groups(model: LLaDA) -> Sequence[Sequence[Tensor]]:
    """Return the parameters by FSDP2 group: embedding, each layer, final norm with head."""
    first, last = list(model.tok_embeddings.parameters()), [*model.norm.parameters(), *model.output.parameters()]
    return [first, *(list(layer.parameters()) for layer in model.layers.values()), last]


def _memory(model: LLaDA, args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int) -> MemoryEstimate:
    training = config.training
    compute = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    parameters = list(model.parameters())
    trained = [_local(p) for p in parameters if p.requires_grad]
    groups = _groups(model)
    if dims.fsdp_enabled:
        resharded = 0 if config.parallelism.fsdp_reshard_after_forward == "never" else 1 + first
        resident = groups[resharded:]
        transient = sorted((_gathered_bytes(group, compute) for group in groups[:resharded]), reverse=True)[:2]
        gathered = sum(_gathered_bytes(group, compute) for group in resident) + sum(transient)
        largest = max(_gathered_elements(p for p in group if p.requires_grad) for group in groups)
        # Autograd's gradients, and two copies in the reduction dtype: this group's and the previous group's, whose
        # reduction is still in progress.
        reducing = largest * (compute + 2 * TORCH_DTYPE_MAP[training.mixed_precision_reduce].itemsize)
    else:
        # Without FSDP2 nothing is gathered, but autocast caches the casts of the weights.
        gathered = compute * sum(_local(p).numel() for p in parameters if p.itemsize != compute)
        reducing = 0.0
    return MemoryEstimate(
        weights=sum(map(_stored_bytes, parameters)),
        gradients=sum(p.numel() * p.itemsize for p in trained),
        optimizer=2.0 * sum(p.numel() * p.itemsize for p in trained),
        gathered=gathered,
        gathered_gradients=reducing,
        activations=_activations(args, dims, config, first) + _grouped_copies(args, dims, config, first, slots),
        head=_head(args, dims, config, trained=any(p.requires_grad for p in model.output.parameters())),
        # Current fast weights, gradients, and updated fast weights.
        fast_weights=3.0 * _fast_bytes(args, dims, config, first, slots),
        dequantized=_dequantized(model, config, compute),
    )


# Float32 temporaries of the logits' size in an eager loss, apart from the logits of student and teacher.
_TEMPORARIES = {"cross_entropy": 0, "kl": 3, "reverse_kl": 2}


def chunk_bytes(loss: str, dtype: torch.dtype, fused: bool) -> int:
    """Return the memory of a chunk's loss, in bytes per element of the chunk's logits.

    Args:
        loss: name of a loss of logits.
        dtype: dtype of the head's matrix product; the loss reads the logits in float32.
        fused: the loss is compiled and has no temporaries of this size but the gradient.
    """
    n_logits = 1 if loss == "cross_entropy" else 2
    if fused:
        return (n_logits + 1) * dtype.itemsize
    copy = 4 if dtype.itemsize < 4 else 0
    return n_logits * (dtype.itemsize + copy) + 4 * _TEMPORARIES[loss]


def _head(args: LLaDAArgs, dims: Layout, config: JobConfig, trained: bool) -> float:
    training, memory = config.training, config.parametric_memory
    dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    tokens, vocabulary = math.ceil(_tokens(training, dims)), args.vocab_size // dims.tp
    rows = chunk_length(tokens, vocabulary, dtype)
    fused = config.compile.enable and "loss" in config.compile.components and dims.tp == 1
    losses = {"cross_entropy": vocabulary * args.dim * 4 if trained and rows < tokens and dtype.itemsize < 4 else 0}
    if memory.enable and memory.inner_loss in _TEMPORARIES:
        losses.setdefault(memory.inner_loss, 0)
    # With several chunks, the outer loss accumulates the gradient of the head's weight in float32.
    return max(rows * vocabulary * chunk_bytes(loss, dtype, fused) + summed for loss, summed in losses.items())


def _tokens(training: Training, dims: Layout) -> float:
    """Return the tokens of a micro-batch on one context-parallel rank."""
    tokens: float = training.local_batch_size * training.seq_len / dims.cp
    return tokens


def saved_elements(args: LLaDAArgs, tp_size: int = 1) -> tuple[float, float]:
    """Return the elements per token that autograd saves for an average layer: with full checkpointing, and without.

    Full checkpointing saves only the layer's input. Without it, the norms, the attention and the FFN save their inputs.
    The attention also saves queries, keys, values, its output, and the copy of the output that the last projection
    reads. The FFN also saves gate, up, silu(gate) and the product.
    """
    heads, kv = args.query_dim, args.kv_dim
    attention = 2 * args.dim / tp_size + args.dim + (3 * heads + 2 * kv) / tp_size
    if args.qk_norm:
        attention += (heads + kv) / tp_size
    if isinstance(args, MixtureArgs):
        # Input, intermediates and output of each expert, and the reordered output in float32 for the weighted sum.
        k, dense = args.experts_per_token, args.n_dense_layers / args.n_layers
        mixture = k * (args.dim + 4 * args.hidden_dim / tp_size + 3 * args.dim) + 4 * args.shared_hidden_dim / tp_size
        ffn = args.dim + (1 - dense) * mixture + dense * 4 * args.dense_hidden_dim / tp_size
    else:
        ffn = args.dim + 4 * args.hidden_dim / tp_size
    return args.dim / tp_size, attention + ffn


def _activations(args: LLaDAArgs, dims: Layout, config: JobConfig, first: int) -> float:
    """Return the bytes of the outer pass's activations, and of the trunk's outputs for the other states."""
    training, checkpointing = config.training, config.activation_checkpoint
    size = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize * _tokens(training, dims)
    checkpointed, full = saved_elements(args, dims.tp)
    if checkpointing.mode == "full":
        layers = args.n_layers * checkpointed + full  # `full`: the layer that is being recomputed
    elif checkpointing.mode == "selective" and checkpointing.selective_ac_option.isdigit():
        every = int(checkpointing.selective_ac_option)
        layers = (args.n_layers - args.n_layers // every) * full + args.n_layers // every * checkpointed + full
    else:
        layers = args.n_layers * full
    others = (_planned(config).inputs - 1) * args.dim / dims.tp if config.parametric_memory.enable else 0.0
    # The backward pass of a layer makes a gradient for each of its activations.
    return size * (layers + full + others + 2 * args.dim / dims.tp)


def _grouped_copies(args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int) -> float:
    """Return the bytes of the padded copies of the adapted linears' inputs, which grouped products read.

    An inner step's backward pass needs the copies of all layers; with full checkpointing, those of the layer that it
    recomputes.
    """
    memory, training = config.parametric_memory, config.training
    sets_per_row = _sets(config, slots).per_row
    if not memory.enable or sets_per_row == 1:
        return 0.0
    if config.activation_checkpoint.mode == "full":
        first = args.n_layers - 1
    tokens = _tokens(training, dims) + GROUP_ROWS * training.local_batch_size * sets_per_row
    linears = [x for x in args.adapted_linears(first, memory.target_modules) if not x.experts]
    elements = sum(x.in_features / (dims.tp if x.row_wise else 1) for x in linears)
    return TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize * tokens * elements


def _sets(config: JobConfig, slots: int) -> Sets:
    """Return the sets of fast weights of a micro-batch."""
    return Sets(config.training.local_batch_size, slots, get_samples_per_set(config.parametric_memory))


def _fast_bytes(
    args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int, with_experts: bool = True
) -> float:
    """Return the bytes of a micro-batch's fast weights on one rank, with those of the experts or without."""
    memory = config.parametric_memory
    if not memory.enable:
        return 0.0
    sets = _sets(config, slots)
    # A rank stores its experts' terms of all sets in the expert-parallel group, unless its ranks share one.
    ep_groups = 1 if sets.samples_per_set is None else dims.ep

    def elements(linear: AdaptedLinear) -> float:
        unsharded, sharded = linear.in_features, linear.out_features
        if linear.row_wise:
            unsharded, sharded = sharded, unsharded
        # Tensor parallelism shards one dimension; the low-rank matrix of the other dimension is replicated.
        count = (
            unsharded * sharded / dims.tp if memory.adapter == "full" else memory.rank * (unsharded + sharded / dims.tp)
        )
        return count * (linear.experts * ep_groups / dims.ep if linear.experts else 1)

    linears = [x for x in args.adapted_linears(first, memory.target_modules) if with_experts or not x.experts]
    return 4.0 * sets.count * sum(map(elements, linears))  # in float32


def _layer_passes(args: LLaDAArgs, config: JobConfig, first: int) -> list[_LayerPasses]:
    """Return the passes of one micro-batch through every layer."""
    if not config.parametric_memory.enable:
        return [_LayerPasses(1, 1)] * args.n_layers
    passes = _planned(config)
    trunk, tail = _LayerPasses(passes.inputs, 1), _LayerPasses(passes.tail_forward, passes.tail_backward)
    return [trunk] * first + [tail] * (args.n_layers - first)


def _planned(config: JobConfig) -> Passes:
    memory = config.parametric_memory
    return planned_passes(get_plan(config), get_inner_loss(memory).teacher is not None, memory.inner_epochs)


def _communication(
    model: LLaDA, args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, micro_batches: int, slots: int
) -> Communication:
    training = config.training
    compute = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    reduce = TORCH_DTYPE_MAP[training.mixed_precision_reduce].itemsize
    policy = config.parallelism.fsdp_reshard_after_forward
    gather = reduced = replicated = 0.0
    groups = _groups(model)
    for number, group in enumerate(groups):
        # Groups that are resharded after the forward pass are all-gathered again for the backward pass; tail and head
        # are not resharded.
        resident = number > first or (number == len(groups) - 1 and policy != "always")
        has_backward = number > 0 or any(p.requires_grad for p in group)
        twice = policy != "never" and not resident and has_backward
        itemsizes = [_gathered_itemsize(p, compute) for p in group]
        for (degree, elements), itemsize in zip(_fsdp_sizes(group), itemsizes, strict=True):
            gather += (2 if twice else 1) * itemsize * elements * (degree - 1) / degree
        for degree, elements in _fsdp_sizes(p for p in group if p.requires_grad):
            reduced += reduce * elements * (degree - 1) / degree
            # HSDP all-reduces each rank's sharded gradients over the replicas.
            replicated += 2 * reduce * elements / degree * (dims.dp_replicate - 1) / dims.dp_replicate
    tokens = _tokens(training, dims)
    passes = _layer_passes(args, config, first)
    recomputed = config.activation_checkpoint.mode == "full"
    n_passes = sum(x.communicating(recomputed) for x in passes)
    # A pass all-gathers the inputs of attention and FFN, and reduce-scatters their outputs.
    tp_sent = n_passes * 4 * compute * tokens * args.dim * (dims.tp - 1) / dims.tp
    ep_sent = 0.0
    if isinstance(args, MixtureArgs):
        routed = tokens * args.experts_per_token
        n_mixture_passes = sum(x.communicating(recomputed) for x in passes[args.n_dense_layers :])
        ep_sent = n_mixture_passes * 2 * compute * routed * args.dim * (dims.ep - 1) / dims.ep
        if args.shared_hidden_dim:  # it is sharded like an FFN of its own
            tp_sent += n_mixture_passes * 2 * compute * tokens * args.dim * (dims.tp - 1) / dims.tp
        if config.parametric_memory.enable and get_samples_per_set(config.parametric_memory) is None:
            # The ranks share one set, and add up the gradients of its terms outside the experts.
            sums = _planned(config).inner_steps * _fast_bytes(args, dims, config, first, slots, with_experts=False)
            ep_sent += 2 * sums * (dims.ep - 1) / dims.ep
    cp_sent = 0.0
    if dims.cp > 1:
        heads, kv = args.query_dim, args.kv_dim
        # Ulysses: queries, keys, values and the output. Ring attention, which rotates keys and values, counts the same.
        cp_sent = n_passes * compute * tokens * 2 * (heads + kv) / dims.tp * (dims.cp - 1) / dims.cp
        if config.parametric_memory.enable:
            sums = _planned(config).inner_steps * _fast_bytes(args, dims, config, first, slots)
            cp_sent += 2 * sums * (dims.cp - 1) / dims.cp
    return Communication(*(micro_batches * x for x in (gather, reduced, replicated, tp_sent, cp_sent, ep_sent)))


def _across_nodes(dims: Layout, node_size: int) -> list[str]:
    """Return the fields of `Communication` whose process groups span nodes.

    Ranks are numbered with tensor parallelism innermost, then context parallelism, FSDP sharding and replicas. Expert
    parallelism uses neighbouring ranks of the sharding dimension. Each group is therefore within a block of consecutive
    ranks, and stays within a node if the block's size divides the node's.
    """
    sharding = dims.dp_shard * dims.cp * dims.tp
    spans = {
        "gather": sharding,
        "reduce": sharding,
        "replicate": dims.dp_replicate * sharding,
        "tensor": dims.tp,
        "context": dims.cp * dims.tp,
        "experts": dims.ep * dims.tp,
    }
    return [name for name, span in spans.items() if node_size % span]


def _row_flops(args: LLaDAArgs, dims: Layout, config: JobConfig) -> float:
    """Return the FLOPs of one row on one rank, averaged over evenly spaced noise levels and over the memory's draws.

    Each row counts as one document, since a configuration does not contain the document lengths of packed rows.
    """
    checkpointing, objective = config.activation_checkpoint, build_objective(config, args, args.vocab_size - 1, dims)
    # With expert parallelism the inner loop reads all rows, unless whole steps are drawn.
    share = objective.probability if dims.ep == 1 or objective.by_step else 1.0
    memory = replace(objective.memory, samples_per_set=1) if objective.memory is not None else None
    objective = replace(objective, probability=1.0, memory=memory)
    recomputation = Recomputation(checkpointing.mode, checkpointing.selective_ac_option)
    row_1L, id_1 = torch.zeros(1, config.training.seq_len, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    total = 0.0
    for number in range(_NOISE_LEVELS):
        level_1 = torch.full((1,), (number + 0.5) / _NOISE_LEVELS, dtype=torch.float64)
        batch = objective.micro_batch(row_1L, row_1L, id_1, step=0, t_U=level_1)
        frozen = get_lora(config) is not None
        flops = step_flops(args, batch, objective.memory, recomputation, frozen)
        total += flops.outer + share * flops.inner
    return total / _NOISE_LEVELS / dims.tp


def _fsdp_sizes(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return (degree of FSDP2 sharding, elements when all-gathered) of each parameter."""
    result = []
    for p in parameters:
        degree = 1
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            sizes = dict(zip(names, p.device_mesh.shape, strict=True))
            degree = math.prod(sizes.get(name, 1) for name in ("fsdp", "efsdp"))
        result.append((degree, _gathered_elements([p])))
    return result
