"""Fake device whose tensors have no values: raises `Refused` where a real device would sync with the host or fail."""

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchgen
from torch import Tensor
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from memdlm_dist.compat.fake_device import DEVICE, FakeTensor, FakeTensorMode, OpOverload, build_on_host
from memdlm_dist.compat.torch import TorchDispatchMode, tree_leaves, tree_map_only
from memdlm_dist.runtime import device

aten = torch.ops.aten
_ASSIGNMENTS = (aten.index_put.default, aten.index_put_.default)


class Refused(Exception):
    """Raised for an operation that syncs with a real device or fails there; names the package's calling function."""


class FakeDevice(TorchDispatchMode):
    """Dispatch mode that runs operators on host tensors normally, and operators on device tensors in FakeTensorMode.

    Host code that reads host tensors works. Device tensors have no values. Refused are:

    - reads of a device value (`.item()`, `.tolist()`, `.cpu()`, `if`). The functions in `reads` get zeros instead.
    - copies between the device and unpinned host memory, for which the host waits, except in the functions in `copies`
      (to the device) and `reads` (to the host). Asynchronous copies of pinned memory are allowed, and counted in
      `transfers`.
    - operators with host and device tensors, except host scalars in elementwise operators; collectives on host tensors.
    - shapes that depend on values (boolean indexing, `nonzero`), and assignments through a boolean mask.

    Not detected are syncs within a kernel's launch (`histc` without a range), and dtypes that a kernel does not
    support.

    An error in a backward pass is printed at once: torch's Python device guard ends the process at such an error.

    Args:
        reads: functions that may read values, as "module:function" relative to memdlm_dist.
        copies: functions that may copy to the device synchronously, in the same form.

    Attributes:
        reads, copies, transfers: number of reads and copies by calling function.
        operators: operators that ran on the device.
    """

    supports_higher_order_operators = True  # flex attention

    def __init__(self, reads: Collection[str] = (), copies: Collection[str] = ()):
        super().__init__()
        self.allowed_reads, self.allowed_copies = reads, copies
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self._pinned: dict[int, Tensor] = {}  # address -> buffer; the reference keeps the address in use
        self.operators: set[OpOverload] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._contexts = ExitStack()

    def __enter__(self) -> "FakeDevice":
        self._contexts.enter_context(build_on_host())
        self._contexts.enter_context(patch.object(device, "pinned", self._pin))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._contexts.close()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._run(operator, args, kwargs or {})
        except Exception:
            if threading.current_thread() is not threading.main_thread():
                traceback.print_exc()
                sys.stderr.flush()
            raise

    def _run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        if operator is torch.ops.prim.device.default:  # a third of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else operator(*args)
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        target = next((x.type for x in leaves if isinstance(x, torch.device)), None)
        if target != DEVICE and not any(isinstance(x, FakeTensor) for x in tensors):
            if tensors and "c10d" in str(operator):
                raise Refused(f"{operator} on a host tensor, in {_caller()}")
            return operator(*args, **kwargs)

        if operator is aten._local_scalar_dense.default:
            self._count("a read of a value", self.reads, self.allowed_reads)
            return torch.zeros((), dtype=args[0].dtype).item()
        if operator in (aten._to_copy.default, aten.copy_.default) and self._is_transfer(operator, args, kwargs):
            self.transfers[_caller()] += 1
            if not isinstance(args[0], FakeTensor) and target is None:
                return args[0].zero_()
            with self._fake:
                return operator(*tree_map_only(Tensor, self._to_fake, args), **kwargs)
        if operator is aten._to_copy.default and target == "cpu":
            self._count("a copy to the host", self.reads, self.allowed_reads)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        if operator is aten.copy_.default and args[0].device.type == "cpu":
            self._count("a copy to the host", self.reads, self.allowed_reads)
            return args[0].zero_()
        copied = {aten._to_copy.default: tensors[:1], aten.copy_.default: tensors[1:]}.get(operator, [])
        if copied and copied[0].device.type == "cpu":
            self._count("a copy from the host", self.copies, self.allowed_copies)
        elif any(x.device.type == "cpu" and not _is_argument(x, operator) for x in tensors):
            raise Refused(f"{operator} on host and device tensors, in {_caller()}")
        elif operator in _ASSIGNMENTS and args[2].numel() > 1 and torch.bool in [x.dtype for x in tree_leaves(args[1])]:
            raise Refused(f"an assignment through a boolean mask, whose size the host reads, in {_caller()}")
        elif isinstance(operator, OpOverload):
            self.operators.add(operator)
        if not all(isinstance(x, FakeTensor) for x in tensors):
            args, kwargs = tree_map_only(Tensor, self._to_fake, (args, kwargs))
        with self._fake:
            return operator(*args, **kwargs)

    def _pin(self, size: int) -> Tensor:
        """Allocate bytes that count as pinned; replaces `runtime.device.pinned`."""
        buffer = torch.empty(size, dtype=torch.uint8)
        self._pinned[buffer.untyped_storage().data_ptr()] = buffer
        return buffer

    def _is_transfer(self, operator: Any, args: Any, kwargs: Any) -> bool:
        """Return whether this is an asynchronous copy to or from pinned memory."""
        if operator is aten.copy_.default:
            target, source, non_blocking = args[0], args[1], args[2:] == (True,) or kwargs.get("non_blocking")
            host = target if isinstance(source, FakeTensor) else source
        else:
            host, non_blocking = args[0], kwargs.get("non_blocking")
        pinned = not isinstance(host, FakeTensor) and host.untyped_storage().data_ptr() in self._pinned
        return pinned and bool(non_blocking)

    def _to_fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._fake.from_tensor(x)

    def _count(self, operation: str, counts: Counter[str], allowed: Collection[str]) -> None:
        """Count an operation by its caller.

        Raises:
            Refused: if the caller is not in `allowed`.
        """
        if (caller := _caller()) not in allowed:
            raise Refused(f"{operation} in {caller}")
        counts[caller] += 1


def _is_argument(x: Tensor, operator: Any) -> bool:
    """Return whether a kernel takes this host tensor as a number: a scalar of an elementwise operator."""
    return x.ndim == 0 and isinstance(operator, OpOverload) and torch.Tag.pointwise in operator.tags


def _caller() -> str:
    """Return the innermost named function of the package on the stack, "module:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        # Skips lambdas and comprehensions; Python 3.11 has frames for comprehensions, 3.12 has none.
        if module.startswith("memdlm_dist.") and not name.startswith("<"):
            return f"{module.removeprefix('memdlm_dist.')}:{name}"
        frame = frame.f_back
    return "code outside of memdlm_dist"


@cache
def _native() -> tuple[dict[str, Any], Any]:
    """Return torch's native operators by name, and those with a CUDA kernel, from the YAML that torch is built with."""
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    functions = {str(function.func.name): function for function in parsed.native_functions}
    return functions, parsed.backend_indices[DispatchKey.CUDA].index


def without_cuda_kernel(operators: Collection[OpOverload]) -> list[str]:
    """Return the names of native operators that have neither a CUDA kernel nor a composite kernel."""
    functions, cuda = _native()
    missing = []
    for operator in operators:
        if not str(operator).startswith("aten."):
            continue
        function = functions[str(operator).removeprefix("aten.").removesuffix(".default")]
        kernel = function.structured_delegate or function.func.name
        if not function.has_composite_kernel and kernel not in cuda:
            missing.append(str(operator))
    return missing
