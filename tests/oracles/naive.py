"""Second, independent implementation of the method, with loops and Python numbers; slow but simple."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

MASK64 = 2**64 - 1


def splitmix(state: int) -> int:
    """Compute SplitMix64's output function on Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK64
    return state ^ (state >> 31)


def keyed(state: int, index: int) -> int:
    """Compute number `index` of a key, 64 bits."""
    return splitmix((state + (index + 1) * 0x9E3779B97F4A7C15) & MASK64)


def sample_key(seed: int, stream: int, step: int, sample_id: int) -> int:
    """Compute the key of a sample."""
    state = 0
    for word in (seed, stream, step, sample_id):
        state = keyed(state, word)
    return state


def keyed_uniform(seed: int, stream: int, step: int, sample_id: int, index: int) -> float:
    """Compute one keyed uniform number on [0, 1), from 53 random bits."""
    return (keyed(sample_key(seed, stream, step, sample_id), index) >> 11) / 2**53


STREAMS = {"adapter": 9, "fast": 10}  # of the masks, by kind of term
LINEARS = ("gate", "up", "down", "q", "k", "v", "o")


class Dropout:
    """Dropout masks of one row in a step, number by number.

    Args:
        probabilities: by kind of term, "adapter" and "fast".
    """

    def __init__(self, seed: int, step: int, sample_id: int, probabilities: dict):
        self.keys = {kind: sample_key(seed, stream, step, sample_id) for kind, stream in STREAMS.items()}
        self.probabilities, self.factors = probabilities, {}

    def __call__(self, kind: str, layer: int, target: str, x_Li: torch.Tensor) -> torch.Tensor:
        """Return a term's input with the dropped features set to 0 and the others divided by 1 - p."""
        length, features = x_Li.shape
        if not self.probabilities[kind]:
            return x_Li
        if (kind, layer, target) not in self.factors:
            rows = [[self.factor(kind, layer, target, i, f) for f in range(features)] for i in range(length)]
            self.factors[kind, layer, target] = torch.tensor(rows, dtype=x_Li.dtype)
        return x_Li * self.factors[kind, layer, target]

    def factor(self, kind: str, layer: int, target: str, position: int, feature: int, expert: int = 0) -> float:
        """Return the factor of one feature of a token: four features share the 16-bit words of one number."""
        number = 2**15 if target == "router" else LINEARS.index(target.removeprefix("shared_"))
        number += 2**14 if target.startswith("shared_") else 0
        key = keyed(self.keys[kind], position) + 2**32 * layer + 2**16 * expert + number
        word = keyed(key, feature // 4) >> 16 * (feature % 4) & 0xFFFF
        dropped = round(self.probabilities[kind] * 2**16)
        return 0.0 if (word + 2**15) % 2**16 < dropped else 1 / (1 - dropped / 2**16)


def weight(t: float, schedule: str) -> float:
    """Compute the loss weight w(t)."""
    if schedule == "linear":
        return 1 / (t + 1e-6)
    angle = math.pi / 2 * (1 - t)
    return math.pi / 2 * math.sin(angle) / (math.cos(angle) + 1e-6)


def mask_probability(t: float, schedule: str) -> float:
    """Compute the mask probability 1 - alpha(t)."""
    return t if schedule == "linear" else math.cos(math.pi / 2 * (1 - t))


def pre_anchor_count(n: int, anchor: int, scale: float) -> int:
    """Compute the pre-anchor's number of masked tokens, of n maskable ones, with the published rounding.

    The ratio and the scaled ratio are rounded to float32; the product with n is truncated in double precision.
    """
    if n == 0:
        return 0
    ratio = np.float32(anchor) / np.float32(n)
    return min(n, max(anchor, int(n * float(min(np.float32(1), ratio * np.float32(scale))))))


class DenseModel:
    """LLaDA's forward pass on one row, from a state dict, in the dtype of the weights.

    The state dict may contain outer adapters; `adapter_scale` is their alpha / rank.
    """

    def __init__(self, state: dict, args, adapter_scale: float = 0.0):
        self.state, self.args, self.adapter_scale = state, args, adapter_scale
        self.writes = None  # {(layer, target): [squared norm of the fast term, of the linear's own output]} if a dict

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

    def __call__(self, tokens_L, fast=None, dropout=None):
        """Compute the logits, and the last layer's output before and after the final norm.

        Args:
            tokens_L: token ids of the row.
            fast: {layer: {target: (A `[R, in]`, B `[out, R]`, scale) or (delta `[out, in]`,)}} of the row.
            dropout: a `Dropout` of the row; None drops nothing.
        """
        drop = dropout or (lambda kind, layer, target, y: y)
        args, s = self.args, self.state
        d = args.dim // args.n_heads
        kv = args.n_kv_heads or args.n_heads
        x = s["tok_embeddings.weight"][tokens_L]
        for layer in range(args.n_layers):
            p = f"layers.{layer}."

            def linear(y, name, target, p=p, layer=layer):
                out = y @ s[p + name + ".weight"].T
                if (A := s.get(p + name + ".lora_A")) is not None:
                    term = drop("adapter", layer, target, y) @ A.T @ s[p + name + ".lora_B"].T
                    out = out + self.adapter_scale * term
                phi = (fast or {}).get(str(layer), {}).get(target)
                if phi is None:
                    return out
                y = drop("fast", layer, target, y)
                term = y @ phi[0].T if len(phi) == 1 else phi[2] * (y @ phi[0].T) @ phi[1].T
                if self.writes is not None and term.any():
                    sums = self.writes.setdefault((str(layer), target), [0.0, 0.0])
                    for i, x in enumerate((term, out)):
                        sums[i] += x.square().sum().item()
                return out + term

            y = self._norm(x, p + "attention_norm.weight")
            q, k, v = (
                linear(y, f"attention.w{n}", n).unflatten(-1, (h, d))
                for n, h in (("q", args.n_heads), ("k", kv), ("v", kv))
            )
            q, k = self._rotate(q), self._rotate(k)
            heads = []
            for h in range(args.n_heads):
                g = h * kv // args.n_heads
                scores = (q[:, h] @ k[:, g].T) / math.sqrt(d)
                heads.append(scores.softmax(-1) @ v[:, g])
            x = x + linear(torch.cat(heads, -1), "attention.wo", "o")
            y = self._norm(x, p + "ffn_norm.weight")
            hidden = F.silu(linear(y, "feed_forward.w1", "gate")) * linear(y, "feed_forward.w3", "up")
            x = x + linear(hidden, "feed_forward.w2", "down")
        normed = self._norm(x, "norm.weight")
        return {"logits": normed @ s["output.weight"].T, "pre_final_norm": x, "post_final_norm": normed}


@dataclass
class Options:
    """Options of the method, under the names of the TOML configuration."""

    trajectory: str = "anchor_consistent"
    inner_steps: int = 2
    inner_epochs: int = 1
    pre_anchor_scale: float = 1.5
    progressive_end: float = 0.2
    inner_loss: str = "cross_entropy"
    distillation_temperature: float = 1.0
    student_hidden: str = "pre_final_norm"
    teacher_hidden: str = "post_final_norm"
    supervision: str = "masked"
    learning_rate: float = 0.1
    learning_rate_scale: str = "none"
    gradient_clip: float = 1.0
    gradient_norm: str = "per_parameter"
    schedule: str = "linear"
    loss_weight: str = "schedule"
    loss_norm: str = "token"
    label_smoothing: float = 0.0
    dropout: float = 0.0
    adapter_dropout: float = 0.0


def anchor_positions(u, maskable, t, options):
    """Return the set of positions that the anchor masks."""
    return {i for i in maskable if u[i] < mask_probability(t, options.schedule)}


def inner_states(u, v, maskable, anchor, t, options):
    """Return the inner states of one row as (masked positions, loss weight, next state's masked positions or None).

    Args:
        u: uniform numbers of the anchor and of the states nested around it.
        v: uniform numbers of states that do not depend on the anchor.
        maskable: list of maskable positions.
        anchor: set of the anchor's masked positions.
        t: noise level of the outer loss.
        options: an `Options`.
    """
    n, steps = len(maskable), options.inner_steps

    def w(level):
        return weight(level, options.schedule) if options.loss_weight == "schedule" else 1.0

    def smallest(noise, count):
        return set(sorted(maskable, key=lambda i: noise[i])[:count])

    if options.trajectory == "anchor_only":
        return [(anchor, w(t), None)]
    if options.trajectory == "progressive":
        last = options.progressive_end
        first = 0.8 if steps > 1 else last
        masked = {i for i in maskable if v[i] < first}
        path = [(masked, w(first))]
        for k in range(1, steps):
            ratio = 0.8 + (last - 0.8) * (k / (steps - 1))
            masked = smallest(v, min(len(masked), int(n * ratio)))
            path.append((masked, w(ratio)))
    else:
        counts = [pre_anchor_count(n, len(anchor), options.pre_anchor_scale)]
        for left in range((2 if options.trajectory == "pre_anchor_only" else steps) - 1, 0, -1):
            counts.append(counts[-1] - math.ceil((counts[-1] - len(anchor)) / left))
        path = [(smallest(u, count), w(count / n) if count else 0.0) for count in counts]
    chain = [(*state, after[0]) for state, after in zip(path, [*path[1:], (None,)], strict=True)]
    return chain[:1] if options.trajectory == "pre_anchor_only" else chain


def scored_positions(masked, after, anchor, options):
    """Return the positions that an inner step scores.

    Args:
        masked: masked positions of its state.
        after: masked positions of the next state; None if the clean sequence follows.
        anchor: masked positions of the anchor.
        options: an `Options`.
    """
    if options.supervision == "anchor":
        return {i for i in masked if i in anchor}
    return masked - after if options.supervision == "newly_revealed" and after is not None else masked


def distance(student, teacher, label, i, options):
    """Compute the inner loss at position i.

    Args:
        student: outputs of `DenseModel` on the state.
        teacher: outputs of `DenseModel` on the next state.
        label: clean token at position i.
        i: position.
        options: an `Options`.
    """
    name = options.inner_loss
    if name == "cross_entropy":
        return F.cross_entropy(student["logits"][i], label)
    if name in ("kl", "reverse_kl"):
        temperature = options.distillation_temperature
        p, q = ((out["logits"][i] / temperature).softmax(-1) for out in (teacher, student))
        if name == "reverse_kl":
            p, q = q, p
        return temperature**2 * sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
    s, t = student[options.student_hidden][i], teacher[options.teacher_hidden][i]
    return ((s - t) ** 2).mean() if name == "hidden_mse" else 1 - (s @ t) / (s.norm() * t.norm())


def bilevel(
    model, tokens_BL, maskable_BL, u_BL, v_BL, t_B, sets, fast_of_set, options, mask_id, dropouts=None, adapts=None
):
    """Compute a full bi-level step: every state of every row passes through the full model, one row at a time.

    Args:
        model: a `DenseModel`.
        tokens_BL: clean tokens.
        maskable_BL: bool, maskable tokens.
        u_BL: uniform numbers of the anchor and of the states nested around it.
        v_BL: uniform numbers of states that do not depend on the anchor.
        t_B: noise levels of the outer loss.
        sets: lists of rows that share a set of fast weights.
        fast_of_set: initial fast weights of each set, in `DenseModel`'s format.
        options: an `Options`.
        mask_id: id of `[MASK]`.
        dropouts: a `Dropout` of each row; None drops nothing.
        adapts: for each set whether its rows train with the memory; None for all.

    Returns:
        The outer loss, without the division by `loss_divisor`; for each set (inner losses, inner gradient norms, final
        fast weights); for each pass that reads the anchor [sum of -log p of its tokens, number of tokens], over the
        sets that adapt; and `DenseModel.writes` of the outer pass.
    """
    rows = []
    for tokens, maskable, u, v, t in zip(
        tokens_BL, maskable_BL, u_BL.tolist(), v_BL.tolist(), t_B.tolist(), strict=True
    ):
        allowed = maskable.nonzero().flatten().tolist()
        anchor = anchor_positions(u, allowed, t, options)
        rows.append((tokens, anchor, t, inner_states(u, v, allowed, anchor, t, options)))

    dropouts = dropouts or [None] * len(rows)

    def corrupted(tokens, positions):
        return torch.tensor([mask_id if i in positions else int(x) for i, x in enumerate(tokens)])

    outer, report, nll, writes = 0.0, [], {}, {}

    def add_nll(name, row, logits):
        sums = nll.setdefault(name, [0.0, 0])
        for i in rows[row][1]:
            sums[0] += F.cross_entropy(logits[i], rows[row][0][i]).item()
            sums[1] += 1

    for members, fast, runs in zip(sets, fast_of_set, adapts or [True] * len(sets), strict=True):
        losses, norms = [], []
        for row in members if runs and not reads_anchor(0, len(rows[0][3]), options) else []:
            tokens, anchor, _, _ = rows[row]
            add_nll("before", row, model(corrupted(tokens, anchor), fast, dropouts[row])["logits"])
        for number, k in enumerate(list(range(len(rows[0][3]))) * options.inner_epochs * runs, 1):
            fast = {
                layer: {name: tuple(_leaf(x) for x in linear) for name, linear in linears.items()}
                for layer, linears in fast.items()
            }
            flat = [x for linears in fast.values() for linear in linears.values() for x in linear if torch.is_tensor(x)]
            rates = [
                rate
                for linears in fast.values()
                for x in linears.values()
                for rate in learning_rates(x, model, options)
            ]
            total, count = 0.0, 0
            for row in members:
                tokens, anchor, _, states = rows[row]
                masked, w, after = states[k]
                student = model(corrupted(tokens, masked), fast, dropouts[row])
                if reads_anchor(k, len(states), options):
                    add_nll(f"step_{number}", row, student["logits"])
                with torch.no_grad():
                    teacher = model(corrupted(tokens, after or set()), fast, dropouts[row])
                for i in scored_positions(masked, after, anchor, options):
                    total = total + w * distance(student, teacher, tokens[i], i, options)
                    count += 1
            if not count:
                losses.append(0.0)
                norms.append(0.0)
                continue
            grads = torch.autograd.grad(total / count, flat, materialize_grads=True)  # experts without tokens
            losses.append((total / count).item())
            norms.append(math.sqrt(sum(g.norm().item() ** 2 for g in grads)))
            moved = []
            for x, g in zip(flat, grads, strict=True):
                norm = g.norm().item() if options.gradient_norm == "per_parameter" else norms[-1]
                if options.gradient_clip and norm > options.gradient_clip:
                    g = g * options.gradient_clip / (norm + 1e-12)
                moved.append((x - rates[len(moved)] * g).detach())
            updated = iter(moved)
            fast = {
                layer: {
                    name: tuple(next(updated) if torch.is_tensor(x) else x for x in linear)
                    for name, linear in linears.items()
                }
                for layer, linears in fast.items()
            }
        for row in members:
            tokens, anchor, t, _ = rows[row]
            w = weight(t, options.schedule) if options.loss_weight == "schedule" else 1.0
            model.writes = writes
            logits = model(corrupted(tokens, anchor), fast if runs else None, dropouts[row])["logits"]
            model.writes = None
            if runs:
                add_nll("after", row, logits)
            own = int(maskable_BL[row].sum()) if options.loss_norm == "answer" else 1
            outer = outer + sum(
                w * F.cross_entropy(logits[i], tokens[i], label_smoothing=options.label_smoothing) / own for i in anchor
            )
        report.append((losses, norms, fast))
    return outer, report, nll, writes


def learning_rates(linear, model, options):
    """Return the learning rates of A and B, or of delta, of a linear's fast weights; LLaDA-MoE's width is 2048."""
    factor = math.sqrt(model.args.dim / 2048) if options.learning_rate_scale == "width" else 1.0
    is_pair = len(linear) > 1
    return [options.learning_rate / factor, options.learning_rate * factor] if is_pair else [options.learning_rate]


def reads_anchor(k, states, options):
    """Return whether inner step k of an epoch scores the anchor's tokens against the clean ones."""
    last = k == states - 1
    return options.inner_loss == "cross_entropy" and (
        options.trajectory == "anchor_only"
        or (options.trajectory == "anchor_consistent" and last and options.inner_steps > 1)
    )


def loss_divisor(maskable_BL, options):
    """Count the maskable tokens, or the rows with one."""
    counts = [sum(row) for row in maskable_BL.tolist()]
    return sum(counts) if options.loss_norm == "token" else sum(1 for count in counts if count)


def _leaf(x):
    return x.detach().requires_grad_() if torch.is_tensor(x) else x
