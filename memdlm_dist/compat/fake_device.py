"""torch 2.11 to 2.13 and torchtitan 0.2.2: a fake accelerator, for tests of operations that a real one would reject.

Its tensors are FakeTensors, with shape, dtype and device, but without values.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only
from torchtitan.models.moe import kernels, utils

__all__ = ["DEVICE", "FakeTensor", "FakeTensorMode", "OpOverload", "build_on_host", "register"]

DEVICE = "fake"


class _Module(backend_registration._DummyBackendModule):
    """The device module `torch.fake`, as far as activation checkpointing and this package use it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    # A fake device draws no values, so the state is empty.
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def set_device(self, device: Any) -> None:
        pass

    class Event:
        """Event of a device without asynchronous work."""

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def register() -> None:
    """Make `DEVICE` (torch's PrivateUse1) the accelerator of this process, until it ends.

    Patches three places that accept only known device types: flex attention's device check, torchtitan's Triton kernel
    for the order of grouped tokens (replaced by an empty result of the same shape), and the fake process group.
    """
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Module())
    dist.Backend.default_device_backend_map[DEVICE] = "fake"
    _register_autocast()
    flex_attention._validate_device = lambda query, key, value: None
    kernels.fill_indices_wrapper = _slot_order
    utils.generate_permute_indices = kernels.generate_permute_indices


_AUTOCAST = "AutocastPrivateUse1"
_registrations: list[torch.library.Library] = []  # keeps them alive: a registration ends with its Library
# Operators of the backbones that autocast runs in lower precision on CUDA.
_LOWER_PRECISION = ("linear", "matmul", "mm", "bmm", "scaled_dot_product_attention")


def _register_autocast() -> None:
    """Register autocast for the device; torch expects it from the kernels of a PrivateUse1 backend."""
    _registrations[:] = fallback_library, aten_library = (
        torch.library.Library("_", "IMPL"),
        torch.library.Library("aten", "IMPL"),
    )
    fallback_library.fallback(torch.library.fallthrough_kernel, _AUTOCAST)
    for name in _LOWER_PRECISION:
        aten_library.impl(name, partial(_in_lower_precision, getattr(torch.ops.aten, name)), _AUTOCAST)


def _in_lower_precision(operator: Any, *args: Any, **kwargs: Any) -> Any:
    def cast(x: Tensor) -> Tensor:
        return x.to(torch.get_autocast_dtype(DEVICE)) if x.is_floating_point() else x

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST))):
        return operator(*tree_map_only(Tensor, cast, args), **kwargs)


def _slot_order(counts: Tensor, starts: Tensor, offsets: Tensor, experts: int, ranks: int, slots: int) -> Tensor:
    return torch.empty(slots, dtype=torch.int32, device=counts.device)


@contextlib.contextmanager
def build_on_host() -> Iterator[None]:
    """Make `torch.tensor` build on the host and copy to the device in this context; dispatch modes see the copy."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
