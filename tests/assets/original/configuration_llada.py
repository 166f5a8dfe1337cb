"""Configuration of a small LLaDA, as transformers loads it from a folder with `trust_remote_code`."""

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    """Sizes under the names of LLaDA-8B's config.json."""

    model_type = "llada"

    def __init__(
        self,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=64,
        vocab_size=64,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        **more,
    ):
        super().__init__(**more)
        self.d_model, self.n_layers, self.n_heads, self.n_kv_heads = d_model, n_layers, n_heads, n_kv_heads
        self.mlp_hidden_size, self.vocab_size = mlp_hidden_size, vocab_size
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
