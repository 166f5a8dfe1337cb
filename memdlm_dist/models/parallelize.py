"""How a backbone is spread over ranks: the steps of torchtitan's recipes, and what ours needs besides."""

from typing import Any, cast

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import apply_compile
from torchtitan.models.llama4.infra.parallelize import apply_fsdp, apply_moe_ep_tp, apply_non_moe_tp
from torchtitan.tools.utils import set_default_dtype

from memdlm_dist.compat.torch import checkpointed, raise_recompile_limit
from memdlm_dist.compat.torchtitan import SAVED_OPERATORS
from memdlm_dist.models import BACKBONES
from memdlm_dist.models.context_parallel import apply_cp
from memdlm_dist.models.llada import LLaDA, LLaDAArgs, TransformerBlock
from memdlm_dist.models.llada_moe import LLaDAMoE
from memdlm_dist.models.lora import LoRAConverter
from memdlm_dist.models.residency import Residency
from memdlm_dist.runtime import cpu


def layout(config: Any, world_size: int) -> ParallelDims:
    """The meshes of a configuration's parallel degrees; torch.distributed knows the ranks."""
    parallel = config.parallelism
    dims = ParallelDims(
        dp_replicate=parallel.data_parallel_replicate_degree,
        dp_shard=parallel.data_parallel_shard_degree,
        cp=parallel.context_parallel_degree,
        tp=parallel.tensor_parallel_degree,
        pp=1,
        ep=parallel.expert_parallel_degree,
        etp=parallel.expert_tensor_parallel_degree,
        world_size=world_size,
    )
    dims.build_mesh()
    return dims


def spread_on_meta(config: Any, args: LLaDAArgs, dims: ParallelDims) -> LLaDA:
    """A backbone without contents, converted and spread over ranks as torchtitan's trainer does it.

    Args:
        args: sizes, after `update_from_config`.
    """
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = BACKBONES[config.model.name].model(args)
    if config.model.converters:
        LoRAConverter(config, dims).convert(model)
    return parallelize_llada(model, dims, config)


def parallelize_llada(model: LLaDA, parallel_dims: ParallelDims, job_config: Any) -> LLaDA:
    """Apply tensor, expert and context parallelism, activation checkpointing, compilation and FSDP2, in that order.

    TP goes first, since the others wrap what it shards; checkpointing inside compilation, so that the
    compiler sees both (but around it with TP, see `_compile_below_checkpoints`); FSDP outermost, one group
    per block. The ranks of a context-parallel group are among those over which FSDP shards.
    """
    parallelism, training = job_config.parallelism, job_config.training
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    if parallel_dims.tp_enabled:
        tp_mesh = parallel_dims.get_mesh("tp")
        apply_non_moe_tp(
            model,
            tp_mesh,
            loss_parallel=not parallelism.disable_loss_parallel,
            enable_float8_tensorwise_tp=False,  # the converter is refused
        )
        if model.model_args.qk_norm:
            # One weight for all heads, of which each rank has some.
            for block in model.layers.values():
                for name in ("attention.q_norm", "attention.k_norm"):
                    style = SequenceParallel(sequence_dim=2, use_local_output=True)
                    parallelize_module(block.get_submodule(name), tp_mesh, style)
        maybe_enable_async_tp(job_config, tp_mesh)
        # How this plan lays out what leaves the head, which the head has to know of its losses.
        model.output.placement = Replicate() if parallelism.disable_loss_parallel else Shard(-1)

    if isinstance(model, LLaDAMoE) and (parallel_dims.tp_enabled or parallel_dims.ep_enabled):
        apply_moe_ep_tp(
            model,
            tp_mesh=parallel_dims.get_optional_mesh("tp"),
            ep_mesh=parallel_dims.get_optional_mesh("ep"),
            etp_mesh=parallel_dims.get_optional_mesh("etp"),
            ep_etp_mesh=parallel_dims.get_optional_mesh(["ep", "etp"]),
        )
        model.set_parallel(parallel_dims.get_optional_mesh("tp"), parallel_dims.ep)

    if parallel_dims.cp_enabled:
        apply_cp(
            [cast(TransformerBlock, block).attention for block in model.layers.values()],
            parallel_dims.get_mesh("cp"),
            parallelism.context_parallel_method,
            parallelism.context_parallel_rotate_method,
        )

    # The styles above make new parameters, some of which forget that they are not trained.
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)

    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=SAVED_OPERATORS,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        # A block is compiled once for every way of passing through it: with and without gradient, of the activations
        # or the fast weights or both, for every batch size.
        raise_recompile_limit(64)
    if compiled and parallel_dims.tp_enabled:
        _compile_below_checkpoints(model, job_config.compile)
    elif compiled:
        apply_compile(model, job_config.compile)

    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            parallel_dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=training.enable_cpu_offload,
            reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
            ep_degree=parallel_dims.ep,
            edp_mesh=parallel_dims.get_optional_mesh(
                ["dp_replicate", "efsdp"] if parallel_dims.dp_replicate_enabled else ["efsdp"]
            ),
        )
        # The bi-level step enters through `trunk` and `tail` as well as `forward`; FSDP's root has to see
        # each entry, to set itself up on the first and to order its streams on all.
        for method in ("trunk", "tail"):
            register_fsdp_forward_method(model, method)
        model.residency = Residency.of(model, parallelism.fsdp_reshard_after_forward)
        cpu.prepare_collectives(model)
    return model


def _compile_below_checkpoints(model: LLaDA, config: Any) -> None:
    """Compile every block, as torchtitan does, but within its checkpoint.

    torch 2.13 fails on a compiled block that holds both DTensors and a checkpoint: its backward pass would
    save the device mesh as if it were a tensor.
    """
    for name, block in model.layers.named_children():
        if (inside := checkpointed(block)) is not None:
            # In place: a wrapper below the checkpoint's would show in the names of the parameters.
            inside.compile(backend=config.backend, fullgraph=True)
        else:
            compiled: Any = torch.compile(block, backend=config.backend, fullgraph=True)
            model.layers.register_module(name, compiled)
