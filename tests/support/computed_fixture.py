"""Fixtures for any options, computed in float64 by naive.py, in the format of the published fixtures."""

import json
from typing import ClassVar

import torch
from safetensors.torch import save_file

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.golden import fixture as golden_fixture
from memdlm_dist.models.llada import LLaDAArgs
from tests.oracles import naive
from tests.oracles.llada2 import LLaDA2Model
from tests.support.bilevel import scaled_model

OURS = {"ce": "cross_entropy", "distill": "kl", "distill_reverse": "reverse_kl"}


class Dense:
    """Dense backbone of the fixtures: its architecture, weights by published name, and naive model."""

    arch: ClassVar[dict] = {
        "kind": "dense", "vocab": 41, "hidden": 24, "intermediate": 36, "layers": 3, "heads": 3, "kv_heads": 1,
        "rope_theta": 500_000.0, "eps": 1e-5, "tied": False,
    }  # fmt: skip

    def __init__(self, length):
        self.args = LLaDAArgs(
            dim=24, n_layers=3, n_heads=3, n_kv_heads=1, hidden_dim=36, vocab_size=41, max_seq_len=length
        )
        sd_adapter = golden_fixture.DenseStateDictAdapter(self.args)
        self.weights, self.ours = {}, {}
        for ours, parameter in scaled_model(self.args).named_parameters():
            (name,) = sd_adapter.to_hf({ours: parameter})
            self.weights[name], self.ours[name] = parameter.detach(), ours

    def adapters(self, targets):
        """Return (published name, layer, key of the model's fast weights) of the target linears of two layers."""
        return [
            (name.removesuffix(".weight"), layer, target.removesuffix("_proj"))
            for layer in ("1", "2")
            for target in targets
            for name in self.weights
            if f"layers.{layer}." in name and name.endswith(f"{target}.weight")
        ]

    def model(self, weights):
        """Return the naive model of these weights."""
        return naive.DenseModel({self.ours[name]: x for name, x in weights.items()}, self.args)


class LLaDA2:
    """LLaDA2.1 with other sizes than the published fixtures': wide heads, no dense layer, two shared experts."""

    arch: ClassVar[dict] = {
        "kind": "llada2", "vocab": 41, "hidden": 20, "intermediate": 28, "expert_intermediate": 12, "layers": 2,
        "first_dense_layers": 0, "heads": 3, "kv_heads": 1, "head_dim": 8, "rope_theta": 6e5,
        "partial_rotary_factor": 0.75, "rotary_dim": 6, "eps": 1e-6, "tied": False, "experts": 6, "top_k": 2,
        "n_group": 3, "topk_group": 2, "router_score": "sigmoid", "expert_bias": True, "renormalise_top_k": True,
        "routed_scaling_factor": 1.5, "shared_experts": 2, "qk_norm": True,
    }  # fmt: skip
    changes: ClassVar[dict] = {}

    def __init__(self, length):
        self.arch = type(self).arch | self.changes
        generator = torch.Generator().manual_seed(3)
        expected = golden_fixture.get_sd_adapter(self.arch, length).expected()
        self.weights = {
            name: (1 if "norm" in name else 0) + 0.3 * torch.randn(x.shape, generator=generator).double()
            for name, x in expected.items()
        }

    def adapters(self, targets):
        """Return (published name, layer, key of the model's fast weights) of the target linears of the last layer."""
        layer = self.arch["layers"] - 1
        prefix = f"model.layers.{layer}."
        return [
            (name.removesuffix(".weight"), str(layer), name.removesuffix(".weight").removeprefix(prefix))
            for target in targets
            for name in self.weights
            if name.startswith(prefix) and name.endswith(f"{target}.weight")
        ]

    def model(self, weights):
        """Return the naive model of these weights."""
        return LLaDA2Model(weights, self.arch)


class DenseLayer(LLaDA2):
    """LLaDA2.1 whose adapted layers are a dense one and one with experts in a single group."""

    changes: ClassVar[dict] = {
        "first_dense_layers": 1,
        "n_group": 1,
        "topk_group": 1,
        "shared_experts": 1,
        "partial_rotary_factor": 1.0,
        "rotary_dim": 8,
    }

    def adapters(self, targets):
        """Return the adapters of both layers."""
        dense = [(f"model.layers.0.mlp.{target}", "0", f"mlp.{target}") for target in targets]
        return dense + super().adapters(targets)


def write_fixture(folder, memory, targets, shape, absent, backbone=Dense):
    """Write a fixture.

    Args:
        folder: existing folder to write to.
        memory: keys of the manifest's memory section that differ from the defaults below.
        targets: published names of the adapted linears.
        shape: (rows, length) of the batch.
        absent: input tensors to leave out; "outer" leaves out the outer results.
        backbone: class of the backbone.
    """
    published = backbone(shape[1])
    mask_id, (rows, length) = 40, shape
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, mask_id, shape, generator=generator)
    maskable = torch.ones(shape, dtype=torch.bool)
    if "labels" not in absent:  # prompts of different lengths; with several rows, row 1 has no maskable token
        maskable = torch.arange(length) >= torch.arange(rows).unsqueeze(1) * 2
        maskable[1:2] = False
    t = torch.rand(rows, generator=generator).double().float() * 0.9 + 0.1
    u, v = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in "uv")

    settings = {"lr": 0.1, "grad_clip": 0.4, "rank": 3, "alpha": 5.0, "start_scale": 1.5} | memory
    loss_weight = "uniform" if memory.get("loss_weight", "").startswith("uniform") else "schedule"
    hidden = f"hidden_{memory.get('hidden_type')}"
    options = naive.Options(
        trajectory=golden_fixture.CONFIG_VALUES["masking"][memory["masking"]],
        inner_steps=memory["steps"],
        inner_epochs=memory.get("epochs", 1),
        pre_anchor_scale=settings["start_scale"],
        inner_loss=OURS.get(memory["loss"], hidden),
        student_hidden=memory.get("student_hidden", "pre_final_norm"),
        teacher_hidden=memory.get("teacher_hidden", "post_final_norm"),
        supervision="newly_revealed" if memory.get("loss_mask_mode") == "newly_revealed" else "masked",
        gradient_clip=settings["grad_clip"],
        loss_weight=loss_weight,
    )
    adapters, fast, inputs = [], {}, {}
    for name, layer, key in published.adapters(targets):
        adapters.append((name, layer, key))
        out, width = published.weights[f"{name}.weight"].shape
        if settings.get("adapter_type") == "full":
            start = (torch.zeros(out, width).double(),)
        else:
            A = (torch.rand(3, width, generator=generator) * 2 - 1) / width**0.5
            inputs[f"A_init.{name}"] = A
            start = (A.double(), torch.zeros(out, 3).double(), settings["alpha"] / 3)
        fast.setdefault(layer, {})[key] = start

    # As the fixture holds them: float32.
    weights = {name: x.float().double().requires_grad_() for name, x in published.weights.items()}
    outer, ((losses, norms, final),), _, _ = naive.bilevel(
        published.model(weights), tokens, maskable, u, v, t.double(), [list(range(rows))], [fast], options, mask_id
    )
    n_maskable = maskable.sum()
    (outer / n_maskable).backward()

    masks, loss_masks, levels, teachers, anchors = [], [], [], [], []
    for row in range(rows):
        allowed = maskable[row].nonzero().flatten().tolist()
        anchor = naive.anchor_positions(u[row].tolist(), allowed, t[row].item(), options)
        states = naive.inner_states(u[row].tolist(), v[row].tolist(), allowed, anchor, t[row].item(), options)
        anchors.append(anchor)
        masks.append([masked for masked, _, _ in states])
        loss_masks.append([naive.scored_positions(masked, after, anchor, options) for masked, _, after in states])
        teachers.append([after or set() for _, _, after in states])
        realised = [len(masked) / max(len(allowed), 1) for masked, _, _ in states]
        schedule = [0.8 - 0.6 * k / 3 for k in range(len(states))]
        level = {"anchor_only": [t[row].item()], "progressive": schedule}.get(options.trajectory, realised)
        levels.append(level)

    def as_masks(positions):  # [row][step] -> set of positions; returns bool [S, B, L]
        return torch.tensor(
            [[[i in positions[b][k] for i in range(length)] for b in range(rows)] for k in range(steps)]
        )

    steps = len(losses) // options.inner_epochs
    inputs |= {
        "input_ids": tokens, "labels": torch.where(maskable, tokens, -100), "t": t, "step_masks": as_masks(masks),
        "anchor_mask": as_masks([[anchor] * steps for anchor in anchors])[0].clone(),
        "step_loss_masks": as_masks(loss_masks),
        "step_t": torch.tensor(levels).T.contiguous(),
        "teacher_input_ids": torch.where(as_masks(teachers), mask_id, tokens),
    }  # fmt: skip
    outputs = {}
    for name, layer, key in adapters:
        letters = ("delta",) if len(final[layer][key]) == 1 else ("A", "B")
        outputs |= {f"{letter}_final.{name}": x for letter, x in zip(letters, final[layer][key], strict=False)}
    results = {"inner_losses": losses, "inner_grad_norms": norms}
    if "outer" not in absent:
        outputs |= {f"grad.{name}": x.grad for name, x in weights.items() if x.grad is not None}
        results["outer_loss"] = (outer / n_maskable).item()
    for name in absent:
        inputs.pop(name, None)
    files = {"inputs": inputs, "outputs": outputs, "weights": weights}
    for file, tensors in files.items():
        rounded = {k: (x.detach().float() if x.is_floating_point() else x).clone() for k, x in tensors.items()}
        save_file(rounded, folder / f"{file}.safetensors")
    manifest = {
        "arch": published.arch, "mask_token_id": mask_id, "memory": settings,
        "adapters": [name for name, _, _ in adapters], "results": results,
        "files": {file: f"{file}.safetensors" for file in files},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
