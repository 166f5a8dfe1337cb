"""Sizes of the backbones by `model.flavor`: published models, the experiments of this repository, and small ones."""

from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoEArgs

LLADA = {
    # LLaDA-8B, and the same proportions at an eighth of its size.
    "8B": LLaDAArgs(),
    "1B": LLaDAArgs(dim=2048, n_layers=16, n_heads=16, hidden_dim=5632),
    # launch/quickstart.sh, 5.3 million parameters: learns something in minutes on two CPU cores.
    "quickstart": LLaDAArgs(dim=256, n_layers=5, n_heads=4, hidden_dim=768, vocab_size=2048),
    # launch/needle.sh: learns to look up facts in a short context within the hour on two CPU cores.
    "needle": LLaDAArgs(
        dim=128, n_layers=4, n_heads=4, hidden_dim=352, vocab_size=2048, init_std=0.088, head_from_embedding=True
    ),
    "needle_gpu": LLaDAArgs(
        dim=512, n_layers=8, n_heads=8, hidden_dim=1408, vocab_size=2048, init_std=0.044, head_from_embedding=True
    ),
    # tools/bench.py on a CPU: the proportions of a large model, seconds a step.
    "bench": LLaDAArgs(dim=512, n_layers=10, n_heads=8, hidden_dim=1376, vocab_size=4096),
    # train_configs/debug.toml: every size divides by 4, so that four tensor-parallel ranks fit.
    "debug": LLaDAArgs(dim=64, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=160, vocab_size=512),
    "shallow": LLaDAArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=160, vocab_size=512),
    # One layer of trunk and one of tail, where every operation counts; and three of trunk with a tail of two.
    "tiny": LLaDAArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512),
    "tiny_shifted": LLaDAArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512, shifted=True),
    "sharded": LLaDAArgs(dim=32, n_layers=5, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512),
    # Four context-parallel ranks fit, with one key-value head for the two query heads of each.
    "many_heads": LLaDAArgs(dim=32, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=48, vocab_size=64),
}

LLADA_MOE = {
    "7B-A1B": LLaDAMoEArgs(),
    # Four tensor-parallel or expert-parallel ranks fit.
    "debug": LLaDAMoEArgs(
        dim=64, n_layers=4, n_heads=8, hidden_dim=32, vocab_size=512, n_experts=8, experts_per_token=2
    ),
    # One layer of trunk and one of tail, where every operation counts; two experts for each of two ranks.
    "tiny": LLaDAMoEArgs(dim=32, n_layers=2, n_heads=4, hidden_dim=16, vocab_size=64, n_experts=4, experts_per_token=2),
}
