"""Oracles: the method written a second time, plainly, with loops and Python numbers. Slow on purpose."""

import math

import torch
import torch.nn.functional as F

MASK64 = 2**64 - 1


def splitmix(state: int) -> int:
    """SplitMix64's output function on Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK64
    return state ^ (state >> 31)


def keyed_uniform(seed: int, stream: int, step: int, sample_id: int, index: int) -> float:
    gamma = 0x9E3779B97F4A7C15
    state = 0
    for word in (seed, stream, step):
        state = splitmix((state + (word + 1) * gamma) & MASK64)
    key = splitmix((state + (sample_id + 1) * gamma) & MASK64)
    return (splitmix((key + (index + 1) * gamma) & MASK64) >> 11) / 2**53


def weight(t: float, schedule: str) -> float:
    if schedule == "linear":
        return 1 / (t + 1e-6)
    angle = math.pi / 2 * (1 - t)
    return math.pi / 2 * math.sin(angle) / (math.cos(angle) + 1e-6)


def mask_probability(t: float, schedule: str) -> float:
    return t if schedule == "linear" else math.cos(math.pi / 2 * (1 - t))


def pre_anchor_count(n: int, anchor: int, scale: float) -> int:
    """The published rounding: ratio and scaled ratio in float32, their product with n truncated in double."""
    import numpy as np

    ratio = np.float32(anchor / n)
    return min(n, max(anchor, int(n * float(np.float32(min(1.0, scale * float(ratio)))))))


class DenseModel:
    """LLaDA's forward pass from a state dict, one row at a time, in the dtype of the weights."""

    def __init__(self, state: dict, args):
        self.state, self.args = state, args

    def _norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.args.norm_eps) * self.state[name]

    def _rotate(self, x):  # [L, H, d]
        length, _, d = x.shape
        out = torch.empty_like(x)
        for j in range(d // 2):
            angle = torch.arange(length, dtype=torch.float64) * self.args.rope_theta ** (-2 * j / d)
            cos, sin = (f(angle).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
            a, b = x[..., j], x[..., j + d // 2]
            out[..., j], out[..., j + d // 2] = a * cos - b * sin, b * cos + a * sin
        return out

    def logits(self, tokens_L, fast=None):
        """fast: {layer: {"gate"|"up"|"down": (A [R, in], B [out, R], scale)}} of this row."""
        args, s = self.args, self.state
        d = args.dim // args.n_heads
        kv = args.n_kv_heads or args.n_heads
        x = s["tok_embeddings.weight"][tokens_L]
        for layer in range(args.n_layers):
            p = f"layers.{layer}."

            def linear(y, name, target=None, p=p, layer=layer):
                out = y @ s[p + name + ".weight"].T
                pair = (fast or {}).get(str(layer), {}).get(target)
                if pair is not None:
                    out = out + pair[2] * (y @ pair[0].T) @ pair[1].T
                return out

            y = self._norm(x, p + "attention_norm.weight")
            q, k, v = (
                linear(y, f"attention.w{n}").unflatten(-1, (h, d))
                for n, h in (("q", args.n_heads), ("k", kv), ("v", kv))
            )
            q, k = self._rotate(q), self._rotate(k)
            heads = []
            for h in range(args.n_heads):
                g = h * kv // args.n_heads
                scores = (q[:, h] @ k[:, g].T) / math.sqrt(d)
                heads.append(scores.softmax(-1) @ v[:, g])
            x = x + linear(torch.cat(heads, -1), "attention.wo")
            y = self._norm(x, p + "ffn_norm.weight")
            hidden = F.silu(linear(y, "feed_forward.w1", "gate")) * linear(y, "feed_forward.w3", "up")
            x = x + linear(hidden, "feed_forward.w2", "down")
        return self._norm(x, "norm.weight") @ s["output.weight"].T


def bilevel_row(model, tokens_L, maskable_L, anchor_L, states, t, fast, schedule, lr, clip, mask_id):
    """One row with fast weights of its own: (outer loss sum, inner losses, inner gradient norms, fast weights).

    states: the boolean masks [L] of the inner loop's inputs, which are also its targets. Straightforward:
    every state goes through the whole model, and every gradient through the whole of its graph.
    """

    def nll_sum(mask_L, current):
        logits = model.logits(torch.where(mask_L, mask_id, tokens_L), current)
        return sum(F.cross_entropy(logits[i], tokens_L[i]) for i in mask_L.nonzero().flatten().tolist())

    losses, norms = [], []
    for mask_L in states:
        current = {
            layer: {name: (*(x.detach().requires_grad_() for x in pair[:2]), pair[2]) for name, pair in pairs.items()}
            for layer, pairs in fast.items()
        }
        flat = [x for pairs in current.values() for pair in pairs.values() for x in pair[:2]]
        m = int(mask_L.sum())
        loss = nll_sum(mask_L, current) * weight(m / int(maskable_L.sum()), schedule) / m
        grads = torch.autograd.grad(loss, flat)
        losses.append(loss.item())
        norms.append(math.sqrt(sum(g.norm().item() ** 2 for g in grads)))
        clipped = [g * clip / (g.norm() + 1e-12) if g.norm() > clip else g for g in grads]
        moved = iter([(x - lr * g).detach() for x, g in zip(flat, clipped, strict=True)])
        fast = {
            layer: {name: (next(moved), next(moved), pair[2]) for name, pair in pairs.items()}
            for layer, pairs in fast.items()
        }
    return nll_sum(anchor_L, fast) * weight(t, schedule), losses, norms, fast
