"""Checkpoints of training runs from and to Hugging Face weights, offline: one process, on the host, no training.

Tensors keep their type unless another is asked for, so that there and back again is the same bit for bit.
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

from memdlm_dist.checkpoint import hugging_face_folder, weights
from memdlm_dist.checkpoint.catalogue import is_export
from memdlm_dist.checkpoint.manager import check_model
from memdlm_dist.checkpoint.reading import load_states, read_metadata
from memdlm_dist.errors import UserError
from memdlm_dist.models import lora
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter
from memdlm_dist.runtime.rank_0 import failure_reason
from memdlm_dist.runtime.storage import Storage, is_remote

# Told what is done now.
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Run:
    """The run whose model is converted.

    Attributes:
        adapter: the backbone's names on Hugging Face.
        tensors: the model's under our names, without contents; with its adapters, if the run trains any.
        lora: None if it trains all weights.
        sources: where config.json and the tokenizer may lie: the folder that it starts from, and the tokenizer's.
    """

    sd_adapter: BackboneStateDictAdapter
    tensors: Mapping[str, Tensor]
    lora: LoRA | None
    sources: Sequence[str]


def from_hugging_face(
    run: Run, source: str, output: str, dtype: torch.dtype | None, progress: Progress = lambda text: None
) -> None:
    """Write Hugging Face weights as a checkpoint that `checkpoint.initial_load_path` and the tools take.

    Args:
        dtype: of the checkpoint; None keeps that of each tensor.

    Raises:
        UserError: if the weights are of another backbone, or the output cannot be written.
    """
    sd_adapter = run.sd_adapter
    hugging_face_folder.check(source, sd_adapter)
    with _new_folder(output) as folder:
        saved = HuggingFaceStorageReader(source).read_metadata().state_dict_metadata
        state = {}
        for name, tensor in lora.without_adapters(run.tensors).items():
            # Of a layer's experts, which are one tensor here, the first one tells.
            first: Any = saved[next(iter(sd_adapter.to_hf({name: tensor})))]
            state[name] = torch.empty(tensor.shape, dtype=dtype or first.properties.dtype)
        progress(f"reading {_size(state)} from {source}")
        state = hugging_face_folder.read_into(state, sd_adapter, source)
        progress(f"writing {output}")
        with _alone(f"The checkpoint could not be written to {output}"):
            dcp.save(state, checkpoint_id=folder, no_dist=True)
        hugging_face_folder.describe(folder, sd_adapter, [source])


def to_hugging_face(
    run: Run,
    checkpoint: str,
    output: str,
    dtype: torch.dtype | None,
    assets: str | None = None,
    adapters_alone: bool = False,
    progress: Progress = lambda text: None,
) -> str:
    """Write a checkpoint's model as Hugging Face weights, its adapters merged, or its adapters alone in PEFT's layout.

    Args:
        checkpoint: `step-N`, or a folder of them, whose newest good one is taken.
        dtype: of the weights; None keeps that of each tensor.
        assets: folder of the tokenizer and config.json; the checkpoint's own, then the tokenizer's, if None.

    Returns:
        The checkpoint that was found.

    Raises:
        UserError: if there is no good checkpoint, it is of another model, or the output cannot be written.
    """
    found = weights.find(checkpoint)
    if is_export(Storage(found).sizes()):
        raise UserError(f"{found} holds Hugging Face weights already; name a checkpoint of a training run.")
    if adapters_alone and run.lora is None:
        raise UserError('The configuration trains no adapters (model.converters = ["lora"]); leave --adapter out.')
    sd_adapter, expected = run.sd_adapter, run.tensors
    if problem := check_model(found, expected):
        raise UserError(f"The checkpoint {found} {problem}; choose another.")
    saved: Any = read_metadata(found).state_dict_metadata
    with _new_folder(output) as folder:
        names = [name for name in expected if not adapters_alone or lora.is_adapter(name)]
        state = {name: torch.empty(expected[name].shape, dtype=saved[name].properties.dtype) for name in names}
        progress(f"reading {_size(state)} from {found}")
        with _alone(f"The checkpoint {found} cannot be read"):
            load_states(state, found, no_dist=True)
        progress(f"writing {output}")
        sources = [assets] if assets else list(run.sources)
        if adapters_alone:
            assert run.lora is not None
            base = sources[0] if sources else ""
            hugging_face_folder.write_peft(_cast(state, dtype), folder, sd_adapter, run.lora.rank, run.lora.alpha, base)
            return found
        state = lora.merged(state, run.lora.scale) if run.lora is not None else state
        hugging_face_folder.write(sd_adapter.to_hf(_cast(state, dtype)), folder)
        sources = sources if assets else [found, *sources]
        hugging_face_folder.describe(folder, sd_adapter, [path for path in sources if not is_remote(path)])
    return found


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in state.items()}


def _size(state: Mapping[str, Tensor]) -> str:
    return f"{sum(x.numel() * x.itemsize for x in state.values()) / 1e9:,.2f} GB"


@contextmanager
def _new_folder(output: str) -> Iterator[str]:
    """A folder beside the output, which takes its name when all is written.

    Raises:
        UserError: if the output exists, or cannot be made.
    """
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; choose another --output, or remove it.")
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written to ({error}); choose another --output.") from None
    try:
        yield str(part)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{output} could not be written ({error}); make room or choose another --output.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _alone(failing: str) -> Iterator[None]:
    """DCP by one process without a process group, which it warns of."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        raise UserError(f"{failing} ({failure_reason(failure)}).") from None
