"""torchtitan 0.2.2: private names, patches, and the step line that it composes itself.

Imported after `runtime.cpu.prepare()`, since torchtitan decides on the device type when it is first imported.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan import train
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list
from torchtitan.models.moe import kernels, utils
from torchtitan.models.moe.utils import _permute, _unpermute
from torchtitan.models.qwen3.model.state_dict_adapter import Qwen3StateDictAdapter

from memdlm_dist.compat.torch import leave_ring_unbalanced

# Operators whose results selective activation checkpointing keeps, as torchtitan's own recipes have it.
SAVED_OPERATORS = _op_sac_save_list


def use_cpu_permutation() -> None:
    """Sort tokens by expert without the Triton kernel, which torchtitan gives no choice about."""
    utils.generate_permute_indices = partial(kernels.generate_permute_indices, use_cpu=True)


def permuted(run: Callable[[Tensor, Tensor], Tensor], x_SD: Tensor, counts: Tensor, ranks: int, experts: int) -> Tensor:
    """Call `run(x, counts)` on slots padded to the multiples that grouped products need; returns its rows unpadded."""
    shape, x_filled, places, counts = _permute(x_SD, counts, ranks, experts)
    out: Tensor = _unpermute(run(x_filled, counts), shape, places)
    return out


def ring_attention(kernels: list[nn.Module], mesh: Any, rotation: Any) -> None:
    """Give attention kernels torch's ring attention. torchtitan's recipe for it reads a causal model's settings."""
    apply_cp_to_attention_module(kernels, mesh, "sdpa")
    leave_ring_unbalanced(rotation)


def special_token(tokenizer: HuggingFaceTokenizer, name: str) -> str | None:
    """Return the text of a special token, such as `mask_token`, from tokenizer_config.json; None if it has none."""
    token: str | None = tokenizer._get_token_from_config(tokenizer.config or {}, name)
    return token


class HookedCheckpoints(CheckpointManager):
    """torchtitan's checkpoint manager, whose decisions have public names here; a subclass overrides those."""

    def is_due(self, step: int, last_step: bool = False) -> bool:
        """Return whether to save after a step."""
        due: bool = super()._should_save(step, last_step)
        return due

    def purge(self) -> None:
        """Remove what retention does not keep; called after each save."""
        super()._purge_stale_checkpoints()

    def states_to_load(self, model_only: bool) -> dict[str, Any]:
        """Return the states that a checkpoint is loaded into, the model's tensors at the top level."""
        states: dict[str, Any] = super()._states_to_load(model_only)
        return states

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self.is_due(curr_step, last_step)

    def _purge_stale_checkpoints(self) -> None:
        self.purge()


def construct_checkpoints(manager: type[CheckpointManager]) -> None:
    """Let torchtitan's Trainer construct `manager`: it has builders for all its components but this one."""
    train.CheckpointManager = manager


@contextlib.contextmanager
def appending_to_step_line(suffix: str) -> Iterator[None]:
    """Append to the console line that `MetricsProcessor.log` composes and logs in one go; rank 0 alone prints it."""

    def append(record: logging.LogRecord) -> bool:
        if "tflops:" not in str(record.msg):
            return True
        record.msg = f"{record.msg}{suffix}"
        return torch.distributed.get_rank() == 0

    logger = logging.getLogger()  # torchtitan's is the root
    logger.addFilter(append)
    try:
        yield
    finally:
        logger.removeFilter(append)


class ReplicatedExpertsAdapter(Qwen3StateDictAdapter):
    """torchtitan's adapter of mixtures of experts, for HSDP too.

    0.2.2 asks every placement of an expert's weights which dimension it shards, and `Replicate` has none.
    """

    def _caculate_indices_from_placements(
        self, dim: int, dim_size: int, dtensor_placements: tuple[Any, ...], device_mesh: Any
    ) -> tuple[int, int]:
        sharding = [i for i, placement in enumerate(dtensor_placements) if not placement.is_replicate()]
        if not sharding:
            return 0, dim_size
        names = tuple(device_mesh.mesh_dim_names[i] for i in sharding)
        placements = tuple(dtensor_placements[i] for i in sharding)
        found: tuple[int, int] = super()._caculate_indices_from_placements(
            dim, dim_size, placements, device_mesh[names]
        )
        return found
