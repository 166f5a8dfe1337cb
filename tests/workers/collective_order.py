"""Sequence of collectives in a training step, as issued by one rank of a fake process group."""

import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.compat.torch import operator_name, tree_leaves
from memdlm_dist.config import parse_config
from memdlm_dist.performance.collectives import Collectives
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer

COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "tiny", "--training.seq_len", "32",
    "--training.local_batch_size", "2", "--metrics.no_enable_tensorboard", "--optimizer.implementation", "fused",
]  # fmt: skip
SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
CP, EP = "--parallelism.context_parallel_degree", "--parallelism.expert_parallel_degree"
# With this probability no sample of rank 2 adapts in step 1.
SELDOM = ["--parametric_memory.probability", "0.1", "--parametric_memory.inner_loss", "kl"]
LAYOUTS = {  # name -> (ranks, arguments)
    "fsdp4": (4, [SHARD, "4", *SELDOM]),
    "fsdp2-tp2": (4, [SHARD, "2", TP, "2"]),
    "fsdp2-cp2": (4, [SHARD, "2", CP, "2"]),
    "fsdp2-tp2-cp2": (8, [SHARD, "2", TP, "2", CP, "2"]),
    "fsdp4-ep2": (4, [SHARD, "4", EP, "2", "--model.name", "llada2", "--model.load_balance_coeff", "0.001"]),
}
# name -> indices of a rank's rows without a maskable token
BATCHES = {"ordinary": (), "empty": (0, 1), "one empty row": (0,)}
DIMENSIONS = ("dp_replicate", "fsdp", "efsdp", "tp", "cp", "ep", "batch", "loss")


class LocalCollectives(Collectives):
    """Recorder of collectives that fills their results with this rank's values.

    A fake process group leaves results uninitialised.
    """

    def __init__(self):
        super().__init__()
        self.calls = []  # (operator, group, elements, dtypes, other arguments)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        before = len(self.issued)
        out = super().__torch_dispatch__(operator, types, args, kwargs)
        name = operator_name(operator)
        if len(self.issued) > before:
            _, group, elements = self.issued[-1]
            leaves = tree_leaves((args, kwargs or {}))
            dtypes = [str(x.dtype) for x in leaves if isinstance(x, Tensor)]
            others = [x for x in leaves if isinstance(x, int | str) and x != group]  # a c10d ReduceOp cannot be read
            self.calls.append((name, group, elements, dtypes, others))
            if name.startswith("_c10d_functional::") and isinstance(out, Tensor):
                _fill(out, args[0])
            elif name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
                _fill(args[0], args[1])
        return out


def _fill(target, source):
    """Fill the target with the source's elements, repeated or truncated."""
    flat = source.reshape(-1)
    target.view(-1).copy_(flat.repeat(-(-target.numel() // max(flat.numel(), 1)))[: target.numel()])


def write_rank(rank, layout, folder):
    """Write a rank's collectives in a step that logs, for every kind of batch, as JSON.

    An entry is (operator, mesh dimension, elements, dtypes, other arguments). The last rank gets a stop request.
    """
    logging.disable()
    warnings.filterwarnings("ignore")
    ranks, arguments = LAYOUTS[layout]
    dist.init_process_group("fake", rank=rank, world_size=ranks)
    config = parse_config.parse([*COMMON, *arguments])
    sizes, dims = replace(get_model_args(config), n_heads=4, n_kv_heads=4), get_layout(config, ranks)
    meshes = {name: dims.get_optional_mesh(name) for name in DIMENSIONS}
    groups = {mesh.get_group().group_name: name for name, mesh in meshes.items() if mesh is not None}
    groups[dist.group.WORLD.group_name] = "world"
    torch.manual_seed(0)
    trained = trainer.build(config, sizes, dims, "cpu")
    trained.stop.requested = rank == ranks - 1
    dp_rank, calls = meshes["batch"].get_local_rank(), {}
    for name, empty in BATCHES.items():
        with LocalCollectives() as counted:
            trainer.step(trained, 1, [trainer.batch(config, sizes, dp_rank, empty)])
        calls[name] = [(operator, groups[group], *rest) for operator, group, *rest in counted.calls]
    (Path(folder) / f"{layout}-{rank}.json").write_text(json.dumps({"place": dp_rank, "found": calls}))
    return 0
