"""How a backbone is parallelised: the steps of torchtitan's recipes, and what ours needs besides."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.job_config import ActivationCheckpoint, Compile, Training
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import apply_compile
from torchtitan.models.llama4.infra.parallelize import apply_fsdp, apply_non_moe_tp
from torchtitan.tools.utils import set_default_dtype

from memdlm_dist.compat.torch import checkpointed, raise_recompile_limit
from memdlm_dist.compat.torchtitan import SAVED_OPERATORS
from memdlm_dist.models.context_parallel import apply_cp
from memdlm_dist.models.expert_parallel import parallelize_experts
from memdlm_dist.models.fsdp_schedule import FSDPSchedule
from memdlm_dist.models.layout import Parallelism
from memdlm_dist.models.llada import LLaDA, LLaDAArgs, TransformerBlock
from memdlm_dist.models.llada_moe import LLaDAMoE, MoEBlock
from memdlm_dist.models.lora import LoRA, add_adapters


@dataclass(frozen=True)
class Recipe:
    """What decides how a backbone is converted and parallelised: sections of a configuration."""

    training: Training
    parallelism: Parallelism
    activation_checkpoint: ActivationCheckpoint
    compile: Compile
    lora: LoRA | None  # None: all weights are trained
    dump_folder: str

    @property
    def compiles(self) -> bool:
        return self.compile.enable and "model" in self.compile.components

    @property
    def compiles_losses(self) -> bool:
        return self.compile.enable and "loss" in self.compile.components


def convert(model: LLaDA, recipe: Recipe) -> None:
    """Give a backbone the adapters that are trained in its place, if any are."""
    if recipe.lora is not None:
        frozen = TORCH_DTYPE_MAP[recipe.training.mixed_precision_param]
        add_adapters(model, recipe.lora, frozen, TORCH_DTYPE_MAP[recipe.training.dtype])


def parallelized_on_meta(model_cls: type[LLaDA], args: LLaDAArgs, dims: ParallelDims, recipe: Recipe) -> LLaDA:
    """Return a backbone without contents, converted and parallelised as torchtitan's trainer does it."""
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[recipe.training.dtype]):
        model = model_cls(args)
    convert(model, recipe)
    return parallelize(model, dims, recipe)


def parallelize(model: LLaDA, dims: ParallelDims, recipe: Recipe) -> LLaDA:
    """Apply tensor, expert and context parallelism, activation checkpointing, compilation and FSDP2, in that order.

    TP goes first, since the others wrap what it shards; checkpointing inside compilation, so that the
    compiler sees both (but around it with TP, see `_compile_below_checkpoints`, and with experts); FSDP
    outermost, one group per block. The ranks of a context-parallel group are among those over which FSDP shards.
    """
    parallelism, training = recipe.parallelism, recipe.training
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    if dims.tp_enabled:
        _apply_tp(model, dims.get_mesh("tp"), recipe)
    if isinstance(model, LLaDAMoE):
        parallelize_experts(model, dims)
    if dims.cp_enabled:
        apply_cp(
            [cast(TransformerBlock, block).attention for block in model.layers.values()],
            dims.get_mesh("cp"),
            parallelism.context_parallel_method,
            parallelism.context_parallel_rotate_method,
        )

    # The styles above make new parameters, some of which forget that they are not trained.
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)

    if recipe.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            recipe.activation_checkpoint,
            model_compile_enabled=recipe.compiles,
            op_sac_save_list=SAVED_OPERATORS,
            base_folder=recipe.dump_folder,
        )
    if recipe.compiles:
        # A block is compiled once for every way of passing through it: with and without gradient, of the activations
        # or the fast weights or both, for every batch size.
        raise_recompile_limit(64)
        if isinstance(model, LLaDAMoE):
            _compile_around_experts(model, recipe.compile)
        elif dims.tp_enabled:
            _compile_below_checkpoints(model, recipe.compile)
        else:
            apply_compile(model, recipe.compile)

    if recipe.compiles_losses and not dims.tp_enabled:
        model.output.backend = recipe.compile.backend

    if dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if dims.dp_replicate_enabled else ["fsdp"]
        apply_fsdp(
            model,
            dims.get_mesh(names),
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=training.enable_cpu_offload,
            reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
            ep_degree=dims.ep,
            edp_mesh=dims.get_optional_mesh(["dp_replicate", "efsdp"] if dims.dp_replicate_enabled else ["efsdp"]),
        )
        # The bi-level step enters through `trunk` and `tail` as well as `forward`; FSDP's root has to see
        # each entry, to set itself up on the first and to order its streams on all.
        for method in ("trunk", "tail"):
            register_fsdp_forward_method(model, method)
        model.fsdp_schedule = FSDPSchedule.from_model(model, parallelism.fsdp_reshard_after_forward)
        model.mixed_precision = TORCH_DTYPE_MAP[training.mixed_precision_param]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 asks for a sum multiplied by torchtitan's factor of 1, which neither gloo nor NCCL's NVLS has.
                module.set_force_sum_reduction_for_comms(True)
    return model


def _apply_tp(model: LLaDA, mesh: DeviceMesh, recipe: Recipe) -> None:
    """Apply llama3's tensor-parallel plan, and what it lacks for this backbone."""
    loss_parallel = not recipe.parallelism.disable_loss_parallel
    # The converter for float8, which the plan could gather in, is refused.
    apply_non_moe_tp(model, mesh, loss_parallel=loss_parallel, enable_float8_tensorwise_tp=False)
    if model.model_args.qk_norm:
        # One weight for all heads, of which each rank has some.
        for block in model.layers.values():
            for name in ("attention.q_norm", "attention.k_norm"):
                style = SequenceParallel(sequence_dim=2, use_local_output=True)
                parallelize_module(block.get_submodule(name), mesh, style)
    maybe_enable_async_tp(cast(Any, recipe), mesh)  # which reads two sections of a configuration
    model.output.follow_plan(loss_parallel)


def _compile_around_experts(model: LLaDAMoE, config: Compile) -> None:
    """Compile every block within its checkpoint, but for its experts.

    torchtitan's recipe compiles each module around them: more graphs, eager products of scores between them, and
    wrappers that show in the names of the parameters.
    """
    for block in model.layers.values():
        cast(MoEBlock, checkpointed(block) or block).compile_around_experts(config.backend)


def _compile_below_checkpoints(model: LLaDA, config: Compile) -> None:
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
