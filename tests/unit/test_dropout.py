"""Dropout of low-rank terms: statistics of the masks, experts, packed documents, and where nothing is dropped."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from memdlm_dist.config import check_layout, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.method import fast_weight_tree, fast_weights
from memdlm_dist.method.fast_weights import FAST_WEIGHT_TYPES, AdaptedLinear
from memdlm_dist.method.keyed_dropout import Dropout, TermDropout
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.models import backbone_args, experts
from memdlm_dist.models.attention import TokenContext
from memdlm_dist.models.linears import LINEAR_NUMBERS, SHARED
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.lora import LoRA, add_adapters
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.runtime.single_process import without_ranks
from tests.oracles import naive
from tests.support.bilevel import build, data, memory, objective

P = 0.3


def dropout(step=5, stream=Stream.ADAPTER_DROPOUT, rows=8, length=64):
    return Dropout.draw(3, stream, step, torch.arange(rows) * 17, length, None, P)


def kept(drop, features=256):
    """Return the mask as numbers of mean 0 and variance 1."""
    x_BLi = drop(torch.ones(*drop.key_BL.shape, features, dtype=torch.float64))
    assert set(x_BLi.unique().tolist()) == {0.0, 65536 / (65536 - round(P * 65536))}
    return ((x_BLi > 0).double() - (1 - P)) / (P * (1 - P)) ** 0.5


def test_masks_have_the_probability_and_are_independent():
    """Neighbouring features, tokens, linears, layers, experts, steps, rows and kinds of terms are uncorrelated."""
    first = dropout()
    mask = kept(first)
    n = mask.numel()  # 131,072: standard error 0.0028 of a mean and of a correlation
    assert abs(mask.mean()) < 0.012
    slots = torch.arange(8 * 64)
    experts = [first.at_slots(slots, torch.full((8 * 64, 1), e)) for e in (0, 1)]
    others = [
        mask.roll(1, 2), mask.roll(4, 2), mask.roll(1, 1), mask.roll(1, 0),
        *(kept(x) for x in (first.at_linear(1), first.at_layer(1), first.at_layer(1).at_linear(6), dropout(step=6))),
        kept(dropout(stream=Stream.FAST_WEIGHT_DROPOUT)), kept(experts[1]).view_as(mask),
    ]  # fmt: skip
    for other in others:
        assert abs((mask * other).sum() / n) < 0.012
    assert torch.equal(kept(experts[0]).view_as(mask), mask) and torch.equal(kept(dropout()), mask)
    per_token = mask.mean(2) * 256**0.5  # each token's share of kept features varies as independent draws do
    assert per_token.var().item() == pytest.approx(1, abs=0.25)


def test_a_shard_of_the_features_has_its_part_of_the_mask():
    drop, x = dropout(), torch.randn(8, 64, 22)
    whole = drop(x)
    for first, last in ((0, 11), (11, 22), (3, 4), (8, 12)):
        assert torch.equal(drop(x[..., first:last], first), whole[..., first:last])


def test_dropping_nothing_and_nearly_everything():
    assert Dropout.draw(3, Stream.ADAPTER_DROPOUT, 1, torch.arange(2), 4, None, 0.0) is None
    most = dropout()._replace(probability=1 - 1e-9)(torch.ones(8, 64, 1024))
    assert most.mean() == pytest.approx(1, abs=0.5) and most.max() == 65536, "at least 1 of 65,536 is kept"


def goal(**changes):
    return replace(objective(memory(targets=("ffn", "attention"))), adapter_dropout=P, fast_weight_dropout=P, **changes)


def adapted_model():
    model = build(torch.float32)
    add_adapters(model, LoRA(4, 8.0), torch.float32, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def loss(model, goal, batch):
    with torch.no_grad():
        return goal.loss_sum(model, batch, 5)[0].item()


def test_masks_are_a_function_of_the_step_and_held_out_losses_drop_nothing():
    model = adapted_model()
    losses = {step: loss(model, goal(), goal().micro_batch(*data(), step=step)) for step in (5, 6)}
    again = goal().micro_batch(*data(), step=5)
    assert loss(model, goal(), again) == losses[5], "a resumed run has the masks of the step"
    other = goal().micro_batch(*data(), step=6).dropout
    assert loss(model, goal(), again._replace(dropout=other)) != losses[5]
    held_out = goal().held_out()
    batch = held_out.micro_batch(*data(), step=5)
    assert batch.dropout == TermDropout(None, None)
    plain = replace(objective(memory(targets=("ffn", "attention"))), seed=0)
    assert loss(model, held_out, batch) == loss(model, plain, plain.micro_batch(*data(), step=5))
    assert goal(memory=None).micro_batch(*data(), step=5).dropout.fast_weights is None


def test_a_packed_document_has_the_masks_that_it_has_alone():
    tokens, labels, ids = data(rows=2)
    numbers = (torch.arange(24) * 3 // 24).expand(2, -1)
    packed = goal().micro_batch(tokens, labels, ids, 5, documents_BL=numbers)
    for row, number in ((0, 0), (1, 2)):
        own = numbers[row] == number
        sample = packed.sample_ids_U.view(2, -1)[row, number].view(1)
        alone = goal().micro_batch(tokens[row : row + 1, own], labels[row : row + 1, own], sample, 5)
        for ours, theirs in zip(packed.dropout, alone.dropout, strict=True):
            assert torch.equal(ours.key_BL[row, own], theirs.key_BL[0])


@pytest.mark.parametrize("fast_weight_type", FAST_WEIGHT_TYPES)
def test_grouped_terms_of_packed_rows_drop_the_same_features(fast_weight_type):
    goal_8 = replace(
        objective(memory(rank=8, targets=("ffn", "attention"), fast_weight_type=fast_weight_type)), slots=4
    )
    goal_8 = replace(goal_8, fast_weight_dropout=P)
    tokens, labels, ids = data()
    batch = goal_8.micro_batch(tokens, labels, ids, 5, documents_BL=(torch.arange(24) * 3 // 24).expand(4, -1))
    losses = []
    for grouped in (False, True):
        model = build(torch.float32)
        model.model_args = replace(model.model_args, grouped=grouped)
        losses.append(loss(model, goal_8, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(loss(model, goal_8, batch._replace(dropout=TermDropout())), rel=1e-4)


WEIGHTS = {"gate": "w1", "up": "w3", "down": "w2"}
ARGS = LLaDAMoEArgs(dim=32, n_layers=1, n_heads=4, hidden_dim=16, vocab_size=61, n_experts=4, experts_per_token=2)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_expert_drops_its_own_features_of_a_token(monkeypatch, grouped):
    """Adapters and fast weights, one token and one expert at a time with naive masks."""
    if grouped:  # float32 stands in for the accelerator's bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x)
        monkeypatch.setattr(experts, "run_padded", with_cpu_permutation)
    torch.manual_seed(0)
    model = LLaDAMixture(replace(ARGS, grouped=grouped))
    model.init_weights()
    add_adapters(model, LoRA(rank=8, alpha=8.0, target_modules=["all-linear"]), torch.float32, torch.float32)
    moe = model.layers["0"].moe
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    linears = [AdaptedLinear("0", t, *sizes, False, 0, 4, 2) for t, sizes in
               {"gate": (32, 16), "up": (32, 16), "down": (16, 32)}.items()]  # fmt: skip
    fast = fast_weights.draw("lora", linears, 8, 8.0, torch.tensor([1]))
    fast = fast_weight_tree.map_leaves(lambda x: x + 0.1 * torch.randn(x.shape), fast)["0"]
    ids, x = torch.tensor([4, 9]), torch.randn(2, 5, 32)
    keys = [Dropout.draw(3, stream, 7, ids, 5, None, P) for stream in (9, 10)]
    with torch.no_grad():
        ours = moe(x, fast=fast, dropout=TermDropout(*keys).at_layer(2))
        gate = moe.router.gate
        assert gate.dropout is None

        def linear(drop, e, target, y, position):
            name, phi, number = WEIGHTS[target], fast[target], LINEAR_NUMBERS[target]
            own = [y.new_tensor([drop.factor(kind, 2, target, position, f, e) for f in range(len(y))]) * y
                   for kind in ("adapter", "fast")]  # fmt: skip
            A, B = (getattr(moe.experts, f"{name}_lora_{half}")[e] for half in "AB")
            assert number == naive.LINEARS.index(target)
            return getattr(moe.experts, name)[e] @ y + B @ (A @ own[0]) + phi.B_GoR[e] @ (phi.A_GRi[e] @ own[1])

        for row in range(2):
            drop = naive.Dropout(3, 7, int(ids[row]), {"adapter": P, "fast": P})
            for position in range(5):
                y, out = x[row, position], torch.zeros(32)
                kept = y * y.new_tensor([drop.factor("adapter", 2, "router", position, f) for f in range(32)])
                scores_E = (gate.weight @ y + gate.lora_B @ (gate.lora_A @ kept)).softmax(-1)
                for e in scores_E.topk(2).indices.tolist():
                    gated, up = (linear(drop, e, target, y, position) for target in ("gate", "up"))
                    down = linear(drop, e, "down", torch.nn.functional.silu(gated) * up, position)
                    out += scores_E[e] * down
                torch.testing.assert_close(ours[row, position], out, rtol=1e-4, atol=1e-5)


def test_the_shared_expert_drops_other_features_than_the_experts():
    """Adapters and fast weights, one token at a time with naive masks, for the block's whole FFN."""
    torch.manual_seed(0)
    args = LLaDA2Args(
        dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=16, vocab_size=61, n_experts=4, experts_per_token=2,
        expert_groups=2, groups_per_token=1, shared_hidden_dim=24, n_dense_layers=0,
    )  # fmt: skip
    model = LLaDAMixture(args)
    model.init_weights()
    add_adapters(model, LoRA(rank=4, alpha=8.0, target_modules=["all-linear"]), torch.float32, torch.float32)
    block = model.layers["0"]
    shared, linears = block.shared_experts, args.adapted_linears(0, ["ffn"])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    fast = fast_weights.draw("lora", linears, 8, 8.0, torch.tensor([1]))
    fast = fast_weight_tree.map_leaves(lambda x: x + 0.1 * torch.randn(x.shape), fast)["0"]
    routed = {target: phi for target, phi in fast.items() if not target.startswith(SHARED)}
    ids, x = torch.tensor([4, 9]), torch.randn(2, 5, 32)
    drop = TermDropout(*(Dropout.draw(3, stream, 7, ids, 5, None, P) for stream in (9, 10))).at_layer(2)
    context = TokenContext(model.freqs_cis, dropout=drop)
    with torch.no_grad():
        ours = block.ffn(x, fast, context) - block.moe(x, fast=routed, dropout=drop)

        def linear(masks, target, y, position):
            module, phi = getattr(shared, WEIGHTS[target]), fast[SHARED + target]
            own = [y * y.new_tensor([masks.factor(kind, 2, SHARED + target, position, f) for f in range(len(y))])
                   for kind in ("adapter", "fast")]  # fmt: skip
            term = 2.0 * module.lora_B @ (module.lora_A @ own[0])
            return module.weight @ y + term + phi.B_GoR[0] @ (phi.A_GRi[0] @ own[1])

        for row in range(2):
            masks = naive.Dropout(3, 7, int(ids[row]), {"adapter": P, "fast": P})
            for position in range(5):
                gate, up = (linear(masks, target, x[row, position], position) for target in ("gate", "up"))
                out = linear(masks, "down", torch.nn.functional.silu(gate) * up, position)
                torch.testing.assert_close(ours[row, position], out, rtol=1e-4, atol=1e-5)


def with_cpu_permutation(*arguments):
    from memdlm_dist.compat.torchtitan import run_padded, use_cpu_permutation

    use_cpu_permutation()
    return run_padded(*arguments)


def configuration(*arguments):
    return parse_config.parse(["--job.config_file", "train_configs/debug.toml", *arguments])


def test_expert_parallelism_refuses_dropout():
    moe = ["--model.name", "llada_moe", "--model.flavor", "tiny", "--parallelism.expert_parallel_degree", "2",
           "--parallelism.data_parallel_shard_degree", "2", "--parametric_memory.granularity", "batch",
           "--model.converters", "lora"]  # fmt: skip
    args = backbone_args("llada_moe", "tiny")
    for key in ("lora.dropout", "parametric_memory.dropout"):
        with pytest.raises(UserError, match=rf"^{key} = 0.1 is not supported with expert parallelism.*; set it to 0"):
            check_layout.check_backbone(configuration(*moe, f"--{key}", "0.1"), args)
    attention = configuration(*moe, "--lora.dropout", "0.1", "--lora.target_modules", "attention")
    check_layout.check_backbone(attention, args)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with a C++ compiler")
def test_compiled_adapters_with_dropout_train(root, tmp_path):
    """Masks read as an int16 view of their bits made torch 2.13 write beyond a buffer here: the process aborted."""
    lora = ["--model.converters", "lora", "--lora.dropout", "0.1", "--parametric_memory.no_enable"]
    run = ["--job.config_file", "train_configs/debug.toml", "--training.steps", "2", "--job.dump_folder", str(tmp_path)]
    command = [sys.executable, "-m", "memdlm_dist.train", *run, *lora, "--compile.enable"]
    environment = {**without_ranks(os.environ), "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
