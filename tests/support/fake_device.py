"""A device without values beside a real host, which refuses what a real device would wait for or fail on."""

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
    """An operation that a device would wait for or fail on, and the function of the package that asked for it."""


class FakeDevice(TorchDispatchMode):
    """Runs operators on host tensors as they are, and operators on the device's under FakeTensorMode.

    Host code that reads host tensors works. The device never gives a value back. Refused are:

    - reads of a value (`.item()`, `.tolist()`, `.cpu()`, `if`), except in `reads`, which gets zeros;
    - copies from and to the host's memory that is not pinned, except in `copies` and `reads`: the host waits for them.
      Those of pinned memory, if they are not to be waited for, are counted in `transfers`;
    - tensors of the host and of the device in one operator, except scalars in elementwise ones; collectives of the
      host's;
    - shapes that depend on values (boolean indexing, `nonzero`), and assignments to the places of a mask.

    Not seen are waits within a kernel's launch (`histc` that looks for its range), and dtypes that a kernel lacks.

    An error in a backward pass is printed before it ends the process, which torch's Python device guard makes it do.

    Args:
        reads, copies: functions below memdlm_dist, "module:function".
    """

    supports_higher_order_operators = True  # flex attention

    def __init__(self, reads: Collection[str] = (), copies: Collection[str] = ()):
        super().__init__()
        self.allowed_reads, self.allowed_copies = reads, copies
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self._pinned: dict[int, Tensor] = {}  # address -> what lies there, which stays
        self.operators: set[OpOverload] = set()  # that ran on the device
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
                raise Refused(f"{operator} on a tensor of the host, in {_caller()}")
            return operator(*args, **kwargs)

        if operator is aten._local_scalar_dense.default:
            self._count("a read of a value", self.reads, self.allowed_reads)
            return torch.zeros((), dtype=args[0].dtype).item()
        if operator in (aten._to_copy.default, aten.copy_.default) and self._is_transfer(operator, args, kwargs):
            self.transfers[_caller()] += 1
            if not isinstance(args[0], FakeTensor) and target is None:
                return args[0].zero_()
            with self._fake:
                return operator(*tree_map_only(Tensor, self._faked, args), **kwargs)
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
            raise Refused(f"{operator} on tensors of the host and of the device, in {_caller()}")
        elif operator in _ASSIGNMENTS and args[2].numel() > 1 and torch.bool in [x.dtype for x in tree_leaves(args[1])]:
            raise Refused(f"an assignment to the places of a mask, which are counted on the host, in {_caller()}")
        elif isinstance(operator, OpOverload):
            self.operators.add(operator)
        if not all(isinstance(x, FakeTensor) for x in tensors):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        with self._fake:
            return operator(*args, **kwargs)

    def _pin(self, size: int) -> Tensor:
        """Return bytes that count as pinned: what `runtime.device.pinned` is here."""
        found = torch.empty(size, dtype=torch.uint8)
        self._pinned[found.untyped_storage().data_ptr()] = found
        return found

    def _is_transfer(self, operator: Any, args: Any, kwargs: Any) -> bool:
        """Return whether this is a copy to or from pinned memory for which the host does not wait."""
        if operator is aten.copy_.default:
            into, source, not_waiting = args[0], args[1], args[2:] == (True,) or kwargs.get("non_blocking")
            host = into if isinstance(source, FakeTensor) else source
        else:
            host, not_waiting = args[0], kwargs.get("non_blocking")
        pinned = not isinstance(host, FakeTensor) and host.untyped_storage().data_ptr() in self._pinned
        return pinned and bool(not_waiting)

    def _faked(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._fake.from_tensor(x)

    def _count(self, what: str, counted: Counter[str], allowed: Collection[str]) -> None:
        if (caller := _caller()) not in allowed:
            raise Refused(f"{what} in {caller}")
        counted[caller] += 1


def _is_argument(x: Tensor, operator: Any) -> bool:
    """Return whether a host tensor is a number to a kernel: a scalar is, of an elementwise operator."""
    return x.ndim == 0 and isinstance(operator, OpOverload) and torch.Tag.pointwise in operator.tags


def _caller() -> str:
    """Return the innermost named function of the package on the stack, "module:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        # Python 3.12 has no frames for comprehensions.
        if module.startswith("memdlm_dist.") and not name.startswith("<"):
            return f"{module.removeprefix('memdlm_dist.')}:{name}"
        frame = frame.f_back
    return "code outside of memdlm_dist"


@cache
def _native() -> tuple[dict[str, Any], Any]:
    """Return torch's own operators by name, and those with a CUDA kernel, as its kernels are generated from."""
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    functions = {str(function.func.name): function for function in parsed.native_functions}
    return functions, parsed.backend_indices[DispatchKey.CUDA].index


def without_cuda_kernel(operators: Collection[OpOverload]) -> list[str]:
    """Return torch's own operators that have neither a CUDA kernel nor one composed of other operators."""
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
