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


class OneRankFSDP(Layout):
    """Layout that applies FSDP2 on a single rank; torchtitan does not.

    On one rank, too, gathered parameters are copies, and resharding frees them.
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
    """Live bytes with five layers of 3.3 MiB each; the tail is the last layer, the final norm and the output head.

    One row of 64 tokens keeps activations below half a layer.
    """
    bench = build("--model.flavor", "quickstart", "--training.local_batch_size", "1", "--training.seq_len", "64")
    model = model_on_meta(bench.config, bench.args, OneRankFSDP(device))
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
    memory, batch = bench.objective.memory, bench.batch(1)
    layers = list(model.layers.values())
    layer = n_bytes(layers[0])
    tail = n_bytes(layers[-1]) + n_bytes(model.norm) + n_bytes(model.output)
    assert memory.first_layer == 4 and layer > 3 * MIB
    bench = replace(bench, model=model)
    none_gathered, tail_gathered = [0] * 7, [0] * 5 + [1] * 2

    def step(at_adapted=lambda fast: None):
        fast = memory.draw(0, 1, batch.sample_ids_U)
        return bilevel.outer_loss(model, batch, memory, fast, on_adapted=at_adapted)[0]

    step().backward()  # first-use allocations
    model.zero_grad()
    before = allocated()

    # Without gradients: each trunk layer is freed after its passes, the tail after the outer pass.
    after_inner_steps = []
    with torch.no_grad():
        loss = step(lambda fast: after_inner_steps.append((allocated() - before, gathered(bench))))
    ((live, groups),) = after_inner_steps
    assert groups == tail_gathered and gathered(bench) == none_gathered
    assert tail <= live < tail + layer / 2
    del loss
    assert abs(allocated() - before) < layer / 8

    # With gradients: the tail is freed after the backward pass.
    loss = step()
    assert gathered(bench) == tail_gathered and allocated() - before > tail
    loss.backward()
    assert gathered(bench) == none_gathered
    gradients = sum(p.grad.to_local().numel() * p.grad.itemsize for p in model.parameters())
    del loss
    assert abs(allocated() - before - gradients) < layer / 8
    model.zero_grad()
    assert abs(allocated() - before) < layer / 8


def test_a_step_takes_no_more_memory_than_plain_training(device, build):
    """Four layers of the 1B flavour with full activation checkpointing, two rows of 1,024 tokens, all in bfloat16.

    The peak excludes the weights. The limit, 1.1 times plain training, is the target in docs/performance.md. It applies
    to a peak at the end of the backward pass, when all gradients exist.
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
