"""Backbone of a configuration: model arguments, parallel layout, state-dict adapter, shard requirements."""

from dataclasses import replace

import torch

from memdlm_dist.checkpoint.convert import Run
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.row_shape import Requirements
from memdlm_dist.models import BACKBONES, backbone_args
from memdlm_dist.models.layout import Layout, build_layout
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.parallelize import Recipe, convert, parallelized_on_meta
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter


def get_model_args(config: JobConfig) -> LLaDAArgs:
    """Return the model arguments, with the run's seq_len and RoPE scaling.

    Raises:
        UserError: if model.name or model.flavor does not exist.
    """
    args = backbone_args(config.model.name, config.model.flavor)
    args.update_from_config(config)
    return args


def get_lora(config: JobConfig) -> LoRA | None:
    """Return the settings of the outer LoRA adapters; None if all weights are trained."""
    return config.lora if config.model.converters else None


def get_recipe(config: JobConfig) -> Recipe:
    """Return the settings that convert and parallelise the backbone."""
    return Recipe(
        training=config.training,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        lora=get_lora(config),
        dump_folder=config.job.dump_folder,
    )


def get_layout(config: JobConfig, world_size: int) -> Layout:
    """Build the device meshes of the configured parallel degrees; torch.distributed must be initialised."""
    return build_layout(config.parallelism, world_size)


def model_on_meta(config: JobConfig, args: LLaDAArgs, dims: Layout) -> LLaDA:
    """Build the backbone on the meta device, converted and parallelised as in training.

    Args:
        args: model arguments from `get_model_args`, or of another size of the same backbone.
    """
    return parallelized_on_meta(BACKBONES[config.model.name].model, args, dims, get_recipe(config))


def get_sd_adapter(config: JobConfig) -> BackboneStateDictAdapter:
    """Return the state-dict adapter between the backbone and its Hugging Face checkpoints.

    Raises:
        UserError: if model.name or model.flavor does not exist.
    """
    return BACKBONES[config.model.name].sd_adapter(get_model_args(config), config.model.hf_assets_path)


def get_conversion(config: JobConfig) -> Run:
    """Return the run's description for the conversion of its weights.

    Raises:
        UserError: if model.name or model.flavor does not exist.
    """
    sd_adapter = get_sd_adapter(config)
    with torch.device("meta"):
        model = sd_adapter.model_cls(backbone_args(config.model.name, config.model.flavor))
    # A 4-bit base is dequantised, so its tensors are described as they are in Hugging Face weights.
    plain = get_lora(config) and replace(config.lora, base="unquantized")
    convert(model, replace(get_recipe(config), lora=plain))
    sources = [path for path in (config.checkpoint.initial_load_path, config.model.hf_assets_path) if path]
    return Run(sd_adapter, dict(model.state_dict()), get_lora(config), sources)


def get_shard_requirements(config: JobConfig, mask_token_id: int) -> Requirements:
    """Return the requirements that the run's shards must meet."""
    parallel = config.parallelism
    return Requirements(
        seq_len=config.training.seq_len,
        vocab_size=backbone_args(config.model.name, config.model.flavor).vocab_size,
        flavour=config.model.flavor,
        mask_token_id=mask_token_id,
        ring_attention=parallel.context_parallel_degree > 1 and parallel.context_parallel_method == "ring",
        sequence_shards=parallel.tensor_parallel_degree * parallel.context_parallel_degree,
    )
