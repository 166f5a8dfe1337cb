"""Denoising as in LLaDA: fills the [MASK] positions of rows block by block, the most confident first.

The rows' state is on the model's device, and their schedules are on the host. Without a threshold, a step keeps a known
share of a block's open positions, and the host counts them without reading. It reads one flag per row at the end of a
block, to stop at end-of-text; with a threshold it reads three numbers per row in every step, all rows at once.
Data-parallel ranks also agree on the number of passes of every step, which waits for the device.

Shapes: S slots, W columns of a slot (its positions and a spare one), R rows of a pass, L tokens of its longest row, T
tokens that it reads of a row, K positions of a block, m those among them that a step predicts, n = R m.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm_dist.inference.canvas import MAX_LENGTH, Canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.row_schedule import Outcome, RowSchedule
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.models.token_choice import TokenChoice
from memdlm_dist.runtime.transfer import HostCopy, PinnedTree

# Upper limit of the tokens in a pass over several whole rows.
PASS_TOKENS = 2**17


class Step(NamedTuple):
    """Rows after a step."""

    tokens_BL: Tensor
    open_BL: Tensor  # bool: still [MASK]
    kept_BL: Tensor  # bool: filled in or replaced at this step

    def to_host(self) -> "Step":
        """Return a copy on the host; waits for the device."""
        return Step(*(copy.read() for copy in [HostCopy(x) for x in self]))


class Reading(NamedTuple):
    """Plan of passes over the same rows and blocks, on the device.

    Attributes:
        slot_R: slots of the rows.
        position_RT: positions that a pass reads; None for all. Padding has the position W - 1.
        length: L, rounded up to the model's multiple.
        row_RK: row in the head's input of each position of the block; -1 if another rank has it.
        details: anything else that the reader needs.
    """

    slot_R: Tensor
    position_RT: Tensor | None
    length: int
    row_RK: Tensor
    details: Any = None


class Reader(Protocol):
    """Model, as the sampler uses it.

    Attributes:
        device: device of all tensors.
        lookback: 1 if a token is predicted at the position before it, else 0.
    """

    device: torch.device
    lookback: int

    def plan(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        targets: Sequence[Sequence[int]],
        read: Sequence[range] | None,
    ) -> Reading:
        """Prepare passes over rows.

        Args:
            slots: slots of the rows.
            lengths: number of tokens of each row.
            targets: positions of each row's block.
            read: positions that the pass reads of each row; None for all.
        """
        ...

    def choose(self, reading: Reading, tokens_RT: Tensor, blank_RT: Tensor | None, choice: TokenChoice) -> Tensor:
        """Run a pass; return the chosen ids and their confidences, float64 `[2, n]`.

        Args:
            reading: the plan.
            tokens_RT: tokens at the positions that the pass reads.
            blank_RT: with guidance, the same with [MASK]s in place of the prompt's tokens.
            choice: rows of the head's input to choose tokens for.
        """
        ...

    def idle(self) -> None:
        """Take part in the collectives of another rank's pass."""
        ...


class Decoder:
    """Rows in the slots of a batch, each at its own place of its own schedule.

    Tokens that are not open at the start never change, and those of complete blocks do not change any more. The result
    of a row does not depend on the other rows.

    Args:
        reader: the model.
        decoding: settings.
        slots: S.
        length: largest length of a row.
        mask_id: token id of [MASK], which is never predicted.
        eos_id: token id of end-of-text.
        max_over_ranks: maximum of a number over all ranks whose models run together.
        pass_tokens: upper limit of the tokens in a pass over several whole rows.
        before_block: callback before rows start a block other than their first, with their slots and the tokens of each
            prompt and of what precedes the block. It may change how the model reads these rows. It is called on all
            ranks if one of them has such a row, without slots on the others.

    Attributes:
        passes: number of forward passes of the model so far.
    """

    def __init__(
        self,
        reader: Reader,
        decoding: Decoding,
        slots: int,
        length: int,
        mask_id: int,
        eos_id: int,
        max_over_ranks: Callable[[int], int] = lambda count: count,
        pass_tokens: int = PASS_TOKENS,
        before_block: Callable[[Sequence[int], Sequence[Sequence[int]]], object] | None = None,
    ):
        self._reader, self._decoding, self._mask_id, self._eos_id = reader, decoding, mask_id, eos_id
        self._max_over_ranks, self._pass_tokens, self._before_block = max_over_ranks, pass_tokens, before_block
        shape, device = (slots, length + 1), reader.device
        self._tokens_SW = torch.full(shape, eos_id, device=device)
        self._open_SW, self._given_SW, self._start_SW, self._response_SW, self._kept_SW = (
            torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(5)
        )
        self._id_S = torch.zeros(slots, dtype=torch.int64, device=device)
        (self._suppressed,) = self._to_device([torch.tensor([mask_id, *decoding.suppress_tokens])])
        self._rows: list[RowSchedule | None] = [None] * slots
        self._prompt_lengths = [0] * slots
        self._plans: dict[tuple[bool, tuple[tuple[int, int], ...]], tuple[Reading, Tensor]] = {}
        self.passes = 0

    def load(self, slots: Sequence[int], start: Canvas) -> None:
        """Put the rows of a canvas into slots, in place of what they held."""
        width = self._tokens_SW.shape[1]
        given_BL = start.attended_BL & ~start.open_BL
        states = (self._tokens_SW, self._open_SW, self._given_SW, self._start_SW, self._response_SW)
        columns = (start.tokens_BL, start.open_BL, given_BL, start.open_BL, start.response_BL)
        # What follows a row is not attended to, so its tokens do not matter.
        rows = [F.pad(x_BL, (0, width - x_BL.shape[1])) for x_BL in columns]
        slot_B, ids_B, *rows = self._to_device([torch.tensor(slots), start.ids_B, *rows])
        for state, row_BW in zip((*states, self._id_S), (*rows, ids_B), strict=True):
            state.index_copy_(0, slot_B, row_BW)
        prompts_B = (start.attended_BL & ~start.response_BL).sum(1).tolist()
        for slot, open_L, attended_L, prompt in zip(slots, start.open_BL, start.attended_BL, prompts_B, strict=True):
            length = max(1, int(attended_L.sum()))
            self._prompt_lengths[slot] = prompt
            self._rows[slot] = RowSchedule(self._decoding, length, open_L.nonzero().flatten().tolist())
        self._forget(slots)

    def is_finished(self, slot: int) -> bool:
        """Return whether a slot's row has no block left, or the slot has no row."""
        return (row := self._rows[slot]) is None or row.is_finished

    def step(self) -> bool:
        """Take a step of every row that is not finished; return whether any rank had one."""
        active = {slot: row for slot, row in enumerate(self._rows) if row and not row.is_finished}
        if self._before_block is not None:
            self._start_blocks(active)
        stale = [slot for slot, row in active.items() if row.is_stale]
        passes = [(group, True) for group in self._groups(stale)]
        if cached := [slot for slot in active if slot not in stale]:
            passes.append((cached, False))
        count = self._max_over_ranks(len(passes))
        self._kept_SW.zero_()
        counts_3R = [self._pass(slots, is_full) for slots, is_full in passes]
        if passes:
            self._advance(passes, counts_3R)
        for _ in range(self._forwards * (count - len(passes))):
            self._reader.idle()
        return count > 0

    def _start_blocks(self, active: Mapping[int, RowSchedule]) -> None:
        """Call `before_block` for the rows that start a later block."""
        starting = [slot for slot, row in active.items() if row.starts_later_block]
        if not self._max_over_ranks(len(starting)):
            return
        texts = []
        for slot, tokens in zip(starting, self.tokens(starting) if starting else [], strict=True):
            texts.append(tokens[: max(self._prompt_lengths[slot], active[slot].block[0])])
            active[slot].drop_cache()
        assert self._before_block is not None
        self._before_block(starting, texts)

    def run(self) -> None:
        """Decode all rows to their ends."""
        running = True
        while running:
            running = self.step()

    def state(self, length: int) -> Step:
        """Return the first `length` positions of all slots after the last step, on the device."""
        return Step(*(x[:, :length].clone() for x in (self._tokens_SW, self._open_SW, self._kept_SW)))

    def tokens(self, slots: Sequence[int]) -> list[list[int]]:
        """Return the tokens of some rows; waits for the device."""
        (slot_B,) = self._to_device([torch.tensor(slots)])
        rows = HostCopy(self._tokens_SW.index_select(0, slot_B)).read().tolist()
        return [tokens[: self._row(slot).length] for slot, tokens in zip(slots, rows, strict=True)]

    @property
    def _forwards(self) -> int:
        """Number of forward passes of the model in a pass."""
        return 2 if self._decoding.cfg_scale else 1

    def _to_device(self, tensors: list[Tensor]) -> list[Tensor]:
        moved: list[Tensor] = PinnedTree(tensors, self._reader.device).to_device()
        return moved

    def _forget(self, slots: Sequence[int]) -> None:
        """Drop the plans that contain some slots."""
        gone = set(slots)
        self._plans = {key: plan for key, plan in self._plans.items() if gone.isdisjoint(slot for slot, _ in key[1])}

    def _groups(self, slots: Sequence[int]) -> Iterator[list[int]]:
        """Divide slots into passes over at most `pass_tokens` tokens each, or over one row."""
        group: list[int] = []
        longest = 0
        for slot in slots:
            length = self._row(slot).length
            if group and max(longest, length) * (len(group) + 1) > self._pass_tokens:
                yield group
                group, longest = [], 0
            group.append(slot)
            longest = max(longest, length)
        if group:
            yield group

    def _row(self, slot: int) -> RowSchedule:
        row = self._rows[slot]
        assert row is not None
        return row

    def _plan(self, slots: Sequence[int], rows: Sequence[RowSchedule], is_full: bool) -> tuple[Reading, Tensor]:
        """Return the reading of a pass, and the positions of the rows' blocks `[R, K]`."""
        read = None if is_full else [row.cached_range(self._reader.lookback) for row in rows]
        firsts = [0] * len(rows) if read is None else [positions.start for positions in read]
        key = (is_full, tuple(zip(slots, firsts, strict=True)))
        if key not in self._plans:
            blocks = [row.block for row in rows]
            # The spare position, which is never open, pads the shorter blocks.
            spare = self._tokens_SW.shape[1] - 1
            most = max(map(len, blocks))
            target_RK = torch.tensor([[*block, *[spare] * (most - len(block))] for block in blocks])
            reading = self._reader.plan(slots, [row.length for row in rows], blocks, read)
            self._plans[key] = (reading, self._to_device([target_RK])[0])
        return self._plans[key]

    def _pass(self, slots: Sequence[int], is_full: bool) -> Tensor:
        """Run the model over some rows; each of them takes a step.

        Returns:
            The fields of each row's `Outcome`, int64 `[3, R]`.
        """
        rows = [self._row(slot) for slot in slots]
        reading, target_RK = self._plan(slots, rows, is_full)
        slot_R = reading.slot_R
        tokens_RW, open_RW = (x.index_select(0, slot_R) for x in (self._tokens_SW, self._open_SW))
        # The open positions of each block come first; without editing, only these reach the output head.
        most = max(row.candidates for row in rows)
        order_Rm = (~open_RW.gather(1, target_RK)).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        position_Rm = target_RK.gather(1, order_Rm)
        chosen_2Rm = self._choose(reading, tokens_RW, open_RW, order_Rm, position_Rm)
        keep_Rm = self._keep(rows, open_RW.gather(1, position_Rm), chosen_2Rm[1])
        edit_Rm = self._edit(slot_R, tokens_RW, open_RW, position_Rm, chosen_2Rm)
        spare = self._tokens_SW.shape[1] - 1
        position_Rm = torch.where(keep_Rm | edit_Rm, position_Rm, spare)
        tokens_RW.scatter_(1, position_Rm, chosen_2Rm[0].long())
        open_RW.scatter_(1, position_Rm, False)
        kept_RW = torch.zeros_like(open_RW).scatter_(1, position_Rm, True)
        kept_RW[:, spare] = False
        end_RW = self._scope(slot_R, target_RK) & ~open_RW & (tokens_RW == self._eos_id)
        for state, x_RW in ((self._tokens_SW, tokens_RW), (self._open_SW, open_RW), (self._kept_SW, kept_RW)):
            state.index_copy_(0, slot_R, x_RW)
        return torch.stack([keep_Rm.sum(1), edit_Rm.sum(1), end_RW.any(1).long()])

    def _keep(self, rows: Sequence[RowSchedule], open_Rm: Tensor, confidence_Rm: Tensor) -> Tensor:
        """Choose the open positions that the step fills in, bool `[R, m]`."""
        confidence_Rm = confidence_Rm.masked_fill(~open_Rm, -torch.inf)
        rank_Rm = confidence_Rm.argsort(dim=1, descending=True, stable=True).argsort(1)
        threshold, quotas = self._decoding.threshold, [row.quota for row in rows]
        quota_R1: Tensor | int = quotas[0]
        if len(set(quotas)) > 1:
            (quota_R1,) = self._to_device([torch.tensor(quotas).unsqueeze(1)])
        # All above the threshold, or as many of the most confident ones as the quota if these are more.
        above_Rm = confidence_Rm > (math.inf if threshold is None else threshold)
        return open_Rm & (above_Rm | (rank_Rm < quota_R1))

    def _edit(
        self, slot_R: Tensor, tokens_RW: Tensor, open_RW: Tensor, position_Rm: Tensor, chosen_2Rm: Tensor
    ) -> Tensor:
        """Choose the decided positions whose tokens the step replaces, bool `[R, m]`."""
        if (threshold := self._decoding.edit_threshold) is None:
            return torch.zeros_like(position_Rm, dtype=torch.bool)
        decided_RW = self._start_SW.index_select(0, slot_R) & ~open_RW
        differs_Rm = chosen_2Rm[0].long() != tokens_RW.gather(1, position_Rm)
        return decided_RW.gather(1, position_Rm) & differs_Rm & (chosen_2Rm[1] > threshold)

    def _scope(self, slot_R: Tensor, target_RK: Tensor) -> Tensor:
        """Return the positions where end-of-text matters, bool `[R, W]`: the response, or see `leave_masks`."""
        if not self._decoding.leave_masks:
            return self._response_SW.index_select(0, slot_R)
        attended_RW = (self._given_SW | self._start_SW).index_select(0, slot_R)
        number_W = torch.arange(attended_RW.shape[1], device=slot_R.device) // self._decoding.block_size
        return attended_RW & (number_W == target_RK[:, :1] // self._decoding.block_size)

    def _choose(
        self, reading: Reading, tokens_RW: Tensor, open_RW: Tensor, order_Rm: Tensor, position_Rm: Tensor
    ) -> Tensor:
        """Return the ids and confidences chosen for some positions of the blocks, float64 `[2, R, m]`."""
        settings, slot_R = self._decoding, reading.slot_R
        key_n, is_random = None, settings.remasking == "random"
        if settings.temperature or is_random:
            # Not the step: the number of steps depends on the threshold. Editing repeats the noise in a complete block,
            # so that its tokens settle.
            decided_R1 = (self._start_SW.index_select(0, slot_R) & ~open_RW).sum(1, keepdim=True)
            ids_Rm = self._id_S.index_select(0, slot_R).unsqueeze(1) * MAX_LENGTH + position_Rm
            key_n = keyed_random.key(settings.seed, Stream.DECODING, decided_R1.expand_as(ids_Rm), ids_Rm).flatten()
        choice = TokenChoice(
            reading.row_RK.gather(1, order_Rm).flatten(),
            self._suppressed,
            settings.temperature,
            key_n,
            is_random,
            mask_id=None if self._mask_id in settings.suppress_tokens else self._mask_id,
        )
        blank_RW = None
        if settings.cfg_scale:
            blank_RW = tokens_RW.masked_fill(self._given_SW.index_select(0, slot_R), self._mask_id)

        def read(x_RW: Tensor) -> Tensor:
            return x_RW[:, : reading.length] if reading.position_RT is None else x_RW.gather(1, reading.position_RT)

        self.passes += self._forwards
        chosen_2n = self._reader.choose(
            reading, read(tokens_RW), read(blank_RW) if blank_RW is not None else None, choice
        )
        return chosen_2n.unflatten(1, order_Rm.shape)

    def _advance(self, passes: Sequence[tuple[list[int], bool]], counts_3R: Sequence[Tensor]) -> None:
        """Count the step of all rows, and end rows at end-of-text."""
        stepped = [(slot, self._row(slot), is_full) for slots, is_full in passes for slot in slots]
        has_threshold, stops = self._decoding.threshold is not None, self._decoding.stop_at_eos
        outcomes = [Outcome(row.quota) for _, row, _ in stepped]
        completes = any(row.open == outcome.kept for (_, row, _), outcome in zip(stepped, outcomes, strict=True))
        if has_threshold or (stops and completes):
            kept, edited, has_end = HostCopy(torch.cat(list(counts_3R), 1)).read().tolist()
            if not has_threshold:
                kept = [outcome.kept for outcome in outcomes]
            outcomes = [Outcome(*counts) for counts in zip(kept, edited, map(bool, has_end), strict=True)]
        complete, ended = [], []
        for (slot, row, is_full), outcome in zip(stepped, outcomes, strict=True):
            if not row.advance(outcome, is_full):
                continue
            complete.append(slot)
            if stops and outcome.has_end and not row.is_finished:
                ended.append(slot)
                row.end()
        if complete:
            self._forget(complete)
        if ended:
            # Blocks go from left to right, so all that is still open follows the end of text.
            ended_S = [[slot in ended] for slot in range(len(self._rows))]
            rest_SW = self._open_SW & self._to_device([torch.tensor(ended_S)])[0]
            self._tokens_SW.masked_fill_(rest_SW, self._eos_id)
            self._open_SW &= ~rest_SW
            self._kept_SW |= rest_SW


def steps(decoder: Decoder, length: int) -> Iterator[Step]:
    """Decode all rows; yield their first `length` positions, on the device, after every step."""
    while decoder.step():
        yield decoder.state(length)


def finished(steps: Iterator[Step], start: Canvas) -> Tensor:
    """Run all steps and return the final tokens on the host, `[B, L]`."""
    last = None
    for step in steps:
        last = step
    return start.tokens_BL if last is None else HostCopy(last.tokens_BL).read()
