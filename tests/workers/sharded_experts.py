"""One mixture-of-experts step on several layouts: loss, inner statistics and every gradient.

    python -m tests.workers.sharded_experts FOLDER [LAYOUT ...]

A single process writes FOLDER/BACKBONE in Hugging Face's format. Each layout reads them like
`checkpoint.initial_load_in_hf`, every rank its own slices, and writes its results to FOLDER/LAYOUT.pt.
"""

import math
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from memdlm_dist.runtime import cpu

cpu.prepare()

from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.tools.logging import logger

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.config import parse_config
from memdlm_dist.method.bilevel import outer_loss
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.fast_weight_tree import leaves
from memdlm_dist.models import BACKBONES, initial_weights
from memdlm_dist.models.initial_weights import Uniform
from memdlm_dist.models.lora import is_adapter
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.collectives import Collectives, by_kind
from memdlm_dist.performance.estimate import estimate
from tests.support.bilevel import trained_in_each_pass
from tests.support.ranks import fork_group

ROWS, LENGTH = 8, 16
SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
EP, ETP = "--parallelism.expert_parallel_degree", "--parallelism.expert_tensor_parallel_degree"
# name -> (ranks, arguments, micro-batches, and so sets of fast weights, of the equivalent single process)
LAYOUTS = {
    "one": (1, [], 1),
    "one-twice": (1, [], 2),
    "fsdp2": (2, [SHARD, "2"], 2),
    "tp2": (2, [TP, "2"], 1),
    "ep2": (2, [SHARD, "2", EP, "2"], 1),
    "fsdp2-ep2": (4, [SHARD, "4", EP, "2", "--activation_checkpoint.mode", "full"], 2),
    "ep2-tp2": (4, [SHARD, "2", EP, "2", TP, "2", ETP, "2"], 1),
}
# Layouts for which `find` also takes "LAYOUT-compiled": blocks compiled around their experts.
COMPILED = ("fsdp2", "tp2", "fsdp2-ep2", "ep2-tp2")
# The head's losses stay eager, because compilation changes their rounding.
COMPILE = ["--compile.enable", "--compile.components", "model", "--compile.backend", "aot_eager"]
MEMORY = "--parametric_memory."
# All linears of all layers: attention, the dense layer's FFN, routed and shared experts. A smaller rate, because
# attention's fast weights saturate it quickly, which amplifies rounding.
EVERYWHERE = [
    MEMORY + "layer_fraction", "1.0", MEMORY + "target_modules", "ffn,attention", MEMORY + "learning_rate", "0.02",
]  # fmt: skip
ADAPTERS = ["--model.converters", "lora", "--lora.rank", "2", "--lora.alpha", "2"]
OWN_SETS, PAIRS = [MEMORY + "granularity", "sample"], [MEMORY + "samples_per_set", "2"]
# Those of a name with "packed" have packed rows; with "non-finite" an inner loss of one set is infinite.
OPTIONS = {
    "lora": [],
    # A router with softmax and without groups and bias; no shared expert, no dense layer.
    "softmax": ["--model.name", "llada_moe"],
    "sample-packed": [*EVERYWHERE, *OWN_SETS],
    "sample-non-finite": [*OWN_SETS, MEMORY + "gradient_norm", "global"],
    "pairs-probability": [*EVERYWHERE, *OWN_SETS, *PAIRS, MEMORY + "probability", "0.5"],
    "pairs-packed": [*EVERYWHERE, *OWN_SETS, *PAIRS, MEMORY + "adapter", "full"],
    "everywhere": EVERYWHERE,
    "full-global-kl-packed": [
        *EVERYWHERE, MEMORY + "adapter", "full", MEMORY + "gradient_norm", "global",
        MEMORY + "inner_loss", "kl", MEMORY + "inner_steps", "3",
    ],
    # Outer adapters on a frozen base: of the router and the attention, and of all linears.
    "adapters": [*ADAPTERS, "--lora.target_modules", "attention,router"],
    "all-adapters": [*ADAPTERS, "--lora.target_modules", "all-linear"],
}  # fmt: skip


def options_of(layout):
    """Return a layout's option sets; tensor parallelism has no adapters of experts."""
    return [name for name in OPTIONS if name != "all-adapters" or TP not in LAYOUTS[layout][1]]


def has_own_sets(options):
    """Return whether the samples of a set are the same on every layout; otherwise they are those of a micro-batch."""
    return "sample" in options or "pairs" in options


# The option sets that test what differs between layouts; the slow tests take the others.
USUAL = {
    "one": list(OPTIONS),
    "one-twice": ["lora", "full-global-kl-packed", "all-adapters"],
    "fsdp2": ["lora", "sample-packed", "all-adapters"],
    "tp2": ["lora", "softmax", "sample-packed", "full-global-kl-packed", "adapters"],
    "ep2": [
        "lora",
        "everywhere",
        "full-global-kl-packed",
        "all-adapters",
        "sample-non-finite",
        "pairs-probability",
        "pairs-packed",
    ],
    "fsdp2-ep2": ["lora", "full-global-kl-packed", "all-adapters", "pairs-probability"],
    "ep2-tp2": ["lora", "full-global-kl-packed", "adapters", "sample-packed", "pairs-packed"],
}


def configuration(*arguments):
    return parse_config.parse([
        "--job.config_file", "train_configs/debug.toml", "--model.name", "llada2", "--model.flavor", "tiny",
        "--training.seq_len", str(LENGTH), "--parametric_memory.layer_fraction", "0.5",
        "--training.local_batch_size", "4", "--training.global_batch_size", str(ROWS),  # for two ranks
        "--parametric_memory.granularity", "batch", "--parametric_memory.rank", "4",
        # An untrained model has small inner gradients; this rate makes the memory matter.
        *("--parametric_memory.learning_rate", "0.1"), *arguments,
    ])  # fmt: skip


def micro_batches(bench, count, seed, packed, non_finite):
    """Yield this rank's micro-batches: `count` of them in a single process, otherwise one per rank.

    Packed rows have three documents; the last row ends with padding. The last inner loss of row 5 may be infinite.
    """
    mesh = bench.dims.get_optional_mesh("batch")
    ranks, rank = (mesh.size(), mesh.get_local_rank()) if mesh is not None else (1, 0)
    tokens = torch.randint(0, 63, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(
        torch.arange(LENGTH) < torch.tensor([[0], [9], [16], [3], [5], [0], [14], [1]]), -100, tokens
    )  # the third row has no maskable token
    documents = (torch.arange(LENGTH) * 3 // LENGTH).expand(ROWS, -1).clone()
    documents[-1, -4:] = PADDING
    labels = torch.where(documents == PADDING, -100, labels) if packed else labels
    rank_ids = torch.arange(ROWS).tensor_split(ranks)[rank]
    for ids in rank_ids.tensor_split(count if ranks == 1 else 1):
        documents_BL = documents[ids] if packed else None
        batch = bench.objective.micro_batch(tokens[ids], labels[ids], ids, step=1, documents_BL=documents_BL)
        if non_finite:
            *others, last = batch.inner
            is_row_N = ids[last.scored.sample_N] == 5
            weight_N = torch.where(is_row_N, torch.inf, last.scored.weight_N)
            last = last._replace(scored=last.scored._replace(weight_N=weight_N))
            batch = batch._replace(inner=(*others, last))
        yield batch


def full_tensor(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def of_all_ranks(bench, x, is_expert=False):
    """Gather a tensor `[E, G, ...]` of this rank's sets and local experts: all experts and sets of all ranks.

    Ranks of an expert-parallel group may share their sets. `x` of experts then has one set, otherwise all of the group.
    """
    mesh = bench.dims.get_optional_mesh("batch")
    if mesh is None:
        return x
    ranks = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(ranks, x.contiguous(), group=mesh.get_group())
    groups = [ranks[i : i + bench.dims.ep] for i in range(0, len(ranks), bench.dims.ep)]
    if is_expert:
        return torch.cat([torch.cat(group) for group in groups], 1)
    shares_sets = bench.objective.memory.samples_per_set is None
    return torch.cat([group[0] if shares_sets else torch.cat(group, 1) for group in groups], 1)


def adapted_sets(bench, fast_of_batches):
    """Return the fast weights of all sets, `[E, G, ...]`, by layer, target and number of the tensor."""
    experts = {(x.layer, x.target): x.experts // bench.dims.ep for x in bench.objective.memory.linears}
    result = {}
    for (layer, target), n_experts in experts.items():
        tensors = [leaves({layer: {target: fast[layer][target]}}) for fast in fast_of_batches]
        for number, batches in enumerate(zip(*tensors, strict=True)):
            x = torch.cat([full_tensor(x).unflatten(0, (n_experts or 1, -1)) for x in batches], 1)
            result[f"adapted {layer} {target} {number}"] = of_all_ranks(bench, x, n_experts > 0)
    return result


def step(bench, count, seed=1, packed=False, non_finite=False):
    objective, model = bench.objective, bench.model
    memory, ep_groups = objective.memory, bench.groups("ep")
    results = {"loss": torch.zeros(())}
    statistics, adapted, issued = [], [], []
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for batch in micro_batches(bench, count, seed, packed, non_finite):
        slots = batch.documents.slots if packed else 1
        # torch.compile does not support a recorder.
        with nullcontext() if bench.config.compile.enable else Collectives() as recorded:
            with trained_in_each_pass(model, memory.first_layer) as trained, bench.autocast:
                fast = memory.draw(0, 1, batch.sample_ids_U, slots)
                loss, inner = outer_loss(model, batch, memory, fast, objective.tp_rank, on_adapted=adapted.append)
            loss.backward()
        # The tail, including the experts' FSDP group, is frozen during the inner loop.
        assert not any(trained[:-1]) and trained[-1] > 0
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
        results["loss"] += loss.detach()
        statistics.append(inner)
        issued += recorded.on(*ep_groups) if recorded else []
    mesh = bench.dims.get_optional_mesh("batch")
    if mesh is not None:
        dist.all_reduce(results["loss"], group=mesh.get_group())

    def all_sets(values):
        return of_all_ranks(bench, torch.cat([x.float() for x in values], 1))

    # Sets that a layout's inner loop reads without a token to score have no entries.
    counted_KG = all_sets([x.counted_KG for x in statistics]).bool()
    read_G = counted_KG.any(0)
    for name in ("loss_KG", "grad_norm_KG"):
        values_KG = all_sets([getattr(x, name) for x in statistics])
        results[name] = torch.where(counted_KG, values_KG, 0.0)[:, read_G]
    results["written"] = all_sets([x.written_norm_G.unsqueeze(0) for x in statistics])[:, read_G]
    results["skipped"] = all_sets([x.skipped_KG for x in statistics]).sum(1)
    results |= adapted_sets(bench, adapted)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        results[name.replace("_checkpoint_wrapped_module.", "")] = full_tensor(p.grad).clone()
    results["load"] = torch.stack([mixture.load for mixture in model.mixtures()])
    if mesh is not None:
        dist.all_reduce(results["load"], group=mesh.get_group())
    model.zero_grad()
    return results, issued, adapted[0]


def estimated(bench, issued, fast):
    """Return predicted and true bytes that a rank sends in its group, the mean of all ranks, and stores for `fast`.

    Packed rows have three documents, whose number has no effect if a micro-batch has one set.
    """
    mesh = bench.dims.get_optional_mesh("batch")
    sent = torch.tensor([0.0])
    for kind, elements in issued:
        # An all-reduce sends everything twice. With a balanced load, each rank keeps an equal share of its tokens.
        sent += {"all_reduce": 2, "all_to_all": 1}.get(kind, 0) * 4 * elements * (1 - 1 / bench.dims.ep) / mesh.size()
    dist.all_reduce(sent, group=mesh.get_group())
    predicted = estimate(bench.model, bench.args, bench.dims, bench.config, documents=3)
    stored = 4 * sum(full_tensor(x).numel() for x in leaves(fast))
    return {
        "sent": (predicted.communication.experts, sent.item()),
        "fast weights": (predicted.memory.fast_weights, 3 * stored),  # current ones, gradients and updated ones
    }


def common_weights(bench, folder):
    """Load the weights of a Hugging Face folder, which the first, unsharded model writes."""
    sd_adapter = BACKBONES[bench.config.model.name].sd_adapter(bench.args)
    if not Path(folder).exists():
        with torch.no_grad():
            for name, parameter in bench.model.named_parameters():
                if not isinstance(bench.model, LLaDAMixture):
                    parameter.mul_(3)  # so that attention is not flat
                elif "layers" in name and "norm" not in name:
                    parameter.mul_(10)  # so that attention is not flat, and masked tokens go to different experts
            for name, bias in bench.model.named_buffers():
                if name.endswith("expert_bias"):
                    initial_weights._fill(bias, name, Uniform(0.05))
        hugging_face_folder.write(sd_adapter.to_hf(bench.model.state_dict()), folder)
    wrapper = ModelWrapper(bench.model)
    hugging_face_folder.load(wrapper, sd_adapter, folder)
    for name, tensor in wrapper.state_dict().items():
        if is_adapter(name):  # neither A nor B is 0
            initial_weights._fill(tensor, name, Uniform(0.3))


@contextmanager
def counted_reads():
    """Yield a list of the number of elements in each read request of DCP's reader on this rank."""
    sizes: list[int] = []
    plain = HuggingFaceStorageReader._process_read_request

    def counted(self, file, request, planner):
        sizes.append(math.prod(request.lengths))
        return plain(self, file, request, planner)

    HuggingFaceStorageReader._process_read_request = counted
    try:
        yield sizes
    finally:
        HuggingFaceStorageReader._process_read_request = plain


def gathers(bench):
    """Count FSDP's all-gathers in a step, plain and ours."""
    groups = bench.groups("fsdp", "efsdp")
    return {
        kind: torch.tensor(float(by_kind(bench.collectives(kind).on(*groups))["all_gather"]))
        for kind in ("plain", "ours")
    }


def loss_without_biases(bench):
    """Return the loss of a step with all experts' biases 0."""
    for mixture in bench.model.mixtures():
        mixture.expert_bias.zero_()
    return step(bench, 1)[0]["loss"]


def find(folder, name, some=None):
    """Take a layout's steps in the current process group; rank 0 saves the results.

    Args:
        folder: folder of the weights and the results.
        name: layout, or "LAYOUT-compiled".
        some: names of option sets; None for all of the layout's.
    """
    layout = name.removesuffix("-compiled")
    _, arguments, count = LAYOUTS[layout]
    logger.setLevel("WARNING")
    results = {}
    for options in some or options_of(layout):
        config = configuration(*arguments, *OPTIONS[options], *(COMPILE if name != layout else []))
        bench = Bench.build(config)
        with counted_reads() as reads:
            common_weights(bench, f"{folder}/{config.model.name}")
        torch._dynamo.reset()
        counters.clear()
        packed, non_finite = "packed" in options, "non-finite" in options
        results[options], issued, adapted = step(bench, count, packed=packed, non_finite=non_finite)
        results[f"{options} collectives"] = issued
        if options in ("everywhere", "pairs-packed") and layout == "ep2":
            results[f"{options} estimate"] = estimated(bench, issued, adapted)
        if options == "lora":
            results["read"] = torch.tensor(float(sum(reads)))
            graphs = [counters["stats"]["unique_graphs"]]
            if name != layout:
                step(bench, count, seed=2)
            results["graphs"] = torch.tensor([*graphs, counters["stats"]["unique_graphs"]])
            results["gathers"] = gathers(bench)
            if layout == "one":
                results["loss without biases"] = loss_without_biases(bench)
        elif options == "softmax" and layout == "fsdp2-ep2":
            results["gathers of two mixtures"] = gathers(bench)
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/{name}.pt")


if __name__ == "__main__":
    folder, *layouts = sys.argv[1:]
    for layout in layouts or LAYOUTS:
        if status := fork_group(LAYOUTS[layout][0], lambda layout=layout: find(folder, layout)):
            sys.exit(status)
