"""Trained model: loads on any layout, adapts fast weights to prompts, decodes and computes likelihoods.

Shapes: B sequences, L tokens, N predicted positions, V vocabulary, M scored tokens of one shard, Z sequence shards.
Arguments and results are on the host, unless stated.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memdlm_dist.checkpoint import weights
from memdlm_dist.config import check_layout, launch
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.inference import canvas, sampler, setup
from memdlm_dist.inference.canvas import Canvas
from memdlm_dist.inference.data_parallel import DataParallel
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.reader import FFN_TOKENS, ModelReader, SequenceShards
from memdlm_dist.inference.sampler import Decoder, Step
from memdlm_dist.method import bilevel, trajectory
from memdlm_dist.method.diffusion import WEIGHTS, SetSum
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loss import full_tensor
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.method.micro_batch import Scored, gather_scored, micro_batch
from memdlm_dist.method.trajectory import State
from memdlm_dist.models import BACKBONES, backbone_args
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.runtime import hub, process_group
from memdlm_dist.runtime.device import device_type
from memdlm_dist.training.backbone import model_on_meta
from memdlm_dist.training.objective import build_objective

ANCHOR_RATIO = 0.2
# As published: the anchor ratio is fixed, so the noise schedule's weights would not give a likelihood bound.
MEMORY_WEIGHTS = "uniform"


@dataclass(frozen=True)
class AdaptedMemory:
    """Fast weights adapted to prompts, one set per prompt, and the time of adapting in seconds."""

    fast: FastWeights
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Responses to a batch of prompts, as token ids up to end-of-text, with times in seconds."""

    responses: list[list[int]]
    fast: FastWeights | None  # adapted to the prompts; None without memory
    memory_seconds: float
    decoding_seconds: float
    passes: int  # forward passes of the model, over all rows


class TrainedModel:
    """Backbone with the weights of a checkpoint, parallelised as configured.

    Call every method on all ranks. Each data-parallel rank has its own batches; all must have the same number.

    Args:
        config: configuration of the run that trained the model, from `parse_config.parse`; not modified.
        checkpoint: checkpoint `step-N`, a folder or URL of checkpoints (the newest intact one is loaded), a folder of
            Hugging Face weights, or a repository of the hub; the run's own checkpoints if None.
        adapter: folder or hub repository of an adapter in PEFT's format, which replaces the adapters of the run. Only
            the base is then loaded from the checkpoint.
        memory_weights: loss weights of the inner steps on prompts. "uniform": 1; "schedule": w(mask ratio of the state)
            of the run's noise schedule, as in training.
        memory: fast weights can be adapted to prompts. False keeps the configured expert parallelism, which has no fast
            weights per prompt.

    Raises:
        UserError: if `memory_weights` is unknown, or the launch, the tokenizer or the checkpoint does not fit.
    """

    def __init__(
        self,
        config: JobConfig,
        checkpoint: str | None = None,
        adapter: str | None = None,
        *,
        memory_weights: str = MEMORY_WEIGHTS,
        memory: bool = True,
    ):
        if memory_weights not in WEIGHTS:
            raise UserError(f"memory_weights must be one of {', '.join(WEIGHTS)}, not '{memory_weights}'.")
        self.adapter = hub.adapter(adapter) if adapter else None
        if self.adapter is not None:
            config = setup.adapter_config(config, self.adapter)
        config = launch.resolve(setup.inference_config(config, memory), *process_group.launched_processes())
        args = backbone_args(config.model.name, config.model.flavor)
        check_layout.check_backbone(config, args)
        # Before the process group is initialised, since a download takes longer than a collective may.
        config.model.hf_assets_path = hub.tokenizer(config.model.hf_assets_path)
        checkpoint = hub.weights(checkpoint) if checkpoint else setup.checkpoint_folder(config)
        self.tokenizer = DiffusionTokenizer(config.model.hf_assets_path)
        self.device, parallel_dims = setup.join(config)
        args.update_from_config(config)
        self._sd_adapter = BACKBONES[config.model.name].sd_adapter(args, config.model.hf_assets_path)
        model: Any = model_on_meta(config, args, parallel_dims)
        model.to_empty(device=self.device)
        with torch.no_grad():
            model.init_weights()
        self.model: LLaDA = model.eval()
        self.checkpoint, self._lora = "", config.lora
        self._initial: str = config.checkpoint.initial_load_path or ""
        self.load(checkpoint)
        self.trained_length: int = config.training.seq_len
        dtype = config.training.mixed_precision_param
        # torch warns about an autocast to the dtype of the weights.
        self._amp: Any = nullcontext()
        if dtype != config.training.dtype:
            self._amp = process_group.autocast(parallel_dims, dtype, device_type())
        objective = build_objective(config, args, self.tokenizer.mask_id, parallel_dims)
        assert objective.memory is not None
        self._memory = replace(objective.memory, samples_per_set=1)
        self._objective = replace(objective, plan=replace(objective.plan, loss_weight=memory_weights))
        self._vocab_size = args.vocab_size
        cp_mesh = parallel_dims.get_optional_mesh("cp")
        self._shards = SequenceShards(
            objective.tp_size,
            objective.tp_rank,
            objective.cp_size,
            objective.cp_rank,
            cp_mesh.get_group() if cp_mesh is not None else None,
        )
        self.data_parallel = DataParallel.from_layout(parallel_dims, self.device)

    def load(self, checkpoint: str) -> None:
        """Load the weights of a checkpoint, for the constructor's argument `checkpoint`, and the adapter again."""
        if self.adapter is None:
            self.checkpoint = weights.load(self.model, checkpoint, self._sd_adapter, initial=self._initial)
        else:
            self.checkpoint = weights.load_with_adapter(
                self.model, checkpoint, self._sd_adapter, self.adapter, self._lora, self._initial
            )

    @property
    def mask_id(self) -> int:
        """Token id of [MASK]."""
        return self.tokenizer.mask_id

    @property
    def eos_id(self) -> int:
        """Token id of end-of-text."""
        return self.tokenizer.eos_id

    @property
    def length_multiple(self) -> int:
        """Number of sequence shards, which divides the length of every canvas."""
        return self._shards.count

    def canvas(
        self, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int], ids: Sequence[int] | None = None
    ) -> Canvas:
        """Build a canvas with this model's token ids and sequence sharding; see `canvas.canvas`."""
        return canvas.canvas(prompts, new_tokens, self.mask_id, self.eos_id, ids, self._shards.count)

    def adapt(
        self, prompts: Sequence[Sequence[int]], anchor_ratio: float = ANCHOR_RATIO, ids: Sequence[int] | None = None
    ) -> AdaptedMemory:
        """Adapt fast weights to prompts with the inner loop, one set per prompt.

        [MASK]s in a prompt are not scored. An empty prompt leaves its fast weights at their initial values.

        Args:
            anchor_ratio: share of each prompt's tokens that the anchor masks.
            ids: row ids, which key the masks and the initial fast weights; 0, 1, ... if None.

        Raises:
            UserError: with expert parallelism.
        """
        if self._memory.ep_mesh is not None:
            raise UserError(
                "This model was loaded without memory (its expert parallelism has no fast weights per prompt); load it "
                "with memory, or set parallelism.expert_parallel_degree to 1."
            )
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
            sequence_shards=self._shards.count,
            shifted=self._objective.shifted,
        )._replace(attended_BL=start.attended_BL)
        batch = batch.cp_slice(self._shards.cp_rank, self._shards.cp_size).to(self.device)
        self.model.extend_rope(start.tokens_BL.shape[1])
        initial = self._memory.draw(self._objective.seed, 0, batch.sample_ids_U)
        with self._amp:
            fast, statistics = bilevel.adapt_fast_weights(
                self.model, batch, self._memory, initial, self._objective.tp_rank
            )
        statistics.written_norm_G.sum().item()  # waits for the device
        return AdaptedMemory(fast, time.perf_counter() - began)

    @torch.no_grad()
    def logits(
        self, tokens_BL: Tensor, target_BL: Tensor, attended_BL: Tensor, fast: FastWeights | None = None
    ) -> Tensor:
        """Return the logits of the target positions, float32 `[N, V]`, in the order of the flattened canvas."""
        scored, index_N = self._gather(tokens_BL, target_BL)
        scored = scored.cp_slice(self._shards.cp_rank, self._shards.cp_size)
        out_NV = full_tensor(self._forward(tokens_BL, scored, attended_BL, fast, "logits"))
        index_N = index_N.to(self.device) - self._shards.cp_rank * len(out_NV)
        is_mine_N = (index_N >= 0) & (index_N < len(out_NV))
        logits_NV = out_NV[index_N.clamp(0, len(out_NV) - 1)].float()
        return self._shards.sum_over_cp(torch.where(is_mine_N.unsqueeze(1), logits_NV, 0.0)).cpu()

    @torch.no_grad()
    def nll(
        self,
        tokens_BL: Tensor,
        target_BL: Tensor,
        clean_BL: Tensor,
        attended_BL: Tensor,
        fast: FastWeights | None = None,
    ) -> Tensor:
        """Return the sum of -log p(clean token) over each row's targets, in nats, float64 `[B]`."""
        scored = self._gather(clean_BL, target_BL)[0].cp_slice(self._shards.cp_rank, self._shards.cp_size)
        sums = SetSum(scored.valid_N.float().to(self.device), scored.sample_N.to(self.device), len(tokens_BL))
        head = HeadLoss(cross_entropy, scored.label_N.to(self.device), sums)
        nll_B = self._forward(tokens_BL, scored, attended_BL, fast, head)
        return self._shards.sum_over_cp(nll_B).double().cpu()

    def check_first(self, target_BL: Tensor) -> None:
        """Check that a backbone which predicts the next token need not predict a row's first token, `[B, L]`.

        Raises:
            UserError: if it must.
        """
        if self._objective.shifted and target_BL[:, 0].any():
            raise UserError(
                "This backbone predicts the next token, so the first token cannot be [MASK]; begin with text."
            )

    def _gather(self, tokens_BL: Tensor, target_BL: Tensor) -> tuple[Scored, Tensor]:
        """Return the targets as input of the output head, and the index of each target in all heads' outputs, `[N]`.

        Raises:
            UserError: if a backbone that predicts the next token is to predict a row's first token.
        """
        shards, shifted = self._shards.count, self._objective.shifted
        self.check_first(target_BL)
        ones_B = torch.ones(len(tokens_BL))
        scored = gather_scored(State(target_BL, target_BL, ones_B), tokens_BL, shards, shifted)
        length = tokens_BL.shape[1]
        width = length // shards
        shard_Z1 = torch.arange(shards).unsqueeze(1)
        flat_N = (scored.index_SM // width * length + shard_Z1 * width + scored.index_SM % width).flatten()
        flat_N = torch.where(scored.valid_N, flat_N, target_BL.numel())
        return scored, flat_N.argsort()[: int(target_BL.sum())]

    def _forward(
        self, tokens_BL: Tensor, scored: Scored, attended_BL: Tensor, fast: FastWeights | None, readout: Any
    ) -> Tensor:
        """Run the model and return the `readout` of the scored positions of this context-parallel rank."""
        self.model.extend_rope(tokens_BL.shape[1])
        index_M = scored.index_SM[self._shards.tp_rank].to(self.device)
        # Without padding pass no mask, so that the fastest attention kernels run.
        attended = None if bool(attended_BL.all()) else attended_BL.to(self.device)
        width = tokens_BL.shape[1] // self._shards.cp_size
        first = self._shards.cp_rank * width
        context = self.model.context(width, first, attended)._replace(ffn_tokens=FFN_TOKENS)
        with self._amp:
            return self.model(tokens_BL[:, first : first + width].to(self.device), index_M, fast, readout, context)

    def reader(self, decoding: Decoding, slots: int, length: int, fast: FastWeights | None = None) -> ModelReader:
        """Build a reader of this model's rows for a `Decoder`.

        Args:
            decoding: settings of decoding.
            slots: number of slots.
            length: largest length of a row.
            fast: fast weights, one set per slot.

        Raises:
            UserError: if a suppressed token is outside the vocabulary, or caches are used with context parallelism.
        """
        decoding.check_vocabulary(self._vocab_size)
        decoding.check_context_parallel(self._shards.cp_size)
        return ModelReader(
            self.model,
            slots,
            length,
            self.device,
            self._shards,
            cached=decoding.cache != "none",
            shifted=self._objective.shifted,
            causal_block=decoding.block_size if decoding.attention == "block_causal" else None,
            guidance=decoding.cfg_scale,
            autocast=self._amp,
            fast=fast,
        )

    def decoder(self, start: Canvas, decoding: Decoding, fast: FastWeights | None = None) -> Decoder:
        """Build a decoder that holds a canvas; see `reader`."""
        self.check_first(start.open_BL)
        batch, length = start.tokens_BL.shape
        decoder = Decoder(
            self.reader(decoding, batch, length, fast), decoding, batch, length, self.mask_id, self.eos_id,
            self.data_parallel.maximum,
        )  # fmt: skip
        decoder.load(range(batch), start)
        return decoder

    def denoise(self, start: Canvas, decoding: Decoding, fast: FastWeights | None = None) -> Iterator[Step]:
        """Decode a canvas with this model, with fast weights if given; yield it on the device after every step.

        With classifier-free guidance both forward passes of a step read the same fast weights.

        Raises:
            UserError: as `reader` does.
        """
        return sampler.steps(self.decoder(start, decoding, fast), start.tokens_BL.shape[1])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int | Sequence[int],
        decoding: Decoding,
        memory: bool = False,
        anchor_ratio: float = ANCHOR_RATIO,
        ids: Sequence[int] | None = None,
    ) -> Generated:
        """Respond to prompts; with `memory`, adapt fast weights to each prompt first. See `canvas` and `adapt`."""
        adapted = self.adapt(prompts, anchor_ratio, ids) if memory else None
        began = time.perf_counter()
        start = self.canvas(prompts, new_tokens, ids)
        decoder = self.decoder(start, decoding, adapted.fast if adapted else None)
        decoder.run()
        tokens_BL = decoder.state(start.tokens_BL.shape[1]).to_host().tokens_BL
        return Generated(
            canvas.responses(tokens_BL, start, self.eos_id),
            adapted.fast if adapted else None,
            adapted.seconds if adapted else 0.0,
            time.perf_counter() - began,
            decoder.passes,
        )

    def __enter__(self) -> "TrainedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
