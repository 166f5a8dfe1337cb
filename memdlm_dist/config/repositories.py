"""Repositories of the Hugging Face hub in a configuration: downloaded, and replaced by the folders of their copies."""

import copy

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.runtime import hub


def downloaded(config: JobConfig, weights: bool = False) -> JobConfig:
    """Return a copy of the configuration with folders in place of repositories; call on all ranks.

    Call it before the process group is initialised, since a download takes longer than a collective may.

    Args:
        weights: download the initial weights and the initial adapter as well, not only the files that describe them.

    Raises:
        UserError: if a repository cannot be downloaded and has no cached copy.
    """
    config = copy.deepcopy(config)
    model, checkpoint = config.model, config.checkpoint
    initial = hub.weights if weights else hub.description
    # A checkpoint of a run is not downloaded: its metadata is a pickle.
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path:
        checkpoint.initial_load_path = initial(checkpoint.initial_load_path)
    elif checkpoint.initial_load_in_hf:
        model.hf_assets_path = initial(model.hf_assets_path)
    if weights and checkpoint.initial_adapter:
        checkpoint.initial_adapter = hub.adapter(checkpoint.initial_adapter)
    model.hf_assets_path = hub.tokenizer(model.hf_assets_path)
    return config
