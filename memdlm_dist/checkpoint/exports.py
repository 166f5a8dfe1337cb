"""Exports of a run: its model as a Hugging Face folder, or its adapters alone in PEFT's format."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.checkpoint import base_model, hugging_face_folder, peft_folder
from memdlm_dist.checkpoint.catalogue import EXPORT, PARTIAL_EXPORT, Catalogue, folder_name
from memdlm_dist.compat.torch import tree_leaves
from memdlm_dist.errors import UserError
from memdlm_dist.models import lora
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter, in_dtype
from memdlm_dist.runtime.rank_0 import failure_reason, first_reason, log_unexpected, on_all_ranks, write_on_rank_0

# Shortest timeout of collectives, in seconds, while an export is written.
_TIMEOUT: Final = 3600.0


@dataclass(frozen=True)
class Exporter:
    """Writer of a run's exports; its methods are collective calls."""

    model: nn.Module
    sd_adapter: BackboneStateDictAdapter
    lora: LoRA | None
    """Settings of the adapters; None if none are trained."""
    weights: str
    """Location of the initial weights, whose configuration and tokenizer files are copied; empty if unknown."""
    dtype: torch.dtype | None
    """Dtype of exported models; None keeps the weights' dtype."""
    catalogue: Catalogue
    timeout: float
    """Timeout of collectives outside exports, in seconds."""

    def write(self, state: dict[str, Any], folder: str) -> None:
        """Export the model, with its adapters merged, or only the adapters.

        Args:
            state: state dict of the model, sharded.

        Raises:
            CheckpointException, OSError: on all ranks, if a rank cannot write.
        """
        with long_timeout(self.timeout):
            self._write(state, folder)

    def _write(self, state: dict[str, Any], folder: str) -> None:
        tokenizer = self.sd_adapter.assets
        if self.lora is not None and self.lora.export == "adapter":
            lora_, base = self.lora, self.weights or tokenizer or ""
            adapters = on_all_ranks(lambda: peft_folder.gather(state), "Gathering the adapters")
            write_on_rank_0(lambda: peft_folder.write(adapters, folder, self.sd_adapter, lora_, base))
            return

        def prepare() -> dict[str, Any]:
            if base_model.is_quantized(self.model):
                assert self.lora is not None
                return base_model.exported_state(self.model, self.lora.scale, self.dtype)
            merged = state if self.lora is None else lora.merged(state, self.lora.scale)
            return in_dtype(merged, self.dtype)

        sources = [path for path in (self.weights, tokenizer) if path]
        hugging_face_folder.export(prepare, folder, self.sd_adapter, sources, tokenizers=sources[::-1])

    def write_beside(self, step: int, state: dict[str, Any], pending: Callable[[], int]) -> str:
        """Export the model into the folder of a checkpoint, under another name until the export is complete.

        Args:
            state: state dict of the model, sharded.
            pending: returns the bytes on the disk that a save in progress still needs.

        Returns:
            The failure of the lowest rank that failed, or an empty string.
        """
        with long_timeout(self.timeout):
            reason, _ = first_reason(self._try_to_write_beside(step, state, pending))
        return reason

    @torch.no_grad()
    def _try_to_write_beside(self, step: int, state: dict[str, Any], pending: Callable[[], int]) -> str:
        folder = self.catalogue.storage.url(folder_name(step))
        partial = f"{folder}/{PARTIAL_EXPORT}"
        try:
            needed = on_all_ranks(lambda: self._size(state) + pending(), "Computing the size of an export")
            write_on_rank_0(lambda: self._prepare_folder(partial, needed))
            self._write(state, partial)
            write_on_rank_0(lambda: os.replace(partial, f"{folder}/{EXPORT}"))
        except (CheckpointException, Exception) as failure:
            log_unexpected(failure, f"Exporting the model of step {step}")
            return failure_reason(failure)
        return ""

    def _size(self, state: dict[str, Any]) -> int:
        """Return the bytes that an export needs on the disk."""
        if self.lora is not None and self.lora.export == "adapter":
            return tensor_bytes({name: tensor for name, tensor in state.items() if lora.is_adapter(name)})
        quantized = base_model.is_quantized(self.model)
        base = base_model.base_state(self.model) if quantized else lora.without_adapters(state)
        return 2 * tensor_bytes(base, self.dtype)  # the ranks' shards, and the files that they are consolidated into

    def _prepare_folder(self, folder: str, needed: int) -> None:
        self.remove_partial()
        disk = shutil.disk_usage(self.catalogue.storage.url())
        if disk.total and disk.free < needed:  # some network file systems report a size of 0
            raise UserError(f"it needs {needed / 2**20:,.0f} MiB")
        os.makedirs(folder)

    def remove_partial(self) -> None:
        """Remove what interrupted or failed exports have left; call on rank 0 alone."""
        for step in self.catalogue.steps():
            shutil.rmtree(self.catalogue.storage.url(f"{folder_name(step)}/{PARTIAL_EXPORT}"), ignore_errors=True)


@contextmanager
def long_timeout(timeout: float) -> Iterator[None]:
    """Let ranks wait in collectives for at least an hour, while others write their files of an export.

    The export must end with a collective, after which no rank waits for another one's files.

    Args:
        timeout: timeout of collectives after the export, in seconds.
    """
    group = dist.group.WORLD
    assert group is not None
    group.set_timeout(timedelta(seconds=max(timeout, _TIMEOUT)))
    try:
        yield
    finally:
        group.set_timeout(timedelta(seconds=timeout))


def tensor_bytes(state: Any, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of all tensors in a state dict, of all ranks together; in `dtype`, unless it is None."""
    tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
    return sum(x.numel() * (dtype or x.dtype).itemsize for x in tensors)
