"""Checks of a resolved configuration against the device and the backbone, before anything is built."""

import math

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import require
from memdlm_dist.models import nf4
from memdlm_dist.models.linears import ALL_LINEAR, GROUPS, LINEARS, ROUTER, adapter_linear_names
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.models.mixture import MixtureArgs
from memdlm_dist.runtime.device import has_grouped_mm


def check_device(config: JobConfig, device_type: str) -> None:
    """Check that the device supports the configured context parallelism and offloading.

    Raises:
        UserError: if ring attention is configured without CUDA, or offloading without an accelerator.
    """
    parallel = config.parallelism
    require(
        not config.training.enable_cpu_offload or device_type != "cpu",
        "training.enable_cpu_offload needs an accelerator, but this machine has none; remove it.",
    )
    require(
        parallel.context_parallel_degree == 1 or parallel.context_parallel_method != "ring" or device_type == "cuda",
        "parallelism.context_parallel_method = 'ring' needs CUDA devices, but this machine has "
        f"{device_type}; set it to 'ulysses'.",
    )


def check_backbone(config: JobConfig, args: LLaDAArgs) -> None:
    """Check that the parallel degrees divide the backbone's sizes and that all target modules exist.

    Args:
        config: resolved configuration, from `launch.resolve`.

    Raises:
        UserError: naming the size, the degree or the module that does not fit.
    """
    has_router, fast = isinstance(args, MixtureArgs), [*GROUPS, *LINEARS]
    outer = [*fast, *([ROUTER] if has_router else []), ALL_LINEAR]
    for key, targets, known in (
        ("parametric_memory.target_modules", config.parametric_memory.target_modules, fast),
        ("lora.target_modules", config.lora.target_modules, outer),
    ):
        for target in targets:
            require(
                target in known,
                f"{key} names {target!r}, which model {config.model.name} does not have; choose among "
                f"{', '.join(known)}.",
            )
        chosen = adapter_linear_names(targets, has_router)
        require(
            len(set(chosen)) == len(chosen),
            f"{key} names a linear twice: {', '.join(targets)} expands to {', '.join(chosen)}; remove one.",
        )
    fused = set(adapter_linear_names(config.lora.target_modules, has_router)) & set(args.fused_linears)
    require(
        not (config.model.converters and config.lora.export == "adapter") or len(fused) in (0, len(args.fused_linears)),
        f"lora.export = 'adapter' needs adapters of all or none of {', '.join(args.fused_linears)} in model "
        f"{config.model.name}, whose published weights hold them as one linear; change lora.target_modules, or set "
        "lora.export to 'merged'.",
    )
    _check_load_balance(config, args)
    if isinstance(args, MixtureArgs):
        _check_experts(config, args)
    else:
        require(
            config.parallelism.expert_parallel_degree == 1,
            f"parallelism.expert_parallel_degree = {config.parallelism.expert_parallel_degree} needs a "
            "mixture-of-experts backbone; set it to 1.",
        )
    tp_size = config.parallelism.tensor_parallel_degree
    _check_context_parallel(config, args)
    if config.model.converters and config.lora.base == "nf4":
        _check_nf4(config, args)
    flavour = f"model.flavor {config.model.flavor}"
    sizes = {
        "training.seq_len": config.training.seq_len,
        f"The number of attention heads of {flavour}": args.n_heads,
        f"The number of key-value heads of {flavour}": args.n_kv_heads or args.n_heads,
        f"The FFN width of {flavour}": math.gcd(*(x.in_features for x in args.adapted_linears(0, ["down"]))),
        f"The vocabulary size of {flavour}": args.vocab_size,
    }
    for name, size in sizes.items():
        require(
            size % tp_size == 0,
            f"{name} ({size}) is not divisible by parallelism.tensor_parallel_degree ({tp_size}); change one of them.",
        )


def _check_load_balance(config: JobConfig, args: LLaDAArgs) -> None:
    """Check that the router has biases, and that what a run saves holds them if it trains them."""
    coefficient = config.model.load_balance_coeff
    require(
        coefficient is None or (isinstance(args, MixtureArgs) and args.has_expert_bias),
        f"model.load_balance_coeff = {coefficient} needs a router with a bias per expert, which model "
        f"{config.model.name} does not have; remove it.",
    )
    for key, value in (("base", "nf4"), ("export", "adapter")):
        require(
            not (coefficient and config.model.converters and getattr(config.lora, key) == value),
            f"model.load_balance_coeff = {coefficient} is not supported with lora.{key} = '{value}', which saves the "
            "adapters alone and not the experts' biases; change one of them.",
        )


def _check_nf4(config: JobConfig, args: LLaDAArgs) -> None:
    """Check that the layout shards a 4-bit base along its rows only, and evenly."""
    parallel = config.parallelism
    for key in ("tensor_parallel_degree", "expert_parallel_degree"):
        require(
            getattr(parallel, key) == 1,
            f"lora.base = 'nf4' is not supported with parallelism.{key} = {getattr(parallel, key)}, because torchao's "
            "4-bit tensors can only be sharded by FSDP; set it to 1.",
        )
    require(
        not config.training.enable_cpu_offload,
        "lora.base = 'nf4' is not supported with training.enable_cpu_offload; set one of them back to its default.",
    )
    phrase = nf4.misfit(args, parallel.data_parallel_shard_degree * parallel.context_parallel_degree)
    require(
        not phrase,
        f"lora.base = 'nf4' does not fit model.flavor {config.model.flavor}: {phrase}; choose another flavor or "
        "parallelism.data_parallel_shard_degree.",
    )


def _check_context_parallel(config: JobConfig, args: LLaDAArgs) -> None:
    """Check that context parallelism divides seq_len and, with Ulysses, the heads; and that EP is off."""
    parallel = config.parallelism
    cp_size, tp_size = parallel.context_parallel_degree, parallel.tensor_parallel_degree
    if cp_size == 1:
        return
    product = f"parallelism.context_parallel_degree x tensor_parallel_degree ({cp_size} x {tp_size})"
    require(
        config.training.seq_len % (cp_size * tp_size) == 0,
        f"training.seq_len ({config.training.seq_len}) is not divisible by {product}; change one of them.",
    )
    heads = {"attention heads": args.n_heads, "key-value heads": args.n_kv_heads or args.n_heads}
    for name, number in heads.items():
        require(
            parallel.context_parallel_method == "ring" or number % (cp_size * tp_size) == 0,
            f"The {name} of model.flavor {config.model.flavor} ({number}) are not divisible by {product}, which "
            "Ulysses attention needs; lower one of them, or on CUDA set context_parallel_method = 'ring'.",
        )
    require(
        parallel.expert_parallel_degree == 1,
        f"parallelism.context_parallel_degree = {cp_size} is not supported with expert_parallel_degree = "
        f"{parallel.expert_parallel_degree}: the two shard the experts' fast weights in different ways; set one to 1.",
    )


def _check_experts(config: JobConfig, args: MixtureArgs) -> None:
    """Check expert parallelism, sharding, the memory and the adapters of a mixture-of-experts backbone."""
    memory, parallel = config.parametric_memory, config.parallelism
    ep_size, tp_size = parallel.expert_parallel_degree, parallel.tensor_parallel_degree
    name = f"model {config.model.name}"
    require(
        not memory.enable or not has_grouped_mm() or memory.adapter == "full" or memory.rank % 8 == 0,
        f"parametric_memory.rank = {memory.rank} must be a multiple of 8: grouped matrix products need it.",
    )
    adapters = adapter_linear_names(config.lora.target_modules, has_router=True)
    expert_adapters = set(adapters) & set(GROUPS["ffn"])
    require(
        not config.model.converters or not expert_adapters or tp_size == 1,
        f"lora.target_modules names linears of the experts of {name} ({', '.join(sorted(expert_adapters))}), but "
        'tensor parallelism cannot shard adapters of experts; set it to ["attention", "router"], or '
        "tensor_parallel_degree to 1.",
    )
    grouped_adapters = config.model.converters and expert_adapters and has_grouped_mm()
    require(
        not grouped_adapters or config.lora.rank % 8 == 0,
        f"lora.rank = {config.lora.rank} must be a multiple of 8: grouped matrix products need it.",
    )
    dropouts = {
        "parametric_memory.dropout": memory.dropout if memory.enable else 0.0,
        "lora.dropout": config.lora.dropout if config.model.converters and expert_adapters else 0.0,
    }
    for key, dropout in dropouts.items():
        require(
            not dropout or ep_size == 1,
            f"{key} = {dropout} is not supported with expert parallelism, which does not send the keys of the masks "
            "with the tokens; set it to 0, or parallelism.expert_parallel_degree to 1.",
        )
    require(
        args.n_experts % ep_size == 0,
        f"The {args.n_experts} experts of model.flavor {config.model.flavor} are not divisible by "
        f"parallelism.expert_parallel_degree ({ep_size}); change it.",
    )
    require(
        ep_size == 1 or tp_size == parallel.expert_tensor_parallel_degree,
        f"parallelism.expert_tensor_parallel_degree ({parallel.expert_tensor_parallel_degree}) must be "
        f"tensor_parallel_degree ({tp_size}) with expert parallelism; set it to {tp_size}.",
    )
    dp_shard = parallel.data_parallel_shard_degree
    require(
        dp_shard % ep_size == 0,
        f"parallelism.expert_parallel_degree ({ep_size}) must divide data_parallel_shard_degree ({dp_shard}), because "
        "an expert-parallel group consists of data-parallel shard ranks; change one of them.",
    )
    require(
        ep_size > 1 or args.n_experts % (dp_shard * parallel.context_parallel_degree) == 0,
        f"The {args.n_experts} experts of model.flavor {config.model.flavor} cannot be sharded evenly over "
        f"data_parallel_shard_degree {dp_shard}"
        + (
            f" x context_parallel_degree {parallel.context_parallel_degree}"
            if parallel.context_parallel_degree > 1
            else ""
        )
        + "; raise parallelism.expert_parallel_degree, or shard over fewer ranks (set "
        "parallelism.data_parallel_shard_within = 'node' or raise data_parallel_replicate_degree).",
    )
    require(
        parallel.expert_parallel_comm_backend == "standard",
        "parallelism.expert_parallel_comm_backend = 'deepep' is not supported: it cannot apply fast weights; set it to "
        "'standard'.",
    )
