"""Offline conversion between training checkpoints and Hugging Face weights, in one process on the CPU.

Tensors keep their dtype unless another is given, so that a conversion there and back is bit-identical.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.checkpoint import base_model, hugging_face_folder, peft_folder, weights
from memdlm_dist.checkpoint.catalogue import is_export, read_run
from memdlm_dist.checkpoint.model_check import check_model
from memdlm_dist.checkpoint.reading import load_states, read_metadata
from memdlm_dist.errors import UserError
from memdlm_dist.models import lora
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.row_slices import RowSlice
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter, in_dtype, stored_dtype
from memdlm_dist.runtime.rank_0 import failure_reason
from memdlm_dist.runtime.storage import Storage, is_remote

# Progress callback, called with a short text before each stage.
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Run:
    """Description of the run whose model is converted.

    Attributes:
        sd_adapter: maps the backbone's tensor names to and from Hugging Face.
        tensors: the model's tensors without storage, by parameter name; including adapters, if the run trains any.
        lora: the adapters' settings; None if the run trains all weights.
        sources: folders to search for config.json, code and tokenizer: the initial weights' and the tokenizer's.
    """

    sd_adapter: BackboneStateDictAdapter
    tensors: Mapping[str, Tensor]
    lora: LoRA | None
    sources: Sequence[str]


def from_hugging_face(
    run: Run, source: str, output: str, dtype: torch.dtype | None, progress: Progress = lambda text: None
) -> None:
    """Convert Hugging Face weights to a checkpoint, for `checkpoint.initial_load_path` and the tools.

    Args:
        source: folder of the Hugging Face weights.
        output: folder to create.
        dtype: dtype of the checkpoint; None keeps each tensor's dtype.

    Raises:
        UserError: if the weights are of another backbone, or the output cannot be written.
    """
    sd_adapter = run.sd_adapter
    hugging_face_folder.check(source, sd_adapter)
    with _new_folder(output) as folder:
        state = _read_base(run, source, dtype, progress)
        progress(f"writing {output}")
        with _single_process_dcp(f"The checkpoint could not be written to {output}"):
            dcp.save(state, checkpoint_id=folder, no_dist=True)
        hugging_face_folder.describe(folder, sd_adapter, [source])


def merge_adapter(
    run: Run,
    source: str,
    adapter: str,
    output: str,
    dtype: torch.dtype | None,
    progress: Progress = lambda text: None,
) -> None:
    """Merge an adapter in PEFT's layout into Hugging Face weights, and write Hugging Face weights.

    Args:
        run: a run that trains adapters with the settings of this one.
        source: folder of the base's weights.
        adapter: folder of the adapter.
        output: folder to create.
        dtype: dtype of the weights; None keeps each tensor's dtype.

    Raises:
        UserError: if the weights or the adapter are of another backbone, or the output cannot be written.
    """
    sd_adapter = run.sd_adapter
    assert run.lora is not None
    hugging_face_folder.check(source, sd_adapter)
    with _new_folder(output) as folder:
        state = _read_base(run, source, None, progress)
        adapters = {name: torch.empty(x.shape) for name, x in run.tensors.items() if lora.is_adapter(name)}
        peft_folder.load(adapters, sd_adapter, adapter, run.lora)
        progress(f"writing {output}")
        state = lora.merged(state | adapters, run.lora.scale)
        hugging_face_folder.write(sd_adapter.to_hf(in_dtype(state, dtype)), folder)
        hugging_face_folder.describe(folder, sd_adapter, [source])


def _read_base(run: Run, source: str, dtype: torch.dtype | None, progress: Progress) -> dict[str, Tensor]:
    """Read checked Hugging Face weights under the names of the backbone; `dtype` None keeps each tensor's dtype."""
    saved = HuggingFaceStorageReader(source).read_metadata().state_dict_metadata
    state = {}
    for name, tensor in lora.without_adapters(run.tensors).items():
        # The experts of a layer are one tensor here; the first expert determines the dtype.
        first = next(iter(run.sd_adapter.to_hf({name: tensor})))
        part = RowSlice.parse(first)
        file_tensor: Any = saved[part.whole if part else first]
        state[name] = torch.empty(tensor.shape, dtype=stored_dtype(name, dtype or file_tensor.properties.dtype))
    progress(f"reading {_size(state)} from {source}")
    return hugging_face_folder.read_into(state, run.sd_adapter, source)


def to_hugging_face(
    run: Run,
    checkpoint: str,
    output: str,
    dtype: torch.dtype | None,
    assets: str | None = None,
    adapters_alone: bool = False,
    progress: Progress = lambda text: None,
) -> str:
    """Convert a checkpoint to Hugging Face weights with merged adapters, or to its adapters alone in PEFT's layout.

    Args:
        checkpoint: `step-N`, or a folder of checkpoints, of which the newest intact one is converted.
        output: folder to create.
        dtype: dtype of the weights; None keeps each tensor's dtype.
        assets: folder of config.json and the tokenizer; None searches the checkpoint's folder, then `run.sources`.
        adapters_alone: write only the adapters.

    Returns:
        The location of the converted checkpoint.

    Raises:
        UserError: if there is no intact checkpoint, it is of another model, or the output cannot be written.
    """
    location = weights.find(checkpoint)
    if is_export(Storage(location).sizes()):
        raise UserError(f"{location} holds Hugging Face weights already; name a checkpoint of a training run.")
    if adapters_alone and run.lora is None:
        raise UserError('The configuration trains no adapters; omit --adapter, or set model.converters = ["lora"].')
    sd_adapter, expected = run.sd_adapter, run.tensors
    on_quantized_base = base_model.BASE in read_run(Storage(location))
    if on_quantized_base and run.lora is None:
        raise UserError(
            f"The checkpoint {location} holds adapters of a 4-bit base, but the configuration trains no adapters; set "
            'model.converters = ["lora"], as in the run that saved it.'
        )
    saved_tensors = {
        name: tensor for name, tensor in expected.items() if not on_quantized_base or lora.is_adapter(name)
    }
    if problem := check_model(location, saved_tensors):
        raise UserError(f"The checkpoint {location} {problem}; choose another.")
    saved: Any = read_metadata(location).state_dict_metadata
    with _new_folder(output) as folder:
        names = [name for name in saved_tensors if not adapters_alone or lora.is_adapter(name)]
        state = {name: torch.empty(expected[name].shape, dtype=saved[name].properties.dtype) for name in names}
        progress(f"reading {_size(state)} from {location}")
        with _single_process_dcp(f"The checkpoint {location} cannot be read"):
            load_states(state, location, no_dist=True)
        if on_quantized_base and not adapters_alone:
            progress("reading and dequantising the 4-bit base")
            with _single_process_dcp(f"The base of {location} cannot be read"):
                state |= base_model.read(expected, sd_adapter, location, run.sources)
        progress(f"writing {output}")
        sources = [assets] if assets else list(run.sources)
        if adapters_alone:
            assert run.lora is not None
            base = sources[0] if sources else ""
            peft_folder.write(in_dtype(state, dtype), folder, sd_adapter, run.lora, base)
            return location
        state = lora.merged(state, run.lora.scale) if run.lora is not None else state
        hugging_face_folder.write(sd_adapter.to_hf(in_dtype(state, dtype)), folder)
        first = [] if assets or is_remote(location) else [location]  # a checkpoint that was converted has all files
        hugging_face_folder.describe(folder, sd_adapter, [*first, *sources], tokenizers=[*first, *sources[::-1]])
    return location


def _size(state: Mapping[str, Tensor]) -> str:
    return f"{sum(x.numel() * x.itemsize for x in state.values()) / 1e9:,.2f} GB"


@contextmanager
def _new_folder(output: str) -> Iterator[str]:
    """Yield a temporary folder next to `output`, and rename it to `output` on success.

    Raises:
        UserError: if the output exists, or cannot be created.
    """
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; choose another --output, or remove it.")
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written to ({error}); choose another --output.") from None
    try:
        yield str(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error}); make room or choose another --output.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _single_process_dcp(failing: str) -> Iterator[None]:
    """Suppress DCP's warning about a missing process group, and raise its failures as UserError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        raise UserError(f"{failing} ({failure_reason(failure)}); check the disk.") from None
