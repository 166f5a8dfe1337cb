"""Parallelisation of a backbone: torchtitan's recipes and the additions of the bi-level step."""

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
from memdlm_dist.models.lora import LoRA, add_adapters
from memdlm_dist.models.mixture import LLaDAMixture


@dataclass(frozen=True)
class Recipe:
    """Configuration sections that determine how a backbone is converted and parallelised."""

    training: Training
    parallelism: Parallelism
    activation_checkpoint: ActivationCheckpoint
    compile: Compile
    lora: LoRA | None  # None: train all weights
    dump_folder: str

    @property
    def compiles(self) -> bool:
        """True if torch.compile applies to the blocks."""
        return self.compile.enable and "model" in self.compile.components

    @property
    def compiles_losses(self) -> bool:
        """True if torch.compile applies to the losses in the output head."""
        return self.compile.enable and "loss" in self.compile.components


def convert(model: LLaDA, recipe: Recipe) -> None:
    """Add outer LoRA adapters to a backbone if the recipe has them, and freeze the base."""
    if recipe.lora is not None:
        frozen = TORCH_DTYPE_MAP[recipe.training.mixed_precision_param]
        add_adapters(model, recipe.lora, frozen, TORCH_DTYPE_MAP[recipe.training.dtype])


def parallelized_on_meta(model_cls: type[LLaDA], args: LLaDAArgs, dims: ParallelDims, recipe: Recipe) -> LLaDA:
    """Build a backbone on the meta device, convert and parallelise it, as torchtitan's trainer does."""
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[recipe.training.dtype]):
        model = model_cls(args)
    convert(model, recipe)
    return parallelize(model, dims, recipe)


def parallelize(model: LLaDA, dims: ParallelDims, recipe: Recipe) -> LLaDA:
    """Apply tensor, expert and context parallelism, activation checkpointing, compilation and FSDP2, in that order.

    Tensor parallelism comes first, since the others wrap the modules that it shards. Checkpointing is inside
    compilation, so that the compiler sees both; with tensor parallelism and with experts it is outside (see
    `_compile_below_checkpoints` and `_compile_around_experts`). FSDP2 is outermost, with one group per block. It shards
    over context-parallel ranks too.
    """
    parallelism, training = recipe.parallelism, recipe.training
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    if dims.tp_enabled:
        _apply_tp(model, dims.get_mesh("tp"), recipe)
    if isinstance(model, LLaDAMixture):
        parallelize_experts(model, dims)
    if dims.cp_enabled:
        apply_cp(
            [cast(TransformerBlock, block).attention for block in model.layers.values()],
            dims.get_mesh("cp"),
            parallelism.context_parallel_method,
            parallelism.context_parallel_rotate_method,
        )

    # The parallel styles above create new parameters, some without the requires_grad flag of the old ones.
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
        # A block is compiled once per kind of pass (without gradients, or with gradients of activations, fast weights
        # or both) and per batch size.
        raise_recompile_limit(64)
        if isinstance(model, LLaDAMixture):
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
        # The bi-level step calls `trunk` and `tail` as well as `forward`. FSDP2's root must see every such call: it
        # initialises on the first one and synchronises its streams on each.
        for method in ("trunk", "tail"):
            register_fsdp_forward_method(model, method)
        model.fsdp_schedule = FSDPSchedule.from_model(model, parallelism.fsdp_reshard_after_forward)
        model.mixed_precision = TORCH_DTYPE_MAP[training.mixed_precision_param]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Otherwise FSDP2 requests a sum that is premultiplied by torchtitan's factor of 1; neither gloo nor
                # NCCL's NVLS supports such sums.
                module.set_force_sum_reduction_for_comms(True)
    return model


def _apply_tp(model: LLaDA, mesh: DeviceMesh, recipe: Recipe) -> None:
    """Apply llama3's tensor-parallel plan, and plans for the norms of queries and keys and for the losses."""
    loss_parallel = not recipe.parallelism.disable_loss_parallel
    # The configuration check rejects float8, so the plan never all-gathers in it.
    apply_non_moe_tp(model, mesh, loss_parallel=loss_parallel, enable_float8_tensorwise_tp=False)
    if model.model_args.qk_norm:
        # The heads are sharded, and all share one norm weight.
        for block in model.layers.values():
            for name in ("attention.q_norm", "attention.k_norm"):
                style = SequenceParallel(sequence_dim=2, use_local_output=True)
                parallelize_module(block.get_submodule(name), mesh, style)
    maybe_enable_async_tp(cast(Any, recipe), mesh)  # it reads two sections, which a recipe has too
    model.output.follow_plan(loss_parallel)


def _compile_around_experts(model: LLaDAMixture, config: Compile) -> None:
    """Compile every block inside its activation checkpoint, except for its experts.

    torchtitan's recipe compiles each module around the experts separately. That makes more graphs, leaves the products
    with the router's scores eager between them, and adds wrappers that appear in parameter names.
    """
    for block in model.layers.values():
        cast(TransformerBlock, checkpointed(block) or block).compile_parts(config.backend)


def _compile_below_checkpoints(model: LLaDA, config: Compile) -> None:
    """Compile every block inside its activation checkpoint; torchtitan compiles outside it.

    torch 2.13 fails on a compiled block that contains both DTensors and a checkpoint: it would save the device mesh for
    the backward pass as if it were a tensor.
    """
    for name, block in model.layers.named_children():
        if (inner := checkpointed(block)) is not None:
            # In place: a compilation wrapper below the checkpoint's would appear in parameter names.
            inner.compile(backend=config.backend, fullgraph=True)
        else:
            compiled: Any = torch.compile(block, backend=config.backend, fullgraph=True)
            model.layers.register_module(name, compiled)
