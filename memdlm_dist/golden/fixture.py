"""The format of the published implementation's fixtures, in our words: names, settings, model, states.

Shapes: B sequences, L tokens, S inner steps, R rank.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdlm_dist.checkpoint.hugging_face_folder import check, read_into
from memdlm_dist.method.fast_weights import FastLinear, FastWeights, Full, LowRank
from memdlm_dist.method.inner_loss import InnerLoss, inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.trajectory import PROGRESSIVE_RATIOS, Plan, State
from memdlm_dist.models.linears import LINEARS
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.state_dict_adapters import (
    BackboneStateDictAdapter,
    LLaDAMoEStateDictAdapter,
    LLaDAStateDictAdapter,
)

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


class Unsupported(Exception):
    """The fixture is of a kind that this version does not cover."""


def get_sd_adapter(arch: dict[str, Any], length: int) -> BackboneStateDictAdapter:
    """The architecture of a manifest as one of our backbones under its published names.

    Raises:
        Unsupported: if it is none of ours.
    """
    kind = arch["kind"]
    if kind not in ("dense", "moe", "llada8b") or arch.get("tied"):
        raise Unsupported(
            f"architecture {kind!r}{' with tied embeddings' if arch.get('tied') else ''} is not supported yet"
        )
    sizes = {
        "dim": arch["hidden"],
        "n_layers": arch["layers"],
        "n_heads": arch["heads"],
        "n_kv_heads": arch.get("kv_heads"),
        "hidden_dim": arch["expert_intermediate" if kind == "moe" else "intermediate"],
        "vocab_size": arch["vocab"],
        "norm_eps": arch["eps"],
        "rope_theta": arch["rope_theta"],
        "max_seq_len": length,
    }
    if kind == "llada8b":
        return LLaDAStateDictAdapter(LLaDAArgs(**sizes))
    if kind == "dense":
        return PlainAdapter(LLaDAArgs(**sizes))
    if arch.get("renormalise_top_k") or arch.get("shared_experts"):
        raise Unsupported("experts whose weights are normalised again, or that are shared, are not supported yet")
    return LLaDAMoEStateDictAdapter(
        LLaDAMoEArgs(
            **sizes, n_experts=arch["experts"], experts_per_token=arch["top_k"], qk_norm=arch.get("qk_norm", True)
        )
    )


class PlainAdapter(LLaDAMoEStateDictAdapter):
    """The names of the fixtures' dense backbone: those of LLaDA-MoE, with one FFN for all tokens."""

    model_cls = LLaDA


def load_model(sd_adapter: BackboneStateDictAdapter, weights: Path) -> LLaDA:
    """The backbone with a file of weights, through the import that `checkpoint.initial_load_in_hf` takes.

    Raises:
        UserError: if they do not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").symlink_to(weights.resolve())
        check(folder, sd_adapter)
        model = sd_adapter.model_cls(sd_adapter.args)
        model.load_state_dict(read_into(model.state_dict(), sd_adapter, folder))
    return model


def split_adapter(name: str) -> tuple[str, str, int | None]:
    """`model.layers.3.mlp.gate_proj` -> ("3", "gate", None); `...mlp.experts.5.gate_proj` -> ("3", "gate", 5)."""
    layer, linear = name.removeprefix("model.layers.").split(".", 1)
    target = linear.split(".")[-1].removesuffix("_proj")
    if target not in LINEARS:
        raise Unsupported(f"fast weights on {linear!r} are not supported yet")
    expert = re.search(r"experts\.(\d+)\.", linear)
    return layer, target, int(expert[1]) if expert else None


def find_leaf(fast: FastWeights, name: str) -> tuple[FastLinear, int]:
    """The fast weights of one adapted linear: which of the tree's, and which entry of its tensors."""
    layer, target, expert = split_adapter(name)
    return fast[layer][target], expert or 0


@dataclass(frozen=True)
class Settings:
    """A manifest's `memory` section in our words."""

    plan: Plan
    loss: InnerLoss
    fast_weight_type: str
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
            fast_weight_type=word("adapter_type"),
            optimiser=InnerSGD(section["lr"], section["grad_clip"], word("grad_clip_scope")),
            rank=section.get("rank", 1),  # full-matrix fast weights have none
            alpha=section.get("alpha", 1.0),
            last_ratio=section.get("prompt_mask_ratio", PROGRESSIVE_RATIOS[1]),
        )

    def start(self, names: Sequence[str], weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> FastWeights:
        """The fast weights before the first step: the fixture's draw of A, zeros otherwise.

        Experts are entries of one tensor, in their order.
        """
        found: dict[tuple[str, str], list[str]] = {}
        for name in names:
            layer, target, expert = split_adapter(name)
            same = found.setdefault((layer, target), [])
            assert expert in (None, len(same)), name
            same.append(name)
        fast: FastWeights = {}
        for (layer, target), same in found.items():
            weight_Goi = torch.stack([weights[f"{name}.weight"] for name in same])
            if self.fast_weight_type == "full":
                new: FastLinear = Full(torch.zeros_like(weight_Goi))
            else:
                A_GRi = torch.stack([inputs[f"A_init.{name}"] for name in same])
                B_GoR = torch.zeros(*weight_Goi.shape[:2], A_GRi.shape[1])
                new = LowRank(A_GRi, B_GoR, self.alpha / self.rank)
            fast.setdefault(layer, {})[target] = new
        return fast


def published_anchor(plan: Plan, inputs: dict[str, Tensor]) -> State:
    """The fixture's outer state; where it has none (adaptation at inference), the last inner one."""
    mask_BL = inputs["anchor_mask"] if "anchor_mask" in inputs else inputs["step_masks"][-1]
    t_B = inputs.get("t", torch.ones(len(mask_BL)))
    return State(mask_BL, mask_BL, plan.weight(t_B.double()))


def published_states(plan: Plan, with_teacher: bool, inputs: dict[str, Tensor], anchor: State) -> list[State]:
    """The fixture's masks, targets and noise levels of every inner step."""
    masks = [anchor.mask_BL]

    def number(mask_BL: Tensor) -> int:
        # States that are the same share their pass of the trunk.
        for known, other_BL in enumerate(masks):
            if torch.equal(other_BL, mask_BL):
                return known
        masks.append(mask_BL)
        return len(masks) - 1

    step_masks = list(inputs["step_masks"])
    following: list[Tensor | None] = [*step_masks[1:], None]
    if with_teacher and "teacher_input_ids" in inputs:
        following = [teacher_BL != inputs["input_ids"] for teacher_BL in inputs["teacher_input_ids"]]
    return [
        State(
            mask_BL,
            target_BL,
            plan.weight(t_B.double()),
            next_BL,
            number(mask_BL),
            None if next_BL is None else number(next_BL),
        )
        for mask_BL, target_BL, t_B, next_BL in zip(
            step_masks, inputs["step_loss_masks"], inputs["step_t"], following, strict=True
        )
    ]
