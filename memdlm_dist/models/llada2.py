"""Sizes of `llada2`, LLaDA2.0 and 2.1: sigmoid scores in groups, a bias that only selects, a shared expert.

The scores of a token's experts are normalised and scaled, the first layer is dense, and RoPE rotates the first half of
every head.
"""

from dataclasses import dataclass
from typing import ClassVar

from memdlm_dist.models.mixture import MixtureArgs, RouterScore


@dataclass
class LLaDA2Args(MixtureArgs):
    """Sizes of a `llada2` backbone; the defaults are LLaDA2.1-mini's."""

    fused_linears: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    dim: int = 2048
    n_layers: int = 20
    n_heads: int = 16
    n_kv_heads: int | None = 4
    hidden_dim: int = 512
    vocab_size: int = 157184
    norm_eps: float = 1e-6
    rope_theta: float = 600_000.0
    partial_rotary_factor: float = 0.5
    native_length: int = 32768
    qk_norm: bool = True
    n_experts: int = 256
    experts_per_token: int = 8
    router_score: RouterScore = "sigmoid"
    normalizes_scores: bool = True
    score_scale: float = 2.5
    expert_groups: int | None = 8
    groups_per_token: int | None = 4
    has_expert_bias: bool = True
    float32_router: bool = True
    shared_hidden_dim: int = 512
    n_dense_layers: int = 1
    dense_hidden_dim: int = 5120
