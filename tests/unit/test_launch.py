"""What follows from the number of processes: degrees and batch sizes, for the shipped configurations and in general."""

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
LOCAL = {  # sequences of a micro-batch on 1, 2, 4 and 8 ranks, where they follow from the global batch
    "quickstart": (8, 8, 4, 2), "needle_base": (64, 32, 16, 8), "needle_mdlm": (32, 16, 8, 4),
    "needle_memdlm": (32, 16, 8, 4), "llada_8b_longalpaca": (4, 4, 4, 4), "llada_moe_7b_longalpaca": (4, 4, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_start_on_any_node(name):
    """On 1, 2, 4 and 8 ranks without an argument, or with a sentence that says how many are needed."""
    config = parse_config.parse(["--job.config_file", f"train_configs/{name}.toml"])
    args = backbone_args(config.model.name, config.model.flavor)
    given = config.training
    others = config.parallelism.tensor_parallel_degree * config.parallelism.context_parallel_degree
    assert (others == 8) == (name == "llada_8b_128k") and (given.local_batch_size == -1) == (name in LOCAL)
    for number, ranks in enumerate((1, 2, 4, 8)):
        if ranks % others:
            with pytest.raises(UserError, match=rf"^{ranks} processes cannot be .* needs a multiple of {others}; "):
                launch.resolve(config, ranks)
            continue
        found = launch.resolve(config, ranks)
        check_layout.check_backbone(found, args)
        parallel, training = found.parallelism, found.training
        assert (parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree) == (1, ranks // others)
        assert training.local_batch_size == LOCAL.get(name, [given.local_batch_size] * 4)[number]
        # The samples of a step are those of the global batch.
        expected = given.global_batch_size if given.global_batch_size > 0 else ranks * given.local_batch_size
        assert training.global_batch_size == expected
        assert expected % (training.local_batch_size * (ranks // others)) == 0
    # Inference has no batch to divide, and keeps no parameters gathered.
    reading = launch.resolve(inference_config(config), 3 * config.parallelism.tensor_parallel_degree)
    assert reading.parallelism.fsdp_reshard_after_forward == "default"
    if name.endswith("longalpaca"):
        found = launch.resolve(config, 32, 8)
        assert found.parallelism.data_parallel_replicate_degree == 4 and found.training.local_batch_size == 1


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
        found = launch.resolve(config, ranks).training
        fitting = [n for n in range(1, (most or total) + 1) if total % (n * ranks) == 0]
        assert (found.local_batch_size, found.global_batch_size) == (max(fitting), total)
    assert config.training.local_batch_size == -1  # what was parsed serves other launches too
    config.training.local_batch_size, config.training.global_batch_size = 6, -1  # what is set is kept
    found = launch.resolve(config, 4).training
    assert (found.local_batch_size, found.global_batch_size) == (6, 24)


NODES = {  # (processes, those of a node, degrees) -> (replicas, shards)
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
    ranks, node, degrees, expected = NODES[name]
    config = copy.deepcopy(debug_config)
    for key, degree in degrees.items():
        setattr(config.parallelism, f"{key}_degree", degree)
    world = launch.resolve(config, ranks, node).parallelism
    assert world.data_parallel_replicate_degree == degrees.get("data_parallel_replicate", 1)
    config.parallelism.data_parallel_shard_within = "node"
    parallel = launch.resolve(config, ranks, node).parallelism
    assert (parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree) == expected
    warned = any("leaves nothing to shard over in a node" in warning for warning in warnings)
    assert warned == (name in list(NODES)[-3:])


@pytest.mark.parametrize("node", (2, 6))
def test_nodes_of_different_sizes_are_refused(node, debug_config, monkeypatch):
    """Of 2, 4 and 6 processes, which all divide 12: the nodes would take themselves for other numbers of replicas."""
    for name, value in {"WORLD_SIZE": 12, "LOCAL_WORLD_SIZE": node, "GROUP_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    config = copy.deepcopy(debug_config)
    config.parallelism.data_parallel_shard_within = "node"
    with pytest.raises(UserError, match=f"this one has {node} of the 12 on 3 nodes; set NGPU alike on all nodes"):
        launch.resolve(config, *launched_processes())
