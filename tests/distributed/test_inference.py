"""TrainedModel: any layout and batch, adaptation on prompts, and no trace of it afterwards."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.predictor import MEMORY_WEIGHTS
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.inference.sampler import finished, steps
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import fast_weight_tree, trajectory
from memdlm_dist.method.diffusion import WEIGHTS
from memdlm_dist.models import backbone_args
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.models.token_choice import TokenChoice
from tests.oracles import naive
from tests.workers.reading import BOLD, LAYOUTS, PROMPTS, SUPPRESSED, arguments_of


@pytest.fixture(scope="module")
def folder(trained):
    return trained


@pytest.fixture(scope="module")
def model(folder):
    trained_model = TrainedModel(parse_config.parse([*arguments_of(folder), *BOLD]))
    yield trained_model
    trained_model.close()


@pytest.fixture
def prompts(model):
    return model.tokenizer.encode_plain(PROMPTS)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_reads_alike(folder, layout):
    one, other = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", layout))
    cached = {"refreshed", "guided, refreshed", "block-causal, cached"}
    assert one.keys() - other.keys() == (cached if layout == "cp2" else set())
    for key in other:
        expected = one[key]
        if key.startswith("losses"):
            # Summation order differs in float32.
            torch.testing.assert_close(torch.tensor(other[key]), torch.tensor(expected), rtol=1e-5, atol=1e-5)
        else:
            assert other[key] == expected, key
    assert one["refreshed"] == one["memory True, temperature 0.0"] and one["guided, refreshed"] == one["guided"]
    assert one["block-causal, cached"] == one["block-causal"] != one["memory True, temperature 1.0"]
    assert other["threshold"] != one["memory True, temperature 1.0"]
    made = [one[key] for key in ("memory True, temperature 0.0", "memory True, temperature 1.0", "guided")]
    assert made[0] != made[1] and made[2] not in made[:2]
    used = [{token for response in responses for token in response} for responses in made]
    assert used[0] & {*SUPPRESSED} and not used[2] & {*SUPPRESSED}


def logits_of(model, prompts, fast=None):
    start = model.canvas(prompts, 3)
    return model.logits(start.tokens_BL, start.open_BL, start.attended_BL, fast)


def test_a_row_is_read_as_if_it_were_alone(model, prompts):
    """Logits of a row do not depend on other rows or on the padding after it."""
    together = logits_of(model, prompts).unflatten(0, (len(prompts), 3))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row], logits_of(model, [prompt]), rtol=0, atol=1e-5)


def test_a_prompt_is_adapted_to_as_if_it_were_alone(model, prompts):
    ids = [11, 12, 13, 14, 15, 16]
    together = model.adapt(prompts, ids=ids).fast
    for row, prompt in enumerate(prompts):
        alone = model.adapt([prompt], ids=ids[row : row + 1]).fast
        # Weights near 1, with gradients summed over another number of columns: a few float32 ulps.
        for x, y in zip(fast_weight_tree.leaves(together), fast_weight_tree.leaves(alone), strict=True):
            torch.testing.assert_close(x[row], y[0], rtol=0, atol=4e-6)
    chosen = fast_weight_tree.select(together, [2, 0, 2], len(prompts))
    for x, y in zip(fast_weight_tree.leaves(chosen), fast_weight_tree.leaves(together), strict=True):
        assert torch.equal(x, y[[2, 0, 2]])


def test_the_memory_is_written_and_leaves_no_trace(model, prompts):
    before = {name: x.clone() for name, x in model.model.state_dict().items()}
    off = logits_of(model, prompts)
    adapted = model.adapt(prompts)
    on = logits_of(model, prompts, adapted.fast)
    assert adapted.seconds > 0
    changed = (on - off).abs().unflatten(0, (len(prompts), 3)).amax((1, 2))
    non_empty = torch.tensor([bool(prompt) for prompt in prompts])
    assert (changed[non_empty] > 1e-4).all() and (changed[~non_empty] == 0).all()  # an empty prompt adapts nothing
    assert torch.equal(logits_of(model, prompts), off)
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not model.model.training and all(p.grad is None for p in model.model.parameters())


def test_the_inner_loop_lowers_the_loss_on_its_prompt(model, prompts):
    """Adapted fast weights improve predictions of their own prompt: rows read their own set."""
    prompts = [prompt for prompt in prompts if len(prompt) > 3]
    start = model.canvas(prompts, 0)
    target_BL = start.attended_BL & (torch.arange(start.tokens_BL.shape[1]) % 2 == 0)
    noisy_BL = torch.where(target_BL, model.mask_id, start.tokens_BL)

    def loss(fast):
        return model.nll(noisy_BL, target_BL, start.tokens_BL, start.attended_BL, fast)

    fast = model.adapt(prompts).fast
    swapped = fast_weight_tree.select(fast, list(range(len(prompts)))[::-1], len(prompts))
    assert loss(fast).sum() < loss(None).sum()
    assert not torch.allclose(loss(fast), loss(swapped))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_memory_of_a_prompt_equals_the_naive_inner_loop(model, folder, prompts, weights):
    if weights != MEMORY_WEIGHTS:
        model = TrainedModel(parse_config.parse([*arguments_of(folder), *BOLD]), memory_weights=weights)
    (prompt, ids), seed = (prompts[0], torch.tensor([11])), model._objective.seed
    maskable_BL = torch.ones(1, len(prompt)).bool()
    draw = trajectory.draw(seed, 0, ids, maskable_BL)
    # The noise level at which the anchor masks int(n / 5) tokens.
    u = draw.u_BL[0].sort().values
    t = (u[len(prompt) // 5 - 1] + u[len(prompt) // 5]) / 2
    weights_64 = {name: x.double() for name, x in model.model.state_dict().items()}
    initial = {
        layer: {name: (x.A_GRi[0].double(), x.B_GoR[0].double(), x.scale) for name, x in linears.items()}
        for layer, linears in model._memory.draw(seed, 0, ids).items()
    }
    _, [(_, norms, expected)], *_ = naive.bilevel(
        naive.DenseModel(weights_64, backbone_args("llada", "tiny")), torch.tensor([prompt]), maskable_BL, draw.u_BL,
        draw.v_BL, t.unsqueeze(0), [[0]], [initial],
        naive.Options(learning_rate=float(BOLD[1]), gradient_clip=0, loss_weight=weights), model.mask_id,
    )  # fmt: skip
    assert min(norms) > 0
    for layer, linears in model.adapt([prompt], ids=[11]).fast.items():
        for name, x in linears.items():
            A, B, _ = expected[layer][name]
            torch.testing.assert_close(x.A_GRi[0].double(), A, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(x.B_GoR[0].double(), B, rtol=1e-4, atol=1e-5)


def test_guidance_reads_the_same_memory_without_the_prompt(model, prompts, monkeypatch):
    """Each step has a second pass: [MASK]s in place of given tokens, also between a prompt's holes; same memory."""
    prompts = [prompts[0], [*prompts[1], model.mask_id, *prompts[2]]]
    start, fast = model.canvas(prompts, 3), model.adapt(prompts).fast
    calls, forward = [], model.model.forward

    def record(tokens_BL, index_M, fast, readout, context):
        calls.append((tokens_BL.clone(), fast, readout))
        return forward(tokens_BL, index_M, fast, readout, context)

    monkeypatch.setattr(model.model, "forward", record)
    decoder = model.decoder(start, Decoding(2, stop_at_eos=False, cfg_scale=1.5), fast)
    (*_, last) = steps(decoder, start.tokens_BL.shape[1])
    given_BL = start.attended_BL & ~start.open_BL
    assert decoder.passes == 2 * 4 and (last.tokens_BL[given_BL] != model.mask_id).all()
    lengths = [len(calls), *(len(tokens_BL) for tokens_BL, _, _ in calls)]
    assert lengths == [8, *[2] * 6, 1, 1]  # the last step is of the row with one hole more
    for (blank_BL, blank_fast, hidden), (tokens_BL, own_fast, _) in zip(calls[:6:2], calls[1:6:2], strict=True):
        assert blank_fast is fast and own_fast is fast and hidden == "post_final_norm"
        assert torch.equal(blank_BL, torch.where(given_BL, model.mask_id, tokens_BL))
        assert torch.equal(tokens_BL[given_BL], start.tokens_BL[given_BL])
    with pytest.raises(UserError, match=r"token 512 is outside the model's vocabulary, 0 to 511; remove it"):
        model.denoise(start, Decoding(suppress_tokens=(5, 512)))
    with pytest.raises(UserError, match="leave no token to predict"):
        model.denoise(start, Decoding(suppress_tokens=tuple(range(512))))


@pytest.mark.parametrize("case", ["full", "block_causal", "shifted", "experts"])
def test_a_block_pass_after_a_full_pass_gives_the_same(folder, model, case):
    """Equal tokens make the cache exact: for some rows, padded ones, with memory and guidance."""
    if case == "shifted":
        model = TrainedModel(parse_config.parse([*arguments_of(folder), "--model.flavor", "tiny_shifted"]))
    prompts = [list(range(20, 29)), list(range(40, 46)), list(range(60, 73))]
    start, fast = model.canvas(prompts, 8), model.adapt(prompts).fast
    decoding = Decoding(4, cfg_scale=0.5, cache="dual", attention="block_causal" if case == "block_causal" else "full")
    batch, length = start.tokens_BL.shape
    reader = model.reader(decoding, batch, length, fast)
    if case == "experts":
        backbone = LLaDAMixture(replace(backbone_args("llada_moe", "tiny"), vocab_size=512))
        backbone.init_weights()
        reader = ModelReader(backbone.eval(), batch, length, model.device, cached=True, guidance=0.5)
    suppressed = torch.tensor([model.mask_id])
    for slots in (range(batch), [1], [0, 2]):
        lengths = [int(start.attended_BL[slot].sum()) for slot in slots]
        ends = [len(prompts[slot]) for slot in slots]
        blocks = [list(range(end, end + 4)) for end in ends]
        tokens_RW = torch.nn.functional.pad(start.tokens_BL[list(slots)], (0, 1))
        blank_RW = torch.where(torch.arange(length + 1) < torch.tensor(ends).unsqueeze(1), model.mask_id, tokens_RW)
        made = []
        for read in (None, [range(end - 2, end + 4 + slot) for slot, end in zip(slots, ends, strict=True)]):
            plan = reader.plan(slots, lengths, blocks, read)
            tokens_RT, blank_RT = (
                x[:, : plan.length] if read is None else x.gather(1, plan.position_RT) for x in (tokens_RW, blank_RW)
            )
            choice = TokenChoice(plan.row_RK.flatten(), suppressed)
            made.append(reader.choose(plan, tokens_RT, blank_RT, choice))
        assert torch.equal(made[0][0], made[1][0])
        torch.testing.assert_close(made[0][1], made[1][1], rtol=1e-4, atol=0)  # float32, other summation order


def test_nll_is_that_of_the_logits(model, prompts):
    start = model.canvas(prompts, 3)
    clean_BL = torch.where(start.open_BL, torch.arange(start.tokens_BL.shape[1]) + 20, start.tokens_BL)
    losses = model.nll(start.tokens_BL, start.open_BL, clean_BL, start.attended_BL)
    logits = model.logits(start.tokens_BL, start.open_BL, start.attended_BL)
    expected = torch.nn.functional.cross_entropy(logits, clean_BL[start.open_BL], reduction="none")
    torch.testing.assert_close(losses, expected.unflatten(0, (len(prompts), 3)).sum(1).double(), rtol=1e-5, atol=1e-5)


def test_infilling_keeps_what_is_given(model):
    (prompt,) = model.tokenizer.encode_plain(["def read(self):"])
    holes = [*prompt[:1], model.mask_id, *prompt[2:], model.mask_id]
    for memory in (None, model.adapt([holes]).fast):
        start = model.canvas([holes], 2)
        tokens_BL = finished(model.denoise(start, Decoding(2), memory), start)
        visible = [i for i, token in enumerate(holes) if token != model.mask_id]
        assert [tokens_BL[0, i].item() for i in visible] == [holes[i] for i in visible]
        assert (tokens_BL != model.mask_id).all()


def test_a_context_beyond_training_is_read(model):
    long = [5] * (model.trained_length + 9)
    assert logits_of(model, [long]).isfinite().all()


def test_spread_is_in_order_and_whole(model):
    progress = []

    def numbered(batch, ids):
        return [f"{x}{i}" for x, i in zip(batch, ids, strict=True)]

    outputs = model.data_parallel.map_batches(list("abcdefg"), 3, numbered, progress.append)
    assert outputs == ["a0", "b1", "c2", "d3", "e4", "f5", "g6"] and progress == [3, 3, 1]


def test_a_backbone_that_predicts_the_next_token(model, folder):
    """Logits for a target come from one position earlier; the first token has none."""
    shifted = TrainedModel(parse_config.parse([*arguments_of(folder), "--model.flavor", "tiny_shifted"]))
    prompts = [[5, 6, 7], [8, 9]]
    start = model.canvas(prompts, 2)
    target_BL = torch.zeros_like(start.open_BL)
    target_BL[0, 3:5] = target_BL[1, 2] = True
    earlier_BL = target_BL.roll(-1, 1)
    logits = shifted.logits(start.tokens_BL, target_BL, start.attended_BL)
    assert torch.equal(logits, model.logits(start.tokens_BL, earlier_BL, start.attended_BL))
    assert shifted.adapt(prompts).seconds > 0
    with pytest.raises(UserError, match="first token cannot be"):
        shifted.logits(start.tokens_BL, torch.ones_like(target_BL), start.attended_BL)


def test_checkpoints_that_cannot_be_read_are_named(model, folder, tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint that can be used in {tmp_path}"):
        model.load(str(tmp_path))
    good = folder / "run/checkpoint"
    shutil.copytree(good / "step-2", tmp_path / "step-2")
    (shard,) = (tmp_path / "step-2").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    before = {name: x.clone() for name, x in model.model.state_dict().items()}
    try:
        with pytest.raises(UserError, match="corrupt: a checksum is wrong"):
            for start in range(0, len(content), 997):  # reaches the weights, past the optimizer's state
                content[start] ^= 1
            shard.write_bytes(content)
            model.load(str(tmp_path))
        (tmp_path / "step-2/.metadata").unlink()
        with pytest.raises(UserError, match="step-2 is incomplete"):
            model.load(str(tmp_path))
    finally:
        model.load(str(good))
    assert all(torch.equal(x, before[name]) for name, x in model.model.state_dict().items())


def test_a_checkpoint_of_another_model_is_named(folder):
    arguments = [*arguments_of(folder), "--model.flavor", "debug"]
    with pytest.raises(UserError, match="is of another model"):
        TrainedModel(parse_config.parse(arguments))
