"""Device of this process: its accelerator, or the CPU if there is none."""

from typing import Any

import torch
from torch import Tensor


def has_accelerator() -> bool:
    """Return whether torch finds an accelerator."""
    return torch.accelerator.is_available()


def device_type() -> str:
    """Return the type of the accelerator, such as "cuda", or "cpu" without one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def device_module() -> Any:
    """Return torch's module for the device type, such as `torch.cuda`."""
    return torch.get_device_module(device_type())


def is_host(device: torch.device) -> bool:
    """Return whether `device` is the host itself."""
    return device.type == "cpu"


def use(device: torch.device) -> None:
    """Set the current device of this thread; a new thread starts with device 0."""
    torch.get_device_module(device.type).set_device(device)


def pinned(size: int) -> Tensor:
    """Allocate `size` bytes of pinned host memory, which the accelerator copies asynchronously.

    Returns:
        uint8 tensor `[size]`.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def has_grouped_mm() -> bool:
    """Return whether the device has a grouped matrix multiplication kernel (compute capability 9 or 10).

    On other devices torch (2.11 to 2.13) loops over the groups, after a device-to-host sync for their sizes.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def has_flash_attention() -> bool:
    """Return whether torch's flash attention kernels run on the device (compute capability 8.0 or higher)."""
    available = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability() >= (8, 0)
