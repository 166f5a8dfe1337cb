"""Relative write of the inner loop over the width of the backbone, with and without scaled learning rates."""

import json

import pytest
import torch
import torch.distributed as dist

from memdlm_dist.config import parse_config
from memdlm_dist.errors import EXIT_STATUS
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.models import backbone_args
from memdlm_dist.performance import relative_write
from memdlm_dist.runtime.single_process import free_port
from memdlm_dist.training.backbone import get_layout
from memdlm_dist.training.objective import build_objective
from tests.support.bilevel import memory
from tools import bench

WIDTHS = [64, 128, 256, 512]
# Steps of norm 0.1 for every fast tensor, as if every gradient were clipped.
CLIPPED = ("--parametric_memory.gradient_clip", "1e-6", "--parametric_memory.learning_rate", "1e5")
PUBLISHED, SCALED = (("--parametric_memory.learning_rate_scale", scale) for scale in ("none", "width"))
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def configuration(root, *overrides):
    sizes = ("--training.seq_len", "32", "--training.local_batch_size", "4", "--training.global_batch_size", "4")
    quickstart = ("--job.config_file", str(root / "train_configs/quickstart.toml"))
    return parse_config.parse([*quickstart, *sizes, *overrides])


def measured(root, widths, *overrides):
    return relative_write.measure(configuration(root, *CLIPPED, *overrides), widths, layers=1, vocab_size=256)


def test_scaled_learning_rates_keep_the_relative_write_of_clipped_steps(one_process, root):
    """Each kind of linear keeps its write within 15% of the mean over the widths; without scale it falls by 30%."""
    plain, scaled = measured(root, WIDTHS, *PUBLISHED), measured(root, WIDTHS, *SCALED)
    for linear in ("gate", "up", "down"):
        writes = [x["linears"][linear] for x in scaled["widths"]]
        assert writes == pytest.approx([sum(writes) / len(writes)] * len(writes), rel=0.15), linear
        assert plain["widths"][-1]["linears"][linear] < 0.7 * plain["widths"][0]["linears"][linear]
        assert abs(scaled["exponents"][linear]) < 0.1 and plain["exponents"][linear] < -0.15, linear


def test_the_write_of_full_fast_weights_needs_no_scale(one_process, root):
    plain, scaled = (measured(root, [64, 128], "--parametric_memory.adapter", "full", *x) for x in (PUBLISHED, SCALED))
    assert plain == scaled and plain["widths"][1]["mean"] == pytest.approx(plain["widths"][0]["mean"], rel=0.1)


def test_scaled_learning_rates_are_the_published_ones_at_the_published_width(one_process, root):
    fast, full = (memory(fast_weight_type=kind).draw(0, 0, torch.arange(2)) for kind in ("lora", "full"))
    rates = {width: InnerSGD(0.1, learning_rate_scale="width", width=width).learning_rates for width in (512, 2048)}
    assert rates[2048](fast) == [0.1, 0.1] * 6 and rates[512](fast) == [0.2, 0.05] * 6
    assert rates[512](full) == [0.1] * 6
    config, args = configuration(root), backbone_args("llada", "quickstart")
    optimiser = build_objective(config, args, 1, get_layout(config, 1)).memory.optimiser
    assert (optimiser.learning_rate_scale, optimiser.width) == ("width", 256)


def test_a_backbone_is_scaled_in_its_proportions(root):
    config = configuration(root, "--model.name", "llada2", "--model.flavor", "mini")
    args = relative_write.scaled_args(config, 128, layers=2, vocab_size=64, init_std=None)
    assert (args.dim, args.hidden_dim, args.shared_hidden_dim, args.n_dense_layers) == (128, 32, 32, 0)
    assert (args.n_heads, args.n_kv_heads, args.n_experts, args.init_std) == (1, 1, 256, 128**-0.5)
    assert relative_write.exponent([1, 4, 16], [8.0, 4.0, 2.0]) == pytest.approx(-0.5)
    assert relative_write.exponent([4, 4], [8.0, 4.0]) is None


def test_the_bench_prints_and_writes_the_relative_write(tmp_path, capsys, monkeypatch, root):
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(root)
    path = tmp_path / "write.json"
    command = ["write", "train_configs/debug.toml", "--widths", "32", "64", "--rows", "2", "--json", str(path)]
    assert bench.main([*command, "--training.seq_len", "16", "--model.name", "llada_moe"]) == 0
    out, result = capsys.readouterr().out, json.loads(path.read_text())
    assert [x["width"] for x in result["widths"]] == [32, 64] and set(result["widths"][0]["linears"]) == {
        "gate",
        "up",
        "down",
    }
    for x in result["widths"]:
        assert x["mean"] == pytest.approx(sum(x["linears"].values()) / len(x["linears"]))
        assert x["mean"] > 0 and f"{x['mean']:.2%}" in out and len(x["gradient_norms"]) == 2
    assert bench.main([*command, "--widths", "33"]) == EXIT_STATUS
    assert "--widths 33 scales a size of 160 at width 64 to 82.5" in capsys.readouterr().err
