"""One step on several layouts, most of them context-parallel: loss, scalars of the memory and every gradient.

    python -m tests.workers.sharded_context FOLDER [LAYOUT ...]

A single process writes the weights to FOLDER; each layout reads them and writes its results to FOLDER/LAYOUT.pt.
"""

import contextlib
import sys
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.distributed as dist

from memdlm_dist.runtime import cpu

cpu.prepare()

from torchtitan.tools.logging import logger

from memdlm_dist.compat import torch as compat_torch
from memdlm_dist.config import parse_config
from memdlm_dist.method import fast_weights
from memdlm_dist.method.documents import PADDING
from memdlm_dist.models import initial_weights, llada
from memdlm_dist.models.initial_weights import Uniform
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.collectives import by_kind
from tests.support.bilevel import recorder
from tests.support.ranks import fork_group
from tests.support.varlen import naive_varlen
from tests.workers.ring_on_cpu import ring_on_cpu
from tests.workers.sharded_experts import common_weights, full_tensor

ROWS, LENGTH = 4, 32
SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
CP = "--parallelism.context_parallel_degree"
RING = ["--parallelism.context_parallel_method", "ring"]
# name -> (ranks, arguments, micro-batches, and so sets of fast weights, of the equivalent single process)
LAYOUTS = {
    "one": (1, [], 1),
    "one-twice": (1, [], 2),
    "cp2": (2, [CP, "2"], 1),
    "cp4": (4, [CP, "4"], 1),
    "fsdp2-cp2": (4, [SHARD, "2", CP, "2", "--activation_checkpoint.mode", "full"], 2),
    "tp2-cp2": (4, [TP, "2", CP, "2"], 1),
    "tp2-ring2": (4, [TP, "2", CP, "2", *RING], 1),
    "fsdp2": (2, [SHARD, "2"], 2),
    "tp2": (2, [TP, "2"], 1),
    "fsdp2-tp2": (4, [SHARD, "2", TP, "2"], 2),
}
MEMORY = "--parametric_memory."
BATCH = [
    MEMORY + "granularity", "batch", MEMORY + "gradient_norm", "global", MEMORY + "inner_loss", "kl",
    MEMORY + "inner_steps", "3", MEMORY + "inner_epochs", "2", MEMORY + "distillation_temperature", "2.0",
    "--diffusion.loss_norm", "answer",
]  # fmt: skip
ATTENTION = [MEMORY + "target_modules", "ffn,attention", MEMORY + "learning_rate", "0.02"]
FULL = [MEMORY + "adapter", "full", MEMORY + "inner_loss", "hidden_cosine", MEMORY + "supervision", "newly_revealed"]
# Experts' adapters are not sharded by tensor parallelism.
DROPOUT = [
    "--model.converters", "lora", "--lora.rank", "8", "--lora.alpha", "8", "--lora.target_modules", "attention,up,down",
    "--lora.dropout", "0.3", MEMORY + "dropout", "0.2",
]  # fmt: skip
MOE_DROPOUT = [*DROPOUT, "--lora.target_modules", "attention,router"]
MOE = ["--model.name", "llada_moe", "--model.flavor", "tiny"]
LLADA2 = ["--model.name", "llada2", "--model.flavor", "tiny", *ATTENTION, MEMORY + "layer_fraction", "1.0"]
PAIRS, DROP = [MEMORY + "samples_per_set", "2"], [MEMORY + "dropout", "0.2"]
# The seeds choose in step 1 row 3 alone, and of sets for two rows the second: never a row of the first of two ranks.
HALF = [MEMORY + "probability", "0.5", "--debug.seed"]
# name -> (arguments, step, rows: "whole", "packed", or "quarter" with maskable tokens only in the first quarter)
OPTIONS = {
    "off": ([], "plain", "whole"),
    "off-packed": ([], "plain", "packed"),
    "sample": ([], "ours", "whole"),
    "sample-quarter": (ATTENTION, "ours", "quarter"),
    "batch-quarter": (BATCH, "ours", "quarter"),
    "sample-packed": (ATTENTION, "ours", "packed"),
    "batch-packed": (BATCH, "ours", "packed"),
    "full-packed": (FULL, "ours", "packed"),
    "moe-packed": (MOE, "ours", "packed"),
    "llada2": (LLADA2, "ours", "whole"),
    "llada2-packed": (LLADA2, "ours", "packed"),
    "dropout-packed": ([*ATTENTION, *DROPOUT], "ours", "packed"),
    "moe-dropout": ([*MOE, *MOE_DROPOUT], "ours", "packed"),
    "llada2-dropout": ([*LLADA2, *DROPOUT, "--lora.target_modules", "all-linear"], "ours", "packed"),
    "pairs": ([*ATTENTION, *PAIRS, *DROP], "ours", "whole"),
    "pairs-full": ([*ATTENTION, *FULL, *PAIRS], "ours", "whole"),
    "pairs-packed": ([*ATTENTION, *PAIRS, *DROP], "ours", "packed"),
    "threes-full-packed": ([*FULL, MEMORY + "samples_per_set", "3"], "ours", "packed"),
    "half": ([*ATTENTION, *HALF, "56"], "ours", "whole"),
    "half-pairs": ([*ATTENTION, *PAIRS, *DROP, *HALF, "6"], "ours", "whole"),
    "half-pairs-packed": ([*PAIRS, *HALF, "56"], "ours", "packed"),
}
# Documents' lengths per row: some cross the ends of sequence shards, and the last row has padding.
DOCUMENTS = [[10, 7, 15], [32], [5, 5, 5, 5, 12], [20, 8]]


def numbers():
    """Return every token's document number, `[ROWS, LENGTH]`."""
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    return torch.stack([torch.cat([row, torch.full((LENGTH - len(row),), PADDING)]) for row in rows])


# ALSO adds the options for which a layout has separate code.
EVERYWHERE = ("off", "off-packed", "sample", "sample-quarter", "sample-packed")
ALSO = {
    "one": tuple(OPTIONS),
    "cp2": tuple(name for name in OPTIONS if not name.startswith("moe")),
    "fsdp2-cp2": ("batch-quarter", "batch-packed", "dropout-packed", "half-pairs"),
    "tp2-cp2": ("batch-packed", "full-packed", "moe-packed", "dropout-packed", "moe-dropout", "pairs"),
}
SHARED = tuple(name for name in OPTIONS if "pairs" in name or "threes" in name)
WITHOUT_CP = {"fsdp2": (*SHARED, "half"), "tp2": ("off", *SHARED, "half", "moe-packed"), "fsdp2-tp2": ("pairs", "half")}


# Repeated with an accelerator's code: grouped products on a rank's sequence shard, and variable-length attention on the
# heads that a rank gets in exchange for its tokens.
GROUPED = [
    *((layout, options) for layout in ("cp2", "tp2-cp2") for options in ("sample-packed", "full-packed")),
    ("tp2", "pairs-packed"), ("one", "threes-full-packed"),
]  # fmt: skip
TWICE = ("dropout-packed", "pairs", "half")  # gradient accumulation; the result does not depend on the micro-batch


def options_of(layout):
    if layout == "one-twice":
        return ["batch-quarter", "batch-packed", *TWICE]
    if layout in WITHOUT_CP:
        return list(WITHOUT_CP[layout])
    if "ring" in layout:  # ring attention supports no documents
        return ["off", "sample", "batch-quarter"]
    return list(dict.fromkeys((*EVERYWHERE, *ALSO.get(layout, ()))))


def configuration(*arguments):
    return parse_config.parse([
        "--job.config_file", "train_configs/debug.toml", "--model.flavor", "many_heads",
        "--training.seq_len", str(LENGTH),
        "--parametric_memory.layer_fraction", "0.5", "--parametric_memory.rank", "8",
        # An untrained model has small inner gradients; this rate makes the memory matter.
        *("--parametric_memory.learning_rate", "0.1"), *arguments,
    ])  # fmt: skip


def data(kind):
    """Return tokens, labels and documents of the global batch; most documents begin with a prompt."""
    tokens = torch.randint(0, 63, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    column = torch.arange(LENGTH)
    if kind == "packed":
        documents = numbers()
        prompt = (column % 16 < 3) | (documents == PADDING)
        return tokens, torch.where(prompt, -100, tokens), documents
    maskable = column < LENGTH // 4 if kind == "quarter" else column >= torch.tensor([[0], [9], [31], [3]])
    return tokens, torch.where(maskable, tokens, -100), None


def micro_batches(bench, count, kind):
    mesh = bench.dims.get_optional_mesh("batch")
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    tokens, labels, documents = data(kind)
    rank_ids = torch.arange(ROWS).tensor_split(ranks)[rank]
    for ids in rank_ids.tensor_split(count if ranks == 1 else 1):
        documents_BL = documents[ids] if documents is not None else None
        yield bench.objective.micro_batch(tokens[ids], labels[ids], ids, step=1, documents_BL=documents_BL)


def step(bench, count, kind, rows):
    """Return the loss, the memory's scalars and all gradients, and the least number of masked tokens on a rank."""
    results = {"loss": torch.zeros(())}
    masked, metrics = [], recorder(bench.dims)
    for number, batch in enumerate(micro_batches(bench, count, rows)):
        with bench.autocast:
            use_memory = kind == "ours"
            loss, inner = bench.objective.loss_sum(bench.model, batch, 1, use_memory=use_memory, measures=True)
        loss.backward()
        results["loss"] += loss.detach()
        masked.append(batch.anchor.valid_N.sum())
        if inner is None:
            continue
        metrics.record_inner_loop(inner)
        # First set of the first micro-batch, which rank 0 holds on every layout; it may train without the memory.
        if number == 0 and bench.objective.probability == 1:
            results["inner"] = torch.stack([inner.loss_KG[:, 0], inner.grad_norm_KG[:, 0]])
            results["written"] = inner.written_norm_G[0]
    scalars = metrics._reduce() | metrics._memory_effect()
    results |= {name: torch.tensor(value) for name, value in scalars.items() if value}
    mesh = bench.dims.get_optional_mesh("loss")
    if mesh is not None:
        dist.all_reduce(results["loss"], group=mesh.get_group())
    for name, p in ((name, p) for name, p in bench.model.named_parameters() if p.requires_grad):
        results[name.replace("_checkpoint_wrapped_module.", "")] = full_tensor(p.grad).clone()
    bench.model.zero_grad()
    least = torch.stack(masked).min()
    if mesh is not None:
        dist.all_reduce(least, dist.ReduceOp.MIN, mesh.get_group())
    return results, least


def collectives_by_rank(bench):
    """Return for some steps each rank's number of rows with the memory, and its data-parallel collectives in order."""
    found = []
    for number, probability in ((1, 1.0), (1, 0.2), (2, 0.2), (3, 0.2)):
        chosen = replace(bench, objective=replace(bench.objective, probability=probability, seed=0))
        adapted_U = chosen.batch(number).adapted_U
        rows = chosen.config.training.local_batch_size if adapted_U is None else int(adapted_U.sum())
        found.append((rows, chosen.collectives("ours", number).on(*chosen.groups("fsdp"))))
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return ranks


def common_adapters(bench):
    """Make the adapters' terms differ from zero; initial weights are equal on all layouts already."""
    with torch.no_grad():
        for name, parameter in bench.model.named_parameters():
            if name.endswith("lora_B"):
                # Not a constant: the router's softmax would not see it, and the gradient of A would be 0.
                initial_weights._fill(parameter, name.replace("_checkpoint_wrapped_module.", ""), Uniform(0.04))
            elif not name.endswith("lora_A"):
                parameter.mul_(3)


def find(folder, layout):
    """Take a layout's steps in the current process group; rank 0 saves the results."""
    _, arguments, count = LAYOUTS[layout]
    logger.setLevel("WARNING")
    results = {"masked on a rank": {}}
    with ring_on_cpu() if "ring" in layout else contextlib.nullcontext():
        for options in options_of(layout):
            extra, kind, rows = OPTIONS[options]
            config = configuration(*arguments, *extra)
            bench = Bench.build(config)
            if config.model.converters:
                common_adapters(bench)
            else:
                common_weights(bench, f"{folder}/{config.model.name}")
            results[options], results["masked on a rank"][options] = step(bench, count, kind, rows)
            if (layout, options) in GROUPED:
                bench.model.model_args = replace(bench.model.model_args, grouped=True)
                with (
                    patch.object(fast_weights, "grouped_mm", wraps=fast_weights.grouped_mm) as products,
                    patch.object(llada, "attention_method", lambda *_: "varlen"),
                    patch.object(compat_torch, "varlen_attn", side_effect=naive_varlen) as attention,
                ):
                    results[f"{options}, grouped"], _ = step(bench, count, kind, rows)
                assert products.call_count > 12 and attention.call_count > 6
            if (layout, options) == ("fsdp2", "half"):
                results["collectives by rank"] = collectives_by_rank(bench)
            if options == "sample" and "ring" not in layout:
                counted = bench.collectives("ours")
                cp_calls, fsdp_calls = (counted.on(*bench.groups(name)) for name in ("cp", "fsdp"))
                results["collectives"] = {"cp": by_kind(cp_calls), "fsdp": by_kind(fsdp_calls)}
                results["plain collectives"] = {"fsdp": by_kind(bench.collectives("plain").on(*bench.groups("fsdp")))}
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/{layout}.pt")


if __name__ == "__main__":
    folder, *layouts = sys.argv[1:]
    for layout in layouts or LAYOUTS:
        if status := fork_group(LAYOUTS[layout][0], lambda layout=layout: find(folder, layout)):
            sys.exit(status)
