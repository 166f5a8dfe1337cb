"""A trained model to read with: loaded on any layout, its memory written on prompts, its denoising.

Shapes: B sequences, L tokens, N predicted positions, V vocabulary. Arguments and results are on the host.
"""

import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils

from memdlm_dist.checkpoint import weights
from memdlm_dist.config import check_layout
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.inference import sampler
from memdlm_dist.inference.sampler import Canvas, Decoding
from memdlm_dist.method import bilevel, trajectory
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loss import whole
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.method.micro_batch import Scored, gather_scored, micro_batch
from memdlm_dist.method.trajectory import State
from memdlm_dist.models import BACKBONES, backbone_args
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.runtime.single_process import single_process_environment
from memdlm_dist.runtime.storage import is_remote
from memdlm_dist.training.backbone import layout_of, model_on_meta
from memdlm_dist.training.objective import build_objective

ANCHOR_RATIO = 0.2

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Remembered:
    """What the inner loop wrote on prompts: a set of fast weights for each, and the seconds that it took."""

    fast: FastWeights
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Responses to a batch of prompts, as token ids up to end-of-text."""

    responses: list[list[int]]
    fast: FastWeights | None  # what they were read with
    memory_seconds: float
    decoding_seconds: float


class TrainedModel:
    """A backbone with the weights of a checkpoint, spread over the ranks as the configuration says.

    Call every method on all ranks. Data-parallel ranks have batches of their own, as many each.

    Args:
        config: of the run that trained it, from `parse_config.parse`; not modified.
        checkpoint: a checkpoint `step-N` or a folder of them, whose newest good one is taken; the run's own if None.

    Raises:
        UserError: if the launch, the tokenizer or the checkpoint does not fit.
    """

    def __init__(self, config: Any, checkpoint: str | None = None):
        config = _for_reading(config)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_layout.check_launch(config, world_size)
        args = backbone_args(config.model.name, config.model.flavor)
        check_layout.check_backbone(config, args, world_size)
        self.tokenizer = DiffusionTokenizer(config.model.hf_assets_path)
        self.device, parallel_dims = _start(config)
        args.update_from_config(config)
        self._adapter = BACKBONES[config.model.name].adapter(args, config.model.hf_assets_path)
        model: Any = model_on_meta(config, args, parallel_dims)
        model.to_empty(device=self.device)
        with torch.no_grad():
            model.init_weights()
        self.model: LLaDA = model.eval()
        self.checkpoint = ""
        self.load(checkpoint or checkpoint_folder(config))
        self.trained_length: int = config.training.seq_len
        dtype = config.training.mixed_precision_param
        # torch warns of an autocast that changes nothing.
        self._amp: Any = nullcontext()
        if dtype != config.training.dtype:
            self._amp = dist_utils.maybe_enable_amp(parallel_dims, dtype, device_type())
        objective = build_objective(config, args, self.tokenizer.mask_id, parallel_dims)
        assert objective.memory is not None
        self._memory = replace(objective.memory, per_sample=True)
        # The prompt is no random corruption whose weight would make a likelihood bound: uniform weights.
        self._objective = replace(objective, plan=replace(objective.plan, loss_weight="uniform"))
        mesh = parallel_dims.get_optional_mesh("batch")
        self._group = mesh.get_group() if mesh else None
        self.rank = mesh.get_local_rank() if mesh else 0  # data-parallel
        self.ranks = mesh.size() if mesh else 1

    def load(self, checkpoint: str) -> None:
        """Replace the weights by another checkpoint's."""
        self.checkpoint = weights.load(self.model, checkpoint, self._adapter)

    @property
    def mask_id(self) -> int:
        return self.tokenizer.mask_id

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    def canvas(
        self, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int], ids: Sequence[int] | None = None
    ) -> Canvas:
        """`sampler.canvas` with this model's tokens and sharding."""
        return sampler.canvas(prompts, new_tokens, self.mask_id, self.eos_id, ids, self._objective.shards)

    def remember(
        self, prompts: Sequence[Sequence[int]], anchor_ratio: float = ANCHOR_RATIO, ids: Sequence[int] | None = None
    ) -> Remembered:
        """Run the inner loop on prompts: the trajectory ends at an anchor that masks a share of each prompt's tokens.

        [MASK] tokens that a prompt holds are not scored. An empty prompt writes nothing.

        Args:
            ids: keys of the rows' masks and initial fast weights; their numbers if None.
        """
        began = time.perf_counter()
        start = self.canvas(prompts, 0, ids)
        maskable_BL = start.attended_BL & ~start.open_BL
        if self._objective.shifted:
            maskable_BL[:, 0] = False
        levels_B = torch.full(start.ids_B.shape, anchor_ratio, dtype=torch.float64)
        draw = trajectory.draw(self._objective.seed, 0, start.ids_B, maskable_BL, levels_B)
        anchor = trajectory.prompt_anchor(draw, anchor_ratio)
        batch = micro_batch(
            start.tokens_BL,
            maskable_BL,
            start.ids_B,
            anchor,
            self._objective.plan.states(draw, anchor),
            self.mask_id,
            with_teacher=self._memory.loss.teacher is not None,
            shards=self._objective.shards,
            shifted=self._objective.shifted,
        )._replace(attended_BL=start.attended_BL)
        batch = batch.to(self.device)
        self.model.reach(start.tokens_BL.shape[1])
        initial = self._memory.draw(self._objective.seed, 0, batch.sample_ids_U)
        with self._amp:
            fast, statistics = bilevel.remember(self.model, batch, self._memory, initial, self._objective.shard)
        statistics.written_norm_G.sum().item()  # waits for the device
        return Remembered(fast, time.perf_counter() - began)

    @torch.no_grad()
    def logits(
        self, tokens_BL: Tensor, target_BL: Tensor, attended_BL: Tensor, fast: FastWeights | None = None
    ) -> Tensor:
        """Logits `[N, V]` in float32 of the target positions, in the order of the flattened canvas."""
        scored, place_N = self._gather(tokens_BL, target_BL)
        out = self._forward(tokens_BL, scored, attended_BL, fast, "logits")
        return whole(out)[place_N.to(self.device)].float().cpu()

    @torch.no_grad()
    def nll(
        self,
        tokens_BL: Tensor,
        target_BL: Tensor,
        clean_BL: Tensor,
        attended_BL: Tensor,
        fast: FastWeights | None = None,
    ) -> Tensor:
        """Each row's sum of -log p(clean token) over its targets, in nats, float64 `[B]`."""
        scored, _ = self._gather(clean_BL, target_BL)
        sums = SetSum(scored.valid_N.float().to(self.device), scored.sample_N.to(self.device), len(tokens_BL))
        head = HeadLoss(cross_entropy, scored.label_N.to(self.device), sums)
        return self._forward(tokens_BL, scored, attended_BL, fast, head).double().cpu()

    def _gather(self, tokens_BL: Tensor, target_BL: Tensor) -> tuple[Scored, Tensor]:
        """The targets as the head gets them, and where each stands among them."""
        shards, shifted = self._objective.shards, self._objective.shifted
        if shifted and target_BL[:, 0].any():
            raise UserError("This backbone predicts the next token, so that the first one cannot be [MASK].")
        ones_B = torch.ones(len(tokens_BL))
        scored = gather_scored(State(target_BL, target_BL, ones_B), tokens_BL, shards, shifted)
        length = tokens_BL.shape[1]
        width = length // shards
        shard_S1 = torch.arange(shards).unsqueeze(1)
        flat_N = (scored.index_SM // width * length + shard_S1 * width + scored.index_SM % width).flatten()
        flat_N = torch.where(scored.valid_N, flat_N, target_BL.numel())
        return scored, flat_N.argsort()[: int(target_BL.sum())]

    def _forward(
        self, tokens_BL: Tensor, scored: Scored, attended_BL: Tensor, fast: FastWeights | None, readout: Any
    ) -> Tensor:
        self.model.reach(tokens_BL.shape[1])
        index_M = scored.index_SM[self._objective.shard].to(self.device)
        # Where everything is attended to no mask is given, so that the fastest kernels run.
        attended = None if bool(attended_BL.all()) else attended_BL.to(self.device)
        context = self.model.context(tokens_BL.shape[1], attended_BL=attended)
        with self._amp:
            return self.model(tokens_BL.to(self.device), index_M, fast, readout, context)

    def denoise(self, start: Canvas, decoding: Decoding, fast: FastWeights | None = None) -> Any:
        """`sampler.denoise` with this model; an iterator of steps."""
        return sampler.denoise(
            lambda tokens_BL, target_BL: self.logits(tokens_BL, target_BL, start.attended_BL, fast),
            start, decoding, self.mask_id, self.eos_id, self.agree,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int | Sequence[int],
        decoding: Decoding,
        memory: bool = False,
        anchor_ratio: float = ANCHOR_RATIO,
        ids: Sequence[int] | None = None,
    ) -> Generated:
        """Responses to prompts, with the memory written on each prompt first or not."""
        remembered = self.remember(prompts, anchor_ratio, ids) if memory else None
        began = time.perf_counter()
        start = self.canvas(prompts, new_tokens, ids)
        tokens_BL = sampler.finished(self.denoise(start, decoding, remembered.fast if remembered else None), start)
        return Generated(
            sampler.responses(tokens_BL, start, self.eos_id),
            remembered.fast if remembered else None,
            remembered.seconds if remembered else 0.0,
            time.perf_counter() - began,
        )

    def agree(self, count: int) -> int:
        """The largest of a number over all data-parallel ranks."""
        if self._group is None:
            return count
        found = torch.tensor(count, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
        return int(found)

    def spread(
        self,
        items: Sequence[T],
        batch_size: int,
        work: Callable[[list[T], list[int]], list[R]],
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[R]:
        """`work` on all items, in batches of a size, over the data-parallel ranks; the results on all of them.

        Every rank has the same number of batches of the same size: the last items are done again to fill them.

        Args:
            items: the same on all ranks.
            work: (items, their numbers) -> a result for each.
            progress: told how many more items are done.
        """
        results: list[tuple[int, R]] = []
        for first in range(0, len(items), batch_size * self.ranks):
            numbers = range(first + self.rank * batch_size, first + (self.rank + 1) * batch_size)
            mine = [min(number, len(items) - 1) for number in numbers]
            if self.ranks == 1:
                mine = list(dict.fromkeys(mine))
            results += zip(mine, work([items[number] for number in mine], mine), strict=True)
            progress(min(batch_size * self.ranks, len(items) - first))
        everything: list[list[tuple[int, R]]] = [results]
        if self._group is not None:
            everything = [[] for _ in range(self.ranks)]
            dist.all_gather_object(everything, results, group=self._group)
        found = dict(pair for part in everything for pair in part)
        return [found[number] for number in range(len(items))]

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def checkpoint_folder(config: Any) -> str:
    """Where a run keeps its checkpoints."""
    folder: str = config.checkpoint.folder
    return folder if is_remote(folder) else os.path.join(config.job.dump_folder, folder)


def _for_reading(config: Any) -> Any:
    config = copy.deepcopy(config)
    # The memory is there for who asks for it, also of a model that was trained without.
    config.parametric_memory.enable = True
    config.activation_checkpoint.mode = "none"
    config.compile.enable = False
    # Each rank's prompts have memories of their own, so every rank has all experts; and prompts are not split.
    config.parallelism.expert_parallel_degree = config.parallelism.expert_tensor_parallel_degree = 1
    config.parallelism.context_parallel_degree = 1
    config.comm.trace_buf_size = 0  # its folder would be made wherever one happens to be
    config.training.global_batch_size = -1
    return config


def _start(config: Any) -> tuple[torch.device, ParallelDims]:
    """Join the process group; returns this rank's device and the layout."""
    single_process_environment()
    device = torch.device(f"{device_type()}:{os.environ['LOCAL_RANK']}")
    device_module().set_device(device)
    world_size = dist.get_world_size() if dist.is_initialized() else dist_utils.init_distributed(config.comm)
    return device, layout_of(config, world_size)
