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
    for name, tensor in checkpointer.states[MODEL].state_dict().items():
        entry = saved.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"The checkpoint in {path} is of another model: it has no {name}; choose another job.dump_folder, or "
                "the model.flavor that it was made with."
            )
        if tuple(entry.size) != tuple(tensor.shape):
            raise UserError(
                f"The checkpoint in {path} is of another model: its {name} is {tuple(entry.size)}, this model's "
                f"{tuple(tensor.shape)}; choose another job.dump_folder, or the model.flavor that it was made with."
            )
