"""Plain backbones under Hugging Face's parameter names, whose linears are modules that PEFT can wrap."""

import torch
import torch.nn.functional as F
from torch import nn

from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs

# Names of embedding, final norm and head, and of a layer's parts: its prefix, the first norm, the linears of queries,
# keys and values (or the fused one), their norms, the output linear and the second norm.
DENSE = (
    ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out"), "model.transformer.blocks.{}",
    "attn_norm", ("q_proj", "k_proj", "v_proj"), None, "attn_out", "ff_norm",
)  # fmt: skip
MOE = (
    ("model.embed_tokens", "model.norm", "lm_head"), "model.layers.{}",
    "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.q_norm", "self_attn.k_norm"), "self_attn.o_proj", "post_attention_layernorm",
)  # fmt: skip
LLADA2 = (
    ("model.word_embeddings", "model.norm", "lm_head"), "model.layers.{}",
    "input_layernorm", ("attention.query_key_value",), ("attention.query_layernorm", "attention.key_layernorm"),
    "attention.dense", "post_attention_layernorm",
)  # fmt: skip
LINEARS = ("gate_proj", "up_proj", "down_proj")


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
        self.args, self.moe, self.llada2 = args, isinstance(args, LLaDAMoEArgs), isinstance(args, LLaDA2Args)
        self.names = LLADA2 if self.llada2 else MOE if self.moe else DENSE
        for name, weight in tensors.items():
            *path, last = name.removesuffix(".weight").split(".")
            parent = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if last == "expert_bias":
                parent.register_buffer(last, weight)
            elif weight.ndim == 1:
                parent.add_module(last, Norm(weight, args.norm_eps))
            elif self.llada2 and last == "gate":  # as published: no linear, so that PEFT cannot adapt it
                parent.get_submodule(last).weight = nn.Parameter(weight)
            else:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight)
                parent.add_module(last, linear)

    def forward(self, tokens_BL):
        (embedding, norm, head), prefix, first, projections, norms, o, second = self.names
        x = F.embedding(tokens_BL, self.get_submodule(embedding).weight)
        for layer in range(self.args.n_layers):
            part = self.get_submodule(prefix.format(layer))
            h = part.get_submodule(first)(x)
            x = x + part.get_submodule(o)(self.attention(part, h, projections, norms))
            x = x + self.feed_forward(part, part.get_submodule(second)(x), layer)
        return self.get_submodule(head)(self.get_submodule(norm)(x))

    def feed_forward(self, part, h, layer):
        if self.moe:
            return self.mixture(part.mlp, h, *self.softmax_scores(part.mlp, h))
        if not self.llada2:
            return self.ffn(part, h, "ff_proj", "up_proj", "ff_out")
        if layer < self.args.n_dense_layers:
            return self.ffn(part.mlp, h, *LINEARS)
        routed = self.mixture(part.mlp, h, *self.grouped_scores(part.mlp, h))
        return routed + self.ffn(part.mlp.shared_experts, h, *LINEARS)

    def attention(self, part, h, projections, norms):
        args = self.args
        kv = args.n_kv_heads or args.n_heads
        heads = torch.cat([part.get_submodule(name)(h) for name in projections], -1).unflatten(-1, (-1, args.head_dim))
        q, k, v = heads.transpose(1, 2).split([args.n_heads, kv, kv], dim=1)
        if norms:
            q, k = (part.get_submodule(name)(y) for name, y in zip(norms, (q, k), strict=True))
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
        weights = (self.rotate(q) @ self.rotate(k).transpose(-1, -2) / args.head_dim**0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def rotate(self, x):
        width = int(x.shape[-1] * self.args.partial_rotary_factor)
        x, rest = x[..., :width], x[..., width:]
        half = width // 2
        angle = torch.arange(x.shape[-2])[:, None] / self.args.rope_theta ** (torch.arange(half) / half)
        angle = torch.cat([angle, angle], dim=-1)
        rotated = x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * angle.sin()
        return torch.cat([rotated, rest], dim=-1)

    def ffn(self, part, h, gate, up, down):
        gate, up, down = (part.get_submodule(name) for name in (gate, up, down))
        return down(F.silu(gate(h)) * up(h))

    def softmax_scores(self, mlp, h):
        return mlp.gate(h).softmax(-1).topk(self.args.experts_per_token, dim=-1)

    def grouped_scores(self, mlp, h):
        args = self.args
        score = F.linear(h, mlp.gate.weight).sigmoid()
        biased = (score + mlp.gate.expert_bias).unflatten(-1, (args.expert_groups, -1))
        groups = biased.topk(2, dim=-1).values.sum(-1).topk(args.groups_per_token, dim=-1).indices
        kept = torch.zeros(biased.shape[:-1], dtype=torch.bool).scatter(-1, groups, True)
        chosen = biased.masked_fill(~kept[..., None], -torch.inf).flatten(-2).topk(args.experts_per_token, -1).indices
        score = score.gather(-1, chosen)
        return args.score_scale * score / score.sum(-1, keepdim=True), chosen

    def mixture(self, mlp, h, score, chosen):
        out = torch.zeros_like(h)
        for expert in range(self.args.n_experts):
            weight = (score * (chosen == expert)).sum(-1, keepdim=True)
            out = out + weight * self.ffn(mlp.experts.get_submodule(str(expert)), h, *LINEARS)
        return out
