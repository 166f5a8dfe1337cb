"""Check that a checkpoint holds the tensors of this model, from its metadata alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpoint import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE

from memdlm_dist.checkpoint import continuity
from memdlm_dist.checkpoint.catalogue import read_run
from memdlm_dist.checkpoint.reading import read_metadata
from memdlm_dist.errors import UserError
from memdlm_dist.models import lora
from memdlm_dist.runtime.rank_0 import from_rank_0, one_line
from memdlm_dist.runtime.storage import Storage

# Keys under which torchtitan saves the states other than the model.
_STATES = (OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE)


def check_model(
    location: str, tensors: Mapping[str, torch.Tensor], base: bool = False, ignore_adapters: bool = False
) -> str:
    """Return the problem of a checkpoint's metadata as a predicate; an empty string if there is none.

    Args:
        tensors: the model's tensors by parameter name.
        base: the checkpoint may lack adapters.
        ignore_adapters: adapters are not compared.

    Raises:
        UserError: if the checkpoint has a newer format, or is intact but of another model; names the first tensor that
            does not match.
    """
    continuity.check_format(location, read_run(Storage(location)))
    try:
        entries = read_metadata(location).state_dict_metadata
    except Exception as error:  # a broken pickle can raise anything
        return f"has metadata that cannot be read ({one_line(error)})"
    for name in tensors:
        if name in entries and not isinstance(entries[name], TensorStorageMetadata):
            return f"holds {name}, which is not a tensor"
    saved_shapes = {
        name: tuple(entry.size)
        for name, entry in entries.items()
        # The model's tensors are at the top level, the other states under their keys.
        if isinstance(entry, TensorStorageMetadata) and name.split(".")[0] not in _STATES
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if ignore_adapters:
        shapes, saved_shapes = lora.without_adapters(shapes), lora.without_adapters(saved_shapes)
    if base and not any(map(lora.is_adapter, saved_shapes)):
        shapes = lora.without_adapters(shapes)
    for name in [*shapes, *saved_shapes]:
        model_shape, saved_shape = shapes.get(name), saved_shapes.get(name)
        if model_shape != saved_shape:
            raise UserError(
                f"The checkpoint in {location} is of another model: its {name} is {saved_shape or 'absent'}, this "
                f"model's {model_shape or 'absent'}; choose another job.dump_folder, or the model.flavor of the "
                "checkpoint."
            )
    return ""


def matching_states(location: str, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states to load, without adapters if the checkpoint has none; call on all ranks."""
    has_adapters = from_rank_0(lambda: any(map(lora.is_adapter, read_metadata(location).state_dict_metadata)))
    return dict(states) if has_adapters else lora.without_adapters(states)
