"""How a `llada` backbone is spread over ranks: torchtitan's llama3 recipe, and what ours needs besides."""

from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import parallelize_llama

from memdlm_dist import cpu
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.residency import Residency


def parallelize_llada(model: LLaDA, parallel_dims: ParallelDims, job_config) -> LLaDA:
    """Apply tensor parallelism, activation checkpointing, compilation and FSDP2, in that order.

    The order is torchtitan's: TP first, since the others wrap what it shards; checkpointing inside
    compilation, so that the compiler sees both; FSDP outermost, one group per block.
    """
    parallelize_llama(model, parallel_dims, job_config)
    # The bi-level step enters through `trunk` and `tail` as well as `forward`; FSDP's root has to see
    # each entry, to set itself up on the first and to order its streams on all.
    for method in ("trunk", "tail"):
        register_fsdp_forward_method(model, method)
    # How torchtitan's plan lays out what leaves the head, which the head has to know of its losses.
    model.output.placement = Replicate() if job_config.parallelism.disable_loss_parallel else Shard(-1)
    model.residency = Residency.of(model, job_config.parallelism.fsdp_reshard_after_forward)
    cpu.prepare_collectives(model)
    return model
