"""Draw the pictures of the documentation in docs/pictures: a training step, the rooms, and the relative write.

    python docs/draw_pictures.py

The rooms and their order come from the import-linter layers in pyproject.toml. The colours follow the reader's light or
dark colour scheme.
"""

import math
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; }
  .note { font-size: 12.5px; fill: #57606a; }
  .page { fill: #ffffff; stroke: #d0d7de; }
  .plain { fill: #f6f8fa; stroke: #8c959f; }
  .base { fill: #ddf4ff; stroke: #0969da; }
  .memory { fill: #fff1e5; stroke: #bc4c00; }
  .lane { fill: none; stroke: #d0d7de; stroke-dasharray: 4 4; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.5; }
  .memory-arrow { fill: none; stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 6 4; }
  .head { fill: #57606a; }
  .memory-head { fill: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .note { fill: #b1bac4; }
    .page { fill: #0d1117; stroke: #3d444d; }
    .plain { fill: #161b22; stroke: #6e7681; }
    .base { fill: #0c2d6b; stroke: #58a6ff; }
    .memory { fill: #5a1e02; stroke: #f0883e; }
    .lane { stroke: #3d444d; }
    .arrow { stroke: #9198a1; }
    .memory-arrow { stroke: #f0883e; }
    .head { fill: #9198a1; }
    .memory-head { fill: #f0883e; }
  }
"""

# The room's contents, in the words of docs/architecture.md.
ROOMS = {
    "tools": "commands: parse arguments, call one room, print",
    "train": "entry point of training",
    "evaluation": "needle tasks, exposure bias, lm-evaluation-harness",
    "golden": "checks against the published numbers",
    "inference": "trained model, decoding",
    "performance": "estimates, bench",
    "training": "trainer and its step, objective, validation, consensus",
    "config": "TOML sections, parsing, checks",
    "data": "corpus, shards, micro-batches",
    "checkpoint": "saving, loading, Hugging Face",
    "models": "backbones, parallel layout, FLOPs",
    "method": "trajectory, inner loop, bi-level step",
    "runtime": "device, signals, hangs, storage, launcher",
    "compat": "private names and patches of other projects",
    "errors": "the error that is one sentence to the user",
}


# Relative write in percent by width, mean over gate, up and down, from `tools/bench.py write` (docs/performance.md).
WRITES: dict[str, dict[int, float]] = {
    "published rate": {128: 3.86, 256: 2.62, 512: 1.95, 1024: 1.52, 2048: 1.39, 4096: 1.32},
    "scaled rates": {128: 0.99, 256: 1.05, 512: 1.08, 1024: 1.16, 2048: 1.39},
}
CLIPPED_WRITES: dict[str, dict[int, float]] = {
    "published rate, all steps clipped": {128: 11.41, 256: 9.30, 512: 7.74, 1024: 6.61, 2048: 5.78, 4096: 5.13},
    "scaled rates, all steps clipped": {128: 5.47, 256: 5.61, 512: 5.65, 1024: 5.73, 2048: 5.78},
}


class Picture:
    """An SVG document that boxes, arrows and texts are added to; coordinates are in pixels."""

    def __init__(self, width: int, height: int, title: str):
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "<defs>",
        ]
        for name in ("head", "memory-head"):
            self._parts.append(
                f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                f'markerUnits="userSpaceOnUse" orient="auto"><path class="{name}" d="M0 0 L8 4 L0 8 z"/></marker>'
            )
        self._parts.append("</defs>")
        self.box("page", 0.5, 0.5, width - 1, height - 1)

    def box(self, kind: str, x: float, y: float, width: float, height: float, *lines: str) -> None:
        """Add a rounded box with centred lines; the first one is bold."""
        self._parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * i, line, "title" if i == 0 else "note", "middle")

    def text(self, x: float, y: float, line: str, kind: str = "note", anchor: str = "start") -> None:
        """Add one line of text; y is its baseline."""
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(line)}</text>')

    def arrow(self, *points: tuple[float, float], memory: bool = False) -> None:
        """Add an arrow along points; `memory` marks the way of the fast weights."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        kind, head = ("memory-arrow", "memory-head") if memory else ("arrow", "head")
        self._parts.append(f'<path class="{kind}" d="M{path}" marker-end="url(#{head})"/>')

    def line(self, kind: str, *points: tuple[float, float]) -> None:
        """Add a line through points."""
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._parts.append(f'<path class="{kind}" d="M{path}"/>')

    def curve(self, *points: tuple[float, float], memory: bool = False) -> None:
        """Add a line through points, with a dot at each."""
        kind, dot = ("memory-arrow", "memory-head") if memory else ("arrow", "head")
        self.line(kind, *points)
        self._parts += [f'<circle class="{dot}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]

    def svg(self) -> str:
        """Return the document."""
        return "\n".join([*self._parts, "</svg>", ""])


def training_step() -> str:
    """Return the picture of one training step as an SVG document."""
    picture = Picture(920, 640, "One training step of MemDLM")

    picture.box("lane", 20, 20, 880, 176)
    picture.text(34, 42, "Host, one step ahead")
    picture.box("plain", 330, 34, 260, 50, "Micro-batch of clean tokens", "noise keyed by (seed, step, sample id)")
    picture.box("plain", 110, 124, 260, 54, "Pre-anchor", "the anchor's masks and more")
    picture.box("plain", 550, 124, 260, 54, "Anchor xₜ", "masks of the outer loss")
    picture.arrow((400, 84), (400, 104), (240, 104), (240, 124))
    picture.arrow((520, 84), (520, 104), (680, 104), (680, 124))

    picture.box("lane", 20, 212, 880, 316)
    picture.text(34, 234, "Device")
    picture.box("base", 110, 246, 700, 50, "Trunk", "embedding and the layers below the fast weights")
    picture.arrow((240, 178), (240, 246))
    picture.text(248, 232, "no gradient")
    picture.arrow((680, 178), (680, 246))
    picture.text(688, 232, "gradient")

    picture.box("memory", 40, 350, 230, 72, "Inner step 1", "tail on the pre-anchor,", "SGD on the fast weights")
    picture.box("memory", 340, 350, 230, 72, "Inner step 2", "tail on the anchor, detached,", "SGD on the fast weights")
    picture.box("base", 640, 350, 230, 72, "Outer step", "tail on the anchor, MDLM loss,", "φ₂ is a constant")
    picture.arrow((155, 296), (155, 350))
    picture.arrow((455, 296), (455, 350))
    picture.arrow((755, 296), (755, 350))
    picture.arrow((270, 386), (340, 386), memory=True)
    picture.text(305, 378, "φ₁", "title", "middle")
    picture.arrow((570, 386), (640, 386), memory=True)
    picture.text(605, 378, "φ₂", "title", "middle")
    picture.text(155, 446, "starts from φ₀, drawn for this batch", anchor="middle")
    picture.text(455, 446, "φ₂ is discarded after the batch", anchor="middle")
    picture.arrow((755, 422), (755, 466))
    picture.text(763, 448, "gradient of θ alone")
    picture.box("base", 40, 466, 830, 46, "Consensus, gradient clipping, AdamW, learning-rate schedule")
    picture.arrow((455, 512), (455, 558))
    picture.box("plain", 40, 558, 830, 40, "Metrics, validation, checkpoint")
    picture.text(
        460, 622, "θ: base model, sharded (blue).  φ: fast weights, local to each rank (orange).", anchor="middle"
    )
    return picture.svg()


def room_layers() -> list[list[str]]:
    """Return the layers of pyproject.toml, top first, each with its rooms."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def rooms() -> str:
    """Return the picture of the rooms, top floor first, as an SVG document."""
    layers = room_layers()
    layers[0] = ["tools", *layers[0]]  # tools/ lies outside of the package, on its top floor
    height, left, width, gap = 46, 96, 720, 12
    picture = Picture(840, 58 + (height + gap) * len(layers), "The rooms of memdlm_dist")
    bottom = 40 + (height + gap) * len(layers) - gap
    for i, layer in enumerate(layers):
        each = (width - gap * (len(layer) - 1)) / len(layer)
        for j, room in enumerate(layer):
            name = f"{room}.py" if room in ("train", "errors") else f"{room}/"
            kind = "memory" if room == "method" else "plain"
            picture.box(kind, left + j * (each + gap), 40 + i * (height + gap), each, height, name, ROOMS[room])
    picture.text(
        left, 26, "A room imports only rooms below it. Orange: the mathematics, which knows no library but torch."
    )
    picture.arrow((56, 40), (56, bottom))
    return picture.svg()


def relative_write() -> str:
    """Return the plot of the relative write over the width, both axes logarithmic, as an SVG document."""
    picture = Picture(840, 420, "Relative write of the inner loop over the width of the backbone")
    left, right, top, bottom = 70, 560, 50, 360

    def place(width: float, percent: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(width / 128) / math.log(4096 / 128)
        return x, bottom - (bottom - top) * math.log(percent / 0.8) / math.log(16 / 0.8)

    for width in (128, 256, 512, 1024, 2048, 4096):
        x, _ = place(width, 1)
        picture.text(x, bottom + 24, f"{width:,}", anchor="middle")
    for percent in (1, 2, 4, 8, 16):
        _, y = place(128, percent)
        picture.line("lane", (left - 10, y), (right + 10, y))
        picture.text(left - 18, y + 4, f"{percent}%", anchor="end")
    picture.text(
        left - 40, 30, "Relative write: norm of the fast term over the norm of the linear's own output", "title"
    )
    picture.text((left + right) / 2, bottom + 46, "width of the backbone", anchor="middle")

    def curves(series: Mapping[str, Mapping[int, float]], memory: bool) -> None:
        for (label, writes), shift in zip(series.items(), (-8, 12), strict=True):
            points = [place(*point) for point in writes.items()]
            picture.curve(*points, memory=memory)
            picture.text(right + 16, points[-1][1] + shift, label)

    curves(CLIPPED_WRITES, memory=True)
    curves(WRITES, memory=False)
    return picture.svg()


PICTURES = {"training_step.svg": training_step, "rooms.svg": rooms, "relative_write.svg": relative_write}


def main() -> int:
    """Write the pictures; return the exit status."""
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw())
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
