"""A small LLaDA under LLaDA-8B's parameter names, written for transformers alone."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_llada import LLaDAConfig


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hidden, self.config = config.d_model, config.mlp_hidden_size, config
        kv_width = width // config.n_heads * config.n_kv_heads
        self.attn_norm, self.ff_norm = (Norm(width, config.rms_norm_eps) for _ in range(2))
        self.q_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, kv_width, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def heads(self, x, count):
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def rotate(self, x):
        length, half = x.shape[-2], x.shape[-1] // 2
        angles = torch.arange(length)[:, None] / self.config.rope_theta ** (torch.arange(half) / half)
        angles = torch.cat((angles, angles), dim=-1)
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, x):
        h, config = self.attn_norm(x), self.config
        q = self.rotate(self.heads(self.q_proj(h), config.n_heads))
        k, v = self.rotate(self.heads(self.k_proj(h), config.n_kv_heads)), self.heads(self.v_proj(h), config.n_kv_heads)
        k, v = (y.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1) for y in (k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn_out((weights @ v).transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig

    def __init__(self, config):
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": Norm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    def forward(self, input_ids):
        parts = self.model["transformer"]
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x = block(x)
        return CausalLMOutput(logits=parts["ff_out"](parts["ln_f"](x)))
