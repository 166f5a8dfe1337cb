"""Sections of the check, the most valuable first.

Sections run tools and launch scripts as a user does. With debug sizes the same commands take seconds on a CPU.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from memdlm_dist.performance.gpu_check import benches, runs
from memdlm_dist.performance.gpu_check.section import Context, Failure, Section, Skip, last_words


def _environment(context: Context) -> None:
    """Copy the machine's description to the section's numbers."""
    context.numbers.update(context.environment)


def _environment_headline(numbers: dict[str, Any]) -> str:
    """Return torch's version and the numbers of devices and CPUs, as one line."""
    if not numbers:
        return ""
    return f"torch {numbers['packages']['torch']}, {len(numbers['devices'])} devices, {numbers['cpus']} CPUs"


def _tests(context: Context) -> None:
    """Run the tests marked `gpu` and keep their counts.

    Raises:
        Skip: if pytest or pytest-xdist is not installed.
        Failure: if a test fails or pytest writes no results.
    """
    if not all(map(importlib.util.find_spec, ("pytest", "xdist"))):
        raise Skip("needs the dev extra: bash launch/setup.sh dev")
    path = context.log.with_suffix(".junit.xml")
    path.unlink(missing_ok=True)
    try:
        status, output = context.status(
            sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "tests/gpu", f"--junitxml={path}"
        )  # fmt: skip
    finally:
        if path.exists():  # pytest writes it even when it is interrupted
            context.numbers.update(_read_junit(path))
    if "tests" not in context.numbers:
        raise Failure(f"pytest ended with status {status}: {last_words(output)}")
    if status != 0:
        raise Failure(f"{len(context.numbers['failures'])} of {context.numbers['tests']} tests failed")


def _read_junit(path: Path) -> dict[str, Any]:
    """Return the counts of pytest's XML report: tests, skipped tests, and the names of failed tests."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError:
        return {}
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "tests": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def _tests_headline(numbers: dict[str, Any]) -> str:
    """Return the counts of tests, as one line."""
    if "tests" not in numbers:
        return ""
    return f"{numbers['tests']} tests, {len(numbers['failures'])} failed, {numbers['skipped']} skipped"


SECTIONS = (
    Section(
        "environment", "devices, versions, and the kernels that the code selects",
        _environment, _environment_headline, least=0,
    ),
    Section(
        "bench_8b", "full training at LLaDA-8B's sizes, compiled: plain, straightforward, ours; kernels of a step",
        benches.bench_model(benches.DENSE_8B, lora=False, kernels=True), benches.bench_headline,
    ),
    Section(
        "lora_8b", "the same for LoRA on a frozen base",
        benches.bench_model(benches.DENSE_8B, lora=True), benches.bench_headline,
    ),
    Section("tests", "pytest -m gpu", _tests, _tests_headline, needs_device=True),
    Section(
        "bench_moe", "full training at LLaDA-MoE-7B-A1B's sizes",
        benches.bench_model(benches.MOE_7B, lora=False), benches.bench_headline,
    ),
    Section(
        "lora_moe", "the same for LoRA on a frozen base",
        benches.bench_model(benches.MOE_7B, lora=True), benches.bench_headline,
    ),
    Section(
        "run_dense", "a run of the 1B flavour, compiled, full checkpointing; saved and resumed",
        runs.run_dense, runs.runs_headline,
    ),
    Section("run_experts", "a run of LLaDA-MoE-7B-A1B with LoRA", runs.run_experts, runs.runs_headline),
    Section("run_packed", "a run of the 1B flavour on packed rows, compiled", runs.run_packed, runs.runs_headline),
    Section(
        "run_128k", "the same on packed rows of 131,072 tokens, where memory allows",
        runs.run_128k, runs.runs_headline,
    ),
    Section(
        "lengths", "plain and ours on rows of 4,096 to 131,072 tokens, as far as memory and time go",
        benches.measure_lengths, benches.lengths_headline,
    ),
    Section(
        "mix", "a mix of fine-tuning rows: padded to seq_len, in buckets, grouped by length",
        benches.measure_mix, benches.mix_headline,
    ),
    Section(
        "decode", "tools/bench.py decode on run_dense's checkpoint: caches, threshold and memory",
        runs.measure_decoding, runs.decoding_headline,
    ),
)  # fmt: skip
# Sections of --quick, meant to take about ten minutes on an H100.
QUICK = ("environment", "bench_8b", "lora_8b", "run_dense", "decode")
