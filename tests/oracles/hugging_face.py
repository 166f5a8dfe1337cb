"""Plain backbones under Hugging Face's parameter names, whose linears are modules that PEFT can wrap."""

import torch
import torch.nn.functional as F
from torch import nn

from memdlm_dist.models.llada_moe import LLaDAMoEArgs

# Names of a layer's parts: prefix of the layer, then norms and attention linears, then those of the FFN.
DENSE = ("model.transformer.blocks.{}.", "attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm")
MOE = (
    "model.layers.{}.", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "post_attention_layernorm",
)  # fmt: skip


class Norm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Backbone(nn.Module):
    """A module for each tensor of a Hugging Face folder, at the place that the tensor's name says."""

    def __init__(self, tensors, args):
        super().__init__()
        self.args, self.moe = args, isinstance(args, LLaDAMoEArgs)
        for name, weight in tensors.items():
            *path, last = name.removesuffix(".weight").split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if weight.ndim == 1:
                parent.add_module(last, Norm(weight, args.norm_eps))
            else:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight)
                parent.add_module(last, linear)

    def forward(self, tokens_BL):
        embedding, norm, head = (
            ("model.embed_tokens", "model.norm", "lm_head")
            if self.moe
            else ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
        )
        x = F.embedding(tokens_BL, self.get_submodule(embedding).weight)
        for layer in range(self.args.n_layers):
            prefix, first, q, k, v, o, second = MOE if self.moe else DENSE
            part = self.get_submodule(prefix.format(layer).rstrip("."))
            x = x + part.get_submodule(o)(self.attention(part, part.get_submodule(first)(x), q, k, v))
            h = part.get_submodule(second)(x)
            x = x + (self.mixture(part.mlp, h) if self.moe else self.ffn(part, h, "ff_proj", "up_proj", "ff_out"))
        return self.get_submodule(head)(self.get_submodule(norm)(x))

    def attention(self, part, h, *names):
        q, k, v = (
            part.get_submodule(name)(h).unflatten(-1, (-1, self.args.head_dim)).transpose(1, 2) for name in names
        )
        if self.moe:
            q, k = part.self_attn.q_norm(q), part.self_attn.k_norm(k)
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
        weights = (self.rotate(q) @ self.rotate(k).transpose(-1, -2) / self.args.head_dim**0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def rotate(self, x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] / self.args.rope_theta ** (torch.arange(half) / half)
        angle = torch.cat([angle, angle], dim=-1)
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * angle.sin()

    def ffn(self, part, h, gate, up, down):
        gate, up, down = (part.get_submodule(name) for name in (gate, up, down))
        return down(F.silu(gate(h)) * up(h))

    def mixture(self, mlp, h):
        score, chosen = mlp.gate(h).softmax(-1).topk(self.args.experts_per_token, dim=-1)
        out = torch.zeros_like(h)
        for expert in range(self.args.n_experts):
            weight = (score * (chosen == expert)).sum(-1, keepdim=True)
            out = out + weight * self.ffn(
                mlp.experts.get_submodule(str(expert)), h, "gate_proj", "up_proj", "down_proj"
            )
        return out
