"""Figures of a whole model from its benches, extrapolated in the number of layers if needed, and their gates."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The pattern excludes MIG slices of a GPU.
_H100_CLASS = re.compile(r"^(?!.*\bMIG\b).*\b(H100|H200|H800|GH200|G?B[123]00)\b")


@dataclass(frozen=True)
class Figures:
    """Figures of a model for the report's tables, by kind of step."""

    whole_layers: int
    layers: tuple[int, ...]  # measured numbers of layers
    tokens_per_second: dict[str, float]  # per device
    mfu: dict[str, float | None]
    over_plain: dict[str, float]
    peak_bytes: dict[str, float]

    @property
    def extrapolated(self) -> bool:
        """True if the figures are extrapolated from two depths."""
        return len(self.layers) > 1

    @property
    def of_whole_model(self) -> bool:
        """True if the figures describe all layers, measured or extrapolated."""
        return self.extrapolated or self.layers == (self.whole_layers,)

    @property
    def depth(self) -> str:
        """Measured depths in words, such as "8, 16 of 32 layers, extrapolated"."""
        text = f"{', '.join(map(str, self.layers))} of {self.whole_layers} layers"
        return f"{text}, extrapolated" if self.extrapolated else text


def figures(numbers: dict[str, Any]) -> Figures | None:
    """Return the figures of a bench section's numbers; None if nothing was measured.

    Step time, model FLOPs and memory of two depths are extrapolated linearly in the number of layers.
    """
    benches = sorted(numbers.get("benches", []), key=lambda bench: bench["layers"])
    if not benches:
        return None
    deepest, all_layers = benches[-1], numbers["whole_layers"]
    depths = tuple(bench["layers"] for bench in benches)

    def extrapolate(key: str, kind: str) -> float:
        value = float(deepest[key][kind])
        if len(benches) == 1:
            return value
        slope = (value - benches[0][key][kind]) / (depths[-1] - depths[0])
        return value + slope * (all_layers - depths[-1])

    kinds = list(deepest["step_seconds"])
    seconds = {kind: extrapolate("step_seconds", kind) for kind in kinds}
    flops = extrapolate("flops", "model")

    def mfu(kind: str) -> float | None:
        if deepest["mfu"][kind] is None:
            return None
        mfu_per_flops = deepest["mfu"][kind] * deepest["step_seconds"][kind] / deepest["flops"]["model"]
        return float(mfu_per_flops * flops / seconds[kind])

    def over_plain(kind: str) -> float:
        if len(benches) == 1 and kind != "plain":
            return float(deepest["ratio"][f"{kind}_over_plain"])  # the median of ratios within a round
        return seconds[kind] / seconds["plain"]

    tokens = {
        kind: deepest["tokens_per_second"][kind] * deepest["step_seconds"][kind] / deepest["ranks"] for kind in kinds
    }
    return Figures(
        whole_layers=all_layers,
        layers=depths,
        tokens_per_second={kind: tokens[kind] / seconds[kind] for kind in kinds},
        mfu={kind: mfu(kind) for kind in kinds},
        over_plain={kind: over_plain(kind) for kind in kinds},
        peak_bytes={kind: extrapolate("peak_bytes", kind) for kind in kinds},
    )


@dataclass(frozen=True)
class Gate:
    """Required bound on one figure of a whole model."""

    text: str
    section: str
    figure: Callable[[Figures], float]
    passes: Callable[[float], bool]
    form: str  # format string of the figure
    h100_class: bool  # the bound holds for H100-class GPUs only


GATES = (
    Gate(
        "plain full training of LLaDA-8B: at least 6,700 tokens/s/GPU on an H100-class GPU",
        "bench_8b", lambda x: x.tokens_per_second["plain"], lambda x: x >= 6700, "{:,.0f} tokens/s/GPU", True,
    ),
    Gate(
        "plain LoRA training of LLaDA-8B: at least 12,000 tokens/s/GPU on an H100-class GPU",
        "lora_8b", lambda x: x.tokens_per_second["plain"], lambda x: x >= 12000, "{:,.0f} tokens/s/GPU", True,
    ),
    Gate(
        "full training of LLaDA-8B with MemDLM: at most 1.5 times plain",
        "bench_8b", lambda x: x.over_plain["ours"], lambda x: x <= 1.5, "{:.3f} times plain", False,
    ),
)  # fmt: skip


def judge(gate: Gate, model_figures: Figures | None, machine: str, debug: bool) -> tuple[str, str]:
    """Return a gate's verdict (pass, fail or not measured), and its figure or the reason that it has none."""
    if debug:
        return "not measured", "debug sizes"
    if model_figures is None:
        return "not measured", f"section {gate.section} has no result"
    figure_text = gate.form.format(gate.figure(model_figures)) + (
        ", extrapolated" if model_figures.extrapolated else ""
    )
    if not model_figures.of_whole_model:
        return "not measured", f"{model_figures.depth}: {figure_text}"
    if gate.h100_class and not _H100_CLASS.search(machine):
        return "not measured", f"not an H100-class GPU: {figure_text}"
    return ("pass" if gate.passes(gate.figure(model_figures)) else "fail"), figure_text
