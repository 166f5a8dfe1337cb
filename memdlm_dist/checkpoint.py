"""What is checked before a checkpoint is read. torchtitan's CheckpointManager does the rest."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.components.checkpoint import MODEL, CheckpointManager

from memdlm_dist.errors import UserError


def check_loadable(checkpointer: CheckpointManager, config: Any) -> None:
    """The checkpoint that the run would start from exists and is of this model.

    Args:
        checkpointer: the run's.
        config: the [checkpoint] section.

    Raises:
        UserError: naming the checkpoint and the first tensor that does not fit.
    """
    if not checkpointer.enable:
        return
    folder = Path(checkpointer.folder)
    if folder.exists():
        step = checkpointer._find_load_step() if config.load_step == -1 else config.load_step
        if step == -1:
            return
        path = folder / f"step-{step}"
    elif config.initial_load_path:
        path = Path(config.initial_load_path)
    else:
        return
    if config.initial_load_in_hf and not folder.exists():
        raise UserError("checkpoint.initial_load_in_hf is not supported yet; load a DCP checkpoint instead.")
    if not (path / ".metadata").is_file():
        raise UserError(
            f"There is no complete checkpoint in {path}; check checkpoint.load_step and checkpoint.initial_load_path."
        )
    try:
        # DCP's metadata is a pickle: the reader is for one's own checkpoints (see the README).
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(
            f"The checkpoint in {path} cannot be read: {error}; choose another checkpoint.load_step."
        ) from None
    saved_shapes = {
        name: tuple(entry.size)
        for name, entry in saved.items()
        # The model's tensors stand at the top level, the other states under their names.
        if isinstance(entry, TensorStorageMetadata) and name.split(".")[0] not in checkpointer.states
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpointer.states[MODEL].state_dict().items()}
    remedy = "choose another job.dump_folder, or the model.flavor that it was made with"
    for name in [*shapes, *saved_shapes]:
        ours, theirs = shapes.get(name), saved_shapes.get(name)
        if ours != theirs:
            raise UserError(
                f"The checkpoint in {path} is of another model: its {name} is {theirs or 'absent'}, this model's "
                f"{ours or 'absent'}; {remedy}."
            )
