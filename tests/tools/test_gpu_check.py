"""launch/gpu_check.sh: its flow on small commands, its figures on given results, and all of it with debug sizes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from memdlm_dist.errors import EXIT_STATUS
from memdlm_dist.performance.gpu_check import check as gpu_check
from memdlm_dist.performance.gpu_check import gpu_report, processes, results
from memdlm_dist.performance.gpu_check.check import Request
from memdlm_dist.performance.gpu_check.figures import GATES, figures, judge
from memdlm_dist.performance.gpu_check.sections import SECTIONS, Context, Section
from tools import generate
from tools import gpu_check as tool

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "capability": "9.0"}
BENCHES = [section for section in SECTIONS if section.name in ("bench_8b", "lora_8b")]


def environment(*devices):
    return {"devices": list(devices), "cpus": 2, "packages": {"torch": "2.13.0", "triton": None}, "bfloat16": True}


def command(name, code, **options):
    """Return a section that runs a line of Python and keeps what it prints."""

    def run(context: Context) -> None:
        context.numbers["said"] = context.python("-c", code).strip()

    return Section(name, "a test", run, lambda numbers: numbers.get("said", ""), **{"least": 0.0, **options})


def run(folder, sections, *devices, **request):
    return gpu_check.check(Request(folder, "COMMAND", **request), sections, lambda log: environment(*devices))


def kept(folder, name, machine="cpu-debug-sizes"):
    return json.loads((folder / f"results/{machine}/{name}.json").read_text())


def runs_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.3)


def test_the_flow_survives_its_sections(tmp_path, capsys, short_grace):
    # The grandchild has a session of its own, as torchrun's workers have, and ignores the interrupt.
    grandchild = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    hangs = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True, stdout=-1); "
        f"child.stdout.readline(); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    sections = [
        command("fails", "import sys; print('error: The disk is full.\\nbye'); sys.exit(3)"),
        command("hangs", hangs),
        Section("odd", "a test", lambda context: context.numbers.update(a=[]), lambda numbers: numbers["b"], least=0),
        command("device", "print(1)", needs_device=True),
        command("good", "print('all well')"),
    ]
    assert run(tmp_path, sections, limit=1.5) == 1
    assert not runs_still(int((tmp_path / "pid").read_text()))
    status = {section.name: kept(tmp_path, section.name)["status"] for section in sections}
    assert status == {"fails": "failed", "hangs": "timed out", "odd": "failed", "device": "skipped", "good": "ok"}
    assert kept(tmp_path, "fails")["reason"].endswith(" ended with status 3: error: The disk is full.")
    assert "bye" in (tmp_path / "logs/fails.log").read_text()
    assert kept(tmp_path, "hangs")["reason"] == "ended at 2 s, its limit"
    assert "KeyError" in kept(tmp_path, "odd")["reason"] and "KeyError" in (tmp_path / "logs/odd.log").read_text()
    said = (tmp_path / "report.md").read_text()
    for cell in ("error: The disk is full.", "needs an accelerator", "all well", "Debug sizes", "its limit"):
        assert cell in said
    out = capsys.readouterr().out
    assert (
        re.search(r"^\[5/5\] good: ok after \d+ s: all well$", out, re.MULTILINE)
        and "[2/5] hangs (at most 2 s) ..." in out
    )
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'report.md'}"


def test_the_budget_cuts_and_skips(tmp_path, short_grace):
    sections = [
        command("first", "print(1)"), command("second", "import time; time.sleep(60)"), command("third", "print(3)"),
    ]  # fmt: skip
    assert run(tmp_path, sections, budget=1.5) == 1
    assert kept(tmp_path, "first")["status"] == "ok"
    assert kept(tmp_path, "second")["status"] == "timed out" and "the budget" in kept(tmp_path, "second")["reason"]
    assert kept(tmp_path, "third")["status"] == "skipped"
    # A section that needs longer than what is left does not start.
    assert run(tmp_path, [command("long", "print(1)", least=60.0)], H100, budget=30.0) == 0
    assert kept(tmp_path, "long", "1-x-nvidia-h100-80gb-hbm3")["reason"] == "30 s of the budget were left"


def test_calls_merge(tmp_path):
    good, other = command("one", "print('first result')"), command("two", "print('second section')")
    assert run(tmp_path, [good, other], only=["one"]) == 0 and run(tmp_path, [good, other], only=["two"]) == 0
    said = (tmp_path / "report.md").read_text()
    assert "first result" in said and "second section" in said
    # A failure does not replace a good result and is noted; a skip is not; the next good one replaces both.
    assert run(tmp_path, [command("one", "raise SystemExit(3)"), other], only=["one"]) == 1
    assert run(tmp_path, [command("one", "", needs_device=True), other], only=["one"]) == 0
    result = kept(tmp_path, "one")
    assert result["status"] == "ok" and result["later"]["status"] == "failed"
    said = (tmp_path / "report.md").read_text()
    assert "first result. Run again on" in said and "status 3" in said
    assert run(tmp_path, [command("one", "print('newer result')"), other], only=["one"], quick=True) == 0
    said = (tmp_path / "report.md").read_text()
    assert "newer result" in said and "first result" not in said and "status 3" not in said and "ok, quick" in said
    # Another machine has a part of its own, this call's first.
    assert run(tmp_path, [command("one", "print('on an H100')"), other], H100, only=["one"]) == 0
    said = (tmp_path / "report.md").read_text()
    assert (
        said.index("## 1 x NVIDIA H100") < said.index("on an H100") < said.index("## CPU, debug") < said.index("newer")
    )


def test_a_failure_is_kept_until_something_better(tmp_path):
    def keep(status):
        results.keep(tmp_path, results.Result("one", "CPU", "2.13", "now", 1.0, status, reason=status))
        return kept(tmp_path, "one", "cpu")["status"]

    assert [keep(status) for status in ("skipped", "failed", "skipped", "timed out")] == [
        "skipped", "failed", "failed", "timed out",
    ]  # fmt: skip
    (tmp_path / "results/cpu/one.json").write_text("{")  # cut off
    assert keep("skipped") == "skipped"


def test_an_interrupt_leaves_a_report(tmp_path, short_grace):
    stops = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [command("first", "print('done')"), command("stops", stops), command("last", "print(1)")])
    assert kept(tmp_path, "stops")["reason"] == "interrupted"
    assert not (tmp_path / "results/cpu-debug-sizes/last.json").exists()
    assert "interrupted" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--only", "bench_8b", "speed"], "There is no section 'speed'; choose among environment, bench_8b, lora_8b"),
        (["--output", "pyproject.toml/x"], "pyproject.toml/x cannot be made"),
    ],
)
def test_mistakes_are_named(capsys, monkeypatch, root, arguments, says):
    monkeypatch.chdir(root)
    assert tool.main(arguments) == EXIT_STATUS
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_sections_are_listed(capsys):
    assert tool.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [x.name for x in SECTIONS]


def bench(layers, seconds=None, ranks=1, mfu=0.5):
    """Return a result of tools/bench.py: 0.1 s a step and 0.05 s a layer, twice and 1.4 times that with memory."""
    factors = {"plain": 1.0, "straightforward": 2.0, "ours": 1.4}
    plain = seconds or 0.1 + 0.05 * layers
    flops = 1e14 + 2e13 * layers
    return {
        "layers": layers,
        "ranks": ranks,
        "step_seconds": {kind: factor * plain for kind, factor in factors.items()},
        "ratio": {"ours_over_plain": 1.41, "straightforward_over_plain": 2.01},
        "tokens_per_second": {kind: 8192 * ranks / factor / plain for kind, factor in factors.items()},
        "mfu": {kind: flops / factor / plain / 4e14 if mfu else None for kind, factor in factors.items()},
        "flops": {"model": flops},
        "peak_bytes": dict.fromkeys(factors, (10 + layers) * 2**30),
    }


def test_figures_of_a_whole_model():
    found = figures({"whole_layers": 32, "benches": [bench(32, seconds=1.0, ranks=4)]})
    assert found.tokens_per_second["plain"] == pytest.approx(8192) and not found.extrapolated
    assert found.over_plain["ours"] == 1.41, "within a round, as bench.py has it"
    assert found.mfu["plain"] == pytest.approx((1e14 + 2e13 * 32) / 4e14)
    assert figures({"whole_layers": 32, "benches": []}) is None and figures({}) is None


def test_figures_are_extrapolated_in_layers():
    found = figures({"whole_layers": 32, "benches": [bench(16), bench(8)]})
    assert found.extrapolated and found.of_whole_model and found.layers == (8, 16)
    assert found.tokens_per_second["plain"] == pytest.approx(8192 / 1.7)  # 0.1 + 32 x 0.05 s
    assert found.tokens_per_second["straightforward"] == pytest.approx(8192 / 3.4)
    assert found.over_plain == pytest.approx({"plain": 1.0, "straightforward": 2.0, "ours": 1.4})
    assert found.mfu["ours"] == pytest.approx((1e14 + 2e13 * 32) / (1.4 * 1.7) / 4e14)
    assert found.peak_bytes["plain"] == 42 * 2**30
    assert figures({"whole_layers": 32, "benches": [bench(8, mfu=None)]}).mfu["plain"] is None


def test_gates():
    full, lora, memory = GATES
    machine = "1 x NVIDIA H100 80GB HBM3"

    def of(seconds, layers=32):
        return figures({"whole_layers": 32, "benches": [bench(layers, seconds)]})

    assert judge(full, of(8192 / 6701), machine, False) == ("pass", "6,701 tokens/s/GPU")
    assert judge(full, of(8192 / 6699), machine, False)[0] == "fail"
    assert judge(lora, of(8192 / 12001), machine, False)[0] == "pass"
    assert judge(lora, of(8192 / 11999), machine, False)[0] == "fail"
    assert judge(memory, of(1.0), machine, False) == ("pass", "1.410 times plain")
    slow = bench(32)
    slow["ratio"]["ours_over_plain"] = 1.501
    assert judge(memory, figures({"whole_layers": 32, "benches": [slow]}), machine, False)[0] == "fail"
    # Not a gate's device, not the whole model, no result, debug sizes.
    for device in ("1 x NVIDIA H200", "8 x NVIDIA B200", "1 x NVIDIA GH200 480GB"):
        assert judge(full, of(1.0), device, False)[0] == "pass"
    assert judge(full, of(1.0), "1 x NVIDIA A100-SXM4-80GB", False)[0] == "not measured"
    assert judge(memory, of(1.0), "1 x NVIDIA A100-SXM4-80GB", False)[0] == "pass"
    assert judge(full, of(1.0, layers=8), machine, False)[0] == "not measured"
    assert judge(full, None, machine, False) == ("not measured", "section bench_8b has no result")
    assert judge(full, of(1.0), machine, True) == ("not measured", "debug sizes")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with tools in the place of the repository's, which do as they are told."""
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)

    def make(fits: int, runs: int, content: str | None = None):
        """Let tools/dry_run.py say that `fits` layers fit, and tools/bench.py run out of memory above `runs`."""
        (tmp_path / "tools/dry_run.py").write_text(
            f"import sys\nsys.exit(int(sys.argv[sys.argv.index('--layers') + 1]) > {fits})\n"
        )
        (tmp_path / "made.json").write_text(json.dumps({layers: bench(layers) for layers in (8, 16, 24, 32)}))
        (tmp_path / "tools/bench.py").write_text(
            "import json, sys\n"
            "given = lambda key: sys.argv[sys.argv.index(key) + 1]\n"
            f"if int(given('--layers')) > {runs}: sys.exit('torch.OutOfMemoryError: CUDA out of memory.')\n"
            f"made = json.load(open({str(tmp_path / 'made.json')!r}))[given('--layers')]\n"
            f"open(given('--json'), 'w').write({content!r} or json.dumps(made))\n"
            "if '--profile' in sys.argv: open(given('--profile'), 'w').write('a kernel\\n' * 40)\n"
        )
        return tmp_path / "check"

    return make


def test_a_model_is_measured_as_deep_as_it_fits(repository):
    for fits, runs, depths in ((32, 32, [32]), (16, 32, [16, 8]), (32, 24, [24, 16]), (8, 32, [8])):
        folder = repository(fits, runs)
        assert run(folder, BENCHES[:1], H100) == 0
        result = kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")
        assert [found["layers"] for found in result["numbers"]["benches"]] == depths
        assert len(result["numbers"]["kernels"]) == 18
        said = (folder / "report.md").read_text()
        cell = f"{', '.join(map(str, sorted(depths)))} of 32" + (", extrapolated" if len(depths) > 1 else "")
        assert cell in said and "a kernel" in said
        # 8,192 tokens in 1.7 s, which eight layers alone do not tell.
        row = next(line for line in said.splitlines() if line.startswith("| LLaDA-8B, full"))
        assert (f"| {8192 / 1.7:,.0f}, " in row) == (depths != [8])
        assert f"| {1.4 if len(depths) > 1 else 1.41:.3f} |" in row
        assert "| LLaDA-8B, LoRA | not measured" in said


def test_a_model_that_does_not_fit_or_run(repository):
    folder = repository(0, 32)
    assert run(folder, BENCHES, H100) == 0
    assert "not even the smallest depth fits" in kept(folder, "lora_8b", "1-x-nvidia-h100-80gb-hbm3")["reason"]
    folder = repository(32, 0)
    assert run(folder, BENCHES[:1], H100) == 1
    assert "OutOfMemoryError" in kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")["reason"]
    for content in ("no JSON", "[]", '{"layers": 32}'):
        folder = repository(32, 32, content)
        assert run(folder, BENCHES, H100) == 1
        assert kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")["status"] == "failed"
        assert "| LLaDA-8B, full | not measured" in (folder / "report.md").read_text()


def test_json_of_generate_has_no_prompt_sign(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
    assert list(generate.prompts(SimpleNamespace(interactive=True, json=True))) == ["import os"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_everything_with_debug_sizes(tmp_path, root):
    """The whole check without an accelerator, as a user starts it; about four minutes."""
    done = subprocess.run(
        ["bash", "launch/gpu_check.sh", "--output", str(tmp_path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {section.name: kept(tmp_path, section.name) for section in SECTIONS}
    assert {name: result["status"] for name, result in found.items()} == {
        section.name: "skipped" if section.name == "tests" else "ok" for section in SECTIONS
    }
    full, lora = (found[name]["numbers"]["benches"][0] for name in ("bench_8b", "lora_8b"))
    assert lora["flops"]["hardware_outer"] < 0.8 * full["flops"]["hardware_outer"], "no gradients of frozen weights"
    runs = [run["name"] for run in found["run_dense"]["numbers"]["runs"]]
    assert runs == ["run_dense, steps 1 to 2", "run_dense, steps 3 to 3"]
    said = (tmp_path / "report.md").read_text()
    for cell in (
        "\npython tools/bench.py train_configs/debug.toml",
        "## CPU, debug sizes",
        "**Debug sizes",
        "aten::mm",
        "| 128 |",
        "| run_packed, steps 1 to 2",
        "| run_128k, steps 1 to 2",
        "| on | 8 |",
    ):
        assert cell in said
    assert said.count("| not measured | debug sizes |") == len(GATES)
    assert "needs an accelerator" in said and gpu_report.NOT_MEASURED in said
