"""Description of the machine: devices, versions, and the kernels that the code selects on them.

Runs as a child process (`python -m`) that prints JSON, because a process that queries a device keeps device memory.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

_PACKAGES = (
    "memdlm_dist", "torch", "torchtitan", "mosaicml-streaming", "triton", "numpy", "safetensors", "tokenizers",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the description of this machine, for the report: devices, versions and available kernels."""
    from memdlm_dist.runtime import cpu

    cpu.prepare()  # must precede the first import of torchtitan
    import torch

    from memdlm_dist.models.attention import attention_method
    from memdlm_dist.runtime.device import device_module, device_type, has_accelerator, has_grouped_mm

    kind, cuda = device_type(), torch.cuda.is_available()
    devices = []
    for i in range(torch.accelerator.device_count() if has_accelerator() else 0):
        properties = device_module().get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))) if cuda else None,
            }
        )
    return {
        "kind": kind,
        "devices": devices,
        "driver": _nvidia_smi(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "grouped matrix products for experts": has_grouped_mm(),
        "attention of packed rows": attention_method(kind, 128, torch.bfloat16),
        "bfloat16": bool(cuda and torch.cuda.is_bf16_supported(including_emulation=False)),
    }


def _version(package: str) -> str | None:
    """Return a package's installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(environment()))
