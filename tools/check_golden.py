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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.bilevel import Memory, outer_loss
from memdlm_dist.diffusion import noise_at
from memdlm_dist.fast_weights import FastWeights, LowRank, map_leaves
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.trajectory import IGNORE_INDEX, MicroBatch, State, view

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
TARGETS = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}

# The settings that this version covers; every other value is another issue's.
SUPPORTED = {
    "masking": ("pmc",),
    "adapter_type": ("lora",),
    "loss": ("ce",),
    "loss_mask_mode": ("student_masked",),
    "epochs": (1,),
    "grad_clip_scope": ("each parameter tensor separately",),
}
SCHEDULER_WEIGHT = "scheduler: 1/(t+1e-6)"

# Losses agree to float32 rounding of sums; gradients, fast weights and logits to what an independent
# float32 recomputation of the fixtures differed by, with a margin (logits reach 15).
LOSS_RTOL, NORM_RTOL, GRADIENT_ATOL, FAST_ATOL, LOGITS_ATOL = 2e-6, 2e-6, 1e-5, 1e-6, 5e-5


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
    if arch["kind"] != "dense":
        raise Unsupported(f"architecture {arch['kind']!r} is not supported yet")
    model = LLaDA(
        LLaDAArgs(
            dim=arch["hidden"],
            n_layers=arch["layers"],
            n_heads=arch["heads"],
            n_kv_heads=arch["kv_heads"],
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


def injected_fast_weights(manifest: dict, inputs: dict[str, Tensor]) -> FastWeights:
    """The fixture's draw of A and zeros for B: one set for the whole batch."""
    settings = manifest["memory"]
    fast: FastWeights = {}
    for name in manifest["adapters"]:
        A_Ri = inputs[f"A_init.{name}"]
        layer, target = split_adapter(name)
        out = manifest["arch"]["hidden" if target == "down" else "intermediate"]
        pair = LowRank(A_Ri[None], torch.zeros(1, out, len(A_Ri)), settings["alpha"] / settings["rank"])
        fast.setdefault(layer, {})[target] = pair
    return fast


def injected_batch(manifest: dict, inputs: dict[str, Tensor]) -> MicroBatch:
    """The fixture's masks and noise levels as a micro-batch."""
    mask_id, tokens_BL = manifest["mask_token_id"], inputs["input_ids"]
    uniform = manifest.get("memory", {}).get("loss_weight", SCHEDULER_WEIGHT) != SCHEDULER_WEIGHT

    def build(mask_BL: Tensor, target_BL: Tensor, t_B: Tensor) -> State:
        weight = noise_at(t_B.double(), weight="uniform" if uniform else "schedule").weight
        return State(mask_BL, target_BL, weight.float())

    anchor_BL = inputs["anchor_mask"]
    states = zip(*(inputs.get(n, ()) for n in ("step_masks", "step_loss_masks", "step_t")), strict=True)
    return MicroBatch(
        anchor=view(build(anchor_BL, anchor_BL, inputs["t"]), tokens_BL, mask_id),
        inner=tuple(view(build(*state), tokens_BL, mask_id) for state in states),
        sample_ids_B=torch.arange(len(tokens_BL)),
        mask_ratio=anchor_BL.float().mean(),
    )


def check_supported(manifest: dict) -> None:
    settings = manifest.get("memory")
    if settings is None:
        raise Unsupported(f"case {manifest.get('case')!r} is not a training case and is not supported yet")
    for key, values in SUPPORTED.items():
        if settings.get(key, values[0]) not in values:
            raise Unsupported(f"memory.{key} = {settings[key]!r} is not supported yet")


def check(folder: Path) -> Iterator[Line]:
    """Compare one fixture; yields a line per quantity.

    Raises:
        Unsupported: the fixture is of a kind that this version does not cover.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    check_supported(manifest)
    part = {name: load_file(folder / path) for name, path in manifest["files"].items()}
    inputs, outputs, results = part["inputs"], part["outputs"], manifest["results"]
    model = build_model(manifest["arch"], part["weights"], inputs["input_ids"].shape[1])
    n_maskable = (inputs["labels"] != IGNORE_INDEX).sum()
    batch = injected_batch(manifest, inputs)
    parameters = dict(model.named_parameters())

    if "plain" in part:
        loss = outer_loss(model, batch, memory=None)[0] / n_maskable
        loss.backward()
        yield from compare_outer("plain", loss, model, batch, parameters, part["plain"], results["plain_loss"])

    settings = manifest["memory"]
    fast = injected_fast_weights(manifest, inputs)
    memory = Memory(
        first_layer=min(map(int, fast)),
        linears=(),
        rank=settings["rank"],
        alpha=settings["alpha"],
        learning_rate=settings["lr"],
        clip=settings["grad_clip"],
        per_sample=False,
    )
    adapted: list[FastWeights] = []
    model.zero_grad()
    loss_sum, statistics = outer_loss(model, batch, memory, fast, on_adapted=adapted.append)
    assert statistics is not None
    loss = loss_sum / n_maskable
    loss.backward()

    yield compare("inner losses", statistics.loss_KG[:, 0], results["inner_losses"], rtol=LOSS_RTOL)
    yield compare("inner gradient norms", statistics.grad_norm_KG[:, 0], results["inner_grad_norms"], rtol=NORM_RTOL)
    pairs = {}
    for name in manifest["adapters"]:
        layer, target = split_adapter(name)
        final = adapted[0][layer][target]
        pairs[f"A {name}"] = (final.A_GRi[0], outputs[f"A_final.{name}"])
        pairs[f"B {name}"] = (final.B_GoR[0], outputs[f"B_final.{name}"])
    yield worst("fast weights", pairs, FAST_ATOL)
    yield from compare_outer("outer", loss, model, batch, parameters, outputs, results["outer_loss"], adapted[0])
    norm = torch.stack([p.grad.double().norm() for p in parameters.values() if p.grad is not None]).norm()
    yield compare("outer gradient norm", norm, results["outer_grad_norm_base"], rtol=NORM_RTOL)


def compare_outer(
    label: str,
    loss: Tensor,
    model: LLaDA,
    batch: MicroBatch,
    parameters: dict[str, torch.nn.Parameter],
    theirs: dict[str, Tensor],
    their_loss: float,
    fast: FastWeights | None = None,
) -> Iterator[Line]:
    """The loss, the logits at every position and every base gradient of an outer pass."""
    yield compare(f"{label} loss", loss, their_loss, rtol=LOSS_RTOL)
    with torch.no_grad():
        everywhere = torch.arange(batch.anchor.tokens_BL.numel())
        plain = map_leaves(lambda x: x.detach(), fast) if fast else None
        logits = model(batch.anchor.tokens_BL, everywhere, plain)
    if "logits" in theirs:
        yield compare(f"{label} logits", logits.view_as(theirs["logits"]), theirs["logits"], atol=LOGITS_ATOL)
    pairs = {}
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
        except (OSError, KeyError, json.JSONDecodeError) as error:
            print(f"  cannot read the fixture ({type(error).__name__}: {error}); see the format's README")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
