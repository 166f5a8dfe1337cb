"""Losses of the output head's logits, of which no more than a chunk exists at a time.

The head's matrix product, the loss and its gradient are computed chunk by chunk of tokens: at 126 k words
the logits of one long sequence are otherwise larger than everything else in memory. Every gradient is
known as soon as its chunk's logits are, so none of them is kept or computed twice. What lies between the
logits' product and those of the gradients can be compiled; it then takes the place of the logits, in their type.
(`torch.nn.functional.linear_cross_entropy` computes them twice if tokens have weights of their own, and
knows neither a sharded vocabulary nor a teacher; the tests compare with it.)

Shapes: N scored tokens, C those of a chunk, D model, V vocabulary, this tensor-parallel rank's part of it,
G sets of fast weights.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_rank

from memdlm_dist.compat.torch import add_product_, mark_dynamic
from memdlm_dist.method.diffusion import SetSum

# Size of a chunk's logits in float32: 512 tokens at LLaDA's 126,464 words, enough to keep the products large.
CHUNK_BYTES = 2**28
# Rows of a chunk are a multiple of this, which fills the tiles of matrix products; the last chunk may have fewer.
CHUNK_ROWS = 128


class Vocabulary(NamedTuple):
    """The vocabulary's spread over tensor-parallel ranks: reductions over all of it, and labels within this part."""

    size: int  # of this rank's part
    group: ProcessGroup | None = None

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, ReduceOp.MAX)

    def own(self, label_C: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the labels in this rank's part, and whether they lie in it."""
        first = self.size * get_rank(self.group) if self.group is not None else 0
        index_C = label_C - first
        return index_C.clamp(0, self.size - 1), (index_C >= 0) & (index_C < self.size)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.group is not None:
            all_reduce(x, operation, self.group)
        return x


# A loss of logits: (logits [C, V], which it may overwrite; target; vocabulary) -> loss [C], gradient [C, V].
LogitLoss = Callable[[Tensor, Tensor, Vocabulary], tuple[Tensor, Tensor]]


def cross_entropy(logits_CV: Tensor, label_C: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """-log p(label) in nats; its gradient is p - 1[label]."""
    index_C, own_C = vocabulary.own(label_C)
    logits_CV = logits_CV.sub_(vocabulary.max(logits_CV.amax(-1)).unsqueeze(1))
    label_logit_C = torch.where(own_C, logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1), 0.0)
    compiling = torch.compiler.is_compiling()
    exp_CV = logits_CV.exp() if compiling else logits_CV.exp_()
    total_C, label_logit_C = vocabulary.sum(torch.stack([exp_CV.sum(-1), label_logit_C]))
    loss_C = total_C.log() - label_logit_C
    if compiling:
        # From the logits again, in one pass: exponentials of two uses and a scatter would each be kept in memory.
        is_label_CV = torch.arange(vocabulary.size, device=index_C.device) == index_C.unsqueeze(1)
        p_CV = (logits_CV - total_C.log().unsqueeze(1)).exp()
        return loss_C, p_CV - (is_label_CV & own_C.unsqueeze(1)).to(p_CV.dtype)
    gradient_CV = exp_CV.div_(total_C.unsqueeze(1))
    gradient_CV.scatter_add_(1, index_C.unsqueeze(1), -own_C.to(gradient_CV.dtype).unsqueeze(1))
    return loss_C, gradient_CV


def kl(logits_CV: Tensor, teacher_CV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S) in nats; its gradient is p_S - p_T."""
    log_s, log_t = _log_probabilities(logits_CV, teacher_CV, vocabulary)
    p_t = log_t.exp()
    loss_C = vocabulary.sum((p_t * (log_t - log_s)).sum(-1))
    return loss_C, log_s.exp_().sub_(p_t)


def reverse_kl(logits_CV: Tensor, teacher_CV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """KL(student || teacher) = sum_v p_S r, r = log p_S - log p_T, in nats; its gradient is p_S (r - loss)."""
    log_s, log_t = _log_probabilities(logits_CV, teacher_CV, vocabulary)
    ratio = log_s - log_t
    p_s = log_s.exp_()
    loss_C = vocabulary.sum((p_s * ratio).sum(-1))
    return loss_C, p_s.mul_(ratio.sub_(loss_C.unsqueeze(1)))


def _log_probabilities(a_CV: Tensor, b_CV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    top_2C = vocabulary.max(torch.stack([a_CV.amax(-1), b_CV.amax(-1)]))
    a_CV, b_CV = a_CV.sub_(top_2C[0].unsqueeze(1)), b_CV.sub_(top_2C[1].unsqueeze(1))
    total_2C = vocabulary.sum(torch.stack([a_CV.exp().sum(-1), b_CV.exp().sum(-1)])).log_()
    return a_CV.sub_(total_2C[0].unsqueeze(1)), b_CV.sub_(total_2C[1].unsqueeze(1))


def _weighted(
    loss: LogitLoss, logits_CV: Tensor, target: Tensor, coefficient_C: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return a chunk's losses `[C]` and the gradient of their weighted sum, in the type of the logits.

    Args:
        logits_CV: as the product returns them; overwritten unless compiled.
        target: labels `[C]`, or the teacher's logits; so are these.
        coefficient_C: weights, of the gradient alone.
    """
    precision = torch.promote_types(logits_CV.dtype, torch.float32)
    # Compiled, these copies are made in registers, while what overwrites an argument is written back to it.
    compiling = torch.compiler.is_compiling()
    if target.is_floating_point():
        target = target.to(precision, copy=compiling)
    loss_C, gradient_CV = loss(logits_CV.to(precision, copy=compiling), target, vocabulary)
    gradient_CV.mul_(coefficient_C.unsqueeze(1))
    return loss_C, gradient_CV.to(logits_CV.dtype) if compiling else logits_CV.copy_(gradient_CV)


@cache
def _compiled(backend: str | Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `_weighted` compiled: one graph for a loss, whatever the number of rows."""
    compiled = torch.compile(_weighted, backend=backend, fullgraph=True)

    def run(loss: LogitLoss, logits_CV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        if len(logits_CV) < 2:  # compilers take one row for a constant
            return _weighted(loss, logits_CV, *rest)
        for x in (logits_CV, *rest):
            if isinstance(x, Tensor):
                mark_dynamic(x, 0)
        found: tuple[Tensor, Tensor] = compiled(loss, logits_CV, *rest)
        return found

    return run


class HeadLoss:
    """What the output head is to return in place of logits: every set's loss.

    Neither a tuple nor a dataclass: FSDP2's mixed precision casts the tensors that it finds in those among a
    module's arguments, and the coefficients would be rounded to three digits.

    Args:
        loss: of the tokens' logits.
        target: labels `[N]`, or the teacher's final-normed hidden states `[N, D]`, a constant.
        sums: how the tokens' losses add up.
    """

    def __init__(self, loss: LogitLoss, target: Tensor, sums: SetSum):
        self.loss, self.target, self.sums = loss, target, sums


def set_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    head: HeadLoss,
    group: ProcessGroup | None = None,
    backend: str | Callable[..., Any] | None = None,
) -> Tensor:
    """sum over a set's tokens of c_i l_i, `[G]`, in float32 at least, equal on all ranks of `group`.

    Args:
        hidden_ND: what the output head reads; the same on all ranks. Its gradient is this rank's part of
            a sum over the group.
        weight_VD: the head's weight, this rank's rows of it. Can have a gradient if there is one set.
        head: loss, targets and coefficients.
        group: the tensor-parallel ranks that share the vocabulary in equal parts.
        backend: compiles the losses, for torch.compile; None leaves them eager. Without a group alone.
    """
    assert group is None or backend is None
    with_gradient = torch.is_grad_enabled()
    loss_G = _SetLosses.apply(
        hidden_ND,
        weight_VD,
        head,
        group,
        backend,
        with_gradient and hidden_ND.requires_grad,
        with_gradient and weight_VD.requires_grad,
    )
    return loss_G


class _SetLosses(torch.autograd.Function):
    """Computes the gradients with the loss; the backward pass multiplies them by that of the sets' losses."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        head: HeadLoss,
        group: ProcessGroup | None,
        backend: str | Callable[..., Any] | None,
        hidden_gradient: bool,
        weight_gradient: bool,
    ) -> Tensor:
        assert not weight_gradient or head.sums.n_sets == 1
        vocabulary = Vocabulary(len(weight_VD), group)
        weighted = _weighted if backend is None else _compiled(backend)
        distilled = head.target.is_floating_point()
        length = chunk_length(len(hidden_ND), len(weight_VD), hidden_ND.dtype)
        dh_ND = torch.empty_like(hidden_ND) if hidden_gradient else None
        dw_VD: Tensor | None = None
        if weight_gradient and length < len(hidden_ND):
            dw_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        losses = []
        for start in range(0, len(hidden_ND), length):
            rows = slice(start, start + length)
            h_CD, target = hidden_ND[rows], head.target[rows]
            if distilled:
                target = F.linear(target.to(weight_VD.dtype), weight_VD)
            logits_CV = F.linear(h_CD, weight_VD)
            loss_C, gradient_CV = weighted(head.loss, logits_CV, target, head.sums.coefficient_N[rows], vocabulary)
            losses.append(loss_C)
            if dh_ND is not None:
                torch.mm(gradient_CV, weight_VD, out=dh_ND[rows])
            if dw_VD is not None:
                add_product_(dw_VD, gradient_CV.T, h_CD)
            elif weight_gradient:
                dw_VD = gradient_CV.T @ h_CD
            del logits_CV, gradient_CV, target  # before the next chunk's
        ctx.set_N = head.sums.set_N if head.sums.n_sets > 1 else None
        ctx.gradients, ctx.weight_dtype = (dh_ND, dw_VD), weight_VD.dtype
        return head.sums(torch.cat(losses))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients are scaled in place: one backward pass"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None
        if dh_ND is not None:
            dh_ND.mul_(grad_G if ctx.set_N is None else grad_G[ctx.set_N].unsqueeze(1))
        if dw_VD is not None:
            dw_VD = dw_VD.mul_(grad_G).to(ctx.weight_dtype)
        return dh_ND, dw_VD, None, None, None, None, None


def chunk_length(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Return the rows of a chunk: as few chunks as keep each one's logits within `CHUNK_BYTES`, in multiples of
    `CHUNK_ROWS` where these are within it."""
    most = max(1, CHUNK_BYTES // (vocabulary * torch.promote_types(dtype, torch.float32).itemsize))
    multiple = CHUNK_ROWS if most >= CHUNK_ROWS else 1
    most -= most % multiple
    equal = -(-tokens // -(-tokens // most))
    return -(-equal // multiple) * multiple
