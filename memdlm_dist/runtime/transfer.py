"""Copies between the host and its device for which the host does not wait.

A copy runs beside the host only if the host's side of it is pinned memory. torch's allocator of pinned memory gives a
block to the next tensor when the copies that read it are over.
"""

from typing import Any

import torch
from torch import Tensor

from memdlm_dist.compat.torch import tree_flatten, tree_unflatten
from memdlm_dist.runtime import device as devices

# Where a tensor may begin in a buffer (bytes): vectorised kernels read 16 at once.
_ALIGNMENT = 16


class PinnedTree:
    """A tree of host tensors in one pinned buffer, which goes to the device as one copy.

    Args:
        tree: tuples, lists and dicts with tensors of the host among their leaves; other leaves stay as they are.
        device: an accelerator; a CPU gets the tree itself.
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
        """Return the tree on the device; its tensors are views of one buffer there."""
        if devices.is_host(self._device):
            return self._tree
        return tree_unflatten(self._views(self._buffer.to(self._device, non_blocking=True)), self._spec)

    def _views(self, buffer: Tensor) -> list[Any]:
        return [
            buffer[start : start + x.nbytes].view(x.dtype).view(x.shape) if isinstance(x, Tensor) else x
            for x, start in zip(self._leaves, self._starts, strict=True)
        ]


class HostCopy:
    """A device tensor that is being copied to the host, to be read when it has arrived."""

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
        """Return the tensor on the host; waits if it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
