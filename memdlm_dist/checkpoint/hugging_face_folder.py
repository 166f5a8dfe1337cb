"""Hugging Face folders: safetensors under Hugging Face's names, with config.json and the tokenizer.

DCP's reader and writer for Hugging Face folders do the I/O, and each rank reads and writes only its own shards. The
functions here check a folder before it is read, and add the remaining files to an export.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.checkpoint import peft_folder
from memdlm_dist.checkpoint.catalogue import EXPORT
from memdlm_dist.checkpoint.slice_reader import SliceReader
from memdlm_dist.compat.torch import consolidate_safetensors
from memdlm_dist.errors import UserError
from memdlm_dist.models import lora, row_slices
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter, fqn_to_index_mapping, stored_dtype
from memdlm_dist.runtime.rank_0 import failure_reason, from_rank_0, on_all_ranks, one_line, write_on_rank_0
from memdlm_dist.runtime.storage import is_remote

logger = logging.getLogger()

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Files to copy along with weights, as patterns of names. Code is copied, and never executed.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TOKENIZER_CODE = ("tokenization_*.py",)
_MODEL_FILES = (CONFIG, "generation_config.json", "*.py", "LICENSE*", "NOTICE*")
_COPY_LIMIT = 128 * 2**20  # maximum size in bytes of a copied file; the largest tokenizers have about 35 MB
# Folder in an export with the ranks' shards, until they are consolidated.
_SHARDS = "sharded"
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
    if [file.name for file in files] == [peft_folder.TENSORS]:
        raise UserError(
            f"{path} holds an adapter without its base; name it in checkpoint.initial_adapter or --adapter, and the "
            "base here."
        )
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
            dcp.load(hf_state, storage_reader=SliceReader(folder, hf_state), no_dist=not dist.is_initialized())
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
        tensors: by Hugging Face name; row slices are joined.

    Raises:
        UserError: if the folder cannot be written to.
    """
    tensors = row_slices.joined(tensors)
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


def export(
    prepare: Callable[[], Mapping[str, Tensor]],
    folder: str,
    sd_adapter: BackboneStateDictAdapter,
    sources: Sequence[str],
    tokenizers: Sequence[str],
) -> None:
    """Write a model with any parallel layout to a folder; a collective call.

    Each rank writes its shards, and then consolidates some of the files. The index comes last: with it, the export is
    complete.

    Args:
        prepare: returns the tensors, cast with `in_dtype`, sharded or not, by parameter name; without adapters.
        sources, tokenizers: see `describe`.

    Raises:
        CheckpointException, OSError: on all ranks, if a rank fails.
    """
    # DCP has collectives, in which the other ranks would wait for a rank that has failed before.
    prepared = on_all_ranks(lambda: sd_adapter.to_hf(dict(prepare())), "Preparing the tensors of an export")
    tensors = row_slices.joined(prepared)
    # A rank names only its own experts, so the list of all tensors comes from the backbone.
    expected, dtype = sd_adapter.expected(), next(iter(tensors.values())).dtype
    numbers = fqn_to_index_mapping(expected, dtype)
    shards = os.path.join(folder, _SHARDS)
    dcp.save(
        tensors,
        storage_writer=HuggingFaceStorageWriter(shards, fqn_to_index_mapping=numbers, save_distributed=True),
    )
    count = max(numbers.values())
    files = {name: f"model-{number:05d}-of-{count:05d}.safetensors" for name, number in numbers.items()}
    mine = {name: files[name] for name, number in numbers.items() if number % dist.get_world_size() == dist.get_rank()}

    def consolidate() -> None:
        if mine:
            consolidate_safetensors(shards, folder, mine)

    on_all_ranks(consolidate, "Writing the files of an export")

    def complete() -> None:
        shutil.rmtree(shards)
        describe(folder, sd_adapter, sources, tokenizers)
        size = sum(math.prod(x.shape) * stored_dtype(name, dtype).itemsize for name, x in expected.items())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    write_on_rank_0(complete)


def describe(
    folder: str,
    sd_adapter: BackboneStateDictAdapter,
    sources: Sequence[str],
    tokenizers: Sequence[str] | None = None,
) -> list[str]:
    """Add config.json, modelling code and tokenizer to a folder of weights, and return the names of the files.

    Files are copied byte for byte, and nothing is executed. In config.json the keys of an extended context are changed.
    If no source has config.json, it is generated. A file that exists in the folder is kept. A source whose config.json
    is another model's gives no config.json, code or licence, with a warning.

    Args:
        sources: folders in order of preference; each file is copied from the first one that has it. A checkpoint's
            own export counts too.
        tokenizers: folders in order of preference for the tokenizer, all of whose files come from the first one that
            has a tokenizer; None for `sources`.
    """
    chosen: dict[str, Path] = {}
    sources, tokenizers = (
        [folder for source in folders for folder in (source, os.path.join(source, EXPORT))]
        for folders in (sources, sources if tokenizers is None else tokenizers)
    )
    for candidate in tokenizers:
        if found := _copyable(candidate, _TOKENIZER_FILES):
            chosen = {**_copyable(candidate, _TOKENIZER_CODE), **found}
            break
    for candidate in dict.fromkeys(sources):
        chosen = _model_files(candidate, sd_adapter) | chosen
    for name, source in chosen.items():
        target = Path(folder) / name
        if target.exists():
            continue
        content = source.read_text() if name == CONFIG else ""
        if name == CONFIG and (extended := sd_adapter.extended(content)) != content:
            target.write_text(extended)
        else:
            shutil.copyfile(source, target)
    if CONFIG not in chosen:
        (Path(folder) / CONFIG).write_text(json.dumps(sd_adapter.config(), indent=2) + "\n")
    return sorted({CONFIG, *chosen})


def _model_files(folder: str, sd_adapter: BackboneStateDictAdapter) -> dict[str, Path]:
    """Return the configuration, code and licence in a folder, by name; none if config.json is another model's."""
    files = _copyable(folder, _MODEL_FILES)
    if CONFIG not in files:
        return files
    try:
        reason = ", ".join(sd_adapter.differences(files[CONFIG].read_text()))
    except (OSError, ValueError) as error:
        reason = f"it cannot be read: {one_line(error)}"
    if not reason:
        return files
    logger.warning(
        f"{folder}/{CONFIG} does not describe this run's model ({reason}); no configuration, code or licence is copied "
        "from this folder to the export."
    )
    return {}


def _copyable(folder: str, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files directly in a folder whose names match one of the patterns, by name.

    A link is followed within the folder, and from a snapshot in the Hugging Face hub's cache to the blobs of the same
    repository. A folder from elsewhere may contain links to private files, which must not get into an export.
    """
    path, files = Path(folder).resolve(), {}
    if not path.is_dir():
        return {}
    for file in sorted(path.iterdir()):
        if not any(fnmatchcase(file.name, pattern) for pattern in patterns) or not file.is_file():
            continue
        content = file.resolve()
        repository = path.parent.parent  # if the folder is models--ORG--NAME/snapshots/REVISION
        is_blob = repository.name.startswith("models--") and content.parent == repository / "blobs"
        if not is_blob and not content.is_relative_to(path):
            reason = f"it links to {content}, outside of its folder"
        elif content.stat().st_size > _COPY_LIMIT:
            reason = f"it has {content.stat().st_size:,} bytes, more than {_COPY_LIMIT:,}"
        else:
            files[file.name] = content
            continue
        logger.error(f"{file} is not copied to the export ({reason}); copy it by hand if the export needs it.")
    return files
