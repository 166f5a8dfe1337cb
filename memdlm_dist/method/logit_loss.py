"""Chunked losses of the output head's logits.

The head's matrix product, the loss and the loss gradient run on one chunk of tokens at a time. With a vocabulary of
126 k, the logits of one long sequence would otherwise be the largest tensor in memory. The gradient of a chunk is
computed as soon as its logits are, so no logits are kept or computed twice. In eager mode the gradient overwrites the
logits, in their dtype. `_loss_and_gradient` can be compiled; the matrix products before and after it stay eager.

`torch.nn.functional.linear_cross_entropy` computes the logits twice if tokens are weighted individually, and supports
neither a sharded vocabulary nor a teacher. The tests compare with it.

Shapes: N scored tokens, C tokens of a chunk, D model width, V local vocabulary of a tensor-parallel rank, G sets of
fast weights.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_rank, get_world_size

from memdlm_dist.compat.torch import add_product_, mark_dynamic
from memdlm_dist.method.diffusion import SetSum

# Maximum size of a chunk's float32 logits. With LLaDA's vocabulary of 126,464 it allows 512 tokens, enough for
# efficient matrix products.
CHUNK_BYTES = 2**28
# A chunk's number of rows is a multiple of this, to fill the tiles of matrix products. The last chunk may be smaller.
CHUNK_ROWS = 128


class Vocabulary(NamedTuple):
    """A vocabulary sharded over the tensor-parallel group: its reductions, and the local index of labels."""

    size: int  # local vocabulary size V
    group: ProcessGroup | None = None  # None: the vocabulary is not sharded

    @property
    def whole_size(self) -> int:
        """Size of the vocabulary over all ranks of the group."""
        return self.size * (get_world_size(self.group) if self.group is not None else 1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over the group, in place."""
        return self._reduce(x, ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Take the maximum of `x` over the group, in place."""
        return self._reduce(x, ReduceOp.MAX)

    def local_index(self, label_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels' local indices, clamped to valid ones, and True where the label is local, `[C]` each."""
        first = self.size * get_rank(self.group) if self.group is not None else 0
        index_C = label_C - first
        return index_C.clamp(0, self.size - 1), (index_C >= 0) & (index_C < self.size)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.group is not None:
            all_reduce(x, operation, self.group)
        return x


# A loss of logits: (logits `[C, V]`, may be overwritten; target; vocabulary) -> loss `[C]`, gradient `[C, V]`. With
# smoothed labels the loss is `[C, 2]` instead of `[C]`: the smoothed loss, and the reported one, -log p(label).
LogitLoss = Callable[[Tensor, Tensor, Vocabulary], tuple[Tensor, Tensor]]


def cross_entropy(
    logits_CV: Tensor, label_C: Tensor, vocabulary: Vocabulary, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute -log p(label) in nats, and its gradient p - 1[label].

    With smoothing e, the loss is (1 - e) (-log p(label)) + e mean_v(-log p(v)) with the mean over the whole vocabulary
    of size V, its gradient is p - (1 - e) 1[label] - e / V, and the reported loss is still -log p(label).
    """
    index_C, is_local_C = vocabulary.local_index(label_C)
    logits_CV = logits_CV.sub_(vocabulary.max(logits_CV.amax(-1)).unsqueeze(1))
    label_logit_C = torch.where(is_local_C, logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1), 0.0)
    compiling = torch.compiler.is_compiling()
    logit_sum = [logits_CV.sum(-1)] if smoothing else []
    exp_CV = logits_CV.exp() if compiling else logits_CV.exp_()
    total_C, label_logit_C, *logit_sum = vocabulary.sum(torch.stack([exp_CV.sum(-1), label_logit_C, *logit_sum]))
    loss_C = total_C.log() - label_logit_C
    if smoothing:
        share, (logit_sum_C,) = smoothing / vocabulary.whole_size, logit_sum
        loss_C = torch.stack([loss_C + smoothing * label_logit_C - share * logit_sum_C, loss_C], 1)
    if compiling:
        # Compute p from the logits again, in one fused pass. Exponentials with two uses, or a scatter, would each be
        # written to memory.
        is_label_CV = torch.arange(vocabulary.size, device=index_C.device) == index_C.unsqueeze(1)
        p_CV = (logits_CV - total_C.log().unsqueeze(1)).exp()
        is_label_CV = is_label_CV & is_local_C.unsqueeze(1)
        if smoothing:
            return loss_C, p_CV - is_label_CV.to(p_CV.dtype) * (1 - smoothing) - share
        return loss_C, p_CV - is_label_CV.to(p_CV.dtype)
    gradient_CV = exp_CV.div_(total_C.unsqueeze(1))
    index_C1, minus_target_C1 = index_C.unsqueeze(1), -is_local_C.to(gradient_CV.dtype).unsqueeze(1)
    if smoothing:
        gradient_CV, minus_target_C1 = gradient_CV.sub_(share), minus_target_C1.mul_(1 - smoothing)
    gradient_CV.scatter_add_(1, index_C1, minus_target_C1)
    return loss_C, gradient_CV


@cache  # compiled code is found again by the identity of its loss
def smoothed_cross_entropy(smoothing: float) -> LogitLoss:
    """Return `cross_entropy` with a smoothing of the labels; 0 leaves it as it is."""
    return partial(cross_entropy, smoothing=smoothing) if smoothing else cross_entropy


def kl(logits_CV: Tensor, teacher_CV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Compute KL(teacher || student) = sum_v p_T (log p_T - log p_S) in nats, and its gradient p_S - p_T."""
    log_s, log_t = _log_probabilities(logits_CV, teacher_CV, vocabulary)
    p_t = log_t.exp()
    loss_C = vocabulary.sum((p_t * (log_t - log_s)).sum(-1))
    return loss_C, log_s.exp_().sub_(p_t)


def reverse_kl(logits_CV: Tensor, teacher_CV: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Compute KL(student || teacher) = sum_v p_S r in nats, and its gradient p_S (r - KL).

    r = log p_S - log p_T.
    """
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


def _loss_and_gradient(
    loss: LogitLoss,
    logits_CV: Tensor,
    target: Tensor,
    coefficient_C: Tensor,
    vocabulary: Vocabulary,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute a chunk's losses `[C]`, and the gradient of their weighted sum in the dtype of the logits.

    Args:
        logits_CV: result of the head's matrix product; overwritten unless compiled.
        target: labels `[C]`, or the teacher's logits `[C, V]`, which may be overwritten unless compiled.
        coefficient_C: weights of the gradient; the returned losses are not weighted.
        temperature: T of the loss T^2 l(z / T), see `HeadLoss`; 1 leaves the operators as they are without it.
    """
    precision = torch.promote_types(logits_CV.dtype, torch.float32)
    # In compiled code these copies stay in registers, while an overwritten argument is written back to memory.
    compiling = torch.compiler.is_compiling()
    if target.is_floating_point():
        target = target.to(precision, copy=compiling)
    logits = logits_CV.to(precision, copy=compiling)
    if temperature != 1:
        logits, target = logits.div_(temperature), target.div_(temperature)
    loss_C, gradient_CV = loss(logits, target, vocabulary)
    if temperature != 1:
        # The derivative of T^2 l(z / T) is T times that of l at z / T.
        loss_C, coefficient_C = loss_C * temperature**2, coefficient_C * temperature
    gradient_CV.mul_(coefficient_C.unsqueeze(1))
    return loss_C, gradient_CV.to(logits_CV.dtype) if compiling else logits_CV.copy_(gradient_CV)


@cache
def _compiled(backend: str | Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile `_loss_and_gradient`: one graph per loss, for any number of rows."""
    compiled = torch.compile(_loss_and_gradient, backend=backend, fullgraph=True)

    def run(loss: LogitLoss, logits_CV: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        if len(logits_CV) < 2:  # torch.compile specialises on a size of 1
            return _loss_and_gradient(loss, logits_CV, *rest)
        for x in (logits_CV, *rest):
            if isinstance(x, Tensor):
                mark_dynamic(x, 0)
        result: tuple[Tensor, Tensor] = compiled(loss, logits_CV, *rest)
        return result

    return run


class HeadLoss:
    """Readout that makes the output head return the losses of the sets instead of logits.

    Neither a tuple nor a dataclass: FSDP2's mixed precision casts the tensors inside tuples and dataclasses that are
    arguments of a module, which would round the coefficients to three digits.

    Args:
        loss: loss of a token's logits.
        target: labels `[N]`, or the teacher's hidden states after the final norm `[N, D]`; a constant.
        sums: weighted sum of the token losses, per set.
        temperature: T; a token's loss is T^2 l(z / T, z' / T) with the logits z of the student and z' of the teacher.
            The factor T^2 keeps the size of the gradient about the same at any T (Hinton et al., arXiv 1503.02531).
            Must be 1 with labels as the target.
    """

    def __init__(self, loss: LogitLoss, target: Tensor, sums: SetSum, temperature: float = 1.0):
        self.loss, self.target, self.sums, self.temperature = loss, target, sums, temperature
        self._loss_N: Tensor | None = None

    def token_losses(self) -> Tensor:
        """Return the reported losses `[N]` of the last pass, without gradient; call it after the head has run.

        With smoothed labels they are -log p(label).
        """
        assert self._loss_N is not None
        return self._loss_N

    def total(self, loss_N: Tensor) -> Tensor:
        """Keep the reported losses of the tokens, and return the sums of the losses for the sets, `[G]`.

        Args:
            loss_N: losses of the tokens, or `[N, 2]`, see `LogitLoss`.
        """
        loss_N, self._loss_N = loss_N.unbind(1) if loss_N.ndim > 1 else (loss_N, loss_N)
        return self.sums(loss_N)


def set_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    head: HeadLoss,
    group: ProcessGroup | None = None,
    backend: str | Callable[..., Any] | None = None,
) -> Tensor:
    """Compute sum_i c_i l_i over the tokens of every set, `[G]`, in float32 or wider; equal on all ranks of `group`.

    Args:
        hidden_ND: input of the output head, equal on all ranks. Its gradient is a partial sum over the group.
        weight_VD: local rows of the head's weight. May require a gradient only if there is one set.
        head: loss, targets and coefficients.
        group: tensor-parallel group over which the vocabulary is sharded evenly; None if it is not sharded.
        backend: torch.compile backend for the losses; None runs them eagerly. Must be None with a group.
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
    """Autograd function that computes the gradients in its forward pass; its backward pass only scales them."""

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
        loss_and_gradient = _loss_and_gradient if backend is None else _compiled(backend)
        distilled = head.target.is_floating_point()
        assert distilled or head.temperature == 1
        chunk_rows = chunk_length(len(hidden_ND), len(weight_VD), hidden_ND.dtype)
        dh_ND = torch.empty_like(hidden_ND) if hidden_gradient else None
        dw_VD: Tensor | None = None
        if weight_gradient and chunk_rows < len(hidden_ND):
            dw_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        losses = []
        for start in range(0, len(hidden_ND), chunk_rows):
            rows = slice(start, start + chunk_rows)
            h_CD, target = hidden_ND[rows], head.target[rows]
            if distilled:
                target = F.linear(target.to(weight_VD.dtype), weight_VD)
            logits_CV = F.linear(h_CD, weight_VD)
            loss_C, gradient_CV = loss_and_gradient(
                head.loss, logits_CV, target, head.sums.coefficient_N[rows], vocabulary, head.temperature
            )
            losses.append(loss_C)
            if dh_ND is not None:
                torch.mm(gradient_CV, weight_VD, out=dh_ND[rows])
            if dw_VD is not None:
                add_product_(dw_VD, gradient_CV.T, h_CD)
            elif weight_gradient:
                dw_VD = gradient_CV.T @ h_CD
            del logits_CV, gradient_CV, target  # free them before the next chunk
        ctx.set_N = head.sums.set_N if head.sums.n_sets > 1 else None
        ctx.gradients, ctx.weight_dtype = (dh_ND, dw_VD), weight_VD.dtype
        return head.total(torch.cat(losses))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients are scaled in place, so only one backward pass is possible"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None
        if dh_ND is not None:
            dh_ND.mul_(grad_G if ctx.set_N is None else grad_G[ctx.set_N].unsqueeze(1))
        if dw_VD is not None:
            dw_VD = dw_VD.mul_(grad_G).to(ctx.weight_dtype)
        return dh_ND, dw_VD, None, None, None, None, None


def chunk_length(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Return the number of rows per chunk: equal chunks, as few as `CHUNK_BYTES` allows.

    The number is a multiple of `CHUNK_ROWS`, unless `CHUNK_BYTES` has no room for `CHUNK_ROWS` rows.

    Args:
        tokens: N.
        vocabulary: V.
        dtype: dtype of the logits; narrower ones count as float32.
    """
    most = max(1, CHUNK_BYTES // (vocabulary * torch.promote_types(dtype, torch.float32).itemsize))
    multiple = CHUNK_ROWS if most >= CHUNK_ROWS else 1
    most -= most % multiple
    equal = -(-tokens // -(-tokens // most))
    return -(-equal // multiple) * multiple
