"""Expert parallelism and tensor parallelism of experts, with torchtitan's recipe."""

from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_moe_ep_tp

from memdlm_dist.models.llada_moe import LLaDAMoE


def parallelize_experts(model: LLaDAMoE, dims: ParallelDims) -> None:
    """Shard the experts of all layers over the expert- and tensor-parallel ranks; a no-op if both are disabled."""
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
    for mixture in model.mixtures():
        mixture.tp_mesh = tp_mesh  # the mixture's output is a partial sum over this mesh
        mixture.local_experts = model.model_args.n_experts // dims.ep
