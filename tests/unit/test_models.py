"""Backbones: sizes, adapted linears, attention, trunk and tail."""

import weakref
from dataclasses import replace

import pytest
import torch

from memdlm_dist.models import BACKBONES
from memdlm_dist.models.flavours import LLADA as FLAVOURS
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.rope import rotary_frequencies
from memdlm_dist.models.row_slices import joined
from tests.oracles.hugging_face import Backbone


@pytest.mark.parametrize(
    "flavour, parameters",
    [
        # LLaDA-8B: embedding and head, 32 layers of four square projections, three FFN matrices and two norms.
        ("8B", 2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096) + 4096),
        ("1B", 2 * 126464 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2048),
        ("quickstart", 5_311_232),
        ("debug", 238_144),
    ],
)
def test_sizes(flavour, parameters):
    with torch.device("meta"):
        model = LLaDA(FLAVOURS[flavour])
    counted, flops = FLAVOURS[flavour].get_nparams_and_flops(model, 4096)
    assert counted == parameters and flops > 6 * (counted - FLAVOURS[flavour].vocab_size * FLAVOURS[flavour].dim)


def test_every_flavour_fits_two_tensor_parallel_ranks():
    for backbone in BACKBONES.values():
        for args in backbone.flavours.values():
            sizes = (args.n_heads, args.n_kv_heads or args.n_heads, args.hidden_dim, args.vocab_size)
            assert all(size % 2 == 0 for size in sizes) and args.dim % args.n_heads == 0


def test_adapted_linears_are_the_last_layers():
    args = FLAVOURS["8B"]
    linears = args.adapted_linears(28, ["gate", "down"])
    assert [(x.layer, x.target) for x in linears] == [(str(i), t) for i in range(28, 32) for t in ("gate", "down")]
    assert (linears[0].in_features, linears[0].out_features, linears[0].row_wise) == (4096, 12288, False)
    assert (linears[1].in_features, linears[1].out_features, linears[1].row_wise) == (12288, 4096, True)


@pytest.mark.parametrize("name", BACKBONES)
def test_logits_and_gradients_are_those_of_plain_modules_under_hugging_faces_names(name):
    """The same weights and, in llada2, biases that change some tokens' experts."""
    torch.manual_seed(0)
    args = replace(BACKBONES[name].flavours["debug"], n_layers=3)
    model, sd_adapter = BACKBONES[name].model(args), BACKBONES[name].sd_adapter(args)
    with torch.no_grad():
        model.init_weights()
        for key, x in model.state_dict().items():
            if key.endswith("bias"):
                x.uniform_(-0.05, 0.05)
            elif "norm" in key:
                x.uniform_(0.7, 1.3)
            elif "layers" in key:
                x.mul_(8)  # so that attention and router are not flat

    def published(tensors):
        return joined(sd_adapter.to_hf({key: x.clone() for key, x in tensors.items()}))

    plain = Backbone(published(model.state_dict()), args)
    tokens = torch.randint(0, 512, (2, 24))
    ours, theirs = model(tokens, torch.arange(48)), plain(tokens).flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    upstream = torch.randn_like(theirs)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    gradients = published({key: p.grad for key, p in model.named_parameters()})
    expected = {f"{key.removesuffix('.weight')}.weight": p.grad for key, p in plain.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(gradients[key], x, rtol=0, atol=1e-5 * gradients[key].abs().max().item(), msg=key)
    for path, bias in plain.biases.items():
        plain.biases[path] = torch.zeros_like(bias)
    assert (len(plain.biases) == 2) == ((plain(tokens).flatten(0, 1) - theirs).abs().max() > 0.01)


def test_attention_sees_both_sides_and_logits_only_where_asked():
    torch.manual_seed(0)
    model = LLaDA(FLAVOURS["debug"])
    with torch.no_grad():
        model.init_weights()
        tokens = torch.randint(0, 512, (2, 16))
        changed = tokens.clone()
        changed[0, 15] = (changed[0, 15] + 1) % 512
        everywhere = torch.arange(32)
        before, after = model(tokens, everywhere), model(changed, everywhere)
        assert (before[0] != after[0]).any(), "the first token attends to the last"
        assert torch.equal(before[16:], after[16:]), "rows do not attend to each other"
        some = torch.tensor([3, 20, 31])
        context = model.context(16)
        # Other shapes in the head: equal up to float32 rounding.
        torch.testing.assert_close(model(tokens, some), before[some], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            model.tail(model.trunk([tokens], 2, context)[0], 2, some, None, "logits", context),
            before[some],
            rtol=1e-5,
            atol=1e-6,
        )


def test_inputs_go_through_the_trunk_together_and_the_first_alone_has_a_gradient():
    torch.manual_seed(0)
    model = LLaDA(FLAVOURS["debug"])
    with torch.no_grad():
        model.init_weights()
    inputs = [torch.randint(0, 512, (2, 16)) for _ in range(3)]
    context = model.context(16)
    together = model.trunk(inputs, 2, context)
    assert [x.requires_grad for x in together] == [True, False, False]
    for x, tokens in zip(together, inputs, strict=True):
        assert torch.equal(x, model.trunk([tokens], 2, context)[0])
    with torch.no_grad():
        assert not model.trunk(inputs, 2, context)[0].requires_grad


def test_the_tail_is_a_constant_in_inner_steps_and_as_before_behind_them():
    """Also after a failure; a frozen parameter stays frozen."""
    model = LLaDA(FLAVOURS["debug"])
    model.output.requires_grad_(False)

    def trainable():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    before = trainable()
    with pytest.raises(ArithmeticError), model.inner_steps(1):
        assert trainable() == {name for name in before if name.startswith(("tok_embeddings", "layers.0."))} != set()
        raise ArithmeticError
    assert trainable() == before and "norm.weight" in before and "output.weight" not in before


def test_activations_of_the_streams_without_gradient_do_not_accumulate():
    """One layer's output is alive per state without gradient, at any trunk depth.

    Autograd saves nothing for these states.
    """
    model = LLaDA(replace(FLAVOURS["debug"], n_layers=8))
    with torch.no_grad():
        model.init_weights()
    outputs, alive = [], []

    def track(module, inputs, output):
        if not torch.is_grad_enabled():
            outputs.append(weakref.ref(output))
            alive.append(sum(x() is not None for x in outputs))

    for layer in model.layers.values():
        layer.register_forward_hook(track)
    states = [torch.randint(0, 512, (2, 16)) for _ in range(3)]
    model.trunk(states, 7, model.context(16))
    # Two streams: a running layer holds its two inputs and the first stream's output.
    assert len(outputs) == 14 and max(alive) <= 4
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model.trunk(states[:1], 7, model.context(16))
        anchor_only = len(saved)
        model.trunk(states, 7, model.context(16))
    assert anchor_only > 0 and len(saved) == 2 * anchor_only


def test_rotary_table_is_complex_so_that_mixed_precision_leaves_it_alone():
    table = rotary_frequencies(8, 16, 10_000.0)
    assert table.dtype == torch.complex64 and table.shape == (16, 4)
    torch.testing.assert_close(table.abs(), torch.ones(16, 4))
