"""torch 2.11 to 2.13 and torchtitan 0.2.2: an accelerator that is not there, for tests of what a real one would refuse.

Its tensors are FakeTensors, which have a shape, a dtype and a device and no values.
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

__all__ = ["DEVICE", "FakeTensor", "FakeTensorMode", "OpOverload", "register", "through_the_host"]

DEVICE = "fake"


class _Module(backend_registration._DummyBackendModule):
    """`torch.fake`: what activation checkpointing and the package ask of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    # No values are drawn, so that there is no state to keep.
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def set_device(self, device: Any) -> None:
        pass

    class Event:
        """An event of a device that does everything at once."""

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def register() -> None:
    """Make `DEVICE`, torch's PrivateUse1, the accelerator of this process, for as long as it lives.

    What knows real devices by name is made to accept it: flex attention's check, torchtitan's Triton kernel for the
    order of grouped tokens, whose result is one of its shape, and the fake process group.
    """
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Module())
    dist.Backend.default_device_backend_map[DEVICE] = "fake"
    _register_autocast()
    flex_attention._validate_device = lambda query, key, value: None
    kernels.fill_indices_wrapper = _slot_order
    utils.generate_permute_indices = kernels.generate_permute_indices


_AUTOCAST = "AutocastPrivateUse1"
_registrations: list[torch.library.Library] = []  # which end with these
# Of the operators that autocast runs in lower precision on CUDA, those that a backbone calls.
_LOWER_PRECISION = ("linear", "matmul", "mm", "bmm", "scaled_dot_product_attention")


def _register_autocast() -> None:
    """Give the device autocast, which torch leaves to a backend's own kernels."""
    _registrations[:] = everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, _AUTOCAST)
    for name in _LOWER_PRECISION:
        some.impl(name, partial(_in_lower_precision, getattr(torch.ops.aten, name)), _AUTOCAST)


def _in_lower_precision(operator: Any, *args: Any, **kwargs: Any) -> Any:
    def cast(x: Tensor) -> Tensor:
        return x.to(torch.get_autocast_dtype(DEVICE)) if x.is_floating_point() else x

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST))):
        return operator(*tree_map_only(Tensor, cast, args), **kwargs)


def _slot_order(counts: Tensor, starts: Tensor, offsets: Tensor, experts: int, ranks: int, slots: int) -> Tensor:
    return torch.empty(slots, dtype=torch.int32, device=counts.device)


@contextlib.contextmanager
def through_the_host() -> Iterator[None]:
    """Make `torch.tensor` build on the host and copy to its device, which a dispatch mode sees, in this context."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
