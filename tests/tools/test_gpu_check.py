"""launch/gpu_check.sh: its loop on small commands, its figures on given results, and the whole check in debug sizes."""

import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.performance.gpu_check import check as gpu_check
from memdlm_dist.performance.gpu_check import gpu_report, processes, results
from memdlm_dist.performance.gpu_check.check import CheckOptions
from memdlm_dist.performance.gpu_check.figures import GATES, figures, judge
from memdlm_dist.performance.gpu_check.section import Context, Section
from memdlm_dist.performance.gpu_check.sections import QUICK, SECTIONS
from tools import generate
from tools import gpu_check as tool

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "capability": "9.0"}
BENCHES = [section for section in SECTIONS if section.name in ("bench_8b", "lora_8b")]


def environment(*devices):
    return {"devices": list(devices), "cpus": 2, "packages": {"torch": "2.13.0", "triton": None}, "bfloat16": True}


def command(name, code, **options):
    """Return a section that runs a line of Python and keeps its output."""

    def run(context: Context) -> None:
        context.numbers["said"] = context.python("-c", code).strip()

    return Section(name, "a test", run, lambda numbers: numbers.get("said", ""), **{"least": 0.0, **options})


def run(folder, sections, *devices, **request):
    return gpu_check.check(CheckOptions(folder, "COMMAND", **request), sections, lambda log: environment(*devices))


def kept(folder, name, machine="cpu-debug-sizes"):
    return json.loads((folder / f"results/{machine}/{name}.json").read_text())


def runs_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def limit():
    """Return a time limit in seconds that starts of Python stay below, also on a busy machine."""
    began = time.monotonic()
    for _ in range(3):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    return float(math.ceil(3 + 5 * (time.monotonic() - began)))


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.3)


def test_the_flow_survives_its_sections(tmp_path, capsys, short_grace, limit):
    # The grandchild starts a session, as torchrun's workers do, and ignores the interrupt.
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
    assert run(tmp_path, sections, limit=limit) == 1
    assert not runs_still(int((tmp_path / "pid").read_text()))
    status = {section.name: kept(tmp_path, section.name)["status"] for section in sections}
    assert status == {"fails": "failed", "hangs": "timed out", "odd": "failed", "device": "skipped", "good": "ok"}
    assert kept(tmp_path, "fails")["reason"].endswith(" ended with status 3: error: The disk is full.")
    assert "bye" in (tmp_path / "logs/fails.log").read_text()
    assert kept(tmp_path, "hangs")["reason"] == f"ended at {limit:.0f} s, its limit"
    assert "KeyError" in kept(tmp_path, "odd")["reason"] and "KeyError" in (tmp_path / "logs/odd.log").read_text()
    report = (tmp_path / "report.md").read_text()
    for cell in ("error: The disk is full.", "needs an accelerator", "all well", "Debug sizes", "its limit"):
        assert cell in report
    out = capsys.readouterr().out
    assert (
        re.search(r"^\[5/5\] good: ok after \d+ s: all well$", out, re.MULTILINE)
        and f"[2/5] hangs (at most {limit:.0f} s) ..." in out
    )
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'report.md'}"


def test_the_budget_cuts_and_skips(tmp_path, short_grace, limit):
    sections = [
        command("first", "print(1)"), command("second", "import time; time.sleep(60)"), command("third", "print(3)"),
    ]  # fmt: skip
    assert run(tmp_path, sections, budget=limit) == 0, "a section that the budget cuts has not failed"
    assert kept(tmp_path, "first")["status"] == "ok"
    assert kept(tmp_path, "second")["status"] == "skipped"
    assert kept(tmp_path, "second")["reason"].startswith("cut by the budget")
    assert kept(tmp_path, "third")["status"] == "skipped"
    # A section that needs more seconds than are left does not start.
    assert run(tmp_path, [command("long", "print(1)", least=60.0)], H100, budget=30.0) == 0
    assert kept(tmp_path, "long", "1-x-nvidia-h100-80gb-hbm3")["reason"] == "30 s of the budget were left"


def test_calls_merge(tmp_path):
    good, other = command("one", "print('first result')"), command("two", "print('second section')")
    assert run(tmp_path, [good, other], only=["one"]) == 0 and run(tmp_path, [good, other], only=["two"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "first result" in report and "second section" in report
    # A failure is noted in a successful result and does not replace it. A skip is dropped. The next successful result
    # replaces both.
    assert run(tmp_path, [command("one", "raise SystemExit(3)"), other], only=["one"]) == 1
    assert run(tmp_path, [command("one", "", needs_device=True), other], only=["one"]) == 0
    result = kept(tmp_path, "one")
    assert result["status"] == "ok" and result["later"]["status"] == "failed"
    report = (tmp_path / "report.md").read_text()
    assert "first result. Run again on" in report and "status 3" in report
    # A successful quick result removes the note of the failure, but does not replace a full result.
    assert run(tmp_path, [command("one", "print('quick result')"), other], only=["one"], quick=True) == 0
    report = (tmp_path / "report.md").read_text()
    assert "first result" in report and "quick" not in report and "status 3" not in report
    assert run(tmp_path, [command("one", "print('newer result')"), other], only=["one"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "newer result" in report and "first result" not in report
    # Another machine has a separate chapter, and this call's machine comes first.
    assert run(tmp_path, [command("one", "print('on an H100')"), other], H100, only=["one"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert (
        report.index("## 1 x NVIDIA H100")
        < report.index("on an H100")
        < report.index("## CPU, debug")
        < report.index("newer")
    )


def test_a_failure_is_kept_until_something_better(tmp_path):
    def keep(status, section="one", torch="2.13", **result):
        results.keep(tmp_path, results.Result(section, "CPU", torch, "now", 1.0, status, reason=status, **result))
        return kept(tmp_path, section, "cpu")["status"]

    # The sections tests and environment keep their newest result.
    assert [keep(status, "tests") for status in ("ok", "failed", "skipped", "ok")] == ["ok", "failed", "failed", "ok"]
    # A quick result with another torch version replaces a full one.
    keep("ok", "two")
    keep("ok", "two", torch="2.14", quick=True)
    assert kept(tmp_path, "two", "cpu")["quick"]
    assert [keep(status) for status in ("skipped", "failed", "skipped", "timed out")] == [
        "skipped", "failed", "failed", "timed out",
    ]  # fmt: skip
    (tmp_path / "results/cpu/one.json").write_text("{")  # a truncated file
    assert keep("skipped") == "skipped"


@pytest.mark.parametrize("limit", [30.0, 1.0], ids=["in a section", "while one is ended"])
def test_interrupts_leave_a_report_and_no_process(tmp_path, monkeypatch, limit):
    # The child ignores the check's interrupt and sends the check three signals, in the second case after the limit and
    # before it is killed, even if it starts a second late.
    monkeypatch.setattr(processes, "GRACE", 1.5)
    stops = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); check = os.getppid();"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep({1.2 if limit == 1.0 else 0});"
        "[os.kill(check, n) for n in (signal.SIGHUP, signal.SIGTERM)]; time.sleep(0.1); os.kill(check, signal.SIGINT);"
        "time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path, [command("first", "print('done')"), command("stops", stops), command("last", "print(1)")],
            limit=limit,
        )  # fmt: skip
    assert not runs_still(int((tmp_path / "pid").read_text()))
    assert kept(tmp_path, "stops")["reason"] == "interrupted"
    assert not (tmp_path / "results/cpu-debug-sizes/last.json").exists()
    assert "interrupted" in (tmp_path / "report.md").read_text()


def test_two_interrupts_at_once_are_one(tmp_path):
    both, ended = (signal.SIGHUP, signal.SIGTERM), []

    def section(context):
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        try:
            for number in both:
                signal.raise_signal(number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        finally:
            (lambda: ended.append(True))()  # a handler that raises a second time does so at this call

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [Section("stops", "a test", section, str, least=0.0)])
    assert ended and kept(tmp_path, "stops")["reason"] == "interrupted"


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.on_interrupt(lambda *_: pytest.fail("SIGHUP is not ignored")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_results_of_another_shape_do_not_stop_a_report(tmp_path):
    folder = tmp_path / "results/cpu-debug-sizes"
    folder.mkdir(parents=True)
    shapes = [{}, {"numbers": []}, {"commands": [1]}, {"later": {}}, {"machine": 1}, {"seconds": "1"}]
    shapes += [{"numbers": {"benches": [{}], "tests": 1, "lengths": [1], "runs": [1], "settings": [1]}}] * 7
    for section, shape in zip(SECTIONS, shapes, strict=True):
        result = results.Result(section.name, "CPU, debug sizes", "2.13", "now", 1.0, "ok")
        (folder / f"{section.name}.json").write_text(json.dumps(vars(result) | shape))
    assert run(tmp_path, [*SECTIONS, command("good", "print('all well')")], only=["good"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "all well" in report and report.count("the result cannot be read; run the section again") > 6
    assert "| environment | devices, versions, and the kernels that the code selects | ok |" in report


def test_the_environment_is_of_the_newest_call(tmp_path):
    sections = [SECTIONS[0], command("one", "print(1)"), command("two", "print(2)")]
    assert run(tmp_path, sections, only=["two"], quick=True) == 0
    assert not (tmp_path / "results/cpu-debug-sizes/one.json").exists()
    assert "| torch | 2.13.0 |" in (tmp_path / "report.md").read_text()


def test_quick_chooses_sections(tmp_path):
    sections = [
        command(section.name, "print(1)") for section in (*SECTIONS, SECTIONS[0]) if section.name != "environment"
    ]
    assert run(tmp_path, sections, quick=True) == 0
    names = {path.stem for path in (tmp_path / "results/cpu-debug-sizes").iterdir()}
    assert names == set(QUICK) - {"environment"}
    assert run(tmp_path, sections, quick=True, only=["tests"]) == 0
    assert kept(tmp_path, "tests")["status"] == "ok"


@pytest.mark.parametrize("full", ["results", "report"])
def test_a_full_disk_is_named(tmp_path, monkeypatch, full):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"results": (results, "keep"), "report": (gpu_report, "write")}[full], write)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*another --output"):
        run(tmp_path, [command("one", "print(1)")])


def test_the_script(tmp_path, root):
    """The script keeps the caller's working directory, and names the remedy if the package is not installed."""
    python = tmp_path / "python"

    def start(program):
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"VIRTUAL_ENV": "active", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(root / "launch/gpu_check.sh"), "--output", "here"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert start('echo "$PWD $@"').stdout.splitlines()[-1] == f"{tmp_path} {root}/tools/gpu_check.py --output here"
    without = start(f'exec {sys.executable} -S "$@"')
    assert without.returncode == EXIT_STATUS and without.stdout == ""
    assert without.stderr.startswith("error: memdlm_dist is not installed") and without.stderr.count("\n") == 1
    assert "`bash launch/setup.sh dev`" in without.stderr


def test_texts_agree(root, monkeypatch, tmp_path):
    usage = subprocess.run(["bash", "launch/gpu_check.sh", "--help"], cwd=root, capture_output=True, text=True).stdout
    docs = (root / "docs/performance.md").read_text()
    *others, last = QUICK
    assert f"{', '.join(others)} and {last}" in usage and usage.splitlines()[-1].startswith("Exit status")
    assert f"at most {gpu_check.LIMIT / 60:.0f} minutes;" in usage
    assert f"at most {gpu_check.QUICK_BUDGET / 60:.0f} minutes in all" in usage
    assert f"at most {gpu_check.LIMIT / 60:.0f} minutes ({gpu_check.QUICK_LIMIT / 60:.0f} with" in docs
    assert all(f"`{section.name}`" in docs for section in SECTIONS)
    assert f"{', '.join(f'`{name}`' for name in others)} and `{last}`" in re.sub(r"\s+", " ", docs)
    # --output is relative to the caller's folder, the default to the repository.
    outputs = []
    monkeypatch.setattr(tool, "check", lambda request: outputs.append(request.output) or 0)
    monkeypatch.chdir(tmp_path)
    assert tool.main(["--output", "here"]) == tool.main([]) == 0
    assert outputs == [tmp_path / "here", root / "outputs/gpu_check"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--only", "bench_8b", "speed"], "There is no section 'speed'; choose among environment, bench_8b, lora_8b"),
        (["--output", "pyproject.toml/x"], "pyproject.toml/x cannot be written"),
    ],
)
def test_mistakes_are_named(capsys, monkeypatch, root, arguments, says):
    monkeypatch.chdir(root)
    assert tool.main(arguments) == EXIT_STATUS
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_sections_are_listed(capsys):
    assert tool.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [x.name for x in SECTIONS]


def bench(layers, seconds=None, ranks=1, mfu=0.5):
    """Return a result of tools/bench.py: plain at 0.1 s + 0.05 s a layer, the others at 2 and 1.4 times."""
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
    result = figures({"whole_layers": 32, "benches": [bench(32, seconds=1.0, ranks=4)]})
    assert result.tokens_per_second["plain"] == pytest.approx(8192) and not result.extrapolated
    assert result.over_plain["ours"] == 1.41, "the ratio within a round, from bench.py"
    assert result.mfu["plain"] == pytest.approx((1e14 + 2e13 * 32) / 4e14)
    assert figures({"whole_layers": 32, "benches": []}) is None and figures({}) is None


def test_figures_are_extrapolated_in_layers():
    result = figures({"whole_layers": 32, "benches": [bench(16), bench(8)]})
    assert result.extrapolated and result.of_whole_model and result.layers == (8, 16)
    assert result.tokens_per_second["plain"] == pytest.approx(8192 / 1.7)  # 0.1 + 32 x 0.05 s
    assert result.tokens_per_second["straightforward"] == pytest.approx(8192 / 3.4)
    assert result.over_plain == pytest.approx({"plain": 1.0, "straightforward": 2.0, "ours": 1.4})
    assert result.mfu["ours"] == pytest.approx((1e14 + 2e13 * 32) / (1.4 * 1.7) / 4e14)
    assert result.peak_bytes["plain"] == 42 * 2**30
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
    # Devices of the H100 class pass; other devices, a part of the model, no result and debug sizes are not measured.
    for device in ("1 x NVIDIA H200", "8 x NVIDIA B200", "1 x NVIDIA GH200 480GB"):
        assert judge(full, of(1.0), device, False)[0] == "pass"
    for device in ("1 x NVIDIA A100-SXM4-80GB", "7 x NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert judge(full, of(1.0), device, False)[0] == "not measured"
    assert judge(memory, of(1.0), "1 x NVIDIA A100-SXM4-80GB", False)[0] == "pass"
    assert judge(full, of(1.0, layers=8), machine, False)[0] == "not measured"
    assert judge(full, None, machine, False) == ("not measured", "section bench_8b has no result")
    assert judge(full, of(1.0), machine, True) == ("not measured", "debug sizes")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Replace the repository with a folder of fake tools; return a function that writes these tools."""
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)

    def make(fits: int, runs: int, content: str | None = None):
        """Write a dry_run.py for which `fits` layers or tokens fit, and a bench.py that can run up to `runs` layers."""
        (tmp_path / "tools/dry_run.py").write_text(
            "import sys\n"
            "given = lambda key, other: sys.argv[sys.argv.index(key) + 1] if key in sys.argv else other\n"
            "size = int(given('--training.seq_len', given('--layers', 1)))\n"
            "open(given('--json', ''), 'w').write('{\"1\": {\"memory\": {}}}')\n"
            f"sys.exit(size > {fits})\n"
        )
        (tmp_path / "made.json").write_text(json.dumps({layers: bench(layers) for layers in (8, 16, 24, 32)}))
        (tmp_path / "tools/bench.py").write_text(
            "import json, sys\n"
            "given = lambda key: sys.argv[sys.argv.index(key) + 1]\n"
            f"if int(given('--layers')) > {runs}: sys.exit('torch.OutOfMemoryError: CUDA out of memory.')\n"
            f"made = json.load(open({str(tmp_path / 'made.json')!r}))[given('--layers')]\n"
            "if '--lengths' in sys.argv: made = {'lengths': [{**made, 'length': int(x), 'hardware_flops_ratio': 1.4}"
            " for x in sys.argv if x.isdigit() and int(x) > 1000]}\n"
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
        assert [bench["layers"] for bench in result["numbers"]["benches"]] == depths
        assert len(result["numbers"]["kernels"]) == 18
        report = (folder / "report.md").read_text()
        cell = f"{', '.join(map(str, sorted(depths)))} of 32 layers" + (", extrapolated" if len(depths) > 1 else "")
        assert cell in report and "a kernel" in report
        # 8,192 tokens in 1.7 s: a figure of the whole model, which eight layers alone do not give.
        whole_model = depths != [8]
        name = "LLaDA-8B" if whole_model else "LLaDA-8B's width, 8 of 32 layers"
        row = next(line for line in report.splitlines() if line.startswith(f"| {name}, full"))
        assert ("| 8 of 32 layers: plain" in report) == (not whole_model)
        assert (f"| {8192 / 1.7:,.0f}, " in row) == (depths != [8])
        assert f"| {1.4 if len(depths) > 1 else 1.41:.3f} |" in row
        assert "| LLaDA-8B, LoRA | not measured" in report


def test_a_model_that_does_not_fit_or_run(repository):
    folder = repository(0, 32)
    assert run(folder, BENCHES, H100) == 0
    assert "not even the smallest depth fits" in kept(folder, "lora_8b", "1-x-nvidia-h100-80gb-hbm3")["reason"]
    (folder.parent / "tools/dry_run.py").write_text("import nothing_such\n")
    assert run(folder, BENCHES[:1], H100) == 1
    assert "No module named 'nothing_such'" in kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")["reason"]
    folder = repository(32, 0)
    assert run(folder, BENCHES[:1], H100) == 1
    assert "OutOfMemoryError" in kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")["reason"]
    for content in ("no JSON", "[]", '{"layers": 32}'):
        folder = repository(32, 32, content)
        assert run(folder, BENCHES[:1], H100) == 1
        assert kept(folder, "bench_8b", "1-x-nvidia-h100-80gb-hbm3")["status"] == "failed"
        assert "| LLaDA-8B, full | not measured" in (folder / "report.md").read_text()


def test_what_will_not_fit_does_not_start(repository):
    machine = "1-x-nvidia-h100-80gb-hbm3"
    runs = [section for section in SECTIONS if section.name.startswith("run_")]
    lengths = [section for section in SECTIONS if section.name == "lengths"]
    folder = repository(0, 32)
    assert run(folder, [*runs, *lengths], H100) == 0
    for section in (*runs, *lengths):
        result = kept(folder, section.name, machine)
        assert result["status"] == "skipped" and "by the estimate of tools/dry_run.py" in result["reason"]
        assert all("dry_run.py" in command for command in result["commands"]) and result["commands"]
    folder = repository(8192, 32)
    assert run(folder, lengths, H100) == 0
    numbers = kept(folder, "lengths", machine)["numbers"]
    assert [row["length"] for row in numbers["lengths"]] == [4096, 8192]
    assert numbers["stopped"].startswith("rows of 16,384 tokens do not fit, by the estimate")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "xdist" else find_spec(name))
    assert run(tmp_path, [section for section in SECTIONS if section.name in ("tests", "decode")], H100) == 0
    reasons = [kept(tmp_path, name, "1-x-nvidia-h100-80gb-hbm3")["reason"] for name in ("tests", "decode")]
    assert reasons[0] == "needs the dev extra: bash launch/setup.sh dev"
    assert "--only run_dense decode" in reasons[1]


def test_commands_of_scripts_say_how_many_processes(tmp_path):
    section = Section("one", "a test", lambda context: context.run("bash", "-c", "true") and None, str, least=0.0)
    assert run(tmp_path, [section], H100, H100) == 0
    assert "\nNGPU=2 bash -c true\n" in (tmp_path / "report.md").read_text()


def test_decoding_in_the_report(tmp_path):
    row = {"memory": "off", "cache": "none", "threshold": None, "tokens_per_second": 20.5, "over_plain": 1.0,
           "passes": 128, "agreement": 1.0}  # fmt: skip
    fast = row | {"cache": "dual", "threshold": 0.9, "tokens_per_second": 164.0, "over_plain": 8.01, "passes": 31}
    numbers = {"settings": [row, fast, fast | {"memory": "on", "over_plain": 9.0, "agreement": 0.875}]}
    numbers |= {"prompt_tokens": 1024, "new_tokens": 128, "memory_seconds": 0.5}
    (decode,) = (section for section in SECTIONS if section.name == "decode")
    assert decode.headline(numbers) == "plain 20.5 tokens/s; cache dual, threshold 0.9: 8.01 times plain"
    results.keep(tmp_path, results.Result("decode", "CPU, debug sizes", "2.13", "now", 1.0, "ok", numbers=numbers))
    assert run(tmp_path, [*SECTIONS, command("good", "print(1)")], only=["good"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "| off | none | none | 20.5 | 1.00 | 128 | 100.0% |" in report
    assert "| on | dual | 0.9 | 164.0 | 9.00 | 31 | 87.5% |" in report and "Writing the memory: 0.500 s" in report


def test_json_of_generate_has_no_prompt_sign(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n"))
    assert list(generate.prompts(SimpleNamespace(interactive=True, json=True))) == ["import os"]
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_everything_with_debug_sizes(tmp_path, root):
    """Run the whole check without an accelerator, as a user starts it; about four minutes."""
    done = subprocess.run(
        ["bash", "launch/gpu_check.sh", "--output", str(tmp_path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept_results = {section.name: kept(tmp_path, section.name) for section in SECTIONS}
    assert {name: result["status"] for name, result in kept_results.items()} == {
        section.name: "skipped" if section.name == "tests" else "ok" for section in SECTIONS
    }
    full, lora = (kept_results[name]["numbers"]["benches"][0] for name in ("bench_8b", "lora_8b"))
    assert lora["flops"]["hardware_outer"] < 0.8 * full["flops"]["hardware_outer"], "no gradients of frozen weights"
    runs = [run["name"] for run in kept_results["run_dense"]["numbers"]["runs"]]
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
        "| on | dual | 0.9 |",
    ):
        assert cell in said
    assert said.count("| not measured | debug sizes |") == len(GATES)
    assert "needs an accelerator" in said and gpu_report.NOT_MEASURED in said
