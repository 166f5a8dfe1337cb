"""torchtitan 0.2.2: private names, patches, and an addition to its console line per step.

Import it after `runtime.cpu.prepare()`, since torchtitan selects the device type when it is first imported.
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

from memdlm_dist.compat.torch import configure_ring_attention

# Operators whose results selective activation checkpointing saves, from torchtitan's recipes.
SAVED_OPERATORS = _op_sac_save_list


def use_cpu_permutation() -> None:
    """Sort tokens by expert without torchtitan's Triton kernel; torchtitan has no option for this."""
    utils.generate_permute_indices = partial(kernels.generate_permute_indices, use_cpu=True)


@contextlib.contextmanager
def without_assets_warning() -> Iterator[None]:
    """Suppress torchtitan's warning that model.hf_assets_path does not exist: it may name a repository of the hub."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("HF assets path ")

    logger = logging.getLogger()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def run_padded(
    run: Callable[..., Tensor], x_SD: Tensor, counts: Tensor, ranks: int, experts: int, *others: Tensor
) -> Tensor:
    """Pad routed tokens to the group sizes that grouped products need, call `run`, and unpad its result.

    Args:
        run: function of the padded tokens, the padded counts, and the padded `others`.
        x_SD: routed tokens `[S, D]`.
        counts: tokens per expert.
        ranks: expert-parallel degree.
        experts: local experts.
        others: further tensors of the tokens, `[S, ...]`, which are zero on the padding.
    """
    shape, x_padded, indices, counts = _permute(x_SD, counts, ranks, experts)
    padded = [torch.cat([y, y.new_zeros(1, *y.shape[1:])])[indices] for y in others]
    out: Tensor = _unpermute(run(x_padded, counts, *padded), shape, indices)
    return out


def ring_attention(kernels: list[nn.Module], mesh: Any, rotation: Any) -> None:
    """Apply torch's ring attention to attention kernels.

    torchtitan's recipe for ring attention reads the settings of a causal model.

    Args:
        kernels: attention modules.
        mesh: context-parallel mesh.
        rotation: `parallelism.context_parallel_rotate_method`, "allgather" or "alltoall".
    """
    apply_cp_to_attention_module(kernels, mesh, "sdpa")
    configure_ring_attention(rotation)


def special_token(tokenizer: HuggingFaceTokenizer, name: str) -> str | None:
    """Return a special token, such as `mask_token`, from tokenizer_config.json; None if there is none."""
    token: str | None = tokenizer._get_token_from_config(tokenizer.config or {}, name)
    return token


class HookedCheckpoints(CheckpointManager):
    """torchtitan's checkpoint manager with public names for its private hooks, for subclasses to override."""

    def is_due(self, step: int, last_step: bool = False) -> bool:
        """Return whether to save a checkpoint after a step."""
        due: bool = super()._should_save(step, last_step)
        return due

    def purge(self) -> None:
        """Delete the checkpoints that retention does not keep; called after each save."""
        super()._purge_stale_checkpoints()

    def states_to_load(self, model_only: bool) -> dict[str, Any]:
        """Return the states to load from a checkpoint, with the model's tensors at the top level."""
        states: dict[str, Any] = super()._states_to_load(model_only)
        return states

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self.is_due(curr_step, last_step)

    def _purge_stale_checkpoints(self) -> None:
        self.purge()


def construct_checkpoints(manager: type[CheckpointManager]) -> None:
    """Make torchtitan's Trainer construct `manager`, the only component for which it has no builder."""
    train.CheckpointManager = manager


@contextlib.contextmanager
def appending_to_step_line(suffix: str) -> Iterator[None]:
    """Append `suffix` to the console line of `MetricsProcessor.log` in this context; only rank 0 prints it.

    `MetricsProcessor.log` formats and logs the line in one call, without a hook.
    """

    def append(record: logging.LogRecord) -> bool:
        if "tflops:" not in str(record.msg):
            return True
        record.msg = f"{record.msg}{suffix}"
        return torch.distributed.get_rank() == 0

    logger = logging.getLogger()  # torchtitan logs to the root logger
    logger.addFilter(append)
    try:
        yield
    finally:
        logger.removeFilter(append)


class ReplicatedExpertsAdapter(Qwen3StateDictAdapter):
    """torchtitan's state-dict adapter for mixtures of experts, extended to HSDP.

    torchtitan 0.2.2 reads the sharded dimension of every placement of the experts' weights. `Replicate` has none.
    """

    def _caculate_indices_from_placements(
        self, dim: int, dim_size: int, dtensor_placements: tuple[Any, ...], device_mesh: Any
    ) -> tuple[int, int]:
        sharded_dims = [i for i, placement in enumerate(dtensor_placements) if not placement.is_replicate()]
        if not sharded_dims:
            return 0, dim_size
        names = tuple(device_mesh.mesh_dim_names[i] for i in sharded_dims)
        placements = tuple(dtensor_placements[i] for i in sharded_dims)
        bounds: tuple[int, int] = super()._caculate_indices_from_placements(
            dim, dim_size, placements, device_mesh[names]
        )
        return bounds
