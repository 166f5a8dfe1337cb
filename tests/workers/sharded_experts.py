"""One mixture-of-experts step on several layouts: loss, inner statistics and every gradient.

    python -m tests.workers.sharded_experts FOLDER [LAYOUT ...]

A single process writes FOLDER/BACKBONE in Hugging Face's format. Each layout reads them like
`checkpoint.initial_load_in_hf`, every rank its own slices, and writes its results to FOLDER/LAYOUT.pt.
"""

import contextlib
import math
import sys
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
from memdlm_dist.method.documents import PADDING
from memdlm_dist.models import BACKBONES, initial_weights
from memdlm_dist.models.initial_weights import Uniform
from memdlm_dist.models.lora import is_adapter
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.collectives import by_kind
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
OPTIONS = {  # those of a name with "packed" have packed rows
    "lora": [],
    # A router with softmax and without groups and bias; no shared expert, no dense layer.
    "softmax": ["--model.name", "llada_moe"],
    "sample-packed": [*EVERYWHERE, MEMORY + "granularity", "sample"],
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
    """Return a layout's option sets.

    Expert parallelism has no fast weights per sample, and tensor parallelism no adapters of experts.
    """
    arguments = LAYOUTS[layout][1]
    refused = {"sample-packed": EP in arguments, "all-adapters": TP in arguments}
    return [name for name in OPTIONS if not refused.get(name)]


# The option sets that test what differs between layouts; the slow tests take the others.
USUAL = {
    "one": list(OPTIONS),
    "one-twice": ["lora", "sample-packed", "full-global-kl-packed", "all-adapters"],
    "fsdp2": ["lora", "sample-packed", "all-adapters"],
    "tp2": ["lora", "softmax", "sample-packed", "full-global-kl-packed", "adapters"],
    "ep2": ["lora", "everywhere", "full-global-kl-packed", "all-adapters"],
    "fsdp2-ep2": ["lora", "full-global-kl-packed", "all-adapters"],
    "ep2-tp2": ["lora", "full-global-kl-packed", "adapters"],
}


def configuration(*arguments):
    return parse_config.parse([
        "--job.config_file", "train_configs/debug.toml", "--model.name", "llada2", "--model.flavor", "tiny",
        "--training.seq_len", str(LENGTH), "--parametric_memory.layer_fraction", "0.5",
        "--parametric_memory.granularity", "batch", "--parametric_memory.rank", "4",
        # An untrained model has small inner gradients; this rate makes the memory matter.
        *("--parametric_memory.learning_rate", "0.1"), *arguments,
    ])  # fmt: skip


def micro_batches(bench, count, seed, packed):
    """Yield this rank's micro-batches: `count` of them in a single process, otherwise one per rank.

    Packed rows have three documents; the last row ends with padding.
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
        yield bench.objective.micro_batch(tokens[ids], labels[ids], ids, step=1, documents_BL=documents_BL)


def full_tensor(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(bench, count, seed=1, packed=False):
    results = {"loss": torch.zeros(())}
    statistics = []
    trainable = [name for name, p in bench.model.named_parameters() if p.requires_grad]
    for batch in micro_batches(bench, count, seed, packed):
        with trained_in_each_pass(bench.model, bench.objective.memory.first_layer) as trained:
            loss, inner = bench.loss_sum("ours", batch, 1)
        loss.backward()
        # The tail, including the experts' FSDP group, is frozen during the inner loop.
        assert not any(trained[:-1]) and trained[-1] > 0
        assert [name for name, p in bench.model.named_parameters() if p.requires_grad] == trainable
        results["loss"] += loss.detach()
        chosen = 1 % len(inner.written_norm_G)
        statistics.append(torch.stack([inner.loss_KG[:, chosen], inner.grad_norm_KG[:, chosen]]))
        results.setdefault("written", inner.written_norm_G[chosen])
    mesh = bench.dims.get_optional_mesh("batch")
    if mesh is not None:
        dist.all_reduce(results["loss"], group=mesh.get_group())
    results["inner"] = statistics[0]  # the only set, or the second sample's set; rank 0 holds both
    for name, p in bench.model.named_parameters():
        if not p.requires_grad:
            continue
        results[name.replace("_checkpoint_wrapped_module.", "")] = full_tensor(p.grad).clone()
    results["load"] = torch.stack([mixture.load for mixture in bench.model.mixtures()])
    if mesh is not None:
        dist.all_reduce(results["load"], group=mesh.get_group())
    bench.model.zero_grad()
    return results


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


@contextlib.contextmanager
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
    return step(bench, 1)["loss"]


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
        results[options] = step(bench, count, packed="packed" in options)
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
