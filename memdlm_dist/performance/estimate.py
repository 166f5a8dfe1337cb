"""What a step needs on one rank, before anything runs: bytes that are held and sent, and what is computed.

From a backbone on the meta device, spread over a layout as for training, the sharded sizes are read off; activations
and communication follow from the sizes and from the order in which the bi-level step passes through the layers. Peak
memory is estimated as the sum of what is held when the outer backward pass is in the deepest layer, which is where all
of this is there at once. Not in it: the allocator's fragmentation, the libraries' workspaces, validation.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.job_config import Training

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.method.documents import GROUP_ROWS, power_of_two
from memdlm_dist.method.fast_weights import AdaptedLinear
from memdlm_dist.method.logit_loss import chunk_length
from memdlm_dist.method.passes import Passes, planned_passes
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.training.backbone import get_lora
from memdlm_dist.training.objective import build_objective, first_adapted_layer, get_inner_loss, get_plan

# The mesh dimensions over which FSDP2 shards a parameter that it gathers to compute with.
_DATA_PARALLEL = ("dp_replicate", "fsdp", "efsdp")
_LEVELS = 8  # noise levels over which the FLOPs of a row are averaged


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the step's peak."""

    weights: float  # sharded, in the type in which they are kept
    gradients: float
    optimizer: float  # AdamW's two moments
    gathered: float  # tail and head, which stay, and two layers of the trunk; all that is never freed
    gathered_gradients: float  # of the layer whose gradients are being reduced
    activations: float
    head: float  # one chunk of logits with what the loss makes of it, and the sum of the weight's gradient
    fast_weights: float  # with their gradients and the next ones

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in an optimizer step, by ring algorithms."""

    gather: float  # FSDP2's all-gathers
    reduce: float  # its reduce-scatters
    replicate: float  # HSDP's all-reduces
    tensor: float  # tensor parallelism's
    context: float  # context parallelism's: tokens for heads, and the fast weights' gradients
    experts: float  # the exchange of tokens

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    parameters: int
    trained: int
    active: int  # that a token passes through
    replicas: int  # of the parameters, which HSDP keeps
    sequences: int  # of a micro-batch
    micro_batches: int  # of an optimizer step
    memory: MemoryEstimate
    communication: Communication
    across_nodes: list[str]  # parts of the communication whose process groups are not within a node
    flops: float  # of the matrix products of an optimizer step on one rank


@dataclass(frozen=True)
class _Passes:
    """How often a micro-batch passes through a layer."""

    forward: int
    backward: int

    def of_collectives(self, recomputed: bool) -> int:
        """Passes that communicate; a checkpointed layer runs forward again before each backward pass."""
        return self.forward + self.backward * (2 if recomputed else 1)


def estimate(
    model: LLaDA,
    args: LLaDAArgs,
    dims: Layout,
    config: JobConfig,
    node_size: int | None = None,
    documents: int = 1,
) -> Estimate:
    """Estimate what a configuration needs.

    Args:
        model: on the meta device, spread over `dims` by `parallelize_llada`.
        args: its sizes.
        config: from `launch.resolve`.
        node_size: ranks of a node; all of them if None.
        documents: in the fullest row of packed ones.
    """
    training, slots = config.training, power_of_two(documents)
    micro_batches = training.global_batch_size // (training.local_batch_size * dims.dp_replicate * dims.dp_shard)
    first = first_adapted_layer(config.parametric_memory, args) if config.parametric_memory.enable else args.n_layers
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        active=_active(model, args),
        replicas=dims.dp_replicate,
        sequences=training.local_batch_size,
        micro_batches=micro_batches,
        memory=_footprint(model, args, dims, config, first, slots),
        communication=_communication(model, args, dims, config, first, micro_batches, slots),
        across_nodes=_across_nodes(dims, node_size) if node_size else [],
        flops=micro_batches * training.local_batch_size * _row_flops(args, dims, config),
    )


def _active(model: LLaDA, args: LLaDAArgs) -> int:
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = args.experts_per_token / args.n_experts if isinstance(args, LLaDAMoEArgs) else 1.0
    return int(sum(p.numel() for p in model.parameters()) - experts * (1 - share))


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _gathered_elements(parameters: Iterable[Tensor]) -> int:
    """When FSDP2 has gathered them: sharded by tensor and expert parallelism alone."""
    total = 0
    for p in parameters:
        parts = 1
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            for name, size, placement in zip(names, p.device_mesh.shape, p.placements, strict=True):
                parts *= size if name not in _DATA_PARALLEL and placement.is_shard() else 1
        total += p.numel() // parts
    return total


def _groups(model: LLaDA) -> Sequence[Sequence[Tensor]]:
    """Parameters that FSDP2 gathers together: the embedding, each layer, norm and head."""
    first, last = list(model.tok_embeddings.parameters()), [*model.norm.parameters(), *model.output.parameters()]
    return [first, *(list(layer.parameters()) for layer in model.layers.values()), last]


def _footprint(
    model: LLaDA, args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int
) -> MemoryEstimate:
    training = config.training
    compute = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    parameters = list(model.parameters())
    trained = [_local(p) for p in parameters if p.requires_grad]
    groups = _groups(model)
    if dims.fsdp_enabled:
        freed = 0 if config.parallelism.fsdp_reshard_after_forward == "never" else 1 + first
        resident = groups[freed:]
        passing = sorted((_gathered_elements(group) for group in groups[:freed]), reverse=True)[:2]
        gathered = compute * (sum(map(_gathered_elements, resident)) + sum(passing))
        largest = max(_gathered_elements(p for p in group if p.requires_grad) for group in groups)
        # As autograd makes them, and as they are reduced: now and, while that is under way, before.
        reducing = largest * (compute + 2 * TORCH_DTYPE_MAP[training.mixed_precision_reduce].itemsize)
    else:
        # One rank computes with its own weights; autocast keeps their casts.
        gathered = compute * sum(_local(p).numel() for p in parameters if p.itemsize != compute)
        reducing = 0.0
    return MemoryEstimate(
        weights=sum(_local(p).numel() * p.itemsize for p in parameters),
        gradients=sum(p.numel() * p.itemsize for p in trained),
        optimizer=2.0 * sum(p.numel() * p.itemsize for p in trained),
        gathered=gathered,
        gathered_gradients=reducing,
        activations=_activations(args, dims, config, first) + _laid_out(args, dims, config, first, slots),
        head=_head(args, dims, config, trained=any(p.requires_grad for p in model.output.parameters())),
        # With their gradients, and what the update makes of them.
        fast_weights=3.0 * _fast_bytes(args, dims, config, first, slots),
    )


# Tensors of the logits' size, in float32, that an eager loss makes besides the logits and the teacher's.
_TEMPORARIES = {"cross_entropy": 0, "kl": 3, "reverse_kl": 2}


def chunk_bytes(loss: str, dtype: torch.dtype, fused: bool) -> int:
    """Return the bytes that a chunk's loss holds for each element of its logits.

    Args:
        loss: a loss of logits, by name.
        dtype: of the logits' product; they are read in float32.
        fused: the loss is compiled: it keeps nothing of this size but the gradient.
    """
    with_teacher = 1 if loss == "cross_entropy" else 2
    if fused:
        return (with_teacher + 1) * dtype.itemsize
    copy = 4 if dtype.itemsize < 4 else 0
    return with_teacher * (dtype.itemsize + copy) + 4 * _TEMPORARIES[loss]


def _head(args: LLaDAArgs, dims: Layout, config: JobConfig, trained: bool) -> float:
    training, memory = config.training, config.parametric_memory
    dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    tokens, vocabulary = math.ceil(_tokens(training, dims)), args.vocab_size // dims.tp
    rows = chunk_length(tokens, vocabulary, dtype)
    fused = config.compile.enable and "loss" in config.compile.components and dims.tp == 1
    losses = {"cross_entropy": vocabulary * args.dim * 4 if trained and rows < tokens and dtype.itemsize < 4 else 0}
    if memory.enable and memory.inner_loss in _TEMPORARIES:
        losses.setdefault(memory.inner_loss, 0)
    # Of several chunks the outer loss sums the weight's gradient in float32 before it is rounded.
    return max(rows * vocabulary * chunk_bytes(loss, dtype, fused) + summed for loss, summed in losses.items())


def _tokens(training: Training, dims: Layout) -> float:
    """Of a micro-batch, those of one context-parallel rank."""
    tokens: float = training.local_batch_size * training.seq_len / dims.cp
    return tokens


def saved_elements(args: LLaDAArgs, tp: int = 1) -> tuple[float, float]:
    """Elements for each token that autograd keeps of a layer: its input alone, and everything.

    Norms keep their input and attention and FFN theirs; attention keeps queries, keys and values as it gets them, its
    output, and that output as the last projection reads it; the FFN its gate, its up, silu(gate) and the product.
    """
    heads, kv = args.dim, (args.dim // args.n_heads) * (args.n_kv_heads or args.n_heads)
    attention = 2 * args.dim / tp + args.dim + (3 * heads + 2 * kv) / tp
    if args.qk_norm:
        attention += (heads + kv) / tp
    if isinstance(args, LLaDAMoEArgs):
        # Each expert's part, and its output in the tokens' order, in float32 for the weighted sum.
        k = args.experts_per_token
        ffn = args.dim + k * (args.dim + 4 * args.hidden_dim / tp + 3 * args.dim)
    else:
        ffn = args.dim + 4 * args.hidden_dim / tp
    return args.dim / tp, attention + ffn


def _activations(args: LLaDAArgs, dims: Layout, config: JobConfig, first: int) -> float:
    """Of the anchor's outer pass, and the trunk's output for the other states, which the inner loop reads before it."""
    training, checkpointing = config.training, config.activation_checkpoint
    size = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize * _tokens(training, dims)
    kept, everything = saved_elements(args, dims.tp)
    if checkpointing.mode == "full":
        layers = args.n_layers * kept + everything  # of the layer that is run again
    elif checkpointing.mode == "selective" and checkpointing.selective_ac_option.isdigit():
        every = int(checkpointing.selective_ac_option)
        layers = (args.n_layers - args.n_layers // every) * everything + args.n_layers // every * kept + everything
    else:
        layers = args.n_layers * everything
    others = (_planned(config).inputs - 1) * args.dim / dims.tp if config.parametric_memory.enable else 0.0
    # A layer's backward pass makes a gradient of everything that its forward pass made.
    return size * (layers + everything + others + 2 * args.dim / dims.tp)


def _laid_out(args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int) -> float:
    """Return the bytes of the copies of the adapted linears' inputs that grouped products read in an inner step.

    Its gradients need them until its backward pass: of all layers, or of the one that is run again.
    """
    memory, training = config.parametric_memory, config.training
    if not memory.enable or memory.granularity != "sample" or slots == 1:
        return 0.0
    if config.activation_checkpoint.mode == "full":
        first = args.n_layers - 1
    tokens = _tokens(training, dims) + GROUP_ROWS * training.local_batch_size * slots
    linears = [x for x in args.adapted_linears(first, memory.target_modules) if not x.experts]
    elements = sum(x.in_features / (dims.tp if x.row_wise else 1) for x in linears)
    return TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize * tokens * elements


def _fast_bytes(args: LLaDAArgs, dims: Layout, config: JobConfig, first: int, slots: int) -> float:
    memory = config.parametric_memory
    if not memory.enable:
        return 0.0
    sets = config.training.local_batch_size * slots if memory.granularity == "sample" else 1

    def elements(linear: AdaptedLinear) -> float:
        wide, narrow = linear.in_features, linear.out_features
        if linear.row_wise:
            wide, narrow = narrow, wide
        # Tensor parallelism shards `narrow`; a low-rank pair's other half is on every rank.
        one = wide * narrow / dims.tp if memory.adapter == "full" else memory.rank * (wide + narrow / dims.tp)
        return one * (linear.experts / dims.ep if linear.experts else 1)

    return 4.0 * sets * sum(map(elements, args.adapted_linears(first, memory.target_modules)))  # in float32


def _passes(args: LLaDAArgs, config: JobConfig, first: int) -> list[_Passes]:
    """Return the passes through every layer, for one micro-batch."""
    if not config.parametric_memory.enable:
        return [_Passes(1, 1)] * args.n_layers
    found = _planned(config)
    trunk, tail = _Passes(found.inputs, 1), _Passes(found.tail_forward, found.tail_backward)
    return [trunk] * first + [tail] * (args.n_layers - first)


def _planned(config: JobConfig) -> Passes:
    return planned_passes(get_plan(config), get_inner_loss(config.parametric_memory).teacher is not None)


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
        # What was freed behind the forward pass is gathered again for the backward pass: tail and head were not.
        resident = number > first or (number == len(groups) - 1 and policy != "always")
        reached = number > 0 or any(p.requires_grad for p in group)
        again = policy != "never" and not resident and reached
        for shards, elements in _by_shards(group):
            gather += (2 if again else 1) * compute * elements * (shards - 1) / shards
        for shards, elements in _by_shards(p for p in group if p.requires_grad):
            reduced += reduce * elements * (shards - 1) / shards
            # HSDP reduces the shards over the replicas.
            replicated += 2 * reduce * elements / shards * (dims.dp_replicate - 1) / dims.dp_replicate
    tokens = _tokens(training, dims)
    passes = _passes(args, config, first)
    recomputed = config.activation_checkpoint.mode == "full"
    layer_passes = sum(x.of_collectives(recomputed) for x in passes)
    # A pass gathers the input of attention and FFN and scatters their outputs.
    tensor = layer_passes * 4 * compute * tokens * args.dim * (dims.tp - 1) / dims.tp
    experts = 0.0
    if isinstance(args, LLaDAMoEArgs):
        routed = tokens * args.experts_per_token
        experts = layer_passes * 2 * compute * routed * args.dim * (dims.ep - 1) / dims.ep
    context = 0.0
    if dims.cp > 1:
        heads, kv = args.dim, (args.dim // args.n_heads) * (args.n_kv_heads or args.n_heads)
        # Queries, keys, values and the output; ring attention's rotation of keys and values is not told apart.
        context = layer_passes * compute * tokens * 2 * (heads + kv) / dims.tp * (dims.cp - 1) / dims.cp
        if config.parametric_memory.enable:
            sums = _planned(config).inner_steps * _fast_bytes(args, dims, config, first, slots)
            context += 2 * sums * (dims.cp - 1) / dims.cp
    return Communication(*(micro_batches * x for x in (gather, reduced, replicated, tensor, context, experts)))


def _across_nodes(dims: Layout, node_size: int) -> list[str]:
    """Return the parts of the communication whose groups are not within a node.

    Ranks are numbered with tensor parallelism innermost, then context parallelism, the shards and the replicas;
    expert parallelism takes neighbours among the shards. A group lies among consecutive ranks, and blocks of so many
    are within a node if they divide it.
    """
    shards = dims.dp_shard * dims.cp * dims.tp
    spans = {
        "gather": shards,
        "reduce": shards,
        "replicate": dims.dp_replicate * shards,
        "tensor": dims.tp,
        "context": dims.cp * dims.tp,
        "experts": dims.ep * dims.tp,
    }
    return [name for name, span in spans.items() if node_size % span]


def _row_flops(args: LLaDAArgs, dims: Layout, config: JobConfig) -> float:
    """Return the FLOPs of one sequence on one rank, as the mean over evenly spread noise levels.

    Rows are taken as one document each: how long those of packed rows are the configuration does not tell.
    """
    checkpointing, objective = config.activation_checkpoint, build_objective(config, args, args.vocab_size - 1, dims)
    recomputation = Recomputation(checkpointing.mode, checkpointing.selective_ac_option)
    row_1L, id_1 = torch.zeros(1, config.training.seq_len, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    total = 0.0
    for number in range(_LEVELS):
        level_1 = torch.full((1,), (number + 0.5) / _LEVELS, dtype=torch.float64)
        batch = objective.micro_batch(row_1L, row_1L, id_1, step=0, t_U=level_1)
        frozen = get_lora(config) is not None
        total += sum(step_flops(args, batch, objective.memory, recomputation, frozen))
    return total / _LEVELS / dims.tp


def _by_shards(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(ranks that FSDP2 shards it over, elements when gathered) of each parameter."""
    found = []
    for p in parameters:
        shards = 1
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            sizes = dict(zip(names, p.device_mesh.shape, strict=True))
            shards = math.prod(sizes.get(name, 1) for name in ("fsdp", "efsdp"))
        found.append((shards, _gathered_elements([p])))
    return found
