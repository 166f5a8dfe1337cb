"""Predictor: a backbone on any layout that adapts fast weights to prompts, decodes and computes likelihoods.

Shapes: B sequences, L tokens, N predicted positions, V vocabulary, M scored tokens of one shard, Z sequence shards.
Arguments and results are on the host, unless stated.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdlm_dist.checkpoint.fingerprint import fingerprint
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.inference import canvas, memory_file, sampler
from memdlm_dist.inference.canvas import Canvas
from memdlm_dist.inference.data_parallel import DataParallel
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, AdaptedMemory, MemorySettings, PromptWriter
from memdlm_dist.inference.reader import FFN_TOKENS, ModelReader, SequenceShards
from memdlm_dist.inference.sampler import Decoder, Step
from memdlm_dist.inference.slot_memory import SlotMemory
from memdlm_dist.method.diffusion import WEIGHTS, SetSum
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loss import full_tensor
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.method.micro_batch import Scored, gather_scored
from memdlm_dist.method.trajectory import State
from memdlm_dist.models import nf4
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.runtime.rank_0 import from_rank_0
from memdlm_dist.training.objective import Objective

# As published: the anchor ratio is fixed, so the noise schedule's weights would not give a likelihood bound.
MEMORY_WEIGHTS = "uniform"


@dataclass(frozen=True)
class Generated:
    """Responses to a batch of prompts, as token ids up to end-of-text, with times in seconds."""

    tokens_BL: Tensor  # the rows with all [MASK]s filled in
    responses: list[list[int]]
    adapted: AdaptedMemory | None  # memory that the rows began with; None without memory
    memory_seconds: float
    memory_steps: int  # inner steps; a step serves all rows that are written together
    decoding_seconds: float
    passes: int  # forward passes of the model, over all rows

    @property
    def fast(self) -> FastWeights | None:
        """Fast weights that the rows began with; None without memory."""
        return self.adapted.fast if self.adapted else None


class Predictor:
    """Backbone, parallelised as configured, with what inference needs.

    Call every method on all ranks. Each data-parallel rank has its own batches; all must have the same number.

    Args:
        model: the backbone.
        args: its sizes.
        tokenizer: its tokenizer.
        objective: objective of its training, with a memory.
        layout: its parallel layout.
        device: this rank's device.
        amp: context of the passes, such as autocast.
        memory_weights: loss weights of the inner steps on prompts. "uniform": 1; "schedule": w(mask ratio of the state)
            of the objective's noise schedule, as in training.

    Raises:
        UserError: if `memory_weights` is unknown.
    """

    def __init__(
        self,
        model: LLaDA,
        args: Any,
        tokenizer: DiffusionTokenizer,
        objective: Objective,
        layout: Layout,
        device: torch.device,
        amp: AbstractContextManager[Any],
        memory_weights: str = MEMORY_WEIGHTS,
    ):
        if memory_weights not in WEIGHTS:
            raise UserError(f"memory_weights must be one of {', '.join(WEIGHTS)}, not '{memory_weights}'.")
        assert objective.memory is not None
        self.model, self.tokenizer, self.device, self._amp = model, tokenizer, device, amp
        self._memory = replace(objective.memory, samples_per_set=1)
        plan = replace(objective.plan, loss_weight=memory_weights)
        self._objective = replace(objective, plan=plan, memory=self._memory)
        self._vocab_size, self._experts = args.vocab_size, nf4.expert_count(args)
        cp_mesh = layout.get_optional_mesh("cp")
        self._shards = SequenceShards(
            objective.tp_size,
            objective.tp_rank,
            objective.cp_size,
            objective.cp_rank,
            cp_mesh.get_group() if cp_mesh is not None else None,
        )
        self.data_parallel = DataParallel.from_layout(layout, device)
        self._writer = PromptWriter(
            model,
            self._objective,
            lambda texts, ids: self.canvas(texts, 0, ids),
            self.mask_id,
            self._shards,
            device,
            amp,
            self.data_parallel.maximum,
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
        self,
        prompts: Sequence[Sequence[int]],
        settings: MemorySettings = AS_PUBLISHED,
        ids: Sequence[int] | None = None,
    ) -> AdaptedMemory:
        """Adapt fast weights to prompts with the inner loop, one set per prompt; see `PromptWriter.write`."""
        return self._writer.write(prompts, settings, ids)

    def save_memory(self, path: Path, memory: AdaptedMemory, overwrite: bool = False) -> None:
        """Save the memory of one prompt to a safetensors file, which `load_memory` reads on any layout.

        Args:
            memory: memory of the prompt, from `adapt`.
            overwrite: replace an existing file.

        Raises:
            UserError: if it is the memory of several prompts or not finite, or the file exists or cannot be written.
        """
        from_rank_0(lambda: memory_file.check_target(path, overwrite))
        memory_file.save(path, memory, self.fingerprint(), self._memory_kind())

    def load_memory(self, path: Path, settings: MemorySettings = AS_PUBLISHED) -> AdaptedMemory:
        """Read a memory that `save_memory` has written for the same weights.

        Args:
            settings: settings with which a refresh goes on.

        Raises:
            UserError: if the file cannot be read, or is a memory of other weights or of another kind or shape; or if a
                refresh would drop it.
        """
        settings.check_refresh_keeps_loaded()
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        empty = self._memory.draw(self._objective.seed, 0, zero)
        return memory_file.load(path, empty, self.fingerprint, self._memory_kind(), settings)

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights, equal on every layout; a collective call."""
        return fingerprint(self.model.state_dict(), self._experts)

    def _memory_kind(self) -> dict[str, str]:
        """Return the settings of the fast weights that their shapes do not show."""
        memory = self._memory
        scale = memory.alpha / memory.rank if memory.fast_weight_type == "lora" else 1.0
        return {"adapter": memory.fast_weight_type, "alpha / rank": f"{scale:g}"}

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

    def slots(
        self, decoding: Decoding, slots: int, length: int, memory: MemorySettings | AdaptedMemory | None = None
    ) -> tuple[Decoder, SlotMemory | None]:
        """Build a decoder with empty slots, and the memory of its rows.

        Args:
            decoding: settings of decoding.
            slots: number of slots.
            length: largest length of a row, a multiple of `length_multiple`.
            memory: see `SlotMemory`; None decodes without memory.

        Raises:
            UserError: as `reader` does.
        """
        reader = self.reader(decoding, slots, length)
        slot_memory, before_block = None, None
        if memory is not None:
            slot_memory = SlotMemory(self._writer, reader, slots, memory)
            before_block = slot_memory.refresh if slot_memory.refreshes else None
        decoder = Decoder(
            reader, decoding, slots, length, self.mask_id, self.eos_id, self.data_parallel.maximum,
            before_block=before_block,
        )  # fmt: skip
        return decoder, slot_memory

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int | Sequence[int],
        decoding: Decoding,
        memory: MemorySettings | AdaptedMemory | None = None,
        ids: Sequence[int] | None = None,
        on_step: Callable[[Decoder], object] = lambda decoder: None,
    ) -> Generated:
        """Respond to prompts.

        Args:
            prompts: token ids; [MASK]s in a prompt are filled in too.
            new_tokens: number of [MASK] positions to append, one for all prompts or one per prompt.
            decoding: settings of decoding.
            memory: settings, with which fast weights are adapted to each prompt first; or a memory to read, which may
                be that of another prompt. None: no memory.
            ids: row ids, which key all random numbers; 0, 1, ... if None.
            on_step: called after every step.

        Raises:
            UserError: as `reader` and `adapt` do.
        """
        adapted = self.adapt(prompts, memory, ids) if isinstance(memory, MemorySettings) else memory
        began = time.perf_counter()
        start = self.canvas(prompts, new_tokens, ids)
        self.check_first(start.open_BL)
        batch, length = start.tokens_BL.shape
        decoder, rows = self.slots(decoding, batch, length, adapted)
        decoder.load(range(batch), start)
        if rows is not None:
            rows.enter(range(batch), prompts, start.ids_B.tolist())
        while decoder.step():
            on_step(decoder)
        tokens_BL = decoder.state(length).to_host().tokens_BL
        refresh_seconds = rows.seconds if rows is not None else 0.0
        writes = isinstance(memory, MemorySettings)
        return Generated(
            tokens_BL,
            canvas.responses(tokens_BL, start, self.eos_id),
            adapted,
            refresh_seconds + (adapted.seconds if adapted and writes else 0.0),
            (rows.steps if rows is not None else 0) + (adapted.steps if adapted and writes else 0),
            time.perf_counter() - began - refresh_seconds,
            decoder.passes,
        )
