"""Loading of a checkpoint's weights alone, for inference and evaluation."""

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import ModelWrapper

from memdlm_dist.checkpoint import base_model, hugging_face_folder, peft_folder
from memdlm_dist.checkpoint.catalogue import METADATA, Catalogue, folder_name, is_export, read_run
from memdlm_dist.checkpoint.model_check import check_model, matching_states
from memdlm_dist.checkpoint.reading import load_states
from memdlm_dist.errors import UserError
from memdlm_dist.models import initial_weights, lora
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter
from memdlm_dist.runtime.rank_0 import failure_reason, from_rank_0
from memdlm_dist.runtime.storage import Storage


def find(location: str) -> str:
    """Return the location of a checkpoint: `location` itself, or the newest intact checkpoint or export in it.

    Raises:
        UserError: if there is none.
    """
    files = Storage(location).sizes()
    if METADATA in files or is_export(files):
        return location
    catalogue = Catalogue(location)
    checkpoints = catalogue.all()
    # An export is complete once its index exists. An export of adapters alone has no index and is not used.
    usable = [
        saved.step
        for saved in checkpoints
        if saved.intact or (saved.exported and hugging_face_folder.INDEX in catalogue.storage.sizes(saved.name))
    ]
    if usable:
        return catalogue.storage.url(folder_name(usable[-1]))
    problems = "; ".join(
        f"{saved.name} {saved.problem or 'holds only exported weights, in safetensors'}" for saved in checkpoints
    )
    raise UserError(
        f"There is no checkpoint that can be used in {location}{f' ({problems})' if problems else ''}; name a "
        "step-N folder, or a folder that contains step-N folders."
    )


@torch.no_grad()
def load_with_adapter(
    model: nn.Module,
    location: str,
    sd_adapter: BackboneStateDictAdapter,
    adapter: str,
    section: LoRA,
    initial: str = "",
) -> str:
    """Load the base of a checkpoint, and an adapter in PEFT's format; otherwise like `load`.

    Args:
        adapter: folder of the adapter, which replaces those of the checkpoint.
        section: the adapter's settings.
        initial: see `load`.
    """
    from_rank_0(lambda: peft_folder.check(adapter, sd_adapter, section))
    path = load(model, location, sd_adapter, base_alone=True, initial=initial)
    peft_folder.load(ModelWrapper(model).state_dict(), sd_adapter, adapter, section)
    return path


@torch.no_grad()
def load(
    model: nn.Module, location: str, sd_adapter: BackboneStateDictAdapter, base_alone: bool = False, initial: str = ""
) -> str:
    """Load weights into a model with any parallel layout and return their location; call on all ranks.

    Each rank reads only its own shards.

    Args:
        location: a checkpoint, a folder of checkpoints, or a folder of Hugging Face weights.
        base_alone: do not load adapters of the checkpoint.
        initial: location of the run's initial weights. It is used for a checkpoint of adapters alone whose 4-bit base
            is not where it was in training.

    Raises:
        UserError: if there is no checkpoint at `location`, or the checkpoint is damaged or of another model.
    """
    path: str = from_rank_0(lambda: find(location))
    weights = ModelWrapper(model)
    initial_weights.draw_adapters(model)  # initial values, kept if the checkpoint has no adapters
    exported = from_rank_0(lambda: is_export(Storage(path).sizes()))
    run = {} if exported else from_rank_0(lambda: read_run(Storage(path)))
    if base_model.BASE in run:  # the checkpoint holds adapters alone
        base_model.restore(model, sd_adapter, path, run, initial)
        if base_alone:
            return path
        weights = base_model.AdapterWrapper(model)
    elif base_model.is_quantized(model):
        base_model.load(model, sd_adapter, path, ignore_adapters=base_alone)
        return path
    if exported:
        hugging_face_folder.load(weights, sd_adapter, path)
        return path
    problem = from_rank_0(lambda: check_model(path, weights.state_dict(), base=True, ignore_adapters=base_alone))
    if not problem:
        try:
            states = lora.without_adapters(weights.state_dict()) if base_alone else weights.state_dict()
            states = matching_states(path, states)
            load_states(states, path)
            weights.load_state_dict(states)
        except CheckpointException as failure:
            problem = f"cannot be read ({failure_reason(failure)})"
    if problem:
        raise UserError(f"The checkpoint {path} {problem}; choose another.")
    return path
