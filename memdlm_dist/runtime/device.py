"""The accelerator of this process, or the CPU in its place."""

from typing import Any

import torch


def has_accelerator() -> bool:
    return torch.accelerator.is_available()


def device_type() -> str:
    """Return "cuda" or the like; "cpu" where there is no accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def device_module() -> Any:
    """Return torch's module of the device, such as `torch.cuda`."""
    return torch.get_device_module(device_type())


def has_grouped_mm() -> bool:
    """Return whether the device multiplies groups of rows in one product (compute capability 9.0)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def has_flash_attention() -> bool:
    """Return whether torch's flash attention kernels run on the device (compute capability 8.0)."""
    available = torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability() >= (8, 0)
