"""Asynchronous copies between host and device.

A copy is asynchronous only if the host memory is pinned. torch's pinned-memory allocator reuses a block only after the
copies that read it have finished.
"""

from typing import Any

import torch
from torch import Tensor

from memdlm_dist.compat.torch import tree_flatten, tree_unflatten
from memdlm_dist.runtime import device as devices

# Tensors start at multiples of this many bytes in a buffer: vectorised kernels read 16 bytes at once.
_ALIGNMENT = 16


class PinnedTree:
    """Tree of host tensors in one pinned buffer, which is copied to the device as one block.

    Args:
        tree: nested tuples, lists and dicts; leaves that are not tensors are kept unchanged.
        device: target device; on the CPU nothing is copied.
    """

    def __init__(self, tree: Any, device: torch.device):
        self._device, self._tree = device, tree
        if devices.is_host(device):
            return
        self._leaves, self._spec = tree_flatten(tree)
        self._starts, size = [], 0
        for x in self._leaves:
            self._starts.append(size)
            if isinstance(x, Tensor):
                size += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer = devices.pinned(size)
        for x, view in zip(self._leaves, self._views(self._buffer), strict=True):
            if isinstance(x, Tensor):
                view.copy_(x)

    def to_device(self) -> Any:
        """Start the copy and return the tree on the device; its tensors are views of one device buffer."""
        if devices.is_host(self._device):
            return self._tree
        return tree_unflatten(self._views(self._buffer.to(self._device, non_blocking=True)), self._spec)

    def _views(self, buffer: Tensor) -> list[Any]:
        """Return the leaves, each tensor as a view of `buffer` (uint8) with its dtype and shape."""
        return [
            buffer[start : start + x.nbytes].view(x.dtype).view(x.shape) if isinstance(x, Tensor) else x
            for x, start in zip(self._leaves, self._starts, strict=True)
        ]


class HostCopy:
    """Asynchronous copy of a device tensor to the host."""

    def __init__(self, x: Tensor):
        self._event = None
        if devices.is_host(x.device):
            self._host = x.clone()
            return
        self._host = devices.pinned(x.nbytes).view(x.dtype).view(x.shape)
        self._host.copy_(x, non_blocking=True)
        self._event = devices.device_module().Event()
        self._event.record()

    def read(self) -> Tensor:
        """Return the tensor on the host; waits until the copy has finished."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
