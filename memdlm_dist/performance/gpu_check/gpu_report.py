"""Report of all kept results, report.md, with one chapter per machine."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from memdlm_dist.performance.gpu_check import results
from memdlm_dist.performance.gpu_check.figures import GATES, Figures, figures, judge
from memdlm_dist.performance.gpu_check.results import FAILED, OK, Result
from memdlm_dist.performance.gpu_check.section import Section

NOT_MEASURED = "not measured"
DEBUG = ", debug sizes"  # suffix of a machine's name for results with debug sizes
_KINDS = ("plain", "straightforward", "ours")
_MODELS = {
    "bench_8b": ("LLaDA-8B", "full"),
    "lora_8b": ("LLaDA-8B", "LoRA"),
    "bench_moe": ("LLaDA-MoE-7B-A1B", "full"),
    "lora_moe": ("LLaDA-MoE-7B-A1B", "LoRA"),
}
_DEBUG_NOTE = (
    "**Debug sizes: this checks that every section runs, and measures nothing that can be compared.** No figure below "
    "describes a model that a table names."
)


def write(folder: Path, machine: str, command: str, sections: Sequence[Section]) -> None:
    """Write report.md from all kept results.

    Args:
        folder: output folder of the check.
        machine: machine of this call; its chapter comes first.
        command: shell command of this call.
        sections: all sections, in their order.
    """
    others = [name for name in dict.fromkeys(results.machines(folder)) if name != machine]
    names = [section.name for section in sections]
    chapters = [
        "# GPU check",
        f"Written {datetime.now().isoformat(' ', 'minutes')} by `{command}`. Results of earlier calls are kept. Each "
        "kind and number of devices has a chapter; a chapter shows the newest successful result of each section.",
    ]
    for name in (machine, *others):
        kept = results.load(folder, name, names)
        chapters += _chapter(name, {section: _readable(result, sections) for section, result in kept.items()}, sections)
    unfinished = folder / "report.md.unfinished"
    unfinished.write_text("\n\n".join(chapters) + "\n")
    unfinished.replace(folder / "report.md")


def _readable(result: Result, sections: Sequence[Section]) -> Result:
    """Return the result if a chapter can be written from it, else a failed result that says so."""
    try:
        _chapter(result.machine, {result.section: result}, sections)
    except Exception:  # malformed numbers raise many kinds of exception
        reason = "the result cannot be read; run the section again"
        return Result(result.section, result.machine, torch="", date="", seconds=0.0, status=FAILED, reason=reason)
    return result


def _chapter(machine: str, kept: dict[str, Result], sections: Sequence[Section]) -> list[str]:
    """Return a machine's chapter as Markdown paragraphs."""
    debug = machine.endswith(DEBUG)
    environment = kept["environment"].numbers if "environment" in kept else {}
    rows = {section: figures(kept[section].numbers) if section in kept else None for section in _MODELS}
    return [
        f"## {machine}",
        *([_DEBUG_NOTE] if debug else []),
        _versions(environment),
        "### Gates",
        _table(
            ("gate", "", "figure"), [(gate.text, *judge(gate, rows[gate.section], machine, debug)) for gate in GATES]
        ),
        "### Training throughput",
        _throughput(rows, debug),
        "MFU uses the model FLOPs of plain full training in every row, as torchtitan's metrics do. LoRA computes no "
        "gradients of the frozen weights, so its MFU overstates the device's work; compare it with LoRA rows only.",
        *_kernels(kept.get("bench_8b")),
        "### Length of a row",
        _lengths(kept.get("lengths")),
        "### Decoding",
        _decoding(kept.get("decode")),
        "### Short runs",
        _runs(kept.values()),
        "### Tests",
        _tests(kept.get("tests")),
        "### Sections",
        _sections(kept, sections),
        "### Commands",
        "\n".join(["```bash", *_commands(kept.values()), "```"]),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _versions(environment: dict[str, Any]) -> str:
    """Return the table of devices and versions."""
    if not environment:
        return "Section environment has no result."
    rows = []
    for device in environment["devices"]:
        capability = f", compute capability {device['capability']}" if device["capability"] else ""
        rows.append(("device", f"{device['name']}, {device['memory_bytes'] / 2**30:.1f} GiB{capability}"))
    for name in ("driver", "cuda", "cudnn", "nccl", "python", "cpus"):
        rows.append((name, str(environment.get(name) or "none")))
    rows += [(name, version or "none") for name, version in environment["packages"].items()]
    known = {"kind", "devices", "driver", "cuda", "cudnn", "nccl", "python", "cpus", "packages"}
    rows += [(name, "yes" if value else "no") for name, value in environment.items() if name not in known]
    return _table(("environment", ""), rows)


def _throughput(rows: dict[str, Figures | None], debug: bool) -> str:
    """Return the throughput table, with the columns of the one in docs/performance.md."""
    header = ["", *(f"{kind}: tokens/s/GPU, MFU" for kind in _KINDS), "ours over plain", "peak memory allocated (GiB)",
              "measured"]  # fmt: skip
    lines = []
    for section, model_figures in rows.items():
        model, kind = _MODELS[section]
        if model_figures is None:
            lines.append([f"{model}, {kind}", *[NOT_MEASURED] * 6])
            continue
        if not model_figures.of_whole_model:
            model = f"{model}'s width, {model_figures.depth}"
        lines.append(
            [
                f"{model}, {kind} ({section} with debug sizes)" if debug else f"{model}, {kind}",
                *(_speed(model_figures, kind) for kind in _KINDS),
                f"{model_figures.over_plain['ours']:.3f}",
                f"{max(model_figures.peak_bytes.values()) / 2**30:.1f}",
                model_figures.depth,
            ]
        )
    return _table(header, lines)


def _speed(model_figures: Figures, kind: str) -> str:
    """Return throughput and MFU of one kind of step, as a table cell."""
    mfu = model_figures.mfu[kind]
    return f"{model_figures.tokens_per_second[kind]:,.0f}, {f'{100 * mfu:.1f}%' if mfu is not None else 'no MFU'}"


def _kernels(result: Result | None) -> list[str]:
    """Return heading and profile of one step of ours; nothing if none was recorded."""
    if result is None or "kernels" not in result.numbers:
        return []
    return ["### Kernels of a step of ours (bench_8b)", "\n".join(["```", *result.numbers["kernels"], "```"])]


def _lengths(result: Result | None) -> str:
    """Return the table of row lengths, and the reason that longer rows are missing."""
    if result is None or not result.numbers.get("lengths"):
        return NOT_MEASURED
    rows = [
        (
            f"{numbers['length']:,}",
            *(f"{numbers['step_seconds'][kind]:.3f}" for kind in ("plain", "ours")),
            f"{numbers['ratio']['ours_over_plain']:.3f}",
            f"{numbers['hardware_flops_ratio']:.3f}",
            *(f"{numbers['peak_bytes'][kind] / 2**30:.1f}" for kind in ("plain", "ours")),
        )
        for numbers in result.numbers["lengths"]
    ]
    header = ("tokens of a row", "plain (s)", "ours (s)", "ours over plain", "by FLOPs",
              "plain, allocated (GiB)", "ours, allocated (GiB)")  # fmt: skip
    stopped = result.numbers.get("stopped")
    return _table(header, rows) + (f"\n\nLonger rows: {NOT_MEASURED}; {stopped}." if stopped else "")


def _decoding(result: Result | None) -> str:
    """Return the table of decoding speed by memory, cache and threshold."""
    if result is None or not result.numbers.get("settings"):
        return NOT_MEASURED
    rows = [
        (
            row["memory"],
            row["cache"],
            "none" if row["threshold"] is None else f"{row['threshold']:g}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['over_plain']:.2f}",
            f"{row['passes']}",
            f"{100 * row['agreement']:.1f}%",
        )
        for row in result.numbers["settings"]
    ]
    numbers = result.numbers
    header = ("memory", "cache", "threshold", "tokens/s", "times plain", "passes", "equal tokens")
    return (
        _table(header, rows) + f"\n\nPrompt: {numbers['prompt_tokens']} tokens, {numbers['new_tokens']} new ones. "
        f"Writing the memory: {numbers['memory_seconds']:.3f} s. The model has had a few training steps, so the share "
        "of equal tokens says little."
    )


def _runs(kept: Iterable[Result]) -> str:
    """Return the table of all short runs."""
    rows = [
        (
            run["name"],
            f"{run['first_loss']:.4f}",
            f"{run['last_loss']:.4f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['memory_gib']:.1f}",
        )
        for result in kept
        for run in result.numbers.get("runs", [])
    ]
    if not rows:
        return NOT_MEASURED
    return _table(("run", "first loss", "last loss", "tokens/s/GPU, last step", "peak memory reserved (GiB)"), rows)


def _tests(result: Result | None) -> str:
    """Return the number of tests and the names of those that failed."""
    if result is None or "tests" not in result.numbers:
        return "not run"
    numbers = result.numbers
    counts = f"{numbers['tests']} tests: {len(numbers['failures'])} failed, {numbers['skipped']} skipped."
    return "\n".join([counts, *(["", *(f"- `{name}`" for name in numbers["failures"])] if numbers["failures"] else [])])


def _sections(kept: dict[str, Result], sections: Sequence[Section]) -> str:
    """Return the table of all sections with status, key figure or reason, date and duration."""
    rows = []
    for section in sections:
        result = kept.get(section.name)
        if result is None:
            rows.append((section.name, section.purpose, "not run", "", "", "", ""))
            continue
        text = section.headline(result.numbers) if result.status == OK else result.reason
        if result.later is not None:
            later = result.later
            text += f". Run again on {later['date']}: {later['status']}, {later['reason']}"
        status = f"{result.status}, quick" if result.quick else result.status
        rows.append(
            (section.name, section.purpose, status, text, result.date, f"{result.seconds:.0f}", result.torch)
        )  # fmt: skip
    return _table(("section", "for", "status", "", "when", "seconds", "torch"), rows)


def _commands(kept: Iterable[Result]) -> list[str]:
    """Return the commands of every section that ran, to be run from the repository's root."""
    return [line for result in kept if result.commands for line in (f"# {result.section}", *result.commands)]
