"""tools/bench.py as a user runs it; no test asserts a speed, which needs a quiet machine."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.performance import preparation_bench
from memdlm_dist.performance.gpu_check.section import last_words
from memdlm_dist.performance.measure import peak_flops
from memdlm_dist.performance.probability_bench import Setting, cycle_length, draw_cycle, slowest_share
from tests.support.bilevel import memory, objective
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


@pytest.fixture
def two_fake_ranks(monkeypatch):
    """Let the bench run here as rank 0 of two ranks without communication: values are missing, shapes are true."""
    if dist.is_initialized():
        dist.destroy_process_group()
    start = dist.init_process_group
    monkeypatch.setattr(bench.dist, "init_process_group", lambda *_: start("fake", rank=0, world_size=2))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_bench_measures_probabilities(tmp_path, capsys, monkeypatch, root, two_fake_ranks):
    monkeypatch.chdir(root)
    file = tmp_path / "probabilities.json"
    arguments = [
        "train_configs/debug.toml", "--rounds", "1", "--warm-up", "1", "--layers", "2", "--json", str(file),
        "--probabilities", "0", "0.5", "1", "--training.seq_len", "64", "--training.local_batch_size", "2",
    ]  # fmt: skip
    assert bench.main(arguments) == 0
    measured = json.loads(file.read_text())
    rows = {(x["unit"], x["probability"]): x for x in measured["settings"]}
    out = capsys.readouterr().out
    assert all(f"{name:<12}{x['step_seconds']:>14.3f}" in out for name, x in [
        ("plain", rows["plain", 0]), ("step 0.5", rows["step", 0.5]), ("sample 1", rows["sample", 1]),
    ])  # fmt: skip
    assert measured["steps_per_round"] == 4 and (measured["groups"], measured["data_parallel_ranks"]) == (2, 2)

    flops = {name: x["flops_over_plain"] for name, x in rows.items()}
    assert flops["step", 0] == flops["sample", 0] == 1 and flops["step", 1] == flops["sample", 1] > 1.4
    # Samples differ in their scored tokens.
    assert flops["step", 0.5] == pytest.approx(1 + 0.5 * (flops["step", 1] - 1), rel=0.02)
    # Embedding, two layers and head are gathered twice, but for the head; ours gathers the tail once.
    gathers = {name: x["all_gathers"] for name, x in rows.items()}
    assert gathers["plain", 0] == gathers["step", 0] == [7, 7] and gathers["step", 1] == [6, 6]
    assert gathers["step", 0.5] == [6, 7] and all(gathers["sample", p] == [6, 6] for p in (0, 0.5, 1))

    share = {name: x["expected_slowest_share"] for name, x in rows.items()}
    assert [share["step", p] for p in (0, 0.5, 1)] == [0, 0.5, 1]
    assert share["sample", 0] == 0 and share["sample", 1] == 1
    assert share["sample", 0.5] == 0.5 * (0.75**2 - 0.25**2) + (1 - 0.75**2)  # two Binomial(2, 0.5): 0, 1 or 2
    assert all(abs(x["slowest_share"] - x["expected_slowest_share"]) <= 1 / 8 for x in rows.values())


@pytest.mark.parametrize("groups, ranks, probability", [(1, 8, 0.25), (2, 1, 0.5), (5, 3, 0.3), (8, 64, 0.25)])
def test_the_slowest_rank_reads_what_is_expected(groups, ranks, probability):
    counts = objective(memory()).row_counts(groups)
    trials = 20_000
    most = np.random.default_rng(0).binomial(groups, probability, (trials, ranks)).max(1)
    read = np.array([min(c for c in counts if c >= n) for n in range(groups + 1)])[most] / groups
    # Four standard deviations of the mean.
    assert abs(slowest_share(probability, ranks, counts) - read.mean()) < 4 * read.std() / trials**0.5


def test_a_cycle_has_the_share_of_its_probability():
    assert [cycle_length(p) for p in ([1.0], [0.25, 0.5], [0.0, 0.3], [0.2, 0.25])] == [4, 4, 10, 20]
    with pytest.raises(UserError, match="needs rounds of 420 steps"):
        cycle_length([0.05, 1 / 3, 1 / 7])
    counts = objective(memory()).row_counts(4)
    assert draw_cycle(Setting("step", 0.3), 10, 2, counts) == [(4, 4)] * 3 + [None] * 7
    for probability, ranks in ((0.0, 2), (0.3, 1), (0.3, 8), (1.0, 2)):
        cycle = draw_cycle(Setting("sample", probability), 10, ranks, counts)
        assert len(cycle) == 10 and {len(step) for step in cycle} == {ranks}
        assert sum(map(sum, cycle)) == round(probability * 10 * ranks * 4)
        slowest = np.mean([min(c for c in counts if c >= max(step)) / 4 for step in cycle])
        assert slowest == pytest.approx(slowest_share(probability, ranks, counts), abs=1 / 40)


def test_expert_parallel_ranks_always_read_all_rows():
    goal = replace(objective(memory()), memory=replace(memory(), ep_mesh=object()))
    assert slowest_share(0.25, 8, goal.row_counts(4)) == 1


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
        (["--profile", "x.txt", "--probabilities", "0.5"], "omit it with --mix, --lengths and --probabilities"),
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


@pytest.mark.parametrize("probability", ["1.5", "-0.5", "0.333", "half"])
def test_probabilities_that_need_long_cycles_are_refused(capsys, probability):
    with pytest.raises(SystemExit):
        bench.main(["--probabilities", "0.5", probability])
    assert "argument --probabilities: invalid probability value" in capsys.readouterr().err
