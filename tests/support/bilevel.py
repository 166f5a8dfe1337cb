"""Small models, memories, objectives and batches for tests of the bi-level step."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from memdlm_dist.method import fast_weight_tree
from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.inner_loss import full_tensor, inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.trajectory import IGNORE_INDEX, Plan
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.training.metrics import MemDLMMetrics
from memdlm_dist.training.objective import Objective

ARGS = LLaDAArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=61, max_seq_len=24)
MASK_ID = 60


def scaled_model(args, dtype=torch.float64):
    torch.manual_seed(0)
    model = LLaDA(args)
    with torch.no_grad():
        model.init_weights()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # away from 1, so that an omitted norm changes the result
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "layers" in name:  # larger than the initialisation, so that attention is not flat
                parameter.mul_(8)
    for parameter in model.parameters():  # not model.to, which would cast the complex RoPE table to real
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        d = args.dim // args.n_heads
        angle = torch.outer(
            torch.arange(args.max_seq_len).double(), args.rope_theta ** (-torch.arange(0, d, 2).double() / d)
        )
        model.freqs_cis = torch.polar(torch.ones_like(angle), angle)
    return model


def build(dtype=torch.float64):
    return scaled_model(ARGS, dtype)


def memory(learning_rate=0.1, clip=1.0, loss="cross_entropy", targets=("ffn",), first_layer=1, **changes) -> Memory:
    settings = {"fast_weight_type": "lora", "rank": 4, "alpha": 8.0, "samples_per_set": 1} | changes
    return Memory(
        first_layer=first_layer,
        linears=ARGS.adapted_linears(first_layer, targets),
        loss=inner_loss(loss, "pre_final_norm", "post_final_norm"),
        optimiser=InnerSGD(learning_rate, clip),
        **settings,
    )


def objective(with_memory: Memory | None, **plan) -> Objective:
    return Objective(MASK_ID, Plan(**plan), with_memory, seed=3, tp_size=1, tp_rank=0)


def data(rows=4, prompt=3):
    tokens = torch.randint(0, MASK_ID, (rows, ARGS.max_seq_len), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :prompt] = IGNORE_INDEX
    return tokens, labels, torch.arange(rows) * 17


def recorder(dims=None) -> MemDLMMetrics:
    """Return metrics without TensorBoard, of one process or of the layout `dims`."""
    metrics = MemDLMMetrics.__new__(MemDLMMetrics)
    metrics.parallel_dims = dims or SimpleNamespace(get_optional_mesh=lambda name: None)
    metrics.start_step()
    return metrics


def double(fast):
    return fast_weight_tree.map_leaves(lambda x: x.double(), fast)


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@torch.no_grad()
def change_in_chunks(model, length, ffn_tokens, tp_size=1, fast=None):
    """Return the largest change of two rows' hidden states when the FFN takes at most `ffn_tokens` tokens at once."""
    tokens = torch.randint(0, MASK_ID, (2, length), generator=torch.Generator().manual_seed(2))
    index = torch.arange(tokens.numel() // tp_size)
    whole, in_chunks = (
        full_tensor(model(tokens, index, fast, "post_final_norm", model.context(length)._replace(ffn_tokens=n)))
        for n in (None, ffn_tokens)
    )
    return (whole - in_chunks).abs().max()


@contextmanager
def trained_in_each_pass(model, first_layer):
    """Yield a list with one entry per forward pass of the head: the number of tail parameters that require a gradient.

    The list grows while the context is open.
    """
    tail, counts = [*list(model.layers.values())[first_layer:], model.norm, model.output], []
    handle = model.output.register_forward_pre_hook(
        lambda *_: counts.append(sum(p.requires_grad for module in tail for p in module.parameters()))
    )
    try:
        yield counts
    finally:
        handle.remove()
