"""Golden checks of training: our results against fixtures of the published reference implementation.

Shapes: B rows, L tokens, K inner steps.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.golden.fixture import (
    Settings,
    find_fast_linear,
    get_sd_adapter,
    load_model,
    published_anchor,
    published_states,
)
from memdlm_dist.golden.sampler_check import sampler_differences
from memdlm_dist.method.bilevel import Memory, outer_loss
from memdlm_dist.method.fast_weight_tree import map_leaves
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.micro_batch import MicroBatch, micro_batch
from memdlm_dist.method.trajectory import IGNORE_INDEX, Draw, Plan, State
from memdlm_dist.models import row_slices
from memdlm_dist.models.attention import TokenContext, block_causal_mask
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter

# Tolerances. Losses: float32 rounding of sums; the absolute tolerance is for cosine distances near 0, which are
# differences of two numbers near 1. Gradients, fast weights and logits: the differences of an independent float32
# recomputation of the fixtures, with a margin (logits reach 15). Norms: the tolerance of gradients.
LOSS_RTOL, LOSS_ATOL, NORM_RTOL, GRADIENT_ATOL, FAST_ATOL, LOGITS_ATOL = 2e-6, 1e-6, 2e-6, 1e-5, 1e-6, 5e-5


@dataclass(frozen=True)
class Comparison:
    """Result of comparing one quantity; its text is one line of the report."""

    quantity: str
    absolute: float  # largest absolute difference
    relative: float  # largest absolute difference over the largest absolute value
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "NOT OK"
        return f"  {self.quantity:<34} abs {self.absolute:9.2e}  rel {self.relative:9.2e}  {verdict}"


def compare(quantity: str, ours, theirs, atol: float = 0.0, rtol: float = 0.0) -> Comparison:
    """Compare a quantity with its published value; ok if |ours - theirs| <= atol + rtol |theirs| everywhere."""
    ours, theirs = (torch.as_tensor(x).detach().cpu().double() for x in (ours, theirs))
    if ours.shape != theirs.shape:
        return Comparison(f"{quantity} (shape {tuple(ours.shape)})", float("inf"), float("inf"), False)
    if not theirs.numel():
        return Comparison(quantity, 0.0, 0.0, True)
    difference = (ours - theirs).abs()
    relative = difference.max() / theirs.abs().max().clamp(min=1e-30)
    ok = bool((difference <= atol + rtol * theirs.abs()).all())
    return Comparison(quantity, difference.max().item(), relative.item(), ok)


def worst(quantity: str, pairs: dict[str, tuple[Tensor, Tensor]], atol: float) -> Comparison:
    """Compare many tensors and return the comparison with the largest difference.

    Args:
        pairs: name -> (our tensor, published tensor).
    """
    lines = [compare(f"{quantity} ({name})", *pair, atol=atol) for name, pair in pairs.items()]
    return max(lines, key=lambda line: (not line.ok, line.absolute))


def compare_trajectory(
    settings: Settings, inputs: dict[str, Tensor], maskable_BL: Tensor, anchor: State, published: list[State]
) -> Iterator[Comparison]:
    """Compare our trajectory with the fixture's: masks, scored tokens and loss weights.

    Tokens that are masked in more of the fixture's states get smaller random numbers. Our masks then equal the
    fixture's if the numbers of masked tokens are equal.

    Args:
        published: the fixture's inner states.
    """
    n_masked_BL = torch.stack([anchor.mask_BL, *(state.mask_BL for state in published)]).sum(0)
    u_BL = torch.where(n_masked_BL > 0, 0.1 / n_masked_BL.clamp(min=1), 0.9).double()
    # The progressive trajectory is independent of the anchor.
    n_masked_BL = n_masked_BL - anchor.mask_BL.long()
    v_BL = torch.where(n_masked_BL > 0, 0.1 / n_masked_BL.clamp(min=1), 0.9).double()
    t_B = inputs.get("t", torch.ones(len(maskable_BL))).double()
    ours = settings.plan.states(Draw(maskable_BL, t_B, u_BL, v_BL), anchor)

    def zeros_if_clean(mask_BL: Tensor | None) -> Tensor:
        return torch.zeros_like(maskable_BL) if mask_BL is None else mask_BL

    for quantity, select in {
        "masks": lambda state: state.mask_BL,
        "targets": lambda state: state.target_BL,
        "teacher's masks": lambda state: zeros_if_clean(state.next_BL),
        # The weight of a row without scored tokens is never read.
        "weights": lambda state: torch.where(state.target_BL.any(1), state.weight_U, 0.0),
    }.items():
        if quantity == "teacher's masks" and settings.loss.teacher is None:
            continue
        mine, theirs = (torch.stack([select(state) for state in states]) for states in (ours, published))
        yield compare(f"trajectory: {quantity}", mine, theirs, rtol=LOSS_RTOL if quantity == "weights" else 0.0)


def check(folder: Path, device: str = "cpu") -> Iterator[Comparison]:
    """Check one fixture and yield a comparison per quantity; quantities that the fixture lacks are skipped.

    Args:
        folder: fixture directory.
        device: device of the model; fixtures of the sampler always run on the CPU.

    Raises:
        Unsupported: the fixture uses an option that is not supported.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if "sampler" in manifest:
        for quantity, differing in sampler_differences(folder, manifest):
            yield Comparison(quantity, float(differing), float(differing > 0), not differing)
        return
    settings = Settings.read(manifest["memory"]) if "memory" in manifest else None
    files = manifest.get("files") or {path.stem: path.name for path in folder.glob("*.safetensors")}
    tensors = {name: load_file(folder / path) for name, path in files.items()}
    inputs, results = tensors["inputs"], manifest.get("results", {})
    tokens_BL = inputs["input_ids"]
    sd_adapter = get_sd_adapter(manifest["arch"], tokens_BL.shape[1])
    model = load_model(sd_adapter, folder / files["weights"]).to(device)
    parameters = dict(model.named_parameters())
    if "anchor_mask" not in inputs and "memory" not in manifest:
        yield from compare_forward(model, inputs, tensors["outputs"], manifest.get("block_length"))
        if "router_row" in manifest:
            yield from compare_routers(model, inputs, tensors["outputs"], manifest)
        return
    maskable_BL = inputs.get("labels", tokens_BL) != IGNORE_INDEX
    n_maskable = maskable_BL.sum().clamp(min=1)
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
    ).to(device)
    if "plain" in tensors:
        loss = outer_loss(model, batch, memory=None)[0] / n_maskable
        loss.backward()
        yield from compare_outer("plain", loss, model, sd_adapter, batch, tensors["plain"], results, "plain_loss")
        yield from compare_norm("plain", parameters.values(), results, "plain_grad_norm")
    if settings is None:
        return

    if "anchor_mask" in inputs and ("t" in inputs or plan.trajectory != "anchor_only"):
        yield from compare_trajectory(settings, inputs, maskable_BL, anchor, states)
    fast = settings.initial_fast_weights(manifest["adapters"], tensors["weights"], inputs)
    fast = map_leaves(lambda x: x.to(device), fast)
    memory = Memory(
        first_layer=min(map(int, fast)),
        linears=(),
        fast_weight_type=settings.fast_weight_type,
        rank=settings.rank,
        alpha=settings.alpha,
        loss=settings.loss,
        optimiser=settings.optimiser,
        samples_per_set=None,
        inner_epochs=settings.epochs,
    )
    adapted: list[FastWeights] = []
    model.zero_grad()
    loss_sum, statistics = outer_loss(model, batch, memory, fast, on_adapted=adapted.append)
    assert statistics is not None
    loss = loss_sum / n_maskable
    loss.backward()

    outputs = tensors["outputs"]
    yield compare("inner losses", statistics.loss_KG[:, 0], results["inner_losses"], LOSS_ATOL, LOSS_RTOL)
    norms = statistics.grad_norm_KG[:, 0]
    yield compare("inner gradient norms", norms, results["inner_grad_norms"], GRADIENT_ATOL, NORM_RTOL)
    pairs = {}
    for name in manifest["adapters"]:
        final, entry = find_fast_linear(adapted[0], name)
        for field, tensor in zip(final._fields, final, strict=True):
            if isinstance(tensor, Tensor):
                letter = field.split("_")[0]  # A, B or delta
                pairs[f"{letter} {name}"] = (tensor[entry], outputs[f"{letter}_final.{name}"])
    yield worst("fast weights", pairs, FAST_ATOL)
    yield from compare_outer("outer", loss, model, sd_adapter, batch, outputs, results, "outer_loss", adapted[0])
    yield from compare_norm("outer", parameters.values(), results, "outer_grad_norm_base")


def compare_forward(
    model: LLaDA, inputs: dict[str, Tensor], theirs: dict[str, Tensor], block: int | None = None
) -> Iterator[Comparison]:
    """Compare the logits of a forward pass at every position; with a padding mask, at the attended positions only.

    Args:
        block: tokens of a block of block-causal attention; None if the fixture has no such logits.
    """
    tokens_BL = inputs["input_ids"]
    device = model.tok_embeddings.weight.device
    tokens_BL = tokens_BL.to(device)
    all_positions = torch.arange(tokens_BL.numel(), device=device)
    attended_BL = torch.ones_like(tokens_BL).bool()
    whole = model.context(tokens_BL.shape[1])
    cases = {"logits": (whole, attended_BL)}
    if "attention_mask_padded" in inputs:
        padded_BL = inputs["attention_mask_padded"].bool().to(device)
        cases["logits_padded"] = (model.context(tokens_BL.shape[1], attended_BL=padded_BL), padded_BL)
    if block is not None:
        cases["logits_block_causal"] = (_context(model, tokens_BL.shape[1], block), attended_BL)
    for name, (context, chosen) in cases.items():
        if name in theirs:
            with torch.no_grad():
                logits = model(tokens_BL, all_positions, context=context).view_as(theirs[name])
            yield compare(name, logits[chosen], theirs[name][chosen.cpu()], LOGITS_ATOL)


@torch.no_grad()
def compare_routers(
    model: LLaDA, inputs: dict[str, Tensor], theirs: dict[str, Tensor], manifest: dict[str, Any]
) -> Iterator[Comparison]:
    """Compare logits, selected experts and weights of all routers for one row, under full and block-causal attention.

    The experts of a token are compared as a set, with the weight of each.
    """
    tokens_1L = inputs["input_ids"][manifest["router_row"]].unsqueeze(0).to(model.tok_embeddings.weight.device)
    length, n_experts = tokens_1L.shape[1], manifest["arch"]["experts"]
    for suffix, block in (("", None), ("_block_causal", manifest.get("block_length"))):
        if f"router_logits{suffix}" not in theirs:
            continue
        logits: list[Tensor] = []
        weights: list[Tensor] = []
        with routers_recorded(model, logits, weights):
            model(tokens_1L, torch.zeros_like(tokens_1L[0, :1]), context=_context(model, length, block))
        published = theirs[f"router_weights{suffix}"]
        expert = theirs[f"router_experts{suffix}"].long()
        by_expert = published.new_zeros(*published.shape[:2], n_experts).scatter(2, expert, published)
        yield compare(f"router logits{suffix}", torch.stack(logits), theirs[f"router_logits{suffix}"], LOGITS_ATOL)
        yield compare(f"router weights{suffix}", torch.stack(weights), by_expert, FAST_ATOL)


@contextmanager
def routers_recorded(model: LLaDA, logits: list[Tensor], weights: list[Tensor]) -> Iterator[None]:
    """Append the outputs of every router to two lists in this context: logits, and weights by expert, `[L, E]` each."""

    def record(router: Any, arguments: Any, outputs: tuple[Tensor, ...]) -> None:
        score_Nk, expert_Nk, _ = outputs
        weights.append(score_Nk.new_zeros(len(score_Nk), router.num_experts).scatter(1, expert_Nk, score_Nk))

    handles = []
    for layer in model.layers.values():
        block: Any = layer
        if block.moe_enabled:
            router = block.moe.router
            handles.append(router.gate.register_forward_hook(lambda gate, arguments, out: logits.append(out)))
            handles.append(router.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _context(model: LLaDA, length: int, block: int | None) -> TokenContext:
    """Return the context of whole rows, under block-causal attention unless `block` is None."""
    context = model.context(length)
    if block is None:
        return context
    return context._replace(mask=block_causal_mask(length, block).to(model.tok_embeddings.weight.device))


def compare_norm(label: str, parameters: Iterable[Tensor], results: dict, key: str) -> Iterator[Comparison]:
    """Compare the 2-norm of the gradient over all base parameters."""
    if key in results:
        norm = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()
        yield compare(f"{label} gradient norm", norm, results[key], GRADIENT_ATOL, NORM_RTOL)


def compare_outer(
    label: str,
    loss: Tensor,
    model: LLaDA,
    sd_adapter: BackboneStateDictAdapter,
    batch: MicroBatch,
    theirs: dict[str, Tensor],
    results: dict[str, Any],
    loss_key: str,
    fast: FastWeights | None = None,
) -> Iterator[Comparison]:
    """Compare loss, logits at every position and all base gradients of an outer pass."""
    if loss_key in results:
        yield compare(f"{label} loss", loss, results[loss_key], LOSS_ATOL, LOSS_RTOL)
    if "logits" in theirs:
        with torch.no_grad():
            all_positions = torch.arange(batch.inputs[0].numel(), device=batch.inputs[0].device)
            detached = map_leaves(lambda x: x.detach(), fast) if fast else None
            logits = model(batch.inputs[0], all_positions, detached)
        yield compare(f"{label} logits", logits.view_as(theirs["logits"]), theirs["logits"], LOGITS_ATOL)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    gradients = row_slices.joined(sd_adapter.to_hf(grads))
    pairs = {
        key.removeprefix("grad."): (gradients[key.removeprefix("grad.")], tensor)
        for key, tensor in theirs.items()
        if key.startswith("grad.")
    }
    if pairs:
        yield worst(f"{label} base gradients", pairs, GRADIENT_ATOL)
