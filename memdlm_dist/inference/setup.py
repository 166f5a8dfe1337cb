"""Set-up of inference: configuration, process group and this rank's device."""

import copy
import os

import torch

from memdlm_dist.checkpoint import peft_folder
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.models.layout import Layout
from memdlm_dist.runtime import process_group
from memdlm_dist.runtime.cpu import check_prepared
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.runtime.single_process import single_process_environment
from memdlm_dist.runtime.storage import is_remote
from memdlm_dist.training.backbone import get_layout, get_sd_adapter


def checkpoint_folder(config: JobConfig) -> str:
    """Return the folder or URL of a run's checkpoints."""
    folder: str = config.checkpoint.folder
    return folder if is_remote(folder) else os.path.join(config.job.dump_folder, folder)


def adapter_config(config: JobConfig, adapter: str) -> JobConfig:
    """Return a copy of a configuration whose model has the adapters of a PEFT folder.

    Raises:
        UserError: if the folder is not an adapter of this model.
    """
    config = copy.deepcopy(config)
    config.lora = peft_folder.read(adapter, get_sd_adapter(config)).settings(config.lora)
    config.model.converters = ["lora"]
    return config


def inference_config(config: JobConfig, memory: bool = True) -> JobConfig:
    """Return a copy of a training configuration with training-only features off.

    Args:
        memory: fast weights are adapted to prompts; False keeps expert parallelism.
    """
    config = copy.deepcopy(config)
    # Any model can be used with the memory, also one that was trained without it.
    config.parametric_memory.enable = True
    config.activation_checkpoint.mode = "none"
    config.compile.enable = False
    if memory:
        # Each rank adapts fast weights to its own prompts, so it needs all experts.
        config.parallelism.expert_parallel_degree = config.parallelism.expert_tensor_parallel_degree = 1
    if config.parallelism.context_parallel_method == "ring":  # takes no mask, which padding needs
        config.parallelism.context_parallel_method, config.parallelism.context_parallel_degree = "ulysses", 1
    config.comm.trace_buf_size = 0  # a trace would create its folder in the current directory
    # Unused, because the caller chooses the batches of prompts; valid for any number of ranks.
    config.training.local_batch_size, config.training.global_batch_size = 1, -1
    # "never" would keep all parameters gathered for the whole of decoding.
    config.parallelism.fsdp_reshard_after_forward = "default"
    return config


def join(config: JobConfig) -> tuple[torch.device, Layout]:
    """Join the process group; return this rank's device and the parallel layout."""
    check_prepared()
    single_process_environment()
    device = torch.device(f"{device_type()}:{os.environ['LOCAL_RANK']}")
    device_module().set_device(device)
    return device, get_layout(config, process_group.join(config.comm))
