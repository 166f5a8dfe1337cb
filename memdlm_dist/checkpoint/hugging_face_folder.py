"""Hugging Face folders: safetensors under Hugging Face's names, with config.json and the tokenizer.

DCP's reader and writer for Hugging Face folders do the I/O, and each rank reads and writes only its own shards. The
functions here check a folder before it is read, and add the remaining files to an export.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from memdlm_dist.errors import UserError
from memdlm_dist.models import lora
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter, fqn_to_index_mapping
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import failure_reason, from_rank_0
from memdlm_dist.runtime.storage import is_remote

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Files to copy along with weights: the tokenizer's and the model's description, never code.
_COMPANIONS = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "LICENSE",
)  # fmt: skip
# Tensors that some exports contain and no model needs, because they follow from the configuration.
_IGNORED = "rotary_emb.inv_freq"
# Accepted dtypes of weights, by safetensors' names.
_DTYPES = ("F64", "F32", "F16", "BF16")


def check(folder: str, sd_adapter: BackboneStateDictAdapter) -> None:
    """Check that the folder holds exactly this backbone's weights.

    Raises:
        UserError: naming the file, the tensor or the key of config.json that is wrong.
    """
    if is_remote(folder):
        raise UserError(f"Hugging Face weights are read from disk, not from {folder}; copy the folder to a disk first.")
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"There is no folder {folder} with Hugging Face weights; correct the path.")
    _check_config(path, sd_adapter)
    shapes_found = _shapes(path)
    for name, tensor in sd_adapter.expected().items():
        if name not in shapes_found:
            raise UserError(
                f"The weights in {folder} lack the tensor {name}; choose the model.name and model.flavor of the "
                "weights, or download them again if they are incomplete."
            )
        shape = shapes_found.pop(name)
        if shape != tuple(tensor.shape):
            raise UserError(
                f"The tensor {name} in {folder} has shape {shape}, but {tuple(tensor.shape)} in this model; choose the "
                "model.flavor of the weights."
            )
    unknown = [name for name in shapes_found if not name.endswith(_IGNORED)]
    if unknown:
        raise UserError(
            f"The weights in {folder} hold a tensor that this model does not have, {unknown[0]}"
            f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}; choose the model.name and model.flavor "
            "of the weights."
        )


def _check_config(path: Path, sd_adapter: BackboneStateDictAdapter) -> None:
    file = path / CONFIG
    if not file.is_file():
        return
    try:
        differences = sd_adapter.differences(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again.") from None
    if differences:
        raise UserError(
            f"{file} describes another model than this run's: {', '.join(differences)}; choose the model.name and "
            "model.flavor of the weights."
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all tensors in a folder from the headers of its safetensors files."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"There are no .safetensors files in {path}; convert the weights to safetensors.")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    shapes[name] = tuple(tensor.get_shape())
                    if tensor.get_dtype() not in _DTYPES and not name.endswith(_IGNORED):
                        raise UserError(
                            f"The tensor {name} in {file} is of type {tensor.get_dtype()}, not one of "
                            f"{', '.join(_DTYPES)}; use weights that are not quantised."
                        )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}); download it again.") from None
    if (path / INDEX).is_file():
        try:
            files_by_tensor = json.loads((path / INDEX).read_text())["weight_map"]
            missing = sorted(set(files_by_tensor.values()) - {file.name for file in files})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path / INDEX} cannot be read ({type(error).__name__}: {error}); download it again."
            ) from None
        if missing:
            raise UserError(f"{path} lacks the file {missing[0]}, which {INDEX} lists; download it again.")
    return shapes


def read_into(state: dict[str, Any], sd_adapter: BackboneStateDictAdapter, folder: str) -> dict[str, Any]:
    """Read a checked folder into a state dict of the backbone; each rank reads only its own shards.

    Args:
        state: tensors under the backbone's parameter names, sharded or not; not all of them are filled in place.

    Returns:
        The state dict to load.

    Raises:
        UserError: if a file cannot be read.
    """
    hf_state = sd_adapter.to_hf(state)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            dcp.load(hf_state, storage_reader=HuggingFaceStorageReader(folder), no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, SafetensorError) as failure:
        raise UserError(
            f"The weights in {folder} cannot be read ({failure_reason(failure)}); download them again."
        ) from None
    return sd_adapter.from_hf(hf_state)


def load(weights: Any, sd_adapter: Any, folder: str) -> None:
    """Load Hugging Face weights into a model with any parallel layout; adapters are not loaded.

    Args:
        weights: torchtitan's `ModelWrapper` of the model.

    Raises:
        UserError: if the folder does not hold exactly this model's weights.
    """
    from_rank_0(lambda: check(folder, sd_adapter))
    base = lora.without_adapters(weights.state_dict())
    weights.load_state_dict(read_into(base, sd_adapter, folder))


def write(tensors: Mapping[str, Tensor], folder: str) -> None:
    """Write unsharded tensors to a folder, in one process: safetensors files of at most 5 GB, and their index.

    Args:
        tensors: by Hugging Face name.

    Raises:
        UserError: if the folder cannot be written to.
    """
    writer = HuggingFaceStorageWriter(folder, fqn_to_index_mapping=fqn_to_index_mapping(tensors))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    except (CheckpointException, OSError) as failure:
        raise UserError(
            f"The weights could not be written to {folder} ({failure_reason(failure)}); make room or choose another "
            "folder."
        ) from None


def describe(folder: str, sd_adapter: BackboneStateDictAdapter, sources: list[str]) -> list[str]:
    """Add config.json and the tokenizer to a folder of weights, and return the names of the files.

    Each file is copied from the first source that has it. In config.json the keys of an extended context are changed.
    If no source has config.json, it is generated.
    """
    written = []
    for name in _COMPANIONS:
        source = next((path for path in (Path(s) / name for s in sources) if path.is_file()), None)
        if source is not None:
            if source.resolve() != (Path(folder) / name).resolve():
                if name == CONFIG:
                    (Path(folder) / name).write_text(sd_adapter.extended(source.read_text()))
                else:
                    shutil.copyfile(source, Path(folder) / name)
            written.append(name)
        elif name == CONFIG:
            (Path(folder) / name).write_text(json.dumps(sd_adapter.config(), indent=2) + "\n")
            written.append(name)
    return written


def write_peft(
    state: Mapping[str, Tensor], folder: str, sd_adapter: BackboneStateDictAdapter, rank: int, alpha: float, base: str
) -> None:
    """Write the adapters in PEFT's layout.

    Args:
        state: unsharded tensors; those that are not adapters are ignored.
        base: name or path of the base model. For a folder in the hub's cache, the repository is written instead.
    """
    repository = hub.origin(base)
    tensors, modules = {}, []
    for name, tensor in state.items():
        if lora.is_adapter(name):
            # The adapters of a layer's experts are one tensor here, and one tensor per expert in PEFT.
            for hf_name, expert_tensor in sd_adapter.to_hf({lora.base_weight_name(name): tensor}).items():
                modules.append(hf_name.removesuffix(".weight"))
                key = f"base_model.model.{modules[-1]}.{name[-len(lora.A) :]}.weight"
                tensors[key] = expert_tensor.reshape(tensor.shape[-2:]).contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True,
        "base_model_name_or_path": repository.id if repository else base,
        "revision": repository.revision if repository else None,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        # Full names, because LLaDA-8B's output head has the same last component as the down projections.
        "target_modules": sorted(set(modules)),
    }  # fmt: skip
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def gather_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the adapters in a model's state dict as unsharded CPU tensors; call on all ranks."""
    adapters = {name: tensor for name, tensor in state.items() if lora.is_adapter(name)}
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in adapters.items()}


def remove_rank_files(folder: str) -> None:
    """Remove the per-rank files, which DCP leaves in the folder after it has consolidated them."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(os.path.join(folder, "sharded"))
