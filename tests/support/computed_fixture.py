"""Fixtures for any options, computed in float64 by naive.py, in the format of the published fixtures."""

import json

import torch
from safetensors.torch import save_file

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.golden import fixture as golden_fixture
from memdlm_dist.models.llada import LLaDAArgs
from tests.oracles import naive
from tests.support.bilevel import scaled_model

OURS = {"ce": "cross_entropy", "distill": "kl", "distill_reverse": "reverse_kl"}


def write_fixture(folder, memory, targets, shape, absent):
    """Write a fixture with two adapted layers.

    Args:
        folder: existing folder to write to.
        memory: keys of the manifest's memory section that differ from the defaults below.
        targets: published names of the adapted linears.
        shape: (rows, length) of the batch.
        absent: input tensors to leave out; "outer" leaves out the outer results.
    """
    args = LLaDAArgs(dim=24, n_layers=3, n_heads=3, n_kv_heads=1, hidden_dim=36, vocab_size=41, max_seq_len=shape[1])
    mask_id, (rows, length) = 40, shape
    state = {name: p.detach() for name, p in scaled_model(args).named_parameters()}
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
        pre_anchor_scale=settings["start_scale"],
        inner_loss=OURS.get(memory["loss"], hidden),
        student_hidden=memory.get("student_hidden", "pre_final_norm"),
        teacher_hidden=memory.get("teacher_hidden", "post_final_norm"),
        supervision="newly_revealed" if memory.get("loss_mask_mode") == "newly_revealed" else "masked",
        gradient_clip=settings["grad_clip"],
        loss_weight=loss_weight,
    )
    published = golden_fixture.DenseStateDictAdapter(args)
    our_names = {theirs: name for name in state for theirs in published.to_hf({name: state[name]})}

    def published_name(name):
        return next(iter(published.to_hf({name: state[name]})))

    adapters, fast, inputs = [], {}, {}
    for layer in ("1", "2"):
        for target in targets:
            name = next(x for x in our_names if f"layers.{layer}." in x and x.endswith(f"{target}.weight"))
            adapters.append(name := name.removesuffix(".weight"))
            out, width = state[our_names[f"{name}.weight"]].shape
            if settings.get("adapter_type") == "full":
                start = (torch.zeros(out, width).double(),)
            else:
                A = (torch.rand(3, width, generator=generator) * 2 - 1) / width**0.5
                inputs[f"A_init.{name}"] = A
                start = (A.double(), torch.zeros(out, 3).double(), settings["alpha"] / 3)
            fast.setdefault(layer, {})[target.removesuffix("_proj")] = start

    state = {name: p.requires_grad_() for name, p in state.items()}
    model = naive.DenseModel(state, args)
    outer, ((losses, norms, final),) = naive.bilevel(
        model, tokens, maskable, u, v, t.double(), [list(range(rows))], [fast], options, mask_id
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

    steps = len(losses)
    inputs |= {
        "input_ids": tokens, "labels": torch.where(maskable, tokens, -100), "t": t, "step_masks": as_masks(masks),
        "anchor_mask": as_masks([[anchor] * steps for anchor in anchors])[0].clone(),
        "step_loss_masks": as_masks(loss_masks),
        "step_t": torch.tensor(levels).T.contiguous(),
        "teacher_input_ids": torch.where(as_masks(teachers), mask_id, tokens),
    }  # fmt: skip
    outputs = {}
    for name in adapters:
        layer, target, _ = golden_fixture.parse_linear_name(name)
        letters = ("delta",) if len(final[layer][target]) == 1 else ("A", "B")
        outputs |= {f"{letter}_final.{name}": x for letter, x in zip(letters, final[layer][target], strict=False)}
    results = {"inner_losses": losses, "inner_grad_norms": norms}
    if "outer" not in absent:
        outputs |= {f"grad.{published_name(name)}": p.grad for name, p in state.items()}
        results["outer_loss"] = (outer / n_maskable).item()
    for name in absent:
        inputs.pop(name, None)
    files = {
        "inputs": inputs,
        "outputs": outputs,
        "weights": {published_name(name): p.detach() for name, p in state.items()},
    }
    for file, tensors in files.items():
        rounded = {k: (x.detach().float() if x.is_floating_point() else x).clone() for k, x in tensors.items()}
        save_file(rounded, folder / f"{file}.safetensors")
    arch = {
        "kind": "dense", "vocab": 41, "hidden": 24, "intermediate": 36, "layers": 3, "heads": 3, "kv_heads": 1,
        "rope_theta": args.rope_theta, "eps": args.norm_eps, "tied": False,
    }  # fmt: skip
    manifest = {
        "arch": arch, "mask_token_id": mask_id, "memory": settings, "adapters": adapters, "results": results,
        "files": {file: f"{file}.safetensors" for file in files},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
