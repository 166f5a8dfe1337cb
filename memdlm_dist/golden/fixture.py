"""Fixture format of the published implementation: maps its names, settings, model and states to ours.

Shapes: B rows, L tokens, G experts of a linear (1 without experts), R rank, i and o input and output features.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from memdlm_dist.checkpoint.hugging_face_folder import check, read_into
from memdlm_dist.method.fast_weights import FastLinear, FastWeights, Full, LowRank
from memdlm_dist.method.inner_loss import InnerLoss, inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.trajectory import Plan, State
from memdlm_dist.models.linears import LINEARS, SHARED
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import RouterScore
from memdlm_dist.models.state_dict_adapters import (
    BackboneStateDictAdapter,
    LLaDA2StateDictAdapter,
    LLaDAMoEStateDictAdapter,
    LLaDAStateDictAdapter,
)

# Key of a manifest's `memory` section -> {published value: our value}. Other values are not supported.
CONFIG_VALUES: dict[str, dict[Any, Any]] = {
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
    "temperature": {1.0: 1.0},
    "dropout": {0.0: 0.0},
    "loss_norm": {"token": "token"},
}


class Unsupported(Exception):
    """Error for a fixture with an option that is not supported."""


def get_sd_adapter(arch: dict[str, Any], length: int) -> BackboneStateDictAdapter:
    """Return the state-dict adapter between our backbone and the tensor names of a manifest's architecture.

    Args:
        arch: `arch` section of the manifest.
        length: seq_len.

    Raises:
        Unsupported: no backbone has this architecture.
    """
    kind = arch["kind"]
    if kind not in ("dense", "moe", "llada8b", "llada2") or arch.get("tied"):
        raise Unsupported(
            f"architecture {kind!r}{' with tied embeddings' if arch.get('tied') else ''} is not supported yet."
        )
    sizes = {
        "dim": arch["hidden"],
        "n_layers": arch["layers"],
        "n_heads": arch["heads"],
        "n_kv_heads": arch.get("kv_heads"),
        "hidden_dim": arch["expert_intermediate" if kind in ("moe", "llada2") else "intermediate"],
        "vocab_size": arch["vocab"],
        "norm_eps": arch["eps"],
        "rope_theta": arch["rope_theta"],
        "max_seq_len": length,
    }
    if kind == "llada8b":
        return LLaDAStateDictAdapter(LLaDAArgs(**sizes))
    if kind == "dense":
        return DenseStateDictAdapter(LLaDAArgs(**sizes))
    if kind == "llada2":
        return LLaDA2StateDictAdapter(_llada2_args(arch, sizes))
    if arch.get("renormalise_top_k") or arch.get("shared_experts"):
        raise Unsupported("shared experts and renormalised expert weights are not supported yet.")
    return LLaDAMoEStateDictAdapter(
        LLaDAMoEArgs(
            **sizes, n_experts=arch["experts"], experts_per_token=arch["top_k"], qk_norm=arch.get("qk_norm", True)
        )
    )


def _llada2_args(arch: dict[str, Any], sizes: dict[str, Any]) -> LLaDA2Args:
    """Return the sizes of a `llada2` backbone from a manifest's architecture and the sizes that all kinds have."""
    if arch["router_score"] not in get_args(RouterScore):
        raise Unsupported(f"arch.router_score = {arch['router_score']!r} is not supported yet.")
    args = LLaDA2Args(
        **sizes,
        head_width=arch["head_dim"],
        partial_rotary_factor=arch["partial_rotary_factor"],
        qk_norm=arch["qk_norm"],
        n_experts=arch["experts"],
        experts_per_token=arch["top_k"],
        router_score=arch["router_score"],
        normalizes_scores=arch["renormalise_top_k"],
        score_scale=arch["routed_scaling_factor"],
        expert_groups=arch["n_group"],
        groups_per_token=arch["topk_group"],
        has_expert_bias=arch["expert_bias"],
        shared_hidden_dim=arch["shared_experts"] * arch["expert_intermediate"],
        n_dense_layers=arch["first_dense_layers"],
        dense_hidden_dim=arch["intermediate"],
    )
    if arch.get("rotary_dim", args.rotary_dim) != args.rotary_dim:
        raise Unsupported(
            f"arch.rotary_dim = {arch['rotary_dim']} is not head_dim x partial_rotary_factor ({args.rotary_dim})."
        )
    return args


class DenseStateDictAdapter(LLaDAMoEStateDictAdapter):
    """State-dict adapter of the fixtures' dense backbone: LLaDA-MoE's tensor names, with a dense FFN."""

    model_cls = LLaDA


def load_model(sd_adapter: BackboneStateDictAdapter, weights: Path) -> LLaDA:
    """Load the backbone from a safetensors file, through the same code as `checkpoint.initial_load_in_hf`.

    Raises:
        UserError: the weights do not fit the backbone.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").symlink_to(weights.resolve())
        check(folder, sd_adapter)
        model = sd_adapter.model_cls(sd_adapter.args)
        model.load_state_dict(read_into(model.state_dict(), sd_adapter, folder))
    return model


def parse_linear_name(name: str) -> tuple[str, str, int | None]:
    """Split a published linear's name into (layer, target, expert).

    `model.layers.3.mlp.gate_proj` -> ("3", "gate", None); `model.layers.3.mlp.experts.5.gate_proj` -> ("3", "gate", 5);
    `model.layers.3.mlp.shared_experts.gate_proj` -> ("3", "shared_gate", None).

    Raises:
        Unsupported: fast weights cannot attach to this linear.
    """
    layer, linear = name.removeprefix("model.layers.").split(".", 1)
    target = linear.split(".")[-1].removesuffix("_proj")
    if target not in LINEARS:
        raise Unsupported(f"fast weights on {linear!r} are not supported yet.")
    expert = re.search(r"experts\.(\d+)\.", linear)
    shared = SHARED if "shared_experts" in linear else ""
    return layer, shared + target, int(expert[1]) if expert else None


def find_fast_linear(fast: FastWeights, name: str) -> tuple[FastLinear, int]:
    """Return the fast weights of a published linear, and its index in their leading dimension: its expert, or 0."""
    layer, target, expert = parse_linear_name(name)
    return fast[layer][target], expert or 0


@dataclass(frozen=True)
class Settings:
    """A manifest's `memory` section, in our names."""

    plan: Plan
    loss: InnerLoss
    fast_weight_type: str
    optimiser: InnerSGD
    rank: int
    alpha: float
    epochs: int

    @classmethod
    def read(cls, section: dict[str, Any]) -> "Settings":
        """Parse a manifest's `memory` section.

        Raises:
            Unsupported: a value is not supported; the message names its key.
        """

        def config_value(key: str) -> Any:
            known_values = CONFIG_VALUES[key]
            value = section.get(key, next(iter(known_values)))
            if key == "loss_weight":
                value = value.partition(":")[0]  # the manifest has the formula after the name
            if value not in known_values:
                raise Unsupported(f"memory.{key} = {section[key]!r} is not supported yet.")
            return known_values[value]

        for key in CONFIG_VALUES:
            config_value(key)
        loss = config_value("loss")
        return cls(
            plan=Plan(
                trajectory=config_value("masking"),
                inner_steps=section["steps"],
                pre_anchor_scale=section.get("start_scale", Plan.pre_anchor_scale),
                progressive_end=section.get("prompt_mask_ratio", Plan.progressive_end),
                supervision=config_value("loss_mask_mode"),
                loss_weight=config_value("loss_weight"),
            ),
            loss=inner_loss(
                config_value("hidden_type") if loss == "hidden" else loss,
                config_value("student_hidden"),
                config_value("teacher_hidden"),
            ),
            fast_weight_type=config_value("adapter_type"),
            optimiser=InnerSGD(section["lr"], section["grad_clip"], config_value("grad_clip_scope")),
            rank=section.get("rank", 1),  # full-matrix fast weights have none
            alpha=section.get("alpha", 1.0),
            epochs=section.get("epochs", 1),
        )

    def initial_fast_weights(
        self, names: Sequence[str], weights: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> FastWeights:
        """Build the initial fast weights: A as drawn in the fixture, zeros for all other tensors.

        The experts of a linear are the entries of one tensor, in order.

        Args:
            names: published names of the adapted linears.
            weights: published base weights, by name.
            inputs: tensors of the fixture's inputs, among them `A_init.{name}`.
        """
        experts: dict[tuple[str, str], list[str]] = {}
        for name in names:
            layer, target, expert = parse_linear_name(name)
            entries = experts.setdefault((layer, target), [])
            assert expert in (None, len(entries)), name
            entries.append(name)
        fast: FastWeights = {}
        for (layer, target), entries in experts.items():
            weight_Goi = torch.stack([weights[f"{name}.weight"] for name in entries])
            if self.fast_weight_type == "full":
                new: FastLinear = Full(torch.zeros_like(weight_Goi))
            else:
                A_GRi = torch.stack([inputs[f"A_init.{name}"] for name in entries])
                B_GoR = torch.zeros(*weight_Goi.shape[:2], A_GRi.shape[1])
                new = LowRank(A_GRi, B_GoR, self.alpha / self.rank)
            fast.setdefault(layer, {})[target] = new
        return fast


def published_anchor(plan: Plan, inputs: dict[str, Tensor]) -> State:
    """Return the fixture's anchor; the last inner state if there is none (adaptation at inference)."""
    mask_BL = inputs["anchor_mask"] if "anchor_mask" in inputs else inputs["step_masks"][-1]
    t_B = inputs.get("t", torch.ones(len(mask_BL)))
    return State(mask_BL, mask_BL, plan.weight(t_B.double()))


def published_states(plan: Plan, with_teacher: bool, inputs: dict[str, Tensor], anchor: State) -> list[State]:
    """Return the fixture's K inner states."""
    masks = [anchor.mask_BL]

    def input_number(mask_BL: Tensor) -> int:
        # Equal states share a trunk pass.
        for index, other_BL in enumerate(masks):
            if torch.equal(other_BL, mask_BL):
                return index
        masks.append(mask_BL)
        return len(masks) - 1

    step_masks = list(inputs["step_masks"])
    next_masks: list[Tensor | None] = [*step_masks[1:], None]
    if with_teacher and "teacher_input_ids" in inputs:
        next_masks = [teacher_BL != inputs["input_ids"] for teacher_BL in inputs["teacher_input_ids"]]
    return [
        State(
            mask_BL,
            target_BL,
            plan.weight(t_B.double()),
            next_BL,
            input_number(mask_BL),
            None if next_BL is None else input_number(next_BL),
        )
        for mask_BL, target_BL, t_B, next_BL in zip(
            step_masks, inputs["step_loss_masks"], inputs["step_t"], next_masks, strict=True
        )
    ]
