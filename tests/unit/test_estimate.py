"""Dry-run estimates of memory, communication and time against real steps."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.distributed import destroy_process_group, is_initialized
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed.utils import init_fake_mode

from memdlm_dist.config import launch, parse_config
from memdlm_dist.models import BACKBONES
from memdlm_dist.performance import bench_steps as bench_step
from memdlm_dist.performance.collectives import Collectives
from memdlm_dist.performance.estimate import Communication, Estimate, MemoryEstimate, estimate, saved_elements
from memdlm_dist.performance.forecast import forecast
from memdlm_dist.performance.step_time import Speeds, StepTime, step_time, warning
from memdlm_dist.runtime import cpu
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args, model_on_meta
from tools import dry_run

DEBUG = [
    "--job.config_file", "train_configs/debug.toml", "--training.seq_len", "64", "--training.local_batch_size", "2",
    "--parametric_memory.layer_fraction", "0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_other_process_group():
    """Destroy a process group left by an earlier test, since fake ranks need their own."""
    if is_initialized():
        destroy_process_group()


SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
CP = "--parallelism.context_parallel_degree"
STEPS = ["--parametric_memory.inner_steps", "3", "--parametric_memory.inner_epochs", "2"]


@pytest.mark.parametrize(
    "ranks, arguments",
    [
        (4, [SHARD, "4"]),
        (4, [SHARD, "4", "--model.converters", "lora"]),
        (4, [SHARD, "4", "--model.converters", "lora", "--parallelism.fsdp_reshard_after_forward", "never"]),
        (4, [SHARD, "2", TP, "2", "--parametric_memory.inner_loss", "kl", *STEPS]),
        (8, [SHARD, "4", "--parallelism.data_parallel_replicate_degree", "2"]),
        (4, [SHARD, "2", CP, "2", "--parametric_memory.target_modules", "ffn,attention", *STEPS]),
        (8, [TP, "2", CP, "2", "--activation_checkpoint.mode", "full"]),
    ],
    ids=["fsdp4", "lora", "lora-never", "fsdp2-tp2", "hsdp", "fsdp2-cp2", "fsdp2-tp2-cp2"],
)
def test_fsdp_sends_what_is_foretold(ranks, arguments):
    """Count the collectives of a step in one process with fake ranks."""
    config = launch.resolve(parse_config.parse([*DEBUG, *arguments]), ranks)
    init_fake_mode(ranks)
    try:
        bench = bench_step.Bench.build(config)
        predicted = estimate(bench.model, bench.args, bench.dims, config).communication
        counted: Collectives = bench.collectives("ours")
        # No parameter stays gathered after a step, because the optimizer changes the weights.
        assert all("fsdp" in p.device_mesh.mesh_dim_names for p in bench.model.parameters())
        fsdp_groups = bench.groups("fsdp")
        dp_size = fsdp_groups[0].size()
        # Each collective's largest argument is the gathered tensor; here every size divides evenly, without padding.
        sums = {
            kind: sum(4 * n * (dp_size - 1) / dp_size for name, n in counted.on(*fsdp_groups) if name == kind)
            for kind in ("all_gather", "reduce_scatter")
        }
        replicated = sum(4 * n for _, n in counted.on(*bench.groups("dp_replicate")))
        assert predicted.gather == pytest.approx(sums["all_gather"])
        assert predicted.reduce == pytest.approx(sums["reduce_scatter"])
        assert predicted.replicate == pytest.approx(2 * replicated / 2)
        if tp_groups := bench.groups("tp"):
            # Only the layers' exchanges; the estimate omits embedding, head and the low-rank inner dimension.
            half = 2 * 64 // bench.dims.cp * bench.args.dim // 2
            # A reduce-scatter takes the full tensor, an all-gather takes a half.
            sizes = {"reduce_scatter": 2 * half, "all_gather": half}
            sent = sum(4 * half for kind, n in counted.on(*tp_groups) if n == sizes.get(kind))
            assert predicted.tensor == pytest.approx(sent, rel=0.1)
        if cp_groups := bench.groups("cp"):
            # A ring all-reduce sends everything twice; an all-to-all sends all but the rank's own part, here a half.
            factor = {"all_to_all": 1 / 2, "all_reduce": 2 / 2}
            sent = sum(4 * n * factor[kind] for kind, n in counted.on(*cp_groups))
            # Tolerance: without fast weights in its attention, the lowest adapted layer skips attention's backward
            # pass in inner steps; the losses are all-reduced too.
            assert predicted.context == pytest.approx(sent, rel=0.01 if "ffn,attention" in arguments else 0.2)
    finally:
        destroy_process_group()


def test_packed_rows_have_sets_and_copies_for_their_slots():
    """5 documents take 8 slots in 4 rows of 64 tokens; a recomputed layer copies inputs for gate, up and down."""
    arguments = ["--activation_checkpoint.mode", "full", "--training.local_batch_size", "4"]
    config = parse_config.parse([*DEBUG, *arguments])
    one, five = (forecast(config, 1, documents=number) for number in (1, 5))
    assert five.memory.fast_weights == 8 * one.memory.fast_weights > 0
    args, rows = get_model_args(config), 4 * (config.training.seq_len + 8 * 8)
    copies = five.memory.activations - one.memory.activations
    assert copies == 4 * rows * (2 * args.dim + args.hidden_dim)
    assert five.flops == one.flops


def test_flops_are_those_of_the_share_with_the_memory():
    """And 2 samples of a set have half of the fast weights."""

    def run(*arguments):
        return forecast(parse_config.parse([*DEBUG, *arguments, "--debug.seed", "1"]), 1)

    half = ["--parametric_memory.probability", "0.5", "--parametric_memory.samples_per_set", "2"]
    plain, full = run("--parametric_memory.no-enable"), run()
    for unit in ("sample", "step"):
        shared = run(*half, "--parametric_memory.probability_unit", unit)
        assert shared.flops == pytest.approx((plain.flops + full.flops) / 2) != plain.flops
        assert shared.memory.fast_weights == full.memory.fast_weights / 2 > 0


@pytest.mark.parametrize(
    "arguments, backend",
    [
        (["--compile.enable", "--compile.backend", "aot_eager"], "aot_eager"),
        (["--compile.enable", TP, "2", SHARD, "2"], None),  # its losses communicate
        (["--compile.enable", "--compile.components", "model"], None),
        ([], None),
    ],
    ids=["losses", "tp2", "model", "eager"],
)
def test_the_head_compiles_its_losses_and_fsdp_sums(monkeypatch, arguments, backend):
    """Head backend follows the configuration; with an accelerator, gradients are plain sums as well."""
    monkeypatch.setattr(cpu, "has_accelerator", lambda: True)
    config = parse_config.parse([*DEBUG, *arguments])
    init_fake_process_group(4)
    try:
        model = model_on_meta(config, get_model_args(config), get_layout(config, 4))
        assert model.output.backend == backend
        groups = [
            group
            for module in model.modules()
            if isinstance(module, FSDPModule)
            for group in [module._get_fsdp_state()._fsdp_param_group]
            if group is not None
        ]
        assert len(groups) > 3 and all(group.force_sum_reduction_for_comms for group in groups)
    finally:
        destroy_process_group()


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("llada", {"hidden_dim": 192}), ("llada_moe", {"hidden_dim": 192}),
        ("llada2", {"dense_hidden_dim": 512}),
        ("llada2", {"hidden_dim": 192, "shared_hidden_dim": 320, "n_dense_layers": 0}),
    ],
    ids=["dense", "experts", "dense layer", "experts and a shared one"],
)  # fmt: skip
def test_autograd_keeps_the_foretold_elements_of_a_layer(name, sizes):
    args = replace(BACKBONES[name].flavours["debug"], dim=128, n_layers=1, max_seq_len=256, **sizes)
    model = BACKBONES[name].model(args)
    with torch.no_grad():
        model.init_weights()
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), model.freqs_cis]}
    saved = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(2, 256, args.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = model.layers["0"](x, model.context(256))
    y.sum().backward()
    # The estimate omits small tensors: norm statistics, routing, the RoPE table. It also omits the normalised inputs,
    # which only a CPU's RMSNorm saves.
    assert saved_elements(args)[1] == pytest.approx(sum(saved.values()) / 4 / (2 * 256), rel=0.12)


def test_dry_run_of_the_recipes(tmp_path, capsys):
    """Full-size recipes on the meta device."""
    results = {}
    for name in ("llada_8b", "llada_moe_7b"):
        file = tmp_path / f"{name}.json"
        recipe = f"train_configs/{name}_longalpaca.toml"
        sizes = ["--world-size", "8", "32"]
        assert dry_run.main([recipe, "--json", str(file), *sizes]) == 0
        results[name] = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert "llada 8B: 8,099,467,264 parameters, 83,886,080 trained" in out
    dense, moe = results["llada_8b"], results["llada_moe_7b"]
    base = 8_015_581_184  # LLaDA-8B
    assert dense["8"]["parameters"] - dense["8"]["trained"] == base
    # NF4: half a byte an element, an int8 scale for 64, a bfloat16 factor for 256 scales; and 34 bytes for each tensor.
    quantized = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    stored = quantized * (1 / 2 + 1 / 64 + 2 / 64 / 256) + 2 * (base - quantized)
    assert dense["8"]["memory"]["weights"] == pytest.approx((stored + 4 * 83_886_080) / 8, rel=1e-3)
    # On four nodes each node holds a replica. Micro-batches have the same size on any layout.
    assert dense["8"]["memory"]["optimizer"] == dense["32"]["memory"]["optimizer"] == 2 * 4 * 83_886_080 / 8
    assert [(dense[n]["replicas"], dense[n]["sequences"]) for n in ("8", "32")] == [(1, 2), (4, 2)]
    # Base and adapters are gathered once per micro-batch, the linears in 4 bits, and stay gathered; across nodes only
    # gradients are reduced.
    gathered = stored + 2 * 83_886_080
    for ranks, micro_batches in (("8", 4), ("32", 1)):
        assert dense[ranks]["memory"]["gathered"] == pytest.approx(gathered, rel=1e-4)
        assert dense[ranks]["communication"]["gather"] == pytest.approx(micro_batches * gathered * 7 / 8, rel=1e-4)
    assert dense["8"]["across_nodes"] == [] and dense["32"]["across_nodes"] == ["replicate"]
    assert dense["32"]["communication"]["replicate"] == 2 * 4 * 83_886_080 / 8 * 3 / 4
    assert moe["8"]["parameters"] - moe["8"]["trained"] == 7_356_880_896
    assert moe["8"]["active"] < 2e9


@pytest.mark.slow  # 257 experts in 19 layers
def test_dry_run_of_llada21_mini(tmp_path):
    file = tmp_path / "found.json"
    recipe = "train_configs/llada21_mini_longalpaca.toml"
    assert dry_run.main([recipe, "--world-size", "8", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["8"]
    # Embedding and head; attention, and the FFN of the dense layer; norms; experts, shared expert and router.
    outside, attention = 2 * 157_184 * 2048, 20 * (2 * 2048**2 + 2 * 512 * 2048) + 3 * 2048 * 5120
    norms = 20 * (2 * 2048 + 2 * 128) + 2048
    experts = {count: 19 * 2048 * (3 * 512 * (count + 1) + 256) for count in (256, 8)}
    adapters = {
        count: 32 * (20 * (2 * 4096 + 2 * 2560) + 3 * (2048 + 5120) + 19 * (count + 1) * 3 * 2560) for count in (256, 8)
    }
    assert found["trained"] == adapters[256]
    assert found["parameters"] - found["trained"] == outside + attention + norms + experts[256] == 16_255_638_528
    assert found["active"] == outside + attention + norms + experts[8] + adapters[8]
    # One set of fast weights, its gradients and the updated set: all experts of two layers, in float32.
    assert found["memory"]["fast_weights"] == 3 * 4 * 126_320_640 == 3 * 4 * (2 * 257 * 3 * 32 * 2560)


@pytest.mark.parametrize(
    "recipe, arguments",
    [
        ("llada_8b", [TP, "2"]),
        ("llada_moe_7b", ["--parallelism.expert_parallel_degree", "4"]),
        ("llada_moe_7b", [TP, "2", "--lora.target_modules", "attention"]),
    ],
)
def test_the_base_stays_frozen_on_every_layout(recipe, arguments):
    """Tensor and expert parallelism create new parameters, which require gradient by default."""
    path = f"train_configs/{recipe}_longalpaca.toml"
    supported = ["--job.config_file", path, "--lora.base", "unquantized", "--lora.dropout", "0"]
    parallel, plain = (forecast(parse_config.parse([*supported, *more]), 8) for more in (arguments, arguments[2:]))
    rank, width = 32, 2048
    if recipe == "llada_8b":
        assert parallel.trained == plain.trained == 83_886_080
    elif "attention" in arguments:
        assert parallel.trained == 16 * 4 * rank * 2 * width
    else:
        assert parallel.trained == 16 * rank * (4 * 2 * width + 64 * 3 * (width + 1024) + width + 64)


def test_dry_run_tells_what_will_not_fit(capsys):
    recipe = "train_configs/llada_8b_longalpaca.toml"
    assert dry_run.main([recipe, "--world-size", "8", "256", "--device-memory", "4"]) == 1
    out = capsys.readouterr().out
    assert "GiB will not fit on devices of 4 GiB" in out
    assert 'parallelism.fsdp_reshard_after_forward = "default"' in out
    assert "256 ranks: training.global_batch_size = 64 must be a multiple of training.local_batch_size 2 x 256" in out
    freed = ["--parallelism.fsdp_reshard_after_forward", "default", "--device-memory", "6"]
    assert dry_run.main([recipe, "--world-size", "8", "--layers", "8", *freed]) == 1
    assert "lower training.local_batch_size" in capsys.readouterr().out
    few = ["--layers", "1", "--training.local_batch_size", "1", "--parametric_memory.samples_per_set", "1"]
    assert dry_run.main([recipe, "--world-size", "8", *freed, *few]) == 0
    assert dry_run.main(["train_configs/absent.toml", "--world-size", "8"]) == 2
    assert "train_configs/absent.toml does not exist" in capsys.readouterr().err


def minimal_estimate(flops=2e14, **traffic):
    """Return an estimate with only the fields that determine the step time."""
    sent = dict.fromkeys(("gather", "reduce", "replicate", "tensor", "context", "experts"), 0.0) | traffic
    memory = MemoryEstimate(*[0.0] * 9)
    return Estimate(0, 0, 0, 1, 4, 1, memory, Communication(**sent), ["gather", "replicate"], flops)


def test_the_seconds_of_a_step():
    speeds = Speeds(tflops=400, intra=450, inter=50)
    seconds = step_time(minimal_estimate(gather=20e9, reduce=9e9, replicate=5e9, tensor=81e9), speeds)
    # 200 of 400 TFLOP/s; 90 GB at 450 GB/s; 25 GB at 50 GB/s.
    assert seconds == StepTime(compute=0.5, within_nodes=pytest.approx(0.2), across_nodes=pytest.approx(0.5))
    assert seconds.communication == pytest.approx(0.7)


SLOW = {  # name -> (bytes across nodes, or within them for "tensor"; other changes; expected warning)
    "0.48 s is less": ({"gather": 24e9}, {}, None),
    "shards across nodes": (
        {"gather": 28e9},
        {},
        "communication takes 0.56 s of a step, longer than its 0.50 s of compute; set "
        "parallelism.data_parallel_shard_within = 'node'.",
    ),
    "gathers": (
        {"gather": 28e9}, {"replicas": 2}, "set parallelism.fsdp_reshard_after_forward = 'never' if memory allows.",
    ),
    "gradients": ({"replicate": 28e9}, {}, "raise training.global_batch_size, or take fewer ranks."),
    "micro-batches": ({"replicate": 28e9}, {"micro_batches": 2}, "raise training.local_batch_size if memory allows, "),
    "tensor parallel": ({"tensor": 270e9}, {}, "takes 0.60 s of a step, longer than its 0.50 s of compute; lower "),
}  # fmt: skip


def test_a_step_that_sends_longer_than_it_computes():
    config = parse_config.parse(DEBUG)
    speeds = Speeds(tflops=400, intra=450, inter=50)
    # The warning proposes only what is not yet in force; with one data-parallel rank a node, "node" changes nothing.
    for degree, within, sentence in (
        (4, "world", "set parallelism.data_parallel_shard_degree = -1 and data_parallel_shard_within = 'node'."),
        (-1, "node", "set parallelism.fsdp_reshard_after_forward = 'never' if memory allows."),
    ):
        other = copy.deepcopy(config)
        other.parallelism.data_parallel_shard_degree, other.parallelism.data_parallel_shard_within = degree, within
        assert sentence in (warning(other, minimal_estimate(gather=28e9), speeds) or "")
    for name, (sent, changes, sentence) in SLOW.items():
        message = warning(config, replace(minimal_estimate(**sent), **changes), speeds)
        assert (message is None) == (sentence is None) and (sentence or "") in (message or ""), name


def test_dry_run_prints_the_seconds(capsys, tmp_path):
    """Two layers of LLaDA-8B, all weights trained, memory off, on two nodes of 4 ranks."""
    arguments = [
        "train_configs/llada_8b_longalpaca.toml", "--world-size", "8", "--ranks-per-node", "4", "--layers", "2",
        "--model.converters", "", "--parametric_memory.no-enable", "--activation_checkpoint.mode", "none",
        "--parallelism.data_parallel_shard_within", "world", "--tflops", "100", "--inter", "10", "--json",
        str(tmp_path / "found.json"), "--training.global_batch_size", "32", "--training.local_batch_size", "4",
    ]  # fmt: skip
    assert dry_run.main(arguments) == 0
    result = json.loads((tmp_path / "found.json").read_text())["8"]
    tokens, width, hidden, vocab_size = 4 * 4096, 4096, 12288, 126464
    linears = 2 * (4 * width * width + 3 * width * hidden)
    # Backward costs twice forward, and 2.5 times for attention; the head runs on half the tokens.
    flops = 3 * 2 * tokens * linears + 3.5 * 2 * 4 * tokens * 4096 * width + 3 * 2 * tokens / 2 * width * vocab_size
    # The number of scored positions is rounded up to a multiple of a sixteenth of the tokens.
    assert result["flops"] == pytest.approx(flops, rel=0.02)
    assert result["seconds"]["compute"] == result["flops"] / 100e12
    parameters = linears + 2 * 2 * width + 2 * vocab_size * width + width
    # Gathered once in bfloat16, reduced in float32.
    assert result["communication"]["gather"] == 2 * parameters * 7 / 8
    assert result["communication"]["reduce"] == 4 * parameters * 7 / 8
    assert result["seconds"] == {
        "compute": result["flops"] / 1e14, "within_nodes": 0.0,
        "across_nodes": pytest.approx(6 * parameters * 7 / 8 / 10e9),
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "8 ranks: communication takes" in out and "set parallelism.data_parallel_shard_within = 'node'." in out
    assert dry_run.main([*arguments, "--ranks-per-node", "8", "--intra", "1e6"]) == 0
    assert "communication takes" not in capsys.readouterr().out
