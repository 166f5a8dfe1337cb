"""Straightforward MemDLM, as the published code has it: every state goes through the whole model.

No pass is shared, no parameter is kept, and the logits of the scored tokens exist whole. On any layout; the
oracle of the shared passes, and the slow side of tools/bench.py. What it computes by hand is compared with
tests/oracles/naive.py and the published numbers elsewhere.
"""

import torch
import torch.nn.functional as F

from memdlm_dist.method import inner_loop, inner_loss, logit_loss
from memdlm_dist.method.bilevel import token_context
from memdlm_dist.method.inner_loss import full_tensor


def _cross_entropy(logits, label):
    return F.cross_entropy(logits, label, reduction="none")


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


def outer_loss(model, batch, memory, fast=None, tp_rank=0):
    """As `bilevel.outer_loss`."""

    context = token_context(model, batch, memory)

    def run(number, scored, fast, readout="logits"):
        out = full_tensor(model(batch.inputs[number], scored.index_SM[tp_rank], fast, readout, context))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def outer(fast):
        scored = batch.anchor
        loss_N = _cross_entropy(run(0, scored, fast), scored.label_N)
        return torch.where(scored.valid_N, scored.weight_N * loss_N, 0.0).sum()

    if memory is None:
        return outer(None), None
    loss = memory.loss

    def state_loss(k, current, sums):
        step = batch.inner[k]
        of_logits = loss.logit_loss is not None
        student = run(step.student, step.scored, current, "logits" if of_logits else loss.student)
        target = step.scored.label_N
        if loss.teacher is not None:
            with torch.no_grad():
                target = run(step.teacher, step.scored, current, "logits" if of_logits else loss.teacher)
        return sums(DISTANCES[loss.logit_loss or loss.hidden_distance](student, target))

    fast, statistics = inner_loop.adapt(
        state_loss,
        [step.scored for step in batch.inner],
        fast,
        memory.sets(batch),
        memory.optimiser,
        memory.group,
    )
    return outer(fast), statistics
