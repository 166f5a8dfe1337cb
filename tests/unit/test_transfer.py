"""Packing a tree of tensors into one buffer: same values, aligned, one allocation."""

import torch

from memdlm_dist.compat.torch import tree_leaves
from memdlm_dist.runtime import device
from memdlm_dist.runtime.transfer import PinnedTree


def test_a_packed_tree_is_the_tree_in_one_buffer(monkeypatch):
    monkeypatch.setattr(device, "is_host", lambda _: False)  # the tree is packed only for an accelerator
    monkeypatch.setattr(device, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    columns = torch.arange(24).view(4, 6)[:, 2:5]  # strided, like a context-parallel rank's slice
    tree = (columns, {"flags": torch.tensor([True, False, True]), "none": None}, [torch.zeros(0, 3), torch.tensor(2.5)])
    tree = (*tree, 7, torch.arange(5, dtype=torch.int32), torch.rand(3, dtype=torch.float64))
    moved = PinnedTree(tree, torch.device("cpu")).to_device()
    assert type(moved) is tuple and moved[1]["none"] is None and moved[3] == 7
    pairs = list(zip(tree_leaves(moved), tree_leaves(tree), strict=True))
    tensors = [(ours, theirs) for ours, theirs in pairs if isinstance(theirs, torch.Tensor)]
    for ours, theirs in tensors:
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.is_contiguous()
        assert ours.storage_offset() * ours.element_size() % 16 == 0
    assert len({ours.untyped_storage().data_ptr() for ours, _ in tensors}) == 1 and len(tensors) == 6
