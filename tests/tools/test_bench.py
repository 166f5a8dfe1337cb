"""tools/bench.py as a user runs it; no test asserts a speed, which needs a quiet machine."""

import json

import pytest
import torch

from memdlm_dist.errors import EXIT_STATUS
from memdlm_dist.performance import preparation_bench
from memdlm_dist.performance.gpu_check.section import last_words
from memdlm_dist.performance.measure import peak_flops
from tests.support.launching import run_module
from tools import bench


@pytest.mark.slow
def test_bench_writes_what_it_measures(tmp_path):
    result, profile = tmp_path / "new/bench.json", tmp_path / "profile.txt"
    out = run_module(
        "tools.bench", "train_configs/debug.toml", "--processes", "2", "--rounds", "2", "--warm-up", "1",
        "--layers", "3", "--json", str(result), "--profile", str(profile), "--training.local_batch_size", "2",
    )  # fmt: skip
    assert "step, median (s)" in out and "data-parallel all-gathers" in out and str(result) in out
    measured = json.loads(result.read_text())
    for key in ("step_seconds", "tokens_per_second", "all_gathers", "reduce_scatters", "peak_bytes"):
        assert set(measured[key]) == {"plain", "straightforward", "ours"} and min(measured[key].values()) > 0
    # Embedding, three layers and head are gathered in the forward pass. The backward pass gathers all but the head
    # again; ours all but the tail.
    assert measured["all_gathers"]["plain"] == 5 + 4 and measured["all_gathers"]["ours"] == 5 + 3
    assert set(measured["reduce_scatters"].values()) == {5}
    assert measured["ratio"]["ours_over_plain"] > 0 and measured["ratio"]["straightforward_over_plain"] > 0
    fastest, slowest = measured["step_seconds_range"]["ours"]
    assert fastest <= measured["step_seconds"]["ours"] <= slowest
    flops = measured["flops"]
    assert measured["hardware_flops_ratio"] == pytest.approx(
        1 + flops["hardware_inner"] / flops["hardware_outer"], rel=0.1
    )
    assert measured["mfu"]["plain"] is None, "a CPU has no peak FLOP/s to compare with"
    assert "aten::mm" in profile.read_text()


@pytest.mark.slow
def test_bench_sweeps_over_lengths(tmp_path):
    result = tmp_path / "lengths.json"
    out = run_module(
        "tools.bench", "train_configs/debug.toml", "--processes", "2", "--rounds", "1", "--warm-up", "1",
        "--lengths", "64", "128", "--json", str(result), "--parallelism.context_parallel_degree", "2",
    )  # fmt: skip
    assert "tokens of a row" in out
    measured = json.loads(result.read_text())["lengths"]
    assert [x["length"] for x in measured] == [64, 128] and measured[0]["ranks"] == 2
    assert all(set(x["step_seconds"]) == {"plain", "ours"} and x["ratio"]["ours_over_plain"] > 0 for x in measured)
    assert measured[1]["flops"]["hardware_outer"] > 1.9 * measured[0]["flops"]["hardware_outer"]


@pytest.mark.slow
def test_bench_compares_arrangements_of_mixed_rows(tmp_path):
    result = tmp_path / "mix.json"
    out = run_module(
        "tools.bench", "train_configs/debug.toml", "--processes", "2", "--rounds", "2", "--warm-up", "1", "--mix",
        "--layers", "2", "--json", str(result), "--training.seq_len", "256", "--training.local_batch_size", "1",
    )  # fmt: skip
    assert "grouped by length" in out
    measured = json.loads(result.read_text())
    assert measured["buckets"] == [128, 256] and measured["rows"] == 2 * 8 * 2
    assert min(measured["step_seconds"].values()) > 0 and measured["over_whole"]["padded to seq_len"] == 1
    tokens = {
        name: measured["content"] + measured["padding"][name] + measured["fill"][name] for name in measured["fill"]
    }
    assert tokens["padded to seq_len"] == 32 * 256 and measured["fill"]["padded to seq_len"] == 0
    assert tokens["grouped by length"] <= tokens["in buckets"] < tokens["padded to seq_len"]


def test_bench_of_the_preparation_counts_all_of_the_corpus(tmp_path, capsys):
    rows = [{"text": f"row {i} of 200: the quick brown fox\n" * 20} for i in range(200)]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    command = ["prepare", "--input", str(corpus), "--train-tokenizer", "300", "--seq-len", "64", "--json"]
    assert bench.main([*command, str(tmp_path / "bench.json"), "--pack-documents"]) == 0
    out = capsys.readouterr().out
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert measured["megabytes"] == sum(len(row["text"]) for row in rows) / 1e6 and measured["rows"] == 201
    assert measured["bad_rows"] == 1 and measured["sequences"] * 64 >= measured["tokens"] > 200 * 20
    assert set(measured["share"]) == {"read", "tokenise", "build", "write"} and min(measured["share"].values()) > 0
    assert sum(measured["share"].values()) == pytest.approx(1)
    speed = measured["megabytes"] / sum(measured["cpu_seconds"].values())
    assert measured["megabytes_per_second"] == pytest.approx(speed) and f"{speed:,.1f}" in out
    assert bench.main([*command, str(tmp_path / "part.json"), "--megabytes", "0.05"]) == 0
    assert 0.05 <= json.loads((tmp_path / "part.json").read_text())["megabytes"] < measured["megabytes"]


def test_a_nested_stage_counts_once(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 7.0, 100.0, 108.0])
    monkeypatch.setattr(preparation_bench.time, "process_time", lambda: next(times))
    clock = preparation_bench._StageClock()
    with clock("build"), clock("tokenise"):
        pass
    with clock("read"):
        pass
    assert clock.seconds == {"read": 8.0, "tokenise": 2.0, "build": 5.0, "write": 0.0}


def test_an_error_reaches_torchrun(tmp_path, monkeypatch, root):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench, "run", fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(torch.OutOfMemoryError):
        bench.main([str(root / "train_configs/debug.toml")])
    assert "OutOfMemoryError: CUDA out of memory." in (tmp_path / "error.json").read_text()


@pytest.mark.slow
def test_the_error_of_another_rank_is_shown(tmp_path, capfd, monkeypatch, root):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time, torch\n"
        "from tools import bench\n"
        "def run(*_):\n"
        "    if os.environ['RANK'] == '1': raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')\n"
        "    time.sleep(60)\n"
        "bench.run = run\n"
        "sys.exit(bench.main())\n"
    )
    monkeypatch.setattr(bench, "__file__", str(worker))
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(root)
    assert bench.main(["train_configs/debug.toml", "--processes", "2", "--json", ""]) == 1
    said = capfd.readouterr().err
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB" in said
    assert last_words(said).endswith("CUDA out of memory. Tried 2 GiB")


@pytest.mark.parametrize(
    "device, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_flops_are_of_devices_that_are_known(device, peak):
    assert peak_flops(device) == peak


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["no/such.toml"], "no/such.toml does not exist"),
        (["--activation_checkpoint.mode", "fulle"], "but is 'fulle'"),
        (["train_configs/debug.toml", "--parametric_memory.no_enable"], "parametric_memory.enable is false"),
        (["train_configs/debug.toml", "--processes", "3", "--parallelism.tensor_parallel_degree", "2"], "3 processes"),
        (["train_configs/debug.toml", "--lengths", "64", "63", "--parallelism.context_parallel_degree", "2"], "(63)"),
        (["train_configs/debug.toml", "--training.sequence", "3"], "Unknown key --training.sequence"),
        (["prepare", "--seq-len", "1"], "--seq-len must be from 2"),
        (["prepare", "--input", "no/such.jsonl"], "no/such.jsonl matches no file"),
        (["prepare", "--tokenizer", "./no_such"], "There is no tokenizer.json in ./no_such"),
        (["train_configs/debug.toml", "--json", "pyproject.toml/x.json"], "pyproject.toml/x.json cannot be written"),
    ],
)
def test_mistakes_are_named(capsys, monkeypatch, root, arguments, says):
    monkeypatch.chdir(root)
    monkeypatch.delenv("RANK", raising=False)  # a run in this process may have set it
    assert bench.main(arguments) == EXIT_STATUS
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1
