"""Numbers and communication of the plain, the straightforward and our step on sharded models.

    python -m tests.workers.sharded_step FOLDER [LAYOUT ...]

Writes the results that test_sharded_step.py asserts as JSON, one file per layout. The layout in COMPILED has a second,
slow part, `LAYOUT-compiled`, which takes as long as all others together.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from memdlm_dist.runtime import cpu

cpu.prepare()

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

from memdlm_dist.config import parse_config
from memdlm_dist.method import bilevel
from memdlm_dist.method.inner_loss import inner_loss
from memdlm_dist.performance.bench_steps import DATA_PARALLEL, KINDS, Bench
from memdlm_dist.performance.collectives import by_kind
from memdlm_dist.runtime.device import device_type
from tests.support.bilevel import change_in_chunks, trained_in_each_pass
from tests.support.ranks import fork_group

# Three trunk layers and two tail layers, so that counts tell trunk from tail.
COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "sharded", "--training.seq_len", "64",
    "--training.local_batch_size", "2", "--parametric_memory.layer_fraction", "0.4", "--compile.backend", "aot_eager",
]  # fmt: skip
SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
LAYOUTS = {
    "fsdp2": (2, []),
    "hsdp2x2": (4, ["--parallelism.data_parallel_replicate_degree", "2", SHARD, "2"]),
    "fsdp2-tp2": (4, [SHARD, "2", TP, "2"]),
}

AC = ["--activation_checkpoint.mode", "full"]
SELECTIVE = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2"]
COMPILE = ["--compile.enable"]
BUILDS = {  # name -> (dtype, arguments, layouts that skip it because compilation takes seconds)
    "float64": ("float64", [], ()),
    "float64-checkpointing": ("float64", AC, ("hsdp2x2",)),
    "float32": ("float32", [], ("fsdp2-tp2",)),
    "float32-compiled-checkpointing": ("float32", AC + COMPILE, ("hsdp2x2", "fsdp2-tp2")),
    "bfloat16": ("bfloat16", [], ("hsdp2x2", "fsdp2-tp2")),
    # Blocks with and without activation checkpointing, which compile differently under tensor parallelism.
    "float32-compiled-selective": ("float32", SELECTIVE + COMPILE, ("fsdp2", "hsdp2x2")),
    "float32-never": ("float32", ["--parallelism.fsdp_reshard_after_forward", "never"], ("hsdp2x2", "fsdp2-tp2")),
    "float32-always": ("float32", ["--parallelism.fsdp_reshard_after_forward", "always"], ("hsdp2x2", "fsdp2-tp2")),
}

COMPILED = ("fsdp2-tp2", "float32-compiled-selective")
COMPILATIONS = {"fsdp2": ("plain", "ours"), "fsdp2-tp2": ("ours",)}

# name -> (plan, inner loss, distillation temperature, targets, further settings of the memory)
OPTIONS = {
    "default": ({}, "cross_entropy", 1.0, ["ffn"], {}),
    "kl-3-newly_revealed": (
        {"inner_steps": 3, "supervision": "newly_revealed"}, "kl", 2.0, ["ffn", "attention"], {},
    ),
    "hidden_cosine-progressive-full": (
        {"trajectory": "progressive", "inner_steps": 3, "progressive_end": 0.5}, "hidden_cosine", 1.0, ["ffn"],
        {"fast_weight_type": "full"},
    ),
    "reverse_kl-anchor_only-batch-2_epochs": (
        {"trajectory": "anchor_only"}, "reverse_kl", 0.5, ["ffn"], {"samples_per_set": None, "inner_epochs": 2},
    ),
}  # fmt: skip


def get_layout(part):
    return part.removesuffix("-compiled")


def builds(part):
    """Yield the comparisons of a layout, or of its compiled part, as "build options"."""
    layout = get_layout(part)
    for name, (_, _, skipped) in BUILDS.items():
        if layout not in skipped and ((layout, name) == COMPILED) == (layout != part):
            # HSDP differs from FSDP only in the reduction of gradients.
            some = OPTIONS if name == "float64" and layout != "hsdp2x2" else list(OPTIONS)[:1]
            yield from (f"{name} {options}" for options in some)


def build(dtype, arguments):
    config = parse_config.parse([*COMMON, *arguments])
    TORCH_DTYPE_MAP["float64"] = torch.float64
    training = config.training
    training.mixed_precision_param = dtype
    training.dtype = training.mixed_precision_reduce = "float32" if dtype == "bfloat16" else dtype
    bench = Bench.build(config)
    with torch.no_grad():
        for parameter in bench.model.parameters():  # larger than the initialisation, so that attention is not flat
            parameter.mul_(3)
    return bench


def with_options(bench, name):
    plan, loss, temperature, targets, settings = OPTIONS[name]
    memory = replace(
        bench.objective.memory,
        loss=inner_loss(loss, "pre_final_norm", "post_final_norm", temperature),
        linears=bench.args.adapted_linears(bench.objective.memory.first_layer, targets),
        **settings,
    )
    objective = replace(bench.objective, memory=memory, plan=replace(bench.objective.plan, **plan))
    return replace(bench, objective=objective)


def step(bench, kind, dtype):
    """Return loss, inner statistics and every gradient of one step, as this rank's tensors."""
    bench.model.zero_grad()
    first_layer = bench.objective.memory.first_layer
    with trained_in_each_pass(bench.model, first_layer) as trained:
        loss, statistics = bench.loss_sum(kind, bench.batch(1), 1, dtype)
    loss.backward()
    if kind == "ours":  # the tail is frozen during the inner loop
        tail = [*list(bench.model.layers.values())[first_layer:], bench.model.norm, bench.model.output]
        assert trained == [0] * (len(trained) - 1) + [sum(1 for module in tail for _ in module.parameters())], trained
        assert all(p.requires_grad for p in bench.model.parameters())
    results = {f"gradient of {name}": local(p.grad) for name, p in bench.model.named_parameters()}
    bench.model.zero_grad()
    results["loss"] = loss.detach()
    if statistics is not None:
        for name in ("loss_KG", "grad_norm_KG", "written_norm_G"):
            results[name] = getattr(statistics, name)
        assert statistics.counted_KG.all() and results["written_norm_G"].min() > 0
        if statistics.write_X2 is not None:
            term_X, own_X = statistics.write_X2.unbind(1)
            results["relative write"] = (term_X / own_X).sqrt()
    return results


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def difference(ours, theirs):
    """Return the largest difference over ranks and quantities, relative to a quantity's largest value."""
    assert ours.keys() == theirs.keys()
    worst = max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-30)).item() for k in ours)
    return largest(worst)


def largest(x):
    x = torch.tensor(float(x), dtype=torch.float64, device=device_type())
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def gathered(bench):
    """Return 1 or 0 for embedding, every layer and head: gathered or sharded."""
    modules = [bench.model.tok_embeddings, *bench.model.layers.values(), bench.model.output]
    return [int(not _is_sharded(next(module.parameters()))) for module in modules]


def _is_sharded(parameter):
    return isinstance(parameter, DTensor) and "fsdp" in parameter.device_mesh.mesh_dim_names


def compare(bench, dtype, count):
    dtype = {"float64": torch.float64}.get(dtype)
    ours, theirs = step(bench, "ours", dtype), step(bench, "straightforward", dtype)
    write_X = ours.pop("relative write")  # of rank 0's tokens, and shards of outputs
    # Losses of the first inner step, whose predictions have the same bits in any precision.
    first = [{"first inner losses": x["loss_KG"][0]} for x in (ours, theirs)]
    result = {"difference": difference(ours, theirs), "difference of the first inner losses": difference(*first)}
    result["relative write"] = write_X.tolist()
    if not count:
        return result
    communication = {kind: bench.collectives(kind, 1).on(*bench.groups(*DATA_PARALLEL)) for kind in KINDS}
    return result | {
        "all_gathers": {kind: by_kind(calls)["all_gather"] for kind, calls in communication.items()},
        "reduce_scatters": {kind: by_kind(calls)["reduce_scatter"] for kind, calls in communication.items()},
        "order": {kind: "".join(x[0][0] for x in calls) for kind, calls in communication.items()},
        # Data-parallel collectives, by kind and size, that plain training does not issue.
        "beyond_plain": sorted(f"{x}" for x in Counter(communication["ours"]) - Counter(communication["plain"])),
    }


def gathered_groups(bench):
    """Return the gathered groups at points of a step, of validation and after failures."""
    bench.model.zero_grad()
    states = {"before": gathered(bench)}
    expected = step(bench, "ours", None)
    batch, memory = bench.batch(1), bench.objective.memory

    def during(_fast):
        states["after the inner steps"] = gathered(bench)

    fast = memory.draw(0, 1, batch.sample_ids_U)
    bench.model.zero_grad()
    loss, _ = bilevel.outer_loss(bench.model, batch, memory, fast, bench.objective.tp_rank, during)
    states["before the backward pass"] = gathered(bench)
    loss.backward()
    states["after the backward pass"] = gathered(bench)

    with torch.no_grad():
        bilevel.outer_loss(bench.model, batch, memory, fast, bench.objective.tp_rank)
    states["after validation"] = gathered(bench)

    def raise_error(*_):
        raise ArithmeticError("on purpose")

    broken_loss = memory.loss._replace(logit_loss=raise_error)
    for name, fail in {
        "inner loop": lambda: bilevel.outer_loss(
            bench.model, batch, replace(memory, loss=broken_loss), fast, bench.objective.tp_rank
        ),
        "between the loops": lambda: bilevel.outer_loss(
            bench.model, batch, memory, fast, bench.objective.tp_rank, raise_error
        ),
    }.items():
        try:
            fail()
            raise AssertionError("no failure reached the caller")
        except ArithmeticError:
            states[f"after a failure in {name}"] = gathered(bench)
        if name == "between the loops":  # a failure in the inner loop leaves FSDP2 in the middle of a forward pass
            states["difference after a failure"] = difference(step(bench, "ours", None), expected)
    return states


def compilations(bench, kind):
    """Return the number of graphs that dynamo has compiled after each of four steps, and its graph breaks."""
    from torch._dynamo.utils import counters

    counters.clear()
    graphs = []
    for number in range(4):
        bench.loss_sum(kind, bench.batch(number), number)[0].backward()
        bench.model.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "breaks": dict(counters["graph_break"])}


def find(part):
    """Compare the steps of a layout, or of its compiled part, in the current process group; return the results."""
    layout = get_layout(part)
    logger.setLevel("WARNING")
    result = {"compilations": {}, "steps": {}}
    built = None
    for step_name in builds(part):
        name, options = step_name.split()
        dtype, arguments, _ = BUILDS[name]
        if name != built:
            bench, built = build(dtype, [*LAYOUTS[layout][1], *arguments]), name
            if name in ("float32-compiled-checkpointing", "float32-compiled-selective"):
                for kind in COMPILATIONS.get(layout, ()):
                    torch._dynamo.reset()  # start without compiled graphs, as a fresh run does
                    result["compilations"][kind] = compilations(bench, kind)
            if name == "float32" and layout == "fsdp2":
                result["gathered"] = gathered_groups(bench)
        # Options differ only in tensor-parallel collectives, so FSDP's are counted for all of them on one layout.
        count = layout == "fsdp2" or options == "default"
        result["steps"][step_name] = compare(with_options(bench, options), dtype, count)
    if bench.dims.tp > 1:
        result["change in chunks"] = change_in_chunks(bench.model, 16, 6, bench.dims.tp).item()
    return result


def write(part, path):
    """Write the results as JSON."""
    result = find(part)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(result))


if __name__ == "__main__":
    folder, *layouts = sys.argv[1:]
    for layout in layouts or LAYOUTS:
        began = time.perf_counter()
        path = f"{folder}/{layout}.json"
        status = fork_group(LAYOUTS[get_layout(layout)][0], lambda part=layout, path=path: write(part, path))
        print(f"{layout}: status {status} after {time.perf_counter() - began:.1f} s", flush=True)
        if status:
            sys.exit(status)
