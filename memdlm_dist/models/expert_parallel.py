"""Expert parallelism and tensor parallelism of experts, with torchtitan's recipe."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp

from memdlm_dist.models.mixture import LLaDAMixture


def parallelize_experts(model: LLaDAMixture, dims: ParallelDims) -> None:
    """Shard the experts of all layers over the expert- and tensor-parallel ranks; a no-op if both are disabled.

    Tensor parallelism shards a shared expert like an FFN.
    """
    if not (dims.tp_enabled or dims.ep_enabled):
        return
    tp_mesh = dims.get_optional_mesh("tp")
    apply_moe_ep_tp(
        model,
        tp_mesh=tp_mesh,
        ep_mesh=dims.get_optional_mesh("ep"),
        etp_mesh=dims.get_optional_mesh("etp"),
        ep_etp_mesh=dims.get_optional_mesh(["ep", "etp"]),
    )
    if tp_mesh is not None:
        for block in model.layers.values():
            _shard_shared_expert(block, tp_mesh)
    for mixture in model.mixtures():
        mixture.tp_mesh = tp_mesh  # the mixture's output is a partial sum over this mesh
        mixture.local_experts, mixture.ep_size = model.model_args.n_experts // dims.ep, dims.ep
        mixture.ep_rank = dims.get_mesh("ep").get_local_rank() if dims.ep_enabled else 0


def _shard_shared_expert(block: nn.Module, mesh: DeviceMesh) -> None:
    if getattr(block, "shared_experts", None) is None:
        return
    plan = {
        "shared_experts": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "shared_experts.w1": ColwiseParallel(),
        "shared_experts.w2": RowwiseParallel(output_layouts=Shard(1)),
        "shared_experts.w3": ColwiseParallel(),
    }
    parallelize_module(block, mesh, plan)
