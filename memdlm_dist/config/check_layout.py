"""Check that a configuration whose launch is resolved fits the device and the backbone, before anything is built."""

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import require
from memdlm_dist.models.linears import GROUPS, LINEARS, linear_names
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.runtime.device import has_grouped_mm


def check_device(config: JobConfig, device_type: str) -> None:
    """The device can run what the configuration asks for.

    Raises:
        UserError: naming the key.
    """
    parallel = config.parallelism
    require(
        parallel.context_parallel_degree == 1 or parallel.context_parallel_method != "ring" or device_type == "cuda",
        "parallelism.context_parallel_method = 'ring' needs CUDA devices, and this machine has "
        f"{device_type}; set it to 'ulysses'.",
    )


def check_backbone(config: JobConfig, args: LLaDAArgs) -> None:
    """The backbone's sizes fit the parallel layout and the memory's targets.

    Args:
        config: from `launch.resolve`.

    Raises:
        UserError: naming the size, the degree or the module.
    """
    known = [*GROUPS, *LINEARS]
    for key, targets in {
        "parametric_memory.target_modules": config.parametric_memory.target_modules,
        "lora.target_modules": config.lora.target_modules,
    }.items():
        for target in targets:
            require(
                target in known,
                f"{key} names {target!r}, which model {config.model.name} does not have; choose among "
                f"{', '.join(known)}.",
            )
        chosen = linear_names(targets)
        require(
            len(set(chosen)) == len(chosen),
            f"{key} names a linear twice: {', '.join(targets)} is {', '.join(chosen)}.",
        )
    if isinstance(args, LLaDAMoEArgs):
        _check_experts(config, args)
    else:
        require(
            config.parallelism.expert_parallel_degree == 1,
            f"parallelism.expert_parallel_degree = {config.parallelism.expert_parallel_degree} needs a "
            "mixture-of-experts backbone; set it to 1.",
        )
    tensor = config.parallelism.tensor_parallel_degree
    _check_context_parallel(config, args)
    flavour = f"model.flavor {config.model.flavor}"
    sizes = {
        "training.seq_len": config.training.seq_len,
        f"the attention heads of {flavour}": args.n_heads,
        f"the key-value heads of {flavour}": args.n_kv_heads or args.n_heads,
        f"the FFN width of {flavour}": args.hidden_dim,
        f"the vocabulary of {flavour}": args.vocab_size,
    }
    for name, size in sizes.items():
        require(
            size % tensor == 0,
            f"{name} ({size}) is not divisible by parallelism.tensor_parallel_degree ({tensor}); change one of them.",
        )


def _check_context_parallel(config: JobConfig, args: LLaDAArgs) -> None:
    """The sequence and, if they are exchanged, the heads can be divided."""
    parallel = config.parallelism
    context, tensor = parallel.context_parallel_degree, parallel.tensor_parallel_degree
    if context == 1:
        return
    product = f"parallelism.context_parallel_degree x tensor_parallel_degree ({context} x {tensor})"
    require(
        config.training.seq_len % (context * tensor) == 0,
        f"training.seq_len ({config.training.seq_len}) is not divisible by {product}; change one of them.",
    )
    heads = {"attention heads": args.n_heads, "key-value heads": args.n_kv_heads or args.n_heads}
    for name, number in heads.items():
        require(
            parallel.context_parallel_method == "ring" or number % (context * tensor) == 0,
            f"The {name} of model.flavor {config.model.flavor} ({number}) are not divisible by {product}, as the "
            "exchange of tokens for heads needs; lower one of them, or on CUDA set context_parallel_method = 'ring'.",
        )
    require(
        parallel.expert_parallel_degree == 1,
        f"parallelism.context_parallel_degree = {context} is not supported with expert_parallel_degree = "
        f"{parallel.expert_parallel_degree}: the two spread the experts' fast weights in different ways; set one to 1.",
    )


def _check_experts(config: JobConfig, args: LLaDAMoEArgs) -> None:
    """A mixture of experts: how its experts are spread, and what its memory and its adapters can be."""
    memory, parallel = config.parametric_memory, config.parallelism
    experts, tensor = parallel.expert_parallel_degree, parallel.tensor_parallel_degree
    name = f"model {config.model.name}"
    of_experts = set(linear_names(memory.target_modules)) & set(GROUPS["ffn"])
    require(
        not memory.enable or memory.granularity == "batch" or experts == 1,
        "parametric_memory.granularity = 'sample' is not supported with expert parallelism: the ranks of a group share "
        "one set of fast weights; set it to 'batch', or parallelism.expert_parallel_degree to 1.",
    )
    require(
        not memory.enable or experts == 1 or of_experts == set(linear_names(memory.target_modules)),
        "parametric_memory.target_modules can only be the experts' linears with expert parallelism, whose ranks share "
        'one set of fast weights; set it to ["ffn"], or parallelism.expert_parallel_degree to 1.',
    )
    require(
        not memory.enable or not has_grouped_mm() or memory.adapter == "full" or memory.rank % 8 == 0,
        f"parametric_memory.rank = {memory.rank} must be a multiple of 8: grouped matrix products need it.",
    )
    adapters_of_experts = set(linear_names(config.lora.target_modules)) & set(GROUPS["ffn"])
    require(
        not config.model.converters or not adapters_of_experts or tensor == 1,
        f"lora.target_modules names linears of the experts of {name} ({', '.join(sorted(adapters_of_experts))}), whose "
        'adapters tensor parallelism cannot shard; set it to ["attention"], or tensor_parallel_degree to 1.',
    )
    grouped_adapters = config.model.converters and adapters_of_experts and has_grouped_mm()
    require(
        not grouped_adapters or config.lora.rank % 8 == 0,
        f"lora.rank = {config.lora.rank} must be a multiple of 8: grouped matrix products need it.",
    )
    require(
        args.n_experts % experts == 0,
        f"The {args.n_experts} experts of model.flavor {config.model.flavor} are not divisible by "
        f"parallelism.expert_parallel_degree ({experts}); change it.",
    )
    require(
        experts == 1 or tensor == parallel.expert_tensor_parallel_degree,
        f"parallelism.expert_tensor_parallel_degree ({parallel.expert_tensor_parallel_degree}) must be "
        f"tensor_parallel_degree ({tensor}) where experts are spread over ranks too; set it to {tensor}.",
    )
    shard = parallel.data_parallel_shard_degree
    require(
        shard % experts == 0,
        f"parallelism.expert_parallel_degree ({experts}) must divide the {shard} ranks of data_parallel_shard_degree, "
        "from which it takes its own; change one of them.",
    )
    require(
        experts > 1 or args.n_experts % (shard * parallel.context_parallel_degree) == 0,
        f"The {args.n_experts} experts of model.flavor {config.model.flavor} cannot be sharded evenly over "
        f"data_parallel_shard_degree {shard}"
        + (
            f" x context_parallel_degree {parallel.context_parallel_degree}"
            if parallel.context_parallel_degree > 1
            else ""
        )
        + "; raise parallelism.expert_parallel_degree, or let fewer ranks share them with "
        "parallelism.data_parallel_shard_within = 'node' or data_parallel_replicate_degree.",
    )
    require(
        parallel.expert_parallel_comm_backend == "standard",
        "parallelism.expert_parallel_comm_backend = 'deepep' is not supported: it has no place for fast weights; set "
        "it to 'standard'.",
    )
