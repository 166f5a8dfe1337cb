"""Non-finite steps, which a fused optimizer skips on the device before the host knows of them."""

import logging
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.training.backbone import get_layout, get_model_args
from memdlm_dist.training.consensus import _local
from memdlm_dist.training.objective import Objective
from tests.support import trainer

ARGUMENTS = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "tiny", "--training.seq_len", "32",
    "--training.local_batch_size", "2", "--training.steps", "100", "--metrics.log_freq", "100",
    "--metrics.no_enable_tensorboard", "--optimizer.implementation", "fused", "--optimizer.weight_decay", "0.5",
    "--reliability.on_nonfinite", "skip", "--reliability.max_consecutive_skips", "2",
    "--parallelism.data_parallel_shard_degree", "2",
]  # fmt: skip


@dataclass(frozen=True)
class Poisoned(Objective):
    """Objective with a NaN loss in the given steps."""

    steps: tuple[int, ...] = ()

    def loss_sum(self, model, batch, step, *rest, **named):
        loss, statistics = super().loss_sum(model, batch, step, *rest, **named)
        return (loss * torch.nan if step in self.steps else loss), statistics


def state(trained):
    """Return copies of this rank's weights, moments and optimizer step counters."""
    (optimizer,) = trained.optimizers
    moments = [x for entry in optimizer.state.values() for x in entry.values()]
    return [_local(x).detach().clone() for x in [*trained.model.parameters(), *moments]]


def same(a, b):
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def find():
    """Take steps 2 to 9 on two ranks, with NaN losses on rank 1 in 4, 7 and 8; return both ranks' results."""
    logging.disable()
    rank, config = dist.get_rank(), parse_config.parse(ARGUMENTS)
    args, dims = replace(get_model_args(config), n_heads=2, n_kv_heads=2), get_layout(config, 2)
    torch.manual_seed(0)
    trained = trainer.build(config, args, dims, "cpu")
    trained.objective = Poisoned(**vars(trained.objective), steps=(4, 7, 8) if rank else ())
    consensus, results = trained.consensus, {}

    def step(number):
        trainer.step(trained, number, [trainer.batch(config, args, 2 * number + rank)])

    step(2), step(3)
    before = state(trained)
    step(4)
    results["unknown"] = consensus.skipped
    results["unchanged"] = same(state(trained), before)
    step(5)
    results["known a step later"] = consensus.skipped
    results["changed"] = not same(state(trained), before)
    (optimizer,) = trained.optimizers
    results["steps taken"] = {int(entry["step"]) for entry in optimizer.state.values()}
    trained.stop.requested = rank == 0
    step(6)
    results["stops early"] = consensus.stop
    consensus.finish()
    consensus.finish()  # a second call changes nothing
    results["stops"], results["skipped"] = consensus.stop, consensus.skipped
    before = state(trained)
    step(7), step(8)
    results["unchanged for long"], results["skipped by now"] = same(state(trained), before), consensus.skipped
    try:
        step(9)
    except UserError as error:
        results["error"] = str(error)
    results["unchanged at the end"] = same(state(trained), before)
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, results)
    return ranks
