"""Naive forward pass of LLaDA2.1 on one row, from weights under the published names."""

import math

import torch
import torch.nn.functional as F


class LLaDA2Model:
    """LLaDA2.1's forward pass, in the dtype of the weights.

    Args:
        state: published weights by name.
        arch: sizes, as in a fixture's manifest.
    """

    def __init__(self, state: dict, arch: dict):
        self.state, self.arch = state, arch

    def _norm(self, x, name):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.arch["eps"]) * self.state[f"{name}.weight"]

    def _rotate(self, x_Ld):
        d = int(self.arch["head_dim"] * self.arch["partial_rotary_factor"])
        position = torch.arange(len(x_Ld), dtype=torch.float64)
        out = list(x_Ld.unbind(-1))
        for j in range(d // 2):
            angle = position * self.arch["rope_theta"] ** (-2 * j / d)
            a, b = x_Ld[:, j], x_Ld[:, j + d // 2]
            out[j], out[j + d // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(out, -1)

    def _attention(self, x_LD, layer):
        arch, name = self.arch, f"model.layers.{layer}.attention"
        heads, kv, d = arch["heads"], arch["kv_heads"], arch["head_dim"]
        rows = (x_LD @ self.state[f"{name}.query_key_value.weight"].T).split(d, dim=-1)
        out = []
        for h in range(heads):
            g = h * kv // heads
            q = self._rotate(self._norm(rows[h], f"{name}.query_layernorm"))
            k = self._rotate(self._norm(rows[heads + g], f"{name}.key_layernorm"))
            out.append((q @ k.T / math.sqrt(d)).softmax(-1) @ rows[heads + kv + g])
        return torch.cat(out, -1) @ self.state[f"{name}.dense.weight"].T

    def _ffn(self, x, layer, name, fast):
        def linear(y, part):
            out = y @ self.state[f"model.layers.{layer}.{name}.{part}.weight"].T
            phi = fast.get(f"{name}.{part}")
            if phi is None:
                return out
            return out + (y @ phi[0].T if len(phi) == 1 else phi[2] * (y @ phi[0].T) @ phi[1].T)

        return linear(F.silu(linear(x, "gate_proj")) * linear(x, "up_proj"), "down_proj")

    def _choose(self, x_D, layer):
        """Return the experts of a token and their weights."""
        arch, name = self.arch, f"model.layers.{layer}.mlp.gate"
        score = torch.sigmoid(self.state[f"{name}.weight"] @ x_D)
        biased = (score + self.state[f"{name}.expert_bias"]).tolist()
        size = arch["experts"] // arch["n_group"]
        groups = [range(g * size, (g + 1) * size) for g in range(arch["n_group"])]
        groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: arch["topk_group"]] for e in group]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: arch["top_k"]]
        total = sum(score[e] for e in chosen) + 1e-20
        return [(e, arch["routed_scaling_factor"] * score[e] / total) for e in chosen]

    def _mixture(self, x_LD, layer, fast):
        rows = []
        for x_D in x_LD:
            experts = self._choose(x_D, layer)
            rows.append(sum(weight * self._ffn(x_D, layer, f"mlp.experts.{e}", fast) for e, weight in experts))
        out_LD = torch.stack(rows)
        return out_LD + self._ffn(x_LD, layer, "mlp.shared_experts", fast) if self.arch["shared_experts"] else out_LD

    def __call__(self, tokens_L, fast=None, dropout=None):
        """Compute the logits, and the last layer's output before and after the final norm.

        Args:
            tokens_L: token ids of the row.
            fast: {layer: {linear within the layer: (A, B, scale) or (delta,)}}.
            dropout: must be None.
        """
        assert dropout is None
        x = self.state["model.word_embeddings.weight"][tokens_L]
        for layer in range(self.arch["layers"]):
            of_layer = (fast or {}).get(str(layer), {})
            x = x + self._attention(self._norm(x, f"model.layers.{layer}.input_layernorm"), layer)
            y = self._norm(x, f"model.layers.{layer}.post_attention_layernorm")
            is_dense = layer < self.arch["first_dense_layers"]
            x = x + (self._ffn(y, layer, "mlp", of_layer) if is_dense else self._mixture(y, layer, of_layer))
        normed = self._norm(x, "model.norm")
        logits = normed @ self.state["lm_head.weight"].T
        return {"logits": logits, "pre_final_norm": x, "post_final_norm": normed}
