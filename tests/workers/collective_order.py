"""The collectives of a training step in their order, as one rank of a fake process group issues them."""

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
SHARD, TENSOR = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
CONTEXT, EXPERT = "--parallelism.context_parallel_degree", "--parallelism.expert_parallel_degree"
# No sample of rank 2 then has a memory in step 1.
SELDOM = ["--parametric_memory.probability", "0.1", "--parametric_memory.inner_loss", "kl"]
LAYOUTS = {  # name -> (ranks, arguments)
    "fsdp4": (4, [SHARD, "4", *SELDOM]),
    "fsdp2-tp2": (4, [SHARD, "2", TENSOR, "2"]),
    "fsdp2-cp2": (4, [SHARD, "2", CONTEXT, "2"]),
    "fsdp2-tp2-cp2": (8, [SHARD, "2", TENSOR, "2", CONTEXT, "2"]),
    "fsdp4-ep2": (4, [SHARD, "4", EXPERT, "2", "--model.name", "llada_moe"]),
}
# A rank's rows: name -> those without a token that may be masked.
BATCHES = {"ordinary": (), "empty": (0, 1), "one empty row": (0,)}
DIMENSIONS = ("dp_replicate", "fsdp", "efsdp", "tp", "cp", "ep", "batch", "loss")


class Uncommunicated(Collectives):
    """Records collectives, and gives their results values: those of this rank, as if all others had the same.

    On a fake process group they are otherwise what memory held before.
    """

    def __init__(self):
        super().__init__()
        self.calls = []  # (operator, group, elements, types, other arguments)

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
    """Repeat or cut the source's elements to the target's number."""
    flat = source.reshape(-1)
    target.view(-1).copy_(flat.repeat(-(-target.numel() // max(flat.numel(), 1)))[: target.numel()])


def write_rank(rank, layout, folder):
    """Write a rank's collectives as JSON: operator, dimension of the mesh, elements, types, other arguments.

    Of a step that logs, on every kind of batch. One rank is asked to stop.
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
    place, found = meshes["batch"].get_local_rank(), {}
    for name, empty in BATCHES.items():
        with Uncommunicated() as counted:
            trainer.step(trained, 1, [trainer.batch(config, sizes, place, empty)])
        found[name] = [(operator, groups[group], *rest) for operator, group, *rest in counted.calls]
    (Path(folder) / f"{layout}-{rank}.json").write_text(json.dumps({"place": place, "found": found}))
    return 0
