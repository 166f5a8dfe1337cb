"""Floating-point operations (FLOPs) of a training step: plain masked diffusion, and the additional FLOPs of the memory.

The count covers the matrix products that the hardware runs for one micro-batch, with one addition and one
multiplication per term. It is a total over all tensor-parallel ranks, for the tokens of one context-parallel rank.
Unlike model FLOPs, on which MFU is based, it includes recomputation in the backward pass, and it counts the output head
only for scored tokens.

Let F be the FLOPs of a forward pass through trunk and tail. Plain training costs F forward and 2 F backward. The inner
loop adds a forward pass of the trunk for every state other than the anchor. Every inner step adds a forward pass of the
tail and the part of its backward pass that leads to the fast weights.

Compiled blocks run the same products, except under activation checkpointing: they skip recomputation that the backward
pass does not need, such as a block's last product.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.fast_weights import AdaptedLinear, can_group
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.passes import count_passes
from memdlm_dist.models.linears import LINEAR_NUMBERS, LINEARS, SHARED, layer_linear
from memdlm_dist.models.llada import LLaDAArgs

# Flash attention runs 2 products forward and 5 backward, one of which is recomputation.
_ATTENTION_BACKWARD = 2.5


class StepFlops(NamedTuple):
    """FLOPs of one micro-batch."""

    outer: float  # plain masked diffusion
    inner: float  # additional FLOPs of the memory

    @property
    def ratio(self) -> float:
        """Factor by which the memory multiplies the step's FLOPs."""
        return (self.outer + self.inner) / self.outer


@dataclass(frozen=True)
class Recomputation:
    """Activation-checkpointing mode, which decides what a block's backward pass recomputes."""

    mode: str = "none"  # `activation_checkpoint.mode`
    option: str = "op"  # `activation_checkpoint.selective_ac_option`

    def layer_flops(self, layer: int, linears: dict[str, float], attention: float) -> float:
        """Return the FLOPs that a layer's backward pass recomputes.

        Args:
            layer: the layer's number; selective checkpointing picks every n-th layer.
            linears: forward FLOPs by linear, in execution order.
            attention: forward FLOPs of the attention.
        """
        if self.mode in ("none", "memory_budget"):  # the compiler decides what "memory_budget" recomputes
            return 0.0
        if self.mode == "full" or (self.option != "op" and layer % int(self.option) == int(self.option) - 1):
            return sum(linears.values()) + attention
        if self.option != "op":
            return 0.0
        # torchtitan's operator-level checkpointing recomputes every second matrix product and saves attention.
        return sum(list(linears.values())[1::2])


def _execution_order(linear: AdaptedLinear) -> tuple[bool, int, int]:
    """Return the place of a linear in the order in which a layer runs them; a shared expert runs last."""
    target = linear.target
    stage = layer_linear(target).stage
    return target.startswith(SHARED), stage, LINEAR_NUMBERS[target.removeprefix(SHARED)]


class _Layer:
    """FLOPs of one block's passes over one state."""

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
        self.linears = {
            x.target: 2.0 * tokens * x.experts_per_token * x.in_features * x.out_features
            for x in sorted(args.layer_linears(layer, list(LINEARS)), key=_execution_order)
        }
        self.attention = 4.0 * tokens * attended * args.query_dim
        self.forward = sum(self.linears.values()) + self.attention
        self.recomputed = recomputation.layer_flops(layer, self.linears, self.attention)
        # Gradients of the linears' inputs and, if the weights are trained, of the weights.
        gradients = (1 if frozen else 2) * sum(self.linears.values())
        self.backward = gradients + _ATTENTION_BACKWARD * self.attention + self.recomputed
        adapted = [x for x in memory.linears if x.layer == str(layer)] if memory is not None else []
        self.fast = (
            {x.target: _fast_products(x, memory, tokens, sets, args.grouped) for x in adapted}
            if memory is not None
            else {}
        )
        self.fast_forward = sum(sum(pair) for pair in self.fast.values())
        # If a block recomputes anything, it recomputes the fast-weight terms too.
        self.fast_recomputed = self.fast_forward if self.recomputed else 0.0

    def inner_backward(self, lowest: bool) -> float:
        """Return the FLOPs of an inner step's backward pass, which computes no gradients of the base weights.

        Args:
            lowest: this is the lowest adapted layer, whose backward pass ends at its first adapted linears.
        """
        first_stage = min(layer_linear(target).stage for target in self.fast) if lowest else -1
        total = sum(flops for name, flops in self.linears.items() if layer_linear(name).stage > first_stage)
        total += _ATTENTION_BACKWARD * self.attention if first_stage < 1 else 0.0
        for target, (first, second) in self.fast.items():
            # Gradients of the fast weights, of the low-rank intermediate, and of the linear's input.
            total += first + second + second + (first if layer_linear(target).stage > first_stage else 0.0)
        return total + self.recomputed + self.fast_recomputed


def _fast_products(linear: AdaptedLinear, memory: Memory, tokens: int, sets: int, grouped: bool) -> tuple[float, float]:
    """Return the forward FLOPs of a fast-weight term's products: A x and B (A x), or delta x and 0."""
    # Experts process each set's slots separately, and grouped products each document's tokens. Otherwise all tokens of
    # a row pass through all sets of that row.
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
    """Compute the FLOPs of one micro-batch; routers and outer adapters are small and not counted.

    Args:
        args: the backbone's sizes.
        batch: the micro-batch, which needs its inner states if `memory` is given.
        memory: None for plain masked diffusion.
        recomputation: activation-checkpointing mode; none by default.
        frozen: the base weights are frozen (outer LoRA) and have no gradients.
    """
    # Grouped products pad each document's tokens; these empty places are not counted.
    sets = batch.sets(memory.samples_per_set).per_row if memory is not None else 1

    def run_layers(rows: int, documents: Documents | None) -> list[_Layer]:
        """Count the FLOPs of each layer's passes over some rows of the micro-batch."""
        # Packed rows are counted as kernels that skip other documents run them; a dense mask (on CPU) computes whole
        # rows.
        attended = float(batch.length) if documents is None else documents.mean_attended()
        numbers, tokens = range(args.n_layers), rows * batch.inputs[0].shape[1]
        return [
            _Layer(args, i, tokens, attended, memory, recomputation or Recomputation(), frozen, sets) for i in numbers
        ]

    layers = run_layers(len(batch.inputs[0]), batch.documents)

    def head(scored: Any) -> float:
        return 2.0 * len(scored.label_N) * args.dim * args.vocab_size

    outer = sum(layer.forward + layer.backward for layer in layers) + (2 if frozen else 3) * head(batch.anchor)
    if memory is None or not batch.inner:
        return StepFlops(outer, 0.0)
    # The outer pass runs the fast-weight terms forward and backward; they are constants, without weight gradients.
    inner = sum(2 * layer.fast_forward + layer.fast_recomputed for layer in layers[memory.first_layer :])
    if (rows_C := batch.inner_rows_C) is not None:
        layers = run_layers(len(rows_C), batch.documents.rows(rows_C) if batch.documents is not None else None)
    trunk, tail = layers[: memory.first_layer], layers[memory.first_layer :]
    tail_forward = sum(layer.forward + layer.fast_forward for layer in tail)
    inner += (count_passes(batch).inputs - 1) * sum(layer.forward for layer in trunk)
    for step in batch.inner * memory.inner_epochs:
        inner += tail_forward + sum(layer.inner_backward(lowest=layer is tail[0]) for layer in tail)
        distilled = step.teacher is not None
        if memory.loss.logit_loss is not None:
            # The student's logits, their backward pass to the hidden states, and the teacher's logits.
            inner += (3 if distilled else 2) * head(step.scored)
        if distilled:
            inner += tail_forward
    return StepFlops(outer, inner)
