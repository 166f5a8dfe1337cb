"""report.md: everything that the kept results say, a part for each machine."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from memdlm_dist.performance.gpu_check import results
from memdlm_dist.performance.gpu_check.figures import GATES, Figures, figures, judge
from memdlm_dist.performance.gpu_check.results import FAILED, OK, Result
from memdlm_dist.performance.gpu_check.section import Section

NOT_MEASURED = "not measured"
DEBUG = ", debug sizes"  # how the name of such a machine ends
_KINDS = ("plain", "straightforward", "ours")
_MODELS = {
    "bench_8b": ("LLaDA-8B", "full"),
    "lora_8b": ("LLaDA-8B", "LoRA"),
    "bench_moe": ("LLaDA-MoE-7B-A1B", "full"),
    "lora_moe": ("LLaDA-MoE-7B-A1B", "LoRA"),
}
_DEBUG_NOTE = (
    "**Debug sizes: this checks that every section runs, and measures nothing that can be compared.** No figure below "
    "is one of the models that a table names."
)


def write(folder: Path, machine: str, command: str, sections: Sequence[Section]) -> None:
    """Write report.md of all kept results.

    Args:
        machine: of this call, which comes first.
        command: of this call.
    """
    others = [name for name in dict.fromkeys(results.machines(folder)) if name != machine]
    names = [section.name for section in sections]
    parts = [
        "# GPU check",
        f"Written {datetime.now().isoformat(' ', 'minutes')} by `{command}`. Results of earlier calls are kept: "
        "those of another kind or number of devices in parts of their own; of the same, the newest good one of each "
        "section.",
    ]
    for each in (machine, *others):
        kept = results.load(folder, each, names)
        parts += _part(each, {name: _readable(result, sections) for name, result in kept.items()}, sections)
    unfinished = folder / "report.md.unfinished"
    unfinished.write_text("\n\n".join(parts) + "\n")
    unfinished.replace(folder / "report.md")


def _readable(result: Result, sections: Sequence[Section]) -> Result:
    """Return a result of which every part can be laid out: itself, or a failure if it has another shape."""
    try:
        _part(result.machine, {result.section: result}, sections)
    except Exception:  # which one depends on the shape
        reason = "the result cannot be read; run the section again"
        return Result(result.section, result.machine, torch="", date="", seconds=0.0, status=FAILED, reason=reason)
    return result


def _part(machine: str, found: dict[str, Result], sections: Sequence[Section]) -> list[str]:
    debug = machine.endswith(DEBUG)
    environment = found["environment"].numbers if "environment" in found else {}
    rows = {section: figures(found[section].numbers) if section in found else None for section in _MODELS}
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
        "MFU goes by the model FLOPs of plain full training in every row, as in torchtitan's metrics. LoRA computes no "
        "gradients of the frozen weights, so its MFU is above what the device does; compare it with LoRA's alone.",
        *_kernels(found.get("bench_8b")),
        "### Length of a row",
        _lengths(found.get("lengths")),
        "### Decoding",
        _decoding(found.get("decoding")),
        "### Short runs",
        _runs(found.values()),
        "### Tests",
        _tests(found.get("tests")),
        "### Sections",
        _sections(found, sections),
        "### Commands",
        "\n".join(["```bash", *_commands(found.values()), "```"]),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _versions(environment: dict[str, Any]) -> str:
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
    """Lay out the table of docs/performance.md."""
    header = ["", *(f"{kind}: tokens/s/GPU, MFU" for kind in _KINDS), "ours over plain", "peak memory allocated (GiB)",
              "measured"]  # fmt: skip
    lines = []
    for section, found in rows.items():
        model, kind = _MODELS[section]
        if found is None:
            lines.append([f"{model}, {kind}", *[NOT_MEASURED] * 6])
            continue
        if not found.of_whole_model:
            model = f"{model}'s width, {found.depth}"
        lines.append(
            [
                f"{model}, {kind} ({section} with debug sizes)" if debug else f"{model}, {kind}",
                *(_speed(found, kind) for kind in _KINDS),
                f"{found.over_plain['ours']:.3f}",
                f"{max(found.peak_bytes.values()) / 2**30:.1f}",
                found.depth,
            ]
        )
    return _table(header, lines)


def _speed(found: Figures, kind: str) -> str:
    mfu = found.mfu[kind]
    return f"{found.tokens_per_second[kind]:,.0f}, {f'{100 * mfu:.1f}%' if mfu is not None else 'no MFU'}"


def _kernels(result: Result | None) -> list[str]:
    if result is None or "kernels" not in result.numbers:
        return []
    return ["### Kernels of a step of ours (bench_8b)", "\n".join(["```", *result.numbers["kernels"], "```"])]


def _lengths(result: Result | None) -> str:
    if result is None or not result.numbers.get("lengths"):
        return NOT_MEASURED
    rows = [
        (
            f"{found['length']:,}",
            *(f"{found['step_seconds'][kind]:.3f}" for kind in ("plain", "ours")),
            f"{found['ratio']['ours_over_plain']:.3f}",
            f"{found['hardware_flops_ratio']:.3f}",
            *(f"{found['peak_bytes'][kind] / 2**30:.1f}" for kind in ("plain", "ours")),
        )
        for found in result.numbers["lengths"]
    ]
    header = ("tokens of a row", "plain (s)", "ours (s)", "ours over plain", "by FLOPs",
              "plain, allocated (GiB)", "ours, allocated (GiB)")  # fmt: skip
    stopped = result.numbers.get("stopped")
    return _table(header, rows) + (f"\n\nLonger rows: {NOT_MEASURED}; {stopped}." if stopped else "")


def _decoding(result: Result | None) -> str:
    rows = []
    for memory in ("off", "on"):
        found = result.numbers.get(f"memory_{memory}") if result is not None else None
        if found is None:
            rows.append((memory, *[NOT_MEASURED] * 4))
            continue
        rows.append(
            (
                memory,
                f"{found['new_tokens']}",
                f"{found['tokens_per_second']:,.1f}",
                f"{found['seconds_per_step']:.4f}",
                f"{found['memory_seconds']:.3f}",
            )
        )
    return _table(("memory", "new tokens", "tokens/s", "seconds a step", "writing the memory (s)"), rows)


def _runs(found: Iterable[Result]) -> str:
    rows = [
        (
            run["name"],
            f"{run['first_loss']:.4f}",
            f"{run['last_loss']:.4f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['memory_gib']:.1f}",
        )
        for result in found
        for run in result.numbers.get("runs", [])
    ]
    if not rows:
        return NOT_MEASURED
    return _table(("run", "first loss", "last loss", "tokens/s/GPU, last step", "peak memory reserved (GiB)"), rows)


def _tests(result: Result | None) -> str:
    if result is None or "tests" not in result.numbers:
        return "not run"
    found = result.numbers
    said = f"{found['tests']} tests: {len(found['failures'])} failed, {found['skipped']} skipped."
    return "\n".join([said, *(["", *(f"- `{name}`" for name in found["failures"])] if found["failures"] else [])])


def _sections(found: dict[str, Result], sections: Sequence[Section]) -> str:
    rows = []
    for section in sections:
        result = found.get(section.name)
        if result is None:
            rows.append((section.name, section.purpose, "not run", "", "", "", ""))
            continue
        said = section.headline(result.numbers) if result.status == OK else result.reason
        if result.later is not None:
            later = result.later
            said += f". Run again on {later['date']}: {later['status']}, {later['reason']}"
        status = f"{result.status}, quick" if result.quick else result.status
        rows.append(
            (section.name, section.purpose, status, said, result.date, f"{result.seconds:.0f}", result.torch)
        )  # fmt: skip
    return _table(("section", "for", "status", "", "when", "seconds", "torch"), rows)


def _commands(found: Iterable[Result]) -> list[str]:
    """Return the commands of every section that ran, in the repository's root."""
    return [line for result in found if result.commands for line in (f"# {result.section}", *result.commands)]
