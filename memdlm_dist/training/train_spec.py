"""Our backbones and components, under the names by which torchtitan's Trainer finds them."""

from functools import cache

from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from memdlm_dist.data.loader import build_dataloader
from memdlm_dist.data.tokenizer import build_tokenizer
from memdlm_dist.models import BACKBONES
from memdlm_dist.models.lora import LoRAConverter
from memdlm_dist.models.parallelize import parallelize_llada
from memdlm_dist.training.metrics import build_metrics_processor
from memdlm_dist.training.validator import build_validator


@cache
def register() -> None:
    """Make the backbones and their model converter known to torchtitan's Trainer."""
    register_model_converter(LoRAConverter, "lora")
    for name, backbone in BACKBONES.items():
        spec = TrainSpec(
            model_cls=backbone.model,
            model_args=backbone.flavours,
            parallelize_fn=parallelize_llada,
            pipelining_fn=None,
            build_optimizers_fn=build_optimizers,
            build_lr_schedulers_fn=build_lr_schedulers,
            build_dataloader_fn=build_dataloader,
            build_tokenizer_fn=build_tokenizer,
            # torchtitan requires one; the trainer computes its loss itself.
            build_loss_fn=build_cross_entropy_loss,
            build_validator_fn=build_validator,
            build_metrics_processor_fn=build_metrics_processor,
            state_dict_adapter=backbone.adapter,
        )
        register_train_spec(name, spec)
