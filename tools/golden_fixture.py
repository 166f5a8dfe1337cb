"""The format of the published implementation's fixtures, in our words: names, settings, model, states.

Shapes: B sequences, L tokens, S inner steps, R rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm_dist.fast_weights import FastLinear, Full, InnerSGD, LowRank
from memdlm_dist.inner_loss import InnerLoss, inner_loss
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.trajectory import PROGRESSIVE_RATIOS, Plan, State

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


class Unsupported(Exception):
    """The fixture is of a kind that this version does not cover."""


def check_supported(manifest: dict) -> None:
    arch = manifest["arch"]
    if arch["kind"] != "dense" or arch.get("tied"):
        raise Unsupported(
            f"architecture {arch['kind']!r}{' with tied embeddings' if arch.get('tied') else ''} is not supported yet"
        )


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

    def start(self, name: str, weight_oi: Tensor, inputs: dict[str, Tensor]) -> FastLinear:
        """The fast weights of one linear before the first step: the fixture's draw of A, zeros otherwise."""
        if self.adapter == "full":
            return Full(torch.zeros_like(weight_oi)[None])
        A_Ri = inputs[f"A_init.{name}"]
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
