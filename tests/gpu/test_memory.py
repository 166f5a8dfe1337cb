"""Memory of a step on the accelerator: how long the tail stays gathered, and the peak against plain training."""

import gc
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from memdlm_dist.method import bilevel
from memdlm_dist.models.layout import Layout
from memdlm_dist.performance.peak_memory import peak_memory
from memdlm_dist.runtime.device import device_module
from memdlm_dist.training.backbone import model_on_meta
from tests.workers.sharded_step import gathered

MIB = 2**20


class OneShard(Layout):
    """FSDP2 layout of a single rank, where gathered parameters are still copies that resharding frees.

    torchtitan applies no FSDP on one rank.
    """

    dp_replicate = dp_shard = cp = tp = ep = 1
    dp_enabled = dp_cp_enabled = dp_replicate_enabled = tp_enabled = cp_enabled = ep_enabled = False
    fsdp_enabled = True

    def __init__(self, device: torch.device):
        self.fsdp = init_device_mesh(device.type, (1,), mesh_dim_names=("fsdp",))

    def get_mesh(self, dims: str | list[str]) -> DeviceMesh:
        assert dims in ("fsdp", ["fsdp"])
        return self.fsdp

    def get_optional_mesh(self, dims: str | list[str]) -> DeviceMesh | None:
        return self.fsdp if dims in ("fsdp", ["fsdp"]) else None


def allocated() -> int:
    """Return the bytes requested by live tensors; the allocator's blocks may be larger."""
    gc.collect()
    return device_module().memory_stats()["requested_bytes.all.current"]


def n_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in module.parameters())


def test_the_tail_is_resident_until_the_backward_pass_has_freed_it(device, build):
    """Live bytes of five layers of 3.3 MiB each, of which the last is the tail.

    One row of 64 tokens keeps activations below half a layer.
    """
    bench = build("--model.flavor", "quickstart", "--training.local_batch_size", "1", "--training.seq_len", "64")
    model = model_on_meta(bench.config, bench.args, OneShard(device))
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
    memory, batch = bench.objective.memory, bench.batch(1)
    layers = list(model.layers.values())
    layer = n_bytes(layers[0])
    tail = n_bytes(layers[-1]) + n_bytes(model.norm) + n_bytes(model.output)
    assert memory.first_layer == 4 and layer > 3 * MIB
    bench = replace(bench, model=model)
    nothing, resident = [0] * 7, [0] * 5 + [1] * 2

    def step(at_adapted=lambda fast: None):
        fast = memory.draw(0, 1, batch.sample_ids_U)
        return bilevel.outer_loss(model, batch, memory, fast, on_adapted=at_adapted)[0]

    step().backward()  # first-use allocations
    model.zero_grad()
    before = allocated()

    # Without gradient: the trunk is freed layer by layer, the tail after the pass that follows the inner steps.
    within = []
    with torch.no_grad():
        loss = step(lambda fast: within.append((allocated() - before, gathered(bench))))
    ((during, groups),) = within
    assert groups == resident and gathered(bench) == nothing
    assert tail <= during < tail + layer / 2
    del loss
    assert abs(allocated() - before) < layer / 8

    # With gradient: the tail is freed after the backward pass.
    loss = step()
    assert gathered(bench) == resident and allocated() - before > tail
    loss.backward()
    assert gathered(bench) == nothing
    gradients = sum(p.grad.to_local().numel() * p.grad.itemsize for p in model.parameters())
    del loss
    assert abs(allocated() - before - gradients) < layer / 8
    model.zero_grad()
    assert abs(allocated() - before) < layer / 8


def test_a_step_takes_no_more_memory_than_plain_training(device, build):
    """Four layers of the 1B flavour with full checkpointing, two rows of 1,024 tokens, everything in bfloat16.

    The peak excludes the weights. 1.1 is the target of docs/performance.md, for a peak at the end of the backward
    pass, when all gradients exist.
    """
    bench = build(
        "--model.flavor", "1B", "--training.seq_len", "1024", "--training.local_batch_size", "2",
        "--parametric_memory.layer_fraction", "0.25", "--activation_checkpoint.mode", "full",
        "--training.dtype", "bfloat16", "--training.mixed_precision_param", "bfloat16",
        layers=4,
    )  # fmt: skip
    peaks = {}
    for kind in ("plain", "ours"):

        def step(kind=kind):
            batch = bench.batch(0)
            loss, _ = bench.loss_sum(kind, batch, 0)
            (loss / batch.maskable).backward()

        step()  # allocates workspaces
        bench.model.zero_grad()
        peaks[kind] = peak_memory(step)[1]
        bench.model.zero_grad()
    assert peaks["ours"] <= 1.1 * peaks["plain"]
