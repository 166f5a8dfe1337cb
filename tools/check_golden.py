"""Check our numbers against fixtures of the published reference implementation.

    python tools/check_golden.py DIR [DIR ...]

Each DIR holds a manifest.json and safetensors files. The masks, noise levels and the draw of the fast
weights come from the fixture; our model, inner loop and outer loss compute the rest. One line per
quantity; exit status 1 if any is out of tolerance, 2 if a fixture is of a kind that is not supported
yet or cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.bilevel import Memory, outer_loss
from memdlm_dist.fast_weights import FastLinear, FastWeights, Full, LowRank, map_leaves
from memdlm_dist.inner_loop import InnerSGD
from memdlm_dist.inner_loss import InnerLoss, inner_loss
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.trajectory import IGNORE_INDEX, PROGRESSIVE_RATIOS, Draw, MicroBatch, Plan, State, micro_batch

# Fixture name of a linear -> our name, and ours -> the fast weights' target name.
BLOCK_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
TARGETS = {name: name.split(".")[1].removesuffix("_proj") for name in BLOCK_NAMES if name.endswith("_proj")}

# A manifest's words -> ours. A value that is not here is of a kind that this version does not cover.
WORDS: dict[str, dict[Any, Any]] = {
    "masking": {
        "pmc": "anchor_consistent",
        "progressive_memory_consistent": "anchor_consistent",
        "pre_only": "pre_anchor_only",
        "no_progressive": "anchor_only",
        "progressive_memory": "progressive",
    },
    "loss": {"ce": "cross_entropy", "distill": "kl", "distill_reverse": "reverse_kl", "distill_hidden": "hidden"},
    "hidden_type": {"mse": "hidden_mse", "cosine": "hidden_cosine"},
    "student_hidden": {"pre_final_norm": "pre_final_norm", "post_final_norm": "post_final_norm"},
    "teacher_hidden": {"post_final_norm": "post_final_norm", "pre_final_norm": "pre_final_norm"},
    "loss_mask_mode": {"student_masked": "masked", "newly_revealed": "newly_revealed"},
    "adapter_type": {"lora": "lora", "full": "full"},
    "loss_weight": {"scheduler": "schedule", "uniform": "uniform"},
    "grad_clip_scope": {"each parameter tensor separately": "per_parameter"},
    "epochs": {1: 1},
    "temperature": {1.0: 1.0},
    "dropout": {0.0: 0.0},
    "loss_norm": {"token": "token"},
}

# Losses agree to float32 rounding of sums; gradients, fast weights and logits to what an independent
# float32 recomputation of the fixtures differed by, with a margin (logits reach 15). A norm may differ
# by what a gradient may. A cosine distance near 0 is the difference of two numbers near 1.
LOSS_RTOL, LOSS_ATOL, NORM_RTOL, GRADIENT_ATOL, FAST_ATOL, LOGITS_ATOL = 2e-6, 1e-6, 2e-6, 1e-5, 1e-6, 5e-5


class Unsupported(Exception):
    """The fixture is of a kind that this version does not cover."""


@dataclass(frozen=True)
class Line:
    quantity: str
    absolute: float
    relative: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "NOT OK"
        return f"  {self.quantity:<34} abs {self.absolute:9.2e}  rel {self.relative:9.2e}  {verdict}"


def compare(quantity: str, ours, theirs, atol: float = 0.0, rtol: float = 0.0) -> Line:
    """Largest absolute and relative difference; ok where |ours - theirs| <= atol + rtol |theirs|."""
    ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    if ours.shape != theirs.shape:
        return Line(f"{quantity} (shape {tuple(ours.shape)})", float("inf"), float("inf"), False)
    if not theirs.numel():
        return Line(quantity, 0.0, 0.0, True)
    difference = (ours - theirs).abs()
    relative = difference.max() / theirs.abs().max().clamp(min=1e-30)
    ok = bool((difference <= atol + rtol * theirs.abs()).all())
    return Line(quantity, difference.max().item(), relative.item(), ok)


def worst(quantity: str, pairs: dict[str, tuple[Tensor, Tensor]], atol: float) -> Line:
    """One line for many tensors: the one that differs most."""
    lines = [compare(f"{quantity} ({name})", *pair, atol=atol) for name, pair in pairs.items()]
    return max(lines, key=lambda line: (not line.ok, line.absolute))


def our_name(name: str) -> str:
    """`model.layers.3.mlp.gate_proj.weight` -> `layers.3.feed_forward.w1.weight`."""
    module = name.removesuffix(".weight")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.weight"
    layer, linear = module.removeprefix("model.layers.").split(".", 1)
    return f"layers.{layer}.{BLOCK_NAMES[linear]}.weight"


def build_model(arch: dict, weights: dict[str, Tensor], length: int) -> LLaDA:
    model = LLaDA(
        LLaDAArgs(
            dim=arch["hidden"],
            n_layers=arch["layers"],
            n_heads=arch["heads"],
            n_kv_heads=arch.get("kv_heads"),
            hidden_dim=arch["intermediate"],
            vocab_size=arch["vocab"],
            norm_eps=arch["eps"],
            rope_theta=arch["rope_theta"],
            max_seq_len=length,
        )
    )
    model.load_state_dict({our_name(name): tensor for name, tensor in weights.items()})
    return model


def split_adapter(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.gate_proj` -> ("3", "gate")."""
    layer, linear = name.removeprefix("model.layers.").split(".", 1)
    if linear not in TARGETS:
        raise Unsupported(f"fast weights on {linear!r} are not supported yet")
    return layer, TARGETS[linear]


@dataclass(frozen=True)
class Settings:
    """A manifest's `memory` section in our words."""

    plan: Plan
    loss: InnerLoss
    adapter: str
    optimiser: InnerSGD
    rank: int
    alpha: float
    last_ratio: float

    @classmethod
    def read(cls, section: dict[str, Any]) -> "Settings":
        """Raises Unsupported, naming the key, for a value without a word of ours."""

        def word(key: str) -> Any:
            words = WORDS[key]
            value = section.get(key, next(iter(words)))
            if key == "loss_weight":
                value = value.partition(":")[0]  # the formula follows the name
            if value not in words:
                raise Unsupported(f"memory.{key} = {section[key]!r} is not supported yet")
            return words[value]

        for key in WORDS:
            word(key)
        loss = word("loss")
        return cls(
            plan=Plan(
                trajectory=word("masking"),
                inner_steps=section["steps"],
                pre_anchor_scale=section.get("start_scale", Plan.pre_anchor_scale),
                supervision=word("loss_mask_mode"),
                loss_weight=word("loss_weight"),
            ),
            loss=inner_loss(
                word("hidden_type") if loss == "hidden" else loss, word("student_hidden"), word("teacher_hidden")
            ),
            adapter=word("adapter_type"),
            optimiser=InnerSGD(section["lr"], section["grad_clip"], word("grad_clip_scope")),
            rank=section.get("rank", 1),  # full-matrix fast weights have none
            alpha=section.get("alpha", 1.0),
            last_ratio=section.get("prompt_mask_ratio", PROGRESSIVE_RATIOS[1]),
        )

    def start(self, weight_oi: Tensor, A_Ri: Tensor | None) -> FastLinear:
        """The fast weights of one linear before the first step: the fixture's draw of A, zeros otherwise."""
        if self.adapter == "full":
            return Full(torch.zeros_like(weight_oi)[None])
        assert A_Ri is not None
        return LowRank(A_Ri[None], torch.zeros(1, len(weight_oi), len(A_Ri)), self.alpha / self.rank)


def published_anchor(plan: Plan, inputs: dict[str, Tensor]) -> State:
    """The fixture's outer state; where it has none (adaptation at inference), the last inner one."""
    mask_BL = inputs["anchor_mask"] if "anchor_mask" in inputs else inputs["step_masks"][-1]
    t_B = inputs.get("t", torch.ones(len(mask_BL)))
    return State(mask_BL, mask_BL, plan.weight(t_B.double()))


def published_states(plan: Plan, with_teacher: bool, inputs: dict[str, Tensor], anchor: State) -> list[State]:
    """The fixture's masks, targets and noise levels of every inner step."""
    masks = [anchor.mask_BL]

    def shared(mask_BL: Tensor) -> Tensor:
        # One tensor object per state: states that are the same share their pass of the trunk.
        for known in masks:
            if torch.equal(known, mask_BL):
                return known
        masks.append(mask_BL)
        return mask_BL

    step_masks = list(inputs["step_masks"])
    following: list[Tensor | None] = [*step_masks[1:], None]
    if with_teacher and "teacher_input_ids" in inputs:
        following = [teacher_BL != inputs["input_ids"] for teacher_BL in inputs["teacher_input_ids"]]
    return [
        State(shared(mask_BL), target_BL, plan.weight(t_B.double()), None if next_BL is None else shared(next_BL))
        for mask_BL, target_BL, t_B, next_BL in zip(
            step_masks, inputs["step_loss_masks"], inputs["step_t"], following, strict=True
        )
    ]


def compare_trajectory(
    settings: Settings, inputs: dict[str, Tensor], maskable_BL: Tensor, anchor: State, published: list[State]
) -> Iterator[Line]:
    """Our trajectory against the fixture's: masks, targets and weights.

    The numbers behind the masks are chosen so that tokens masked longest have the smallest: then ours are
    the same if their counts are.
    """
    if settings.plan.trajectory == "progressive" and settings.last_ratio != PROGRESSIVE_RATIOS[1]:
        return
    times_BL = torch.stack([anchor.mask_BL, *(state.mask_BL for state in published)]).sum(0)
    u_BL = torch.where(times_BL > 0, 0.1 / times_BL.clamp(min=1), 0.9).double()
    # The progressive trajectory does not know the anchor.
    times_BL = times_BL - anchor.mask_BL.long()
    v_BL = torch.where(times_BL > 0, 0.1 / times_BL.clamp(min=1), 0.9).double()
    t_B = inputs.get("t", torch.ones(len(maskable_BL))).double()
    ours = settings.plan.states(Draw(maskable_BL, t_B, u_BL, v_BL), anchor)
    if settings.loss.teacher is None:
        published = [State(state.mask_BL, state.target_BL, state.weight_B) for state in published]

    def clean(mask_BL: Tensor | None) -> Tensor:
        return torch.zeros_like(maskable_BL) if mask_BL is None else mask_BL

    for what, of in {
        "masks": lambda state: state.mask_BL,
        "targets": lambda state: state.target_BL,
        "teacher's masks": lambda state: clean(state.next_BL),
        # A row's weight is read where it has a target.
        "weights": lambda state: torch.where(state.target_BL.any(1), state.weight_B, 0.0),
    }.items():
        if what == "teacher's masks" and settings.loss.teacher is None:
            continue
        mine, theirs = (torch.stack([of(state) for state in states]) for states in (ours, published))
        yield compare(f"trajectory: {what}", mine, theirs, rtol=LOSS_RTOL if what == "weights" else 0.0)


def check_supported(manifest: dict) -> None:
    if "sampler" in manifest:
        raise Unsupported("a sampler's fixture is not supported yet")
    arch = manifest["arch"]
    if arch["kind"] != "dense" or arch.get("tied"):
        raise Unsupported(
            f"architecture {arch['kind']!r}{' with tied embeddings' if arch.get('tied') else ''} is not supported yet"
        )


def check(folder: Path) -> Iterator[Line]:
    """Compare one fixture; yields a line per quantity. What the fixture does not hold is not checked.

    Raises:
        Unsupported: the fixture is of a kind that this version does not cover.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    check_supported(manifest)
    settings = Settings.read(manifest["memory"]) if "memory" in manifest else None
    files = manifest.get("files") or {path.stem: path.name for path in folder.glob("*.safetensors")}
    part = {name: load_file(folder / path) for name, path in files.items()}
    inputs, results = part["inputs"], manifest["results"]
    tokens_BL = inputs["input_ids"]
    maskable_BL = inputs.get("labels", tokens_BL) != IGNORE_INDEX
    n_maskable = maskable_BL.sum().clamp(min=1)
    model = build_model(manifest["arch"], part["weights"], tokens_BL.shape[1])
    parameters = dict(model.named_parameters())

    plan = settings.plan if settings else Plan()
    anchor = published_anchor(plan, inputs)
    with_teacher = settings is not None and settings.loss.teacher is not None
    states = published_states(plan, with_teacher, inputs, anchor) if settings else []
    batch = micro_batch(
        tokens_BL,
        maskable_BL,
        torch.arange(len(tokens_BL)),
        anchor,
        states,
        manifest["mask_token_id"],
        with_teacher,
    )
    if "plain" in part:
        loss = outer_loss(model, batch, memory=None)[0] / n_maskable
        loss.backward()
        yield from compare_outer("plain", loss, model, batch, part["plain"], results, "plain_loss")
        yield from compare_norm("plain", parameters.values(), results, "plain_grad_norm")
    if settings is None:
        return

    if "anchor_mask" in inputs and ("t" in inputs or plan.trajectory != "anchor_only"):
        yield from compare_trajectory(settings, inputs, maskable_BL, anchor, states)
    fast: FastWeights = {}
    for name in manifest["adapters"]:
        layer, target = split_adapter(name)
        start = settings.start(part["weights"][f"{name}.weight"], inputs.get(f"A_init.{name}"))
        fast.setdefault(layer, {})[target] = start
    memory = Memory(
        first_layer=min(map(int, fast)),
        linears=(),
        adapter=settings.adapter,
        rank=settings.rank,
        alpha=settings.alpha,
        loss=settings.loss,
        optimiser=settings.optimiser,
        per_sample=False,
    )
    adapted: list[FastWeights] = []
    model.zero_grad()
    loss_sum, statistics = outer_loss(model, batch, memory, fast, on_adapted=adapted.append)
    assert statistics is not None
    loss = loss_sum / n_maskable
    loss.backward()

    outputs = part["outputs"]
    yield compare("inner losses", statistics.loss_KG[:, 0], results["inner_losses"], LOSS_ATOL, LOSS_RTOL)
    norms = statistics.grad_norm_KG[:, 0]
    yield compare("inner gradient norms", norms, results["inner_grad_norms"], GRADIENT_ATOL, NORM_RTOL)
    pairs = {}
    for name in manifest["adapters"]:
        layer, target = split_adapter(name)
        final = adapted[0][layer][target]
        for field, tensor in zip(final._fields, final, strict=True):
            if isinstance(tensor, Tensor):
                letter = field.split("_")[0]  # A, B or delta
                pairs[f"{letter} {name}"] = (tensor[0], outputs[f"{letter}_final.{name}"])
    yield worst("fast weights", pairs, FAST_ATOL)
    yield from compare_outer("outer", loss, model, batch, outputs, results, "outer_loss", adapted[0])
    yield from compare_norm("outer", parameters.values(), results, "outer_grad_norm_base")


def compare_norm(label: str, parameters: Iterable[Tensor], results: dict, key: str) -> Iterator[Line]:
    """The 2-norm of the gradient of all base parameters."""
    if key in results:
        norm = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()
        yield compare(f"{label} gradient norm", norm, results[key], GRADIENT_ATOL, NORM_RTOL)


def compare_outer(
    label: str,
    loss: Tensor,
    model: LLaDA,
    batch: MicroBatch,
    theirs: dict[str, Tensor],
    results: dict[str, Any],
    loss_key: str,
    fast: FastWeights | None = None,
) -> Iterator[Line]:
    """The loss, the logits at every position and every base gradient of an outer pass."""
    if loss_key in results:
        yield compare(f"{label} loss", loss, results[loss_key], LOSS_ATOL, LOSS_RTOL)
    if "logits" in theirs:
        with torch.no_grad():
            everywhere = torch.arange(batch.inputs[0].numel())
            plain = map_leaves(lambda x: x.detach(), fast) if fast else None
            logits = model(batch.inputs[0], everywhere, plain)
        yield compare(f"{label} logits", logits.view_as(theirs["logits"]), theirs["logits"], LOGITS_ATOL)
    pairs = {}
    parameters = dict(model.named_parameters())
    for key, tensor in theirs.items():
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            gradient = parameters[our_name(name)].grad
            pairs[name] = (torch.zeros_like(tensor) if gradient is None else gradient, tensor)
    if pairs:
        yield worst(f"{label} base gradients", pairs, GRADIENT_ATOL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="check_golden.py"
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="fixture directory")
    status = 0
    for folder in parser.parse_args(argv).folders:
        print(folder)
        try:
            for line in check(folder):
                print(line)
                if not line.ok:
                    status = max(status, 1)
        except Unsupported as reason:
            print(f"  {reason}")
            status = 2
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            print(f"  cannot read the fixture ({type(error).__name__}: {error}); see the format's README")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
