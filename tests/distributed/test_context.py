"""Context parallelism, and sets shared by samples on all layouts: numbers of one process, collectives of a step."""

import json
from dataclasses import replace

import pytest
import torch
from torch.distributed import destroy_process_group, is_initialized
from torchtitan.distributed.utils import init_fake_mode

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.config import check_layout, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.models import BACKBONES
from memdlm_dist.models.flavours import LLADA as FLAVOURS
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.training import run
from memdlm_dist.training.backbone import get_layout, model_on_meta
from tests.support import zygote
from tests.workers.sharded_context import (
    DOCUMENTS,
    GROUPED,
    LAYOUTS,
    OPTIONS,
    TWICE,
    configuration,
    numbers,
    options_of,
)

# Layouts sum in different orders: float32 rounding, 8e-7 measured.
TOLERANCE = 1e-5
CP, TP = "--parallelism.context_parallel_degree", "--parallelism.tensor_parallel_degree"
METHOD = "--parallelism.context_parallel_method"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("context")
    for name, (processes, _, _) in LAYOUTS.items():
        zygote.call(processes, "tests.workers.sharded_context:find", str(root), name)
    return {name: torch.load(root / f"{name}.pt") for name in LAYOUTS}


STEPS = [(name, options) for name in LAYOUTS if not name.startswith("one") for options in options_of(name)]
STEPS.extend(("one-twice", options) for options in TWICE)


@pytest.mark.parametrize("layout, options", STEPS)
def test_a_layout_gives_the_single_process_loss_and_gradients(results, layout, options):
    ours = results[layout][options]
    twice = LAYOUTS[layout][2] == 2 and options.startswith("batch")
    single = results["one-twice" if twice else "one"][options]
    assert ours.keys() == single.keys() and ("inner" in single) == (not options.startswith(("off", "half")))
    for name, theirs in single.items():
        assert (ours[name] - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("layout, options", GROUPED)
def test_grouped_products_and_sequences_give_the_single_process_step(results, layout, options):
    ours, theirs = results[layout][f"{options}, grouped"], results["one"][options]
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name] - x).abs().max() <= TOLERANCE * x.abs().max(), name


def test_the_comparison_can_tell(results):
    """Cases include a rank without a masked token; sets, documents and memory change the loss."""
    for name in ("cp2", "cp4", "fsdp2-cp2", "tp2-cp2"):
        masked = results[name]["masked on a rank"]
        assert masked["sample-quarter"] == masked.get("batch-quarter", 0) == 0 < masked["sample"], name
    one, twice = results["one"], results["one-twice"]
    assert abs(one["batch-packed"]["loss"] - twice["batch-packed"]["loss"]) > 1e-3 * one["batch-packed"]["loss"]
    assert one["sample"]["loss"] < 0.95 * one["off"]["loss"]
    assert one["sample"]["written"] > 0.1 and any(len(row) > 3 for row in DOCUMENTS)
    assert {kind for _, _, kind in OPTIONS.values()} == {"whole", "packed", "quarter"} and (numbers() < 0).any()


def test_what_a_step_communicates(results):
    """Context parallelism adds two all-to-alls per attention pass and all-reduces in inner steps, nothing else.

    The model has three layers, one of them trunk. Each inner step all-reduces the fast weights' gradients, two tensors
    for each of three linears in two layers, and the loss. FSDP communicates as without context parallelism.
    """
    forward = 2 + 2 * 2 + 2  # trunk on two states; tail in two inner steps and the outer step
    backward = 3 + 2 * 1  # an inner step's backward pass ends at the lowest adapted FFN, above its attention
    for name in ("fsdp2-cp2", "tp2-cp2"):
        again = 3 + 2 * 2 if name == "fsdp2-cp2" else 0  # recomputed by activation checkpointing
        collectives = results[name]["collectives"]
        assert collectives["cp"] == {"all_to_all": 2 * (forward + backward + again), "all_reduce": 2 * (2 * 3 * 2 + 1)}
        plain = results[name]["plain collectives"]["fsdp"]
        assert collectives["fsdp"]["all_gather"] == plain["all_gather"] - 2 and plain["all_gather"] == 5 + 4
        assert collectives["fsdp"]["reduce_scatter"] == plain["reduce_scatter"] == 5


def test_the_number_of_rows_with_the_memory_changes_no_data_parallel_collective(results):
    """A rank without such a row issues the same collectives in the same order as others, and as at probability 1."""
    first, second = results["fsdp2"]["collectives by rank"]
    assert [(a, b) for (a, _), (b, _) in zip(first, second, strict=True)] == [(4, 4), (2, 2), (0, 0), (1, 0)]
    calls = [calls for _, calls in (*first, *second)]
    assert len(calls[0]) == 5 + 2 + 5 and all(x == calls[0] for x in calls)


@pytest.fixture
def many_ranks():
    """Initialise a fake process group with this process as one of eight ranks."""
    if is_initialized():
        destroy_process_group()
    init_fake_mode(8)
    yield 8
    destroy_process_group()


def test_ring_attention_is_torchs_without_load_balancing(many_ranks):
    from torch.distributed.tensor.experimental._attention import _cp_options

    config = configuration(CP, "8", METHOD, "ring", "--parallelism.context_parallel_rotate_method", "alltoall")
    args = replace(FLAVOURS["many_heads"], n_kv_heads=2)  # fewer heads than ranks
    model = model_on_meta(config, args, get_layout(config, many_ranks))
    for block in model.layers.values():
        kernel = block.attention.inner_attention
        hooks = [hook.func.__qualname__ for hook in kernel._forward_pre_hooks.values()]
        assert hooks == ["_ContextParallel.sdpa_input_fn"] and len(kernel._forward_hooks) == 1
    assert not _cp_options.enable_load_balance and _cp_options.rotate_method.name == "ALL_TO_ALL"
    check_layout.check_backbone(config, args)
    check_layout.check_device(config, "cuda")
    with pytest.raises(UserError, match="'ring' needs CUDA devices, but this machine has cpu; set it to 'ulysses'"):
        check_layout.check_device(config, "cpu")


def test_a_rank_has_its_part_of_every_row(many_ranks):
    config = configuration(CP, "4", TP, "2", "--training.local_batch_size", "2")
    bench = Bench.build(config)
    assert bench.objective.cp_size == 4 and bench.objective.tp_size == 2 and bench.dims.get_mesh("fsdp").size() == 4
    slices = [replace(bench.objective, cp_rank=cp_rank).micro_batch(*batch(), step=1) for cp_rank in range(4)]
    full = replace(bench.objective, cp_size=1, tp_size=1).micro_batch(*batch(), step=1)
    assert torch.equal(torch.cat([each.inputs[1] for each in slices], dim=1), full.inputs[1])
    assert [each.first for each in slices] == [0, 8, 16, 24] and {each.length for each in slices} == {32}
    for state, slice_states in ((full.anchor, [each.anchor for each in slices]),
                            (full.inner[0].scored, [each.inner[0].scored for each in slices])):  # fmt: skip
        labels = torch.cat([x.label_N[x.valid_N] for x in slice_states])
        assert sorted(labels.tolist()) == sorted(state.label_N[state.valid_N].tolist())
        for x in slice_states:
            assert torch.equal(x.count_U, state.count_U) and x.index_SM.shape == slice_states[0].index_SM.shape
            assert len(x.index_SM) == 2 and x.index_SM.max() < 2 * 4


def batch():
    tokens = torch.arange(64).view(2, 32) % 60
    return tokens, tokens.clone(), torch.arange(2)


def test_rope_scaling():
    args = replace(FLAVOURS["8B"], rope_scaling=32.0, rope_scaling_method="ntk")
    d, theta = args.dim // args.n_heads, 500_000
    # The slowest pair turns slower by the scaling factor.
    assert args.rotary_base ** (-(d - 2) / d) == pytest.approx(theta ** (-(d - 2) / d) / 32)
    assert replace(args, rope_scaling=1.0).rotary_base == FLAVOURS["8B"].rotary_base == theta
    # 35 of the 64 pairs complete a turn within 4,096 tokens to either side; pair 34 only just.
    turns = [2 * 4096 / (2 * torch.pi) * theta ** (-2 * j / d) for j in range(64)]
    assert turns[34] > 1 > turns[35]
    base = replace(args, rope_scaling_method="diffusion_ntk").rotary_base
    assert 2 * 131072 / (2 * torch.pi) * base ** (-2 * 35 / d) == pytest.approx(1)
    assert args.rotary_base < base < 1e9


def test_scaled_positions_are_the_models(tmp_path):
    model = LLaDA(replace(FLAVOURS["debug"], rope_scaling=4.0, rope_scaling_method="ntk", max_seq_len=8))
    base = 500_000 * 4 ** (8 / 6)
    expected = torch.outer(torch.arange(8.0), base ** (-torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(model.freqs_cis, torch.polar(torch.ones_like(expected), expected))
    model.extend_rope(20)
    assert len(model.freqs_cis) == 20 and model.freqs_cis[19, 3].angle() == pytest.approx(19 * base ** (-6 / 8))
    config = parse_config.parse(["--job.config_file", "train_configs/llada_8b_128k.toml"])
    args = replace(FLAVOURS["8B"])
    args.update_from_config(config)
    assert args.rope_scaling * args.native_length == config.training.seq_len and args.rotary_base > 1e8
    # A run may start from weights for the native context; its export names the scaled base.
    sd_adapter = BACKBONES["llada"].sd_adapter(args, None)
    assert sd_adapter.config()["rope_theta"] == args.rotary_base
    assert not sd_adapter.differences('{"rope_theta": 500000.0}')
    assert not sd_adapter.differences(json.dumps({"rope_theta": args.rotary_base}))
    assert sd_adapter.differences('{"rope_theta": 10000.0}') == ["rope_theta is 10000.0 there and 500000.0 here"]
    (tmp_path / "from").mkdir()
    (tmp_path / "from/config.json").write_text('{"rope_theta": 500000.0, "max_sequence_length": 4096, "more": 1}')
    assert hugging_face_folder.describe(str(tmp_path), sd_adapter, [str(tmp_path / "from")]) == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "rope_theta": args.rotary_base, "max_sequence_length": 131072, "more": 1,
    }  # fmt: skip


def test_a_run_beyond_its_weights_context_is_warned(monkeypatch):
    recipe = ["--job.config_file", "train_configs/llada_8b_128k.toml", "--model.rope_scaling"]
    configs = [parse_config.parse([*recipe, scaling]) for scaling in ("32", "8")]
    logs = []
    monkeypatch.setattr(run.logger, "warning", logs.append)
    for config in configs:
        run._warn_of_length(config, FLAVOURS["8B"])
    assert len(logs) == 1 and "131072 is longer than the 32768 tokens" in logs[0] and "rope_scaling = 32 " in logs[0]
