"""How a `llada` backbone is spread over ranks: the steps of torchtitan's llama3 recipe, and what ours needs besides."""

from typing import Any

from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list, apply_compile, apply_fsdp, apply_tp

from memdlm_dist import cpu
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.residency import Residency


def parallelize_llada(model: LLaDA, parallel_dims: ParallelDims, job_config: Any) -> LLaDA:
    """Apply tensor parallelism, activation checkpointing, compilation and FSDP2, in that order.

    TP goes first, since the others wrap what it shards; checkpointing inside compilation, so that the
    compiler sees both; FSDP outermost, one group per block.
    """
    parallelism, training = job_config.parallelism, job_config.training
    compiled = compiles_blocks(job_config)

    if parallel_dims.tp_enabled:
        tp_mesh = parallel_dims.get_mesh("tp")
        apply_tp(
            model,
            tp_mesh,
            loss_parallel=not parallelism.disable_loss_parallel,
            enable_float8_tensorwise_tp=False,  # model.converters is refused
        )
        maybe_enable_async_tp(job_config, tp_mesh)
        # How this plan lays out what leaves the head, which the head has to know of its losses.
        model.output.placement = Replicate() if parallelism.disable_loss_parallel else Shard(-1)

    # torch 2.13 fails on a compiled block that holds both DTensors and a checkpoint: its backward pass would
    # save the device mesh as if it were a tensor. There the checkpoint goes around the compiled block.
    steps = [_checkpoint, _compile] if not parallel_dims.tp_enabled else [_compile, _checkpoint]
    for step in steps:
        step(model, job_config, compiled)

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
        )
        # The bi-level step enters through `trunk` and `tail` as well as `forward`; FSDP's root has to see
        # each entry, to set itself up on the first and to order its streams on all.
        for method in ("trunk", "tail"):
            register_fsdp_forward_method(model, method)
        model.residency = Residency.of(model, parallelism.fsdp_reshard_after_forward)
        cpu.prepare_collectives(model)
    return model


def compiles_blocks(job_config: Any) -> bool:
    return job_config.compile.enable and "model" in job_config.compile.components


def _checkpoint(model: LLaDA, job_config: Any, compiled: bool) -> None:
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=_op_sac_save_list,
            base_folder=job_config.job.dump_folder,
        )


def _compile(model: LLaDA, job_config: Any, compiled: bool) -> None:
    if compiled:
        apply_compile(model, job_config.compile)
