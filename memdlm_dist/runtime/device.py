"""The accelerator of this process, or the CPU in its place."""

from typing import Any

import torch
from torch import Tensor


def has_accelerator() -> bool:
    return torch.accelerator.is_available()


def device_type() -> str:
    """Return "cuda" or the like; "cpu" where there is no accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def device_module() -> Any:
    """Return torch's module of the device, such as `torch.cuda`."""
    return torch.get_device_module(device_type())


def is_host(device: torch.device) -> bool:
    """Return whether a device's memory is the host's own."""
    return device.type == "cpu"


def use(device: torch.device) -> None:
    """Make `device` the current one of this thread; a new thread begins with the first of the machine."""
    torch.get_device_module(device.type).set_device(device)


def pinned(size: int) -> Tensor:
    """Return so many bytes of host memory that the accelerator copies from and to while the host goes on."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def has_grouped_mm() -> bool:
    """Return whether the device multiplies groups of rows in one product (compute capability 9 or 10).

    On others torch loops over the groups, and waits for the device to learn their sizes (2.11 to 2.13).
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def has_flash_attention() -> bool:
    """Return whether torch's flash attention kernels run on the device (compute capability 8.0)."""
    available = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability() >= (8, 0)
