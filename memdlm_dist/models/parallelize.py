"""How a `llada` backbone is spread over ranks: torchtitan's llama3 recipe, and what ours needs besides."""

from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import parallelize_llama

from memdlm_dist import cpu


def parallelize_llada(model: nn.Module, parallel_dims: ParallelDims, job_config) -> nn.Module:
    """Apply tensor parallelism, activation checkpointing, compilation and FSDP2, in that order.

    The order is torchtitan's: TP first, since the others wrap what it shards; checkpointing inside
    compilation, so that the compiler sees both; FSDP outermost, one group per block.
    """
    model = parallelize_llama(model, parallel_dims, job_config)
    # The bi-level step enters through `trunk` and `tail` as well as `forward`; FSDP's root has to see
    # each entry, to set itself up on the first and to order its streams on all.
    for method in ("trunk", "tail"):
        register_fsdp_forward_method(model, method)
    cpu.prepare_collectives(model)
    return model
