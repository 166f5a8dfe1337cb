"""FLOP estimate of a step against torch's counter on real steps."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed import activation_checkpoint
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from memdlm_dist.method.bilevel import outer_loss
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.fsdp_schedule import frozen
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from tests.oracles import naive
from tests.support.bilevel import ARGS, build, data, memory, objective


class Flops(TorchDispatchMode):
    """FLOP counter over torch's formulas; FlopCounterMode itself breaks around `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        name = operator.overloadpacket._qualified_op_name
        # torch's table lacks the CPU's attention.
        if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif operator.overloadpacket in flop_registry:
            self.total += flop_registry[operator.overloadpacket](*args, **kwargs, out_val=out)
        return out


class CompiledFlops:
    """FLOP counter for compiled blocks and the eager head between them."""

    def __init__(self):
        self.total = 0

    def counted(self, function):
        def run(*args, **kwargs):
            with Flops() as counter:
                out = function(*args, **kwargs)
            self.total += counter.total
            return out

        return run

    def backend(self, graph, inputs):
        """Run the graphs that AOTAutograd generates, operator by operator."""

        def compiler(graph, inputs):
            return make_boxed_func(self.counted(graph))

        return aot_eager(graph, inputs, fw_compiler=compiler, bw_compiler=compiler)

    def compile(self, model):
        for block in model.layers.values():
            block.compile(backend=self.backend, fullgraph=True)
        model.output.forward = self.counted(model.output.forward)


def count(model, settings, recomputation=None, frozen=False, args=ARGS, slots=None, adapted_groups=None, **plan):
    """Return a step's FLOPs by torch's counter and by our estimate; memory is off if `settings` is None.

    Args:
        slots: document slots of packed rows, each of which has one document; a dense mask then computes no more.
        adapted_groups: of the groups of rows with common sets, those that train with the memory; None for all.
    """
    goal = replace(objective(settings, **plan), slots=slots)
    tokens, labels, ids = data()
    documents = None if slots is None else torch.zeros_like(tokens)
    batch = goal.micro_batch(tokens, labels, ids, step=3, documents_BL=documents, adapted_groups=adapted_groups)
    fast = settings.draw(3, 3, batch.sample_ids_U, slots or 1) if settings is not None and batch.inner else None
    with Flops() as counter:
        outer_loss(model, batch, settings, fast)[0].backward()
    return counter.total, step_flops(args, batch, settings, recomputation, frozen)


CASES = {
    "default": ({}, {}),
    "three steps": ({}, {"inner_steps": 3}),
    "anchor alone": ({}, {"trajectory": "anchor_only"}),
    "kl": ({"loss": "kl", "inner_epochs": 2}, {"inner_steps": 3}),
    "hidden": ({"loss": "hidden_mse"}, {"trajectory": "progressive"}),
    "attention too": ({"targets": ("ffn", "attention")}, {}),
    "o and down": ({"targets": ("o", "down")}, {}),
    "down alone": ({"targets": ("down",), "first_layer": 2}, {}),
    "full": ({"fast_weight_type": "full"}, {}),
    "all layers": ({"first_layer": 0}, {}),
}


SHARED = {  # name -> settings of the memory, groups of the 4 rows that train with the memory, document slots
    "no row": ({}, 0, None),
    "one row": ({"targets": ("ffn", "attention")}, 1, None),
    "two rows": ({"loss": "kl"}, 2, None),
    "three rows, so four": ({}, 3, None),
    "pairs": ({"samples_per_set": 2, "targets": ("ffn", "attention")}, None, None),
    "a pair of two": ({"samples_per_set": 2, "fast_weight_type": "full"}, 1, None),
    "packed pairs": ({"samples_per_set": 2}, None, 4),
    "packed threes of two rows": ({"samples_per_set": 3, "fast_weight_type": "full"}, 2, 4),
}


@pytest.mark.parametrize("case", SHARED)
def test_the_inner_loop_costs_the_rows_that_it_reads(case):
    settings, groups, slots = SHARED[case]
    counted, ours = count(build(torch.float32), memory(**settings), slots=slots, adapted_groups=groups)
    assert ours.outer + ours.inner == counted and (ours.inner == 0) == (groups == 0)
    everything = count(build(torch.float32), memory(**settings), slots=slots)[1] if groups else ours
    assert (ours.inner < everything.inner) == bool(groups)


def test_steps_without_the_memory_cost_plain_training():
    """Over 200 steps with `probability_unit` "step"; the naive draw says which steps train with the memory."""
    goal = replace(objective(memory(samples_per_set=2)), probability=0.25, probability_unit="step")
    always, never, (tokens, labels, ids) = objective(memory(samples_per_set=2)), objective(None), data()
    total, expected, chosen = 0.0, 0.0, 0
    for step in range(1, 201):

        def flops(kind, step=step):
            return sum(step_flops(ARGS, kind.micro_batch(tokens, labels, ids, step), kind.memory))

        uses_memory = naive.keyed_uniform(goal.seed, 5, step, 0, 0) < 0.25  # stream 5
        chosen += uses_memory
        expected += flops(always if uses_memory else never)
        total += flops(goal.at_step(step))
    assert total == expected and abs(chosen - 50) < 4 * (200 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_every_product_of_a_step_is_counted(case):
    settings, plan = CASES[case]
    counted, ours = count(build(torch.float32), memory(**settings), **plan)
    assert ours.outer + ours.inner == counted
    assert ours.ratio == pytest.approx(counted / ours.outer)


def test_plain_training_is_counted_as_such():
    counted, ours = count(build(torch.float32), None)
    assert ours == (counted, 0.0) and ours.ratio == 1.0


def test_compiled_blocks_run_the_same_products(monkeypatch):
    """Compiled inner steps compute no base gradients, because the base is frozen during them.

    Without freezing, losses and gradients keep the same bits, but AOTAutograd computes base gradients in every
    inner step.
    """
    settings = memory(first_layer=0)
    tokens, labels, ids = data()
    batch = objective(settings).micro_batch(tokens, labels, ids, step=3)
    models = {name: build(torch.float32) for name in ("eager", "compiled", "not constant")}
    torch._dynamo.reset()
    (counter := CompiledFlops()).compile(models["compiled"])
    blocks = models["not constant"]
    # The head stays frozen: it has no gradient with several sets of fast weights.
    monkeypatch.setattr(blocks, "inner_steps", lambda start: frozen([blocks.output]))

    def step(model):
        loss, statistics = outer_loss(model, batch, settings, settings.draw(3, 3, ids))
        loss.backward()
        return [loss.detach(), statistics.loss_KG, statistics.grad_norm_KG, *(p.grad for p in model.parameters())]

    for results in zip(*map(step, models.values()), strict=True):
        assert all(torch.equal(x, results[0]) for x in results)
    ours = step_flops(ARGS, batch, settings)
    assert counter.total == ours.outer + ours.inner


@pytest.mark.parametrize("mode, option", [("full", "op"), ("selective", "2"), ("selective", "op")])
@pytest.mark.parametrize("with_memory", [False, True])
def test_checkpointing_runs_again_what_is_counted(monkeypatch, mode, option, with_memory):
    """Recomputed FLOPs match the estimate; passes without gradient are not recomputed."""
    monkeypatch.setattr(activation_checkpoint, "_layer_sac_count", 0)
    settings = memory() if with_memory else None
    model = build(torch.float32)
    # torchtitan's list names only the attention kernels of accelerators.
    saved = _op_sac_save_list | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    config = ActivationCheckpoint(mode=mode, selective_ac_option=option)
    activation_checkpoint.apply_ac(model, config, op_sac_save_list=saved)
    counted, ours = count(model, settings, Recomputation(mode, option))
    assert count(build(torch.float32), settings)[0] < counted == ours.outer + ours.inner


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_frozen_base_has_no_gradients_of_its_weights(with_memory):
    """Everything is frozen but the embedding, so that every layer's input still requires gradient."""
    model = build(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("tok_embeddings"))
    counted, ours = count(model, memory() if with_memory else None, frozen=True)
    assert ours.outer + ours.inner == counted


SIZES = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 61, "max_seq_len": 24}
MIXTURES = {
    "llada_moe": LLaDAMoEArgs(**SIZES, n_experts=4, experts_per_token=2),
    # The trunk is a dense layer; heads are wider than the model.
    "llada2": LLaDA2Args(
        **SIZES, n_kv_heads=2, head_width=12, n_experts=8, experts_per_token=2, expert_groups=4, groups_per_token=2,
        shared_hidden_dim=48, dense_hidden_dim=80,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_count_as_often_as_a_token_sees_them(name):
    args = MIXTURES[name]
    torch.manual_seed(0)
    model = LLaDAMixture(args)
    with torch.no_grad():
        model.init_weights()
    settings = replace(memory(), linears=args.adapted_linears(1, ["ffn"]), first_layer=1)
    for chosen in (None, settings):
        counted, ours = count(model, chosen, args=args)
        # The estimate omits routers and the weighted sums of expert outputs: 2% of a layer this small.
        assert 0.95 < (ours.outer + ours.inner) / counted < 1
