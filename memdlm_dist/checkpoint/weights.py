"""The weights alone of a checkpoint, for whoever reads with a model and does not train it."""

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import ModelWrapper

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.checkpoint.catalogue import METADATA, Catalogue, folder_name, is_export
from memdlm_dist.checkpoint.manager import check_model, states_in
from memdlm_dist.checkpoint.reading import load_states
from memdlm_dist.errors import UserError
from memdlm_dist.models import initial_weights
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter
from memdlm_dist.runtime.rank_0 import failure_reason, from_rank_0
from memdlm_dist.runtime.storage import Storage


def find(location: str) -> str:
    """Find a checkpoint: `location` itself, or the newest good one in that folder, exported ones among them.

    Raises:
        UserError: if there is none.
    """
    files = Storage(location).sizes()
    if METADATA in files or is_export(files):
        return location
    catalogue = Catalogue(location)
    found = catalogue.all()
    # An export is whole once its index is there; the adapters alone have none.
    good = [
        saved.step
        for saved in found
        if saved.intact or (saved.exported and hugging_face_folder.INDEX in catalogue.storage.sizes(saved.name))
    ]
    if good:
        return catalogue.storage.url(folder_name(good[-1]))
    problems = "; ".join(f"{saved.name} {saved.problem or 'holds weights alone, in safetensors'}" for saved in found)
    raise UserError(
        f"There is no checkpoint that can be used in {location}{f' ({problems})' if problems else ''}; name a folder "
        "step-N, or one that holds such folders."
    )


@torch.no_grad()
def load(model: nn.Module, location: str, sd_adapter: BackboneStateDictAdapter) -> str:
    """Load weights into a model of any layout, each rank its own part; returns where they were found.

    Call on all ranks.

    Args:
        location: a checkpoint, a folder of them, or a folder of Hugging Face weights.
        adapter: the model's names on Hugging Face.

    Raises:
        UserError: if there is no checkpoint at `location`, or it is damaged or of another model.
    """
    found: str = from_rank_0(lambda: find(location))
    weights = ModelWrapper(model)
    initial_weights.draw_adapters(model)  # which weights of a plain model leave as they are
    if from_rank_0(lambda: is_export(Storage(found).sizes())):
        hugging_face_folder.load(weights, sd_adapter, found)
        return found
    problem = from_rank_0(lambda: check_model(found, weights.state_dict(), base=True))
    if not problem:
        try:
            states = states_in(found, weights.state_dict())
            load_states(states, found)
            weights.load_state_dict(states)
        except CheckpointException as failure:
            problem = f"cannot be read ({failure_reason(failure)})"
    if problem:
        raise UserError(f"The checkpoint {found} {problem}; choose another.")
    return found
