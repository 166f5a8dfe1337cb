"""Figures of a whole model from its benches, extrapolated in layers if need be, and the gates that they are to pass."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Not a MIG slice of one.
_H100_CLASS = re.compile(r"^(?!.*\bMIG\b).*\b(H100|H200|H800|GH200|G?B[123]00)\b")


@dataclass(frozen=True)
class Figures:
    """What a table says of a model, by kind of step."""

    whole_layers: int
    layers: tuple[int, ...]  # depths that were measured
    tokens_per_second: dict[str, float]  # of a device
    mfu: dict[str, float | None]
    over_plain: dict[str, float]
    peak_bytes: dict[str, float]

    @property
    def extrapolated(self) -> bool:
        return len(self.layers) > 1

    @property
    def of_whole_model(self) -> bool:
        return self.extrapolated or self.layers == (self.whole_layers,)

    @property
    def depth(self) -> str:
        said = f"{', '.join(map(str, self.layers))} of {self.whole_layers} layers"
        return f"{said}, extrapolated" if self.extrapolated else said


def figures(numbers: dict[str, Any]) -> Figures | None:
    """Return the figures of a bench section's numbers; None if nothing was measured.

    Step time, model FLOPs and memory of two depths are continued linearly in layers to the whole model.
    """
    benches = sorted(numbers.get("benches", []), key=lambda bench: bench["layers"])
    if not benches:
        return None
    last, whole = benches[-1], numbers["whole_layers"]
    depths = tuple(bench["layers"] for bench in benches)

    def at_whole(key: str, kind: str) -> float:
        above = float(last[key][kind])
        if len(benches) == 1:
            return above
        slope = (above - benches[0][key][kind]) / (depths[-1] - depths[0])
        return above + slope * (whole - depths[-1])

    kinds = list(last["step_seconds"])
    seconds = {kind: at_whole("step_seconds", kind) for kind in kinds}
    flops = at_whole("flops", "model")

    def mfu(kind: str) -> float | None:
        if last["mfu"][kind] is None:
            return None
        per_second = last["mfu"][kind] * last["step_seconds"][kind] / last["flops"]["model"]
        return float(per_second * flops / seconds[kind])

    def over_plain(kind: str) -> float:
        if len(benches) == 1 and kind != "plain":
            return float(last["ratio"][f"{kind}_over_plain"])  # within a round
        return seconds[kind] / seconds["plain"]

    tokens = {kind: last["tokens_per_second"][kind] * last["step_seconds"][kind] / last["ranks"] for kind in kinds}
    return Figures(
        whole_layers=whole,
        layers=depths,
        tokens_per_second={kind: tokens[kind] / seconds[kind] for kind in kinds},
        mfu={kind: mfu(kind) for kind in kinds},
        over_plain={kind: over_plain(kind) for kind in kinds},
        peak_bytes={kind: at_whole("peak_bytes", kind) for kind in kinds},
    )


@dataclass(frozen=True)
class Gate:
    """A bound that a figure of a whole model is to keep."""

    text: str
    section: str
    figure: Callable[[Figures], float]
    passes: Callable[[float], bool]
    form: str  # of the figure
    h100_class: bool  # the bound is for such a device


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


def judge(gate: Gate, found: Figures | None, machine: str, debug: bool) -> tuple[str, str]:
    """Return a gate's verdict (pass, fail or not measured), and its figure or why there is none."""
    if debug:
        return "not measured", "debug sizes"
    if found is None:
        return "not measured", f"section {gate.section} has no result"
    shown = gate.form.format(gate.figure(found)) + (", extrapolated" if found.extrapolated else "")
    if not found.of_whole_model:
        return "not measured", f"{found.depth}: {shown}"
    if gate.h100_class and not _H100_CLASS.search(machine):
        return "not measured", f"not an H100-class GPU: {shown}"
    return ("pass" if gate.passes(gate.figure(found)) else "fail"), shown
