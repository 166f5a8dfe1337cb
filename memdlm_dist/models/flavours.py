"""Backbone sizes by `model.flavor`: published models, this repository's experiments, and small test models."""

from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs

LLADA = {
    # LLaDA-8B, and a model of about an eighth of its size with the same proportions.
    "8B": LLaDAArgs(),
    "1B": LLaDAArgs(dim=2048, n_layers=16, n_heads=16, hidden_dim=5632),
    # launch/quickstart.sh: 5.3 million parameters, trains in minutes on two CPU cores.
    "quickstart": LLaDAArgs(dim=256, n_layers=5, n_heads=4, hidden_dim=768, vocab_size=2048),
    # launch/needle.sh: learns to retrieve facts from a short context within an hour on two CPU cores.
    "needle": LLaDAArgs(
        dim=128, n_layers=4, n_heads=4, hidden_dim=352, vocab_size=2048, init_std=0.088, head_from_embedding=True
    ),
    "needle_gpu": LLaDAArgs(
        dim=512, n_layers=8, n_heads=8, hidden_dim=1408, vocab_size=2048, init_std=0.044, head_from_embedding=True
    ),
    # tools/bench.py on CPU: the proportions of a large model, seconds per step.
    "bench": LLaDAArgs(dim=512, n_layers=10, n_heads=8, hidden_dim=1376, vocab_size=4096),
    # train_configs/debug.toml: all sizes are divisible by 4, for up to four tensor-parallel ranks.
    "debug": LLaDAArgs(dim=64, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=160, vocab_size=512),
    "shallow": LLaDAArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=160, vocab_size=512),
    # The smallest models with a trunk and a tail, one layer each.
    "tiny": LLaDAArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512),
    "tiny_shifted": LLaDAArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512, shifted=True),
    # Three trunk layers and two tail layers.
    "sharded": LLaDAArgs(dim=32, n_layers=5, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512),
    # Every linear has an even number of NF4's units of 16,384 elements, so that two ranks can share a 4-bit base.
    "nf4": LLaDAArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=512),
    # For up to four context-parallel ranks: each gets two query heads and one key-value head.
    "many_heads": LLaDAArgs(dim=32, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=48, vocab_size=64),
}

LLADA_MOE = {
    "7B-A1B": LLaDAMoEArgs(),
    # For up to four tensor-parallel or expert-parallel ranks.
    "debug": LLaDAMoEArgs(
        dim=64, n_layers=4, n_heads=8, hidden_dim=32, vocab_size=512, n_experts=8, experts_per_token=2
    ),
    # For a 4-bit base, as the flavour of llada.
    "nf4": LLaDAMoEArgs(
        dim=256, n_layers=2, n_heads=4, hidden_dim=32, vocab_size=512, n_experts=4, experts_per_token=2
    ),
    # The smallest model with a trunk and a tail, one layer each; two experts for each of two expert-parallel ranks.
    "tiny": LLaDAMoEArgs(dim=32, n_layers=2, n_heads=4, hidden_dim=16, vocab_size=64, n_experts=4, experts_per_token=2),
}

LLADA2 = {
    "mini": LLaDA2Args(),
    # For up to four tensor-parallel or expert-parallel ranks.
    "debug": LLaDA2Args(
        dim=64, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=32, vocab_size=512, n_experts=16, experts_per_token=4,
        expert_groups=4, groups_per_token=2, shared_hidden_dim=32, dense_hidden_dim=96,
    ),
    # For a 4-bit base, as the flavour of llada.
    "nf4": LLaDA2Args(
        dim=256, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=512, n_experts=8, experts_per_token=2,
        expert_groups=2, groups_per_token=1, shared_hidden_dim=128, dense_hidden_dim=128,
    ),
    # A dense trunk, one layer with a mixture in the tail.
    "tiny": LLaDA2Args(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=16, vocab_size=64, n_experts=8, experts_per_token=2,
        expert_groups=2, groups_per_token=1, shared_hidden_dim=16, dense_hidden_dim=48,
    ),
}  # fmt: skip
