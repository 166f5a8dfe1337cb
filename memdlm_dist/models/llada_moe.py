"""Sizes of `llada_moe`, LLaDA-MoE: a float32 softmax over all experts, whose scores are not normalised again."""

from dataclasses import dataclass

from memdlm_dist.models.mixture import MixtureArgs


@dataclass
class LLaDAMoEArgs(MixtureArgs):
    """Sizes of a `llada_moe` backbone; the defaults are LLaDA-MoE-7B-A1B's."""

    dim: int = 2048
    n_layers: int = 16
    n_heads: int = 16
    hidden_dim: int = 1024
    vocab_size: int = 157184
    rope_theta: float = 50_000.0
    native_length: int = 8192
    qk_norm: bool = True
    n_experts: int = 64
    experts_per_token: int = 8
