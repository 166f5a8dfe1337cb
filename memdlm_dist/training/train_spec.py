"""Registration of the backbones and components with torchtitan, whose Trainer looks them up by name.

The functions have the signatures that torchtitan prescribes and translate them into our own.
"""

import os
from functools import cache
from typing import Any

from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from memdlm_dist.config import schedule
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.loader import EpochLoader, training_loader
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.models import BACKBONES, backbone_args
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.parallelize import convert, parallelize
from memdlm_dist.training.backbone import get_recipe, get_shard_requirements
from memdlm_dist.training.metrics import MemDLMMetrics
from memdlm_dist.training.validator import HeldOutValidator


class _Converter:
    """torchtitan model converter `lora`: adds the adapters of the [lora] section."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        self._recipe = get_recipe(job_config)

    def convert(self, model: LLaDA) -> None:
        """Add adapters to the linears, before the model is parallelised."""
        convert(model, self._recipe)

    def post_optimizer_hook(self, model: nn.Module) -> None:
        """Do nothing: adapters need no work after an optimizer step."""


def _parallelize(model: LLaDA, parallel_dims: ParallelDims, job_config: JobConfig) -> LLaDA:
    return parallelize(model, parallel_dims, get_recipe(job_config))


def _build_tokenizer(job_config: JobConfig) -> DiffusionTokenizer:
    return DiffusionTokenizer(job_config.model.hf_assets_path)


def _build_dataloader(
    *, dp_world_size: int, dp_rank: int, tokenizer: DiffusionTokenizer, job_config: JobConfig
) -> EpochLoader:
    del dp_rank  # mosaicml-streaming reads the rank from the environment
    training = job_config.training
    workers = training.dataloader
    loader = training_loader(
        job_config.data,
        get_shard_requirements(job_config, tokenizer.mask_id),
        local_batch_size=training.local_batch_size,
        global_batch_size=training.global_batch_size,
        dp_size=dp_world_size,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        samples_per_set=job_config.parametric_memory.group_size,
        num_workers=workers.num_workers,
        persistent_workers=workers.persistent_workers,
        prefetch_factor=workers.prefetch_factor,
        pin_memory=workers.pin_memory,
    )
    # torchtitan's Trainer builds the data loader before everything that reads the number of steps.
    schedule.resolve(job_config, loader.steps_per_epoch)
    return loader


def _build_validator(loss_fn: Any, **arguments: Any) -> HeldOutValidator:
    del loss_fn  # the validator computes its own loss
    return HeldOutValidator(**arguments)


def _build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: Any = None, tag: str | None = None
) -> MemDLMMetrics:
    del model_args
    return MemDLMMetrics(job_config, parallel_dims, tag)


@cache
def register() -> None:
    """Register all backbones and the model converter `lora` with torchtitan; once per process."""
    register_model_converter(_Converter, "lora")
    for name, backbone in BACKBONES.items():
        spec = TrainSpec(
            model_cls=backbone.model,
            # Copies, because the Trainer writes the run's seq_len into them.
            model_args={flavour: backbone_args(name, flavour) for flavour in backbone.flavours},
            parallelize_fn=_parallelize,
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers_with_moe_load_balancing,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=_build_dataloader,
            build_tokenizer_fn=_build_tokenizer,
            # Required by torchtitan but unused: the trainer computes its own loss.
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=_build_validator,
            build_metrics_processor_fn=_build_metrics_processor,
            state_dict_adapter=backbone.sd_adapter,
        )
        register_train_spec(name, spec)
