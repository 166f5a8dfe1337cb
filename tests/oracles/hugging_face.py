"""Plain backbones under Hugging Face's parameter names, whose linears are modules that PEFT can wrap."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs


@dataclass(frozen=True)
class Names:
    """Names of a backbone's modules; those of a layer begin with `layer`."""

    embedding: str
    norm: str
    head: str
    layer: str
    first_norm: str
    queries_keys_values: tuple[str, ...]  # one name: a single linear with the rows of all three
    output: str
    second_norm: str
    head_norms: tuple[str, ...] = ()


DENSE = Names(
    "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out", "model.transformer.blocks.{}",
    "attn_norm", ("q_proj", "k_proj", "v_proj"), "attn_out", "ff_norm",
)  # fmt: skip
MOE = Names(
    "model.embed_tokens", "model.norm", "lm_head", "model.layers.{}", "input_layernorm",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "post_attention_layernorm",
    ("self_attn.q_norm", "self_attn.k_norm"),
)  # fmt: skip
LLADA2 = Names(
    "model.word_embeddings", "model.norm", "lm_head", "model.layers.{}", "input_layernorm",
    ("attention.query_key_value",), "attention.dense", "post_attention_layernorm",
    ("attention.query_layernorm", "attention.key_layernorm"),
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
        self.args, self.names = args, {LLaDAMoEArgs: MOE, LLaDA2Args: LLADA2}.get(type(args), DENSE)
        self.biases = {name.rpartition(".")[0]: x for name, x in tensors.items() if name.endswith("expert_bias")}
        for name, weight in tensors.items():
            if name.endswith("expert_bias"):
                continue
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
        names = self.names
        x = F.embedding(tokens_BL, self.get_submodule(names.embedding).weight)
        for layer in range(self.args.n_layers):
            path = names.layer.format(layer)
            part = self.get_submodule(path)
            x = x + part.get_submodule(names.output)(self.attention(part, part.get_submodule(names.first_norm)(x)))
            h = part.get_submodule(names.second_norm)(x)
            if names is DENSE:
                x = x + self.ffn(part, h, "ff_proj", "up_proj", "ff_out")
            elif names is MOE:
                x = x + self.experts(part.mlp, h, *self.softmax_router(part.mlp, h))
            elif layer < self.args.n_dense_layers:
                x = x + self.ffn(part.mlp, h)
            else:
                routed = self.experts(part.mlp, h, *self.sigmoid_router(part.mlp, h, self.biases[f"{path}.mlp.gate"]))
                x = x + routed + self.ffn(part.mlp.shared_experts, h)
        return self.get_submodule(names.head)(self.get_submodule(names.norm)(x))

    def attention(self, part, h):
        projected = torch.cat([part.get_submodule(name)(h) for name in self.names.queries_keys_values], dim=-1)
        heads, kv_heads = self.args.n_heads, self.args.n_kv_heads or self.args.n_heads
        q, k, v = projected.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
        if self.names.head_norms:
            q, k = (part.get_submodule(norm)(y) for norm, y in zip(self.names.head_norms, (q, k), strict=True))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        weights = (self.rotate(q) @ self.rotate(k).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def rotate(self, x):
        """Rotate the first units of every head: half of them in LLaDA2, all in the others."""
        rotated = x.shape[-1] // 2 if self.names is LLADA2 else x.shape[-1]
        x, rest = x[..., :rotated], x[..., rotated:]
        half = rotated // 2
        angle = torch.arange(x.shape[-2])[:, None] / self.args.rope_theta ** (torch.arange(half) / half)
        angle = torch.cat([angle, angle], dim=-1)
        x = x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * angle.sin()
        return torch.cat([x, rest], dim=-1)

    def ffn(self, part, h, gate="gate_proj", up="up_proj", down="down_proj"):
        gate, up, down = (part.get_submodule(name) for name in (gate, up, down))
        return down(F.silu(gate(h)) * up(h))

    def softmax_router(self, mlp, h):
        """Return every token's experts and their weights, `[B, L, k]` each."""
        score, chosen = mlp.gate(h).softmax(-1).topk(self.args.experts_per_token, dim=-1)
        return chosen, score

    def sigmoid_router(self, mlp, h, bias):
        """Return every token's experts and their weights, one token after the other."""
        args, score = self.args, mlp.gate(h).sigmoid()
        chosen = []
        for biased in (score + bias).flatten(0, 1):
            groups = biased.view(args.expert_groups, -1)
            worth = [group.sort(descending=True).values[:2].sum().item() for group in groups]
            best = sorted(range(args.expert_groups), key=lambda g: -worth[g])[: args.groups_per_token]
            size = groups.shape[1]
            allowed = [expert for g in best for expert in range(g * size, (g + 1) * size)]
            chosen.append(sorted(allowed, key=lambda expert: -biased[expert].item())[: args.experts_per_token])
        chosen = torch.tensor(chosen).view(*h.shape[:2], -1)
        weight = score.gather(-1, chosen)
        return chosen, args.score_scale * weight / (weight.sum(-1, keepdim=True) + 1e-20)

    def experts(self, mlp, h, chosen, weight):
        out = torch.zeros_like(h)
        for expert in range(self.args.n_experts):
            own = (weight * (chosen == expert)).sum(-1, keepdim=True)
            out = out + own * self.ffn(mlp.experts.get_submodule(str(expert)), h)
        return out
