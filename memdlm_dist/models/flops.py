"""Floating-point operations of a training step: plain masked diffusion's, and what the memory adds.

Counted are the matrix products (an addition and a multiplication each) that the hardware runs for one
micro-batch, all tensor-parallel ranks together, and of a context-parallel rank its part: unlike model FLOPs, by
which MFU goes, with what is computed again in the backward pass, and with the head on the scored tokens alone.

With F for the trunk's and tail's forward pass, plain training is F forward and 2 F backward. The inner loop
adds a forward pass of the trunk for every state that is not the anchor, and for every inner step a forward
pass of the tail and that part of its backward pass which leads to the fast weights.

Compiled blocks run the same products, except under activation checkpointing: they run nothing again that the
backward pass does not need, such as a block's last product.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.fast_weights import AdaptedLinear, can_group
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.passes import count_passes
from memdlm_dist.models.linears import GROUPS, LINEARS
from memdlm_dist.models.llada import LLaDAArgs

# In the order in which a layer runs them.
_IN_ORDER = sorted(LINEARS, key=lambda name: LINEARS[name].stage)
# Flash attention's backward pass: 5 products for the forward pass's 2, one of them computed again.
_ATTENTION_BACKWARD = 2.5


class StepFlops(NamedTuple):
    outer: float  # plain masked diffusion's
    inner: float  # what the memory adds to them

    @property
    def ratio(self) -> float:
        """By what factor the memory multiplies the step's operations."""
        return (self.outer + self.inner) / self.outer


@dataclass(frozen=True)
class Recomputation:
    """What activation checkpointing runs again in a block's backward pass, as torchtitan's modes do."""

    mode: str = "none"  # `activation_checkpoint.mode`
    option: str = "op"  # `activation_checkpoint.selective_ac_option`

    def of_layer(self, layer: int, linears: dict[str, float], attention: float) -> float:
        """FLOPs run again.

        Args:
            linears: of the forward pass, by linear, in the order in which they run.
            attention: of the attention's forward pass.
        """
        if self.mode in ("none", "memory_budget"):  # of the latter only the compiler knows
            return 0.0
        if self.mode == "full" or (self.option != "op" and layer % int(self.option) == int(self.option) - 1):
            return sum(linears.values()) + attention
        if self.option != "op":
            return 0.0
        # Every second matrix product is run again; attention is kept.
        return sum(list(linears.values())[1::2])


class _Layer:
    """One block on one state: FLOPs of its passes."""

    def __init__(
        self,
        args: LLaDAArgs,
        layer: int,
        tokens: int,
        attended: float,
        memory: Memory | None,
        recomputation: Recomputation,
        frozen: bool,
        sets: int,
    ):
        # The layers are alike; the last one's linears are all that is listed from there on.
        sizes = {linear.target: linear for linear in args.adapted_linears(args.n_layers - 1, list(GROUPS))}
        self.linears = {
            name: 2.0 * tokens * x.experts_per_token * x.in_features * x.out_features
            for name, x in ((name, sizes[name]) for name in _IN_ORDER)
        }
        self.attention = 4.0 * tokens * attended * args.dim
        self.forward = sum(self.linears.values()) + self.attention
        self.again = recomputation.of_layer(layer, self.linears, self.attention)
        # To the linears' inputs and, if they are trained, to their weights.
        gradients = (1 if frozen else 2) * sum(self.linears.values())
        self.backward = gradients + _ATTENTION_BACKWARD * self.attention + self.again
        adapted = [x for x in memory.linears if x.layer == str(layer)] if memory is not None else []
        self.fast = (
            {x.target: _fast_products(x, memory, tokens, sets, args.grouped) for x in adapted}
            if memory is not None
            else {}
        )
        self.fast_forward = sum(sum(pair) for pair in self.fast.values())
        # The fast terms are run again where anything of the block is.
        self.fast_again = self.fast_forward if self.again else 0.0

    def inner_backward(self, lowest: bool) -> float:
        """To the fast weights, through what lies between; below the lowest layer's first ones nothing is needed."""
        first = min(LINEARS[target].stage for target in self.fast) if lowest else -1
        between = sum(flops for name, flops in self.linears.items() if LINEARS[name].stage > first)
        between += _ATTENTION_BACKWARD * self.attention if first < 1 else 0.0
        for target, (reads, writes) in self.fast.items():
            # Gradients of the fast tensors, of what lies between two of them, and of the linear's input.
            between += reads + writes + writes + (reads if LINEARS[target].stage > first else 0.0)
        return between + self.again + self.fast_again


def _fast_products(linear: AdaptedLinear, memory: Memory, tokens: int, sets: int, grouped: bool) -> tuple[float, float]:
    """FLOPs of the fast term's products: the one that reads the linear's input, and the one after it if there is."""
    # Experts take the slots of each set apart, grouped products the tokens of each document; elsewhere all tokens of
    # a row go through all of its sets.
    grouped = grouped and can_group(memory.fast_weight_type, linear, memory.rank, memory.tp_mesh)
    tokens *= linear.experts_per_token if linear.experts else 1 if grouped else sets
    if memory.fast_weight_type == "full":
        return 2.0 * tokens * linear.in_features * linear.out_features, 0.0
    return 2.0 * tokens * memory.rank * linear.in_features, 2.0 * tokens * memory.rank * linear.out_features


def step_flops(
    args: LLaDAArgs,
    batch: MicroBatch,
    memory: Memory | None,
    recomputation: Recomputation | None = None,
    frozen: bool = False,
) -> StepFlops:
    """FLOPs of one micro-batch's step; routers and outer adapters, which are small, are not counted.

    Args:
        args: the backbone's sizes.
        batch: with the inner states, if there is a memory.
        memory: None for plain masked diffusion.
        recomputation: by activation checkpointing; none by default.
        frozen: the base is, as outer LoRA has it: no gradients of its weights.
    """
    tokens, documents = batch.inputs[0].numel(), batch.documents
    # Of packed rows what blocks of documents have; a dense mask, as on a CPU, computes everything.
    attended = float(batch.length) if documents is None else documents.mean_attended()
    # The empty places between documents, which grouped products have, are not counted.
    sets = documents.slots if documents is not None and memory is not None and memory.per_sample else 1
    again = recomputation or Recomputation()
    layers = [_Layer(args, i, tokens, attended, memory, again, frozen, sets) for i in range(args.n_layers)]

    def head(scored: Any) -> float:
        return 2.0 * len(scored.label_N) * args.dim * args.vocab_size

    outer = sum(layer.forward + layer.backward for layer in layers) + (2 if frozen else 3) * head(batch.anchor)
    if memory is None:
        return StepFlops(outer, 0.0)
    trunk, tail = layers[: memory.first_layer], layers[memory.first_layer :]
    tail_forward = sum(layer.forward + layer.fast_forward for layer in tail)
    inner = (count_passes(batch).inputs - 1) * sum(layer.forward for layer in trunk)
    # The adapted tail has a forward and a backward pass of the fast terms besides; the terms are constants.
    inner += sum(2 * layer.fast_forward + layer.fast_again for layer in tail)
    for step in batch.inner:
        inner += tail_forward + sum(layer.inner_backward(lowest=layer is tail[0]) for layer in tail)
        distilled = step.teacher is not None
        if memory.loss.logit_loss is not None:
            # Logits, and their gradient's way back; the teacher's logits.
            inner += (3 if distilled else 2) * head(step.scored)
        if distilled:
            inner += tail_forward
    return StepFlops(outer, inner)
