"""Straightforward MemDLM, as in the published code: every state passes through the whole model.

No passes are shared, no parameters stay gathered, and the full logits of all scored tokens are in memory at once. It
runs on any layout. Tests use it as the reference for shared passes, and tools/bench.py as the slow baseline. The
distances in this file are tested against tests/oracles/naive.py and the published numbers.
"""

import torch
import torch.nn.functional as F

from memdlm_dist.method import inner_loop, inner_loss, logit_loss
from memdlm_dist.method.bilevel import token_context
from memdlm_dist.method.inner_loss import full_tensor


def _cross_entropy(logits, label, smoothing=0.0):
    return F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)


def _kl(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def _reverse_kl(student, teacher):
    return _kl(teacher, student)


def _hidden_mse(student, teacher):
    return F.mse_loss(student, teacher, reduction="none").mean(-1)


def _hidden_cosine(student, teacher):
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


DISTANCES = {
    logit_loss.cross_entropy: _cross_entropy,
    logit_loss.kl: _kl,
    logit_loss.reverse_kl: _reverse_kl,
    inner_loss.hidden_mse: _hidden_mse,
    inner_loss.hidden_cosine: _hidden_cosine,
}


def outer_loss(model, batch, memory, fast=None, tp_rank=0, label_smoothing=0.0):
    """Compute the outer loss sum and the inner statistics; arguments and results are those of `bilevel.outer_loss`."""
    context = token_context(model, batch, memory)

    def run(number, scored, fast, readout="logits"):
        out = full_tensor(model(batch.inputs[number], scored.index_SM[tp_rank], fast, readout, context))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def outer(fast):
        scored = batch.anchor
        loss_N = _cross_entropy(run(0, scored, fast), scored.label_N, label_smoothing)
        return torch.where(scored.valid_N, scored.weight_N * loss_N, 0.0).sum()

    if memory is None:
        return outer(None), None
    assert batch.inner_rows_C is None, "every state has all rows"
    loss = memory.loss

    def state_loss(k, current, sums):
        step = batch.inner[k % len(batch.inner)]
        of_logits = loss.logit_loss is not None
        student = run(step.student, step.scored, current, "logits" if of_logits else loss.student)
        target = step.scored.label_N
        if loss.teacher is not None:
            with torch.no_grad():
                target = run(step.teacher, step.scored, current, "logits" if of_logits else loss.teacher)
        if (temperature := loss.temperature) != 1:
            student, target = student / temperature, target / temperature
        return sums(temperature**2 * DISTANCES[loss.logit_loss or loss.hidden_distance](student, target))

    fast, statistics = inner_loop.adapt(
        state_loss,
        [step.scored for step in batch.inner] * memory.inner_epochs,
        fast,
        batch.sets(memory.samples_per_set),
        memory.optimiser,
        memory.group,
    )
    return outer(fast), statistics
