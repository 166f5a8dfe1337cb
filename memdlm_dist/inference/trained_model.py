"""Trained model: a predictor with the weights of a checkpoint, which it loads on any layout."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from memdlm_dist.checkpoint import weights
from memdlm_dist.config import check_layout, launch
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.inference import setup
from memdlm_dist.inference.predictor import MEMORY_WEIGHTS, Predictor
from memdlm_dist.models import BACKBONES, backbone_args
from memdlm_dist.runtime import hub, process_group
from memdlm_dist.runtime.device import device_type
from memdlm_dist.training.backbone import model_on_meta
from memdlm_dist.training.objective import build_objective


class TrainedModel(Predictor):
    """Backbone with the weights of a checkpoint, parallelised as configured.

    Args:
        config: configuration of the run that trained the model, from `parse_config.parse`; not modified.
        checkpoint: checkpoint `step-N`, a folder or URL of checkpoints (the newest intact one is loaded), a folder of
            Hugging Face weights, or a repository of the hub; the run's own checkpoints if None.
        adapter: folder or hub repository of an adapter in PEFT's format, which replaces the adapters of the run. Only
            the base is then loaded from the checkpoint.
        memory_weights: loss weights of the inner steps on prompts. "uniform": 1; "schedule": w(mask ratio of the state)
            of the run's noise schedule, as in training.
        memory: fast weights can be adapted to prompts. False keeps the configured expert parallelism, which has no fast
            weights per prompt.

    Raises:
        UserError: if `memory_weights` is unknown, or the launch, the tokenizer or the checkpoint does not fit.
    """

    def __init__(
        self,
        config: JobConfig,
        checkpoint: str | None = None,
        adapter: str | None = None,
        *,
        memory_weights: str = MEMORY_WEIGHTS,
        memory: bool = True,
    ):
        self.adapter = hub.adapter(adapter) if adapter else None
        if self.adapter is not None:
            config = setup.adapter_config(config, self.adapter)
        config = launch.resolve(setup.inference_config(config, memory), *process_group.launched_processes())
        args = backbone_args(config.model.name, config.model.flavor)
        check_layout.check_backbone(config, args)
        # Before the process group is initialised, since a download takes longer than a collective may.
        config.model.hf_assets_path = hub.tokenizer(config.model.hf_assets_path)
        checkpoint = hub.weights(checkpoint) if checkpoint else setup.checkpoint_folder(config)
        tokenizer = DiffusionTokenizer(config.model.hf_assets_path)
        device, layout = setup.join(config)
        args.update_from_config(config)
        self._sd_adapter = BACKBONES[config.model.name].sd_adapter(args, config.model.hf_assets_path)
        model: Any = model_on_meta(config, args, layout)
        model.to_empty(device=device)
        with torch.no_grad():
            model.init_weights()
        dtype = config.training.mixed_precision_param
        # torch warns about an autocast to the dtype of the weights.
        amp: Any = nullcontext()
        if dtype != config.training.dtype:
            amp = process_group.autocast(layout, dtype, device_type())
        objective = build_objective(config, args, tokenizer.mask_id, layout)
        super().__init__(model.eval(), args, tokenizer, objective, layout, device, amp, memory_weights)
        self.trained_length: int = config.training.seq_len
        self.checkpoint, self._lora = "", config.lora
        self._initial: str = config.checkpoint.initial_load_path or ""
        self.load(checkpoint)

    def load(self, checkpoint: str) -> None:
        """Load the weights of a checkpoint, for the constructor's argument `checkpoint`, and the adapter again."""
        if self.adapter is None:
            self.checkpoint = weights.load(self.model, checkpoint, self._sd_adapter, initial=self._initial)
        else:
            self.checkpoint = weights.load_with_adapter(
                self.model, checkpoint, self._sd_adapter, self.adapter, self._lora, self._initial
            )

    def __enter__(self) -> "TrainedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
