"""Degrees and batch sizes resolved from the number of processes, for shipped and for other configurations."""

import copy
import re
from itertools import product
from pathlib import Path

import pytest

from memdlm_dist.config import check_layout, launch, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.setup import inference_config
from memdlm_dist.models import backbone_args
from memdlm_dist.runtime.process_group import launched_processes

SHIPPED = sorted(path.stem for path in Path("train_configs").glob("*.toml"))
LOCAL = {  # local batch size on 1, 2, 4 and 8 ranks, where it follows from the global batch size
    "quickstart": (8, 8, 4, 2), "needle_base": (64, 32, 16, 8), "needle_mdlm": (32, 16, 8, 4),
    "needle_memdlm": (32, 16, 8, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_start_on_any_node(name):
    """Configurations resolve on 1, 2, 4 and 8 ranks, or the error names the multiple that they need."""
    config = parse_config.parse(["--job.config_file", f"train_configs/{name}.toml"])
    args = backbone_args(config.model.name, config.model.flavor)
    asked = config.training
    others = config.parallelism.tensor_parallel_degree * config.parallelism.context_parallel_degree
    assert (others == 8) == (name == "llada_8b_128k") and (asked.local_batch_size == -1) == (name in LOCAL)
    for number, ranks in enumerate((1, 2, 4, 8)):
        if ranks % others:
            with pytest.raises(UserError, match=rf"^{ranks} processes cannot be .* needs a multiple of {others}; "):
                launch.resolve(config, ranks)
            continue
        resolved = launch.resolve(config, ranks)
        check_layout.check_backbone(resolved, args)
        parallel, training = resolved.parallelism, resolved.training
        assert (parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree) == (1, ranks // others)
        assert training.local_batch_size == LOCAL.get(name, [asked.local_batch_size] * 4)[number]
        # A step covers exactly the global batch.
        expected = asked.global_batch_size if asked.global_batch_size > 0 else ranks * asked.local_batch_size
        assert training.global_batch_size == expected
        assert expected % (training.local_batch_size * (ranks // others)) == 0
    # Inference has no batch to divide and reshards after the forward pass.
    inference = launch.resolve(inference_config(config), 3 * others)
    assert inference.parallelism.fsdp_reshard_after_forward == "default"
    assert inference.parallelism.context_parallel_degree == config.parallelism.context_parallel_degree
    config.parallelism.context_parallel_method = "ring"  # takes no mask
    assert inference_config(config).parallelism.context_parallel_degree == 1
    if name.endswith("longalpaca"):
        resolved = launch.resolve(config, 32, 8)
        assert resolved.parallelism.data_parallel_replicate_degree == 4 and resolved.training.local_batch_size == 2


@pytest.fixture(scope="module")
def debug_config():
    return parse_config.parse(["--job.config_file", "train_configs/debug.toml"])


def test_a_local_batch_is_the_largest_part_of_a_ranks_share(debug_config):
    config = copy.deepcopy(debug_config)
    config.training.local_batch_size = -1
    for total, ranks, most in product((1, 6, 8, 12), (1, 2, 3, 4), (0, 1, 4, 5)):
        config.training.global_batch_size, config.training.max_local_batch_size = total, most
        if total % ranks:
            with pytest.raises(UserError, match=rf"set it to a multiple of {ranks} \(the nearest is") as refused:
                launch.resolve(config, ranks)
            config.training.global_batch_size = int(re.search(r"nearest is (\d+)", str(refused.value))[1])
            launch.resolve(config, ranks)
            continue
        resolved = launch.resolve(config, ranks).training
        fitting = [n for n in range(1, (most or total) + 1) if total % (n * ranks) == 0]
        assert (resolved.local_batch_size, resolved.global_batch_size) == (max(fitting), total)
    assert config.training.local_batch_size == -1  # the parsed configuration stays unresolved for other launches
    config.training.local_batch_size, config.training.global_batch_size = 6, -1  # explicit sizes are kept
    resolved = launch.resolve(config, 4).training
    assert (resolved.local_batch_size, resolved.global_batch_size) == (6, 24)


NODES = {  # (processes, processes per node, degrees) -> (replicate degree, shard degree)
    "one node": (8, 8, {}, (1, 8)),
    "four nodes": (32, 8, {}, (4, 8)),
    "tensor parallel": (32, 8, {"tensor_parallel": 2}, (4, 4)),
    "context parallel, whose ranks shard": (32, 8, {"context_parallel": 8}, (4, 1)),
    "set degree": (32, 8, {"data_parallel_shard": 32}, (1, 32)),
    "set replicas": (32, 8, {"data_parallel_replicate": 2}, (2, 16)),
    "one data-parallel rank a node": (32, 8, {"tensor_parallel": 8}, (1, 4)),
    "a group across nodes": (32, 8, {"tensor_parallel": 2, "context_parallel": 8}, (1, 2)),
    "one process a node": (4, 1, {}, (1, 4)),
}


@pytest.mark.parametrize("name", NODES)
def test_sharding_within_a_node(name, debug_config, monkeypatch):
    warnings = []
    monkeypatch.setattr(launch.logger, "warning", warnings.append)
    ranks, per_node, degrees, expected = NODES[name]
    config = copy.deepcopy(debug_config)
    for key, degree in degrees.items():
        setattr(config.parallelism, f"{key}_degree", degree)
    world = launch.resolve(config, ranks, per_node).parallelism
    assert world.data_parallel_replicate_degree == degrees.get("data_parallel_replicate", 1)
    config.parallelism.data_parallel_shard_within = "node"
    parallel = launch.resolve(config, ranks, per_node).parallelism
    assert (parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree) == expected
    warned = any("leaves nothing to shard over in a node" in warning for warning in warnings)
    assert warned == (name in list(NODES)[-3:])


@pytest.mark.parametrize("node", (2, 6))
def test_nodes_of_different_sizes_are_refused(node, debug_config, monkeypatch):
    """Nodes of 2, 4 and 6 processes: each count divides 12, so nodes would derive different replicate degrees."""
    for name, value in {"WORLD_SIZE": 12, "LOCAL_WORLD_SIZE": node, "GROUP_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    config = copy.deepcopy(debug_config)
    config.parallelism.data_parallel_shard_within = "node"
    with pytest.raises(UserError, match=f"this one has {node} of the 12 on 3 nodes; set NGPU alike on all nodes"):
        launch.resolve(config, *launched_processes())
