"""Steps that train the experts' biases, on several layouts, with the routers' selections."""

import logging
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from memdlm_dist.runtime import cpu

cpu.prepare()

from torchtitan.components.checkpoint import ModelWrapper

from memdlm_dist.config import parse_config
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer
from tests.workers.skipped_steps import Poisoned

SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
EP = "--parallelism.expert_parallel_degree"
FULL = ["--activation_checkpoint.mode", "full"]
COEFFICIENT = 0.01
TRAINED = ["--model.load_balance_coeff", str(COEFFICIENT)]
MICRO_BATCHES = 2  # of a step, on all data-parallel ranks
# name -> (ranks, arguments)
LAYOUTS = {
    "one": (1, []),
    "fsdp2-full": (2, [SHARD, "2", *FULL]),
    "ep2": (2, [SHARD, "2", EP, "2", "--optimizer.implementation", "fused"]),
    "tp2": (2, [TP, "2"]),
}


class Run:
    """A trainer without data, on the current process group; its mixture's biases are not zero.

    Args:
        arguments: of the configuration.
        skipped: steps with a NaN loss.
    """

    def __init__(self, *arguments, skipped=()):
        self.config = parse_config.parse([
            "--job.config_file", "train_configs/debug.toml", "--model.name", "llada2", "--model.flavor", "tiny",
            "--training.seq_len", "16", "--training.local_batch_size", "2", "--training.steps", "9",
            "--metrics.log_freq", "1", "--metrics.no_enable_tensorboard", "--parametric_memory.granularity", "batch",
            "--reliability.on_nonfinite", "skip", *arguments,
        ])  # fmt: skip
        self.sizes, self.dims = get_model_args(self.config), get_layout(self.config, dist.get_world_size())
        torch.manual_seed(0)
        self.trained = trainer.build(self.config, self.sizes, self.dims, "cpu")
        self.trained.objective = Poisoned(**vars(self.trained.objective), steps=skipped)
        (self.mixture,) = self.trained.model.mixtures()
        self.bias = self.mixture.expert_bias
        with torch.no_grad():
            self.mixture.router.gate.weight.mul_(20)
            self.bias.copy_(torch.linspace(-0.1, 0.1, len(self.bias)))

    def step(self, number):
        """Take a step; return each expert's tokens on all ranks, from the routers' selections."""
        mesh = self.dims.get_optional_mesh("batch")
        ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
        own = range(MICRO_BATCHES * number + rank, MICRO_BATCHES * (number + 1), ranks)
        self.trained.gradient_accumulation_steps = len(own)
        with selections(self.mixture) as selected:
            trainer.step(self.trained, number, [trainer.batch(self.config, self.sizes, i) for i in own])
        # Activation checkpointing selects again in the backward pass.
        passes = len(own) * (2 if self.config.activation_checkpoint.mode == "full" else 1)
        assert len(selected) == passes
        load = torch.cat(selected).flatten().bincount(minlength=len(self.bias)).float() * len(own) / passes
        if mesh is not None:
            dist.all_reduce(load, group=mesh.get_group())
        return load


@contextmanager
def selections(mixture):
    """Yield a list of the experts that the router selects in each pass of the training loss."""
    selected, is_outer = [], []
    hooks = [
        mixture.register_forward_pre_hook(lambda *args: is_outer.append(args[-1]["trains"]), with_kwargs=True),
        mixture.router.register_forward_hook(lambda *args: selected.append(args[-1][1]) if is_outer[-1] else None),
    ]
    yield selected
    for hook in hooks:
        hook.remove()


def find(layout):
    """Take a step and skip another on a layout.

    Returns:
        The biases at the start and after each step, the experts' tokens in each step, and the metrics of the first.
    """
    logging.disable()
    run = Run(*LAYOUTS[layout][1], *TRAINED, skipped=(2,))
    biases, loads, metrics = [run.bias.tolist()], [], []
    for number in (1, 2):
        loads.append(run.step(number).tolist())
        biases.append(run.bias.tolist())
        metrics.append(run.trained.metrics_processor._load_balance())
    return biases, loads, metrics[0]


def resume(folder):
    """Return the biases after a step that is taken twice from the same checkpoint."""
    logging.disable()
    run = Run(*TRAINED)
    run.step(1)
    wrapper = ModelWrapper(run.trained.model)
    dcp.save(wrapper.state_dict(), checkpoint_id=folder)
    run.step(2)
    biases = [run.bias.tolist()]
    state = wrapper.state_dict()
    dcp.load(state, checkpoint_id=folder)
    wrapper.load_state_dict(state)
    run.step(2)
    return [*biases, run.bias.tolist()]


def keep():
    """Return the biases before and after a step that does not train them."""
    logging.disable()
    run = Run()
    before = run.bias.tolist()
    run.step(1)
    return before, run.bias.tolist()
