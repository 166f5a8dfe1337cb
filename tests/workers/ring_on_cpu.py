"""torch's ring attention with the CPU's attention kernel, so that CPU tests can run it.

torch registers ring attention for CUDA's attention kernels only.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SEQUENCE_DIM = 2


@contextlib.contextmanager
def ring_on_cpu() -> Iterator[None]:
    """Dispatch the CPU's attention on sequence-sharded DTensors to ring attention, as on CUDA."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handlers |= {_FORWARD: _forward, _BACKWARD: _backward}
    try:
        yield
    finally:
        del handlers[_FORWARD], handlers[_BACKWARD]


def _forward(operator: Any, args: Any, kwargs: Any) -> Any:
    mesh = args[0].device_mesh
    q, k, v = (x.to_local() for x in args[:3])
    out, lse = ring._templated_ring_attention(
        mesh.get_group(), _SEQUENCE_DIM, operator, q, k, v, is_causal=False, **kwargs
    )
    return _sharded(mesh, out, lse)


def _backward(operator: Any, args: Any, kwargs: Any) -> Any:
    mesh = args[1].device_mesh
    grad_out, q, k, v, out, lse = (x.to_local().contiguous() for x in args[:6])
    assert not args[7], "causal attention is not expected"
    gradients = ring._templated_ring_attention_backward(
        mesh.get_group(), _SEQUENCE_DIM, operator, grad_out, "grad_out", q, k, v, out, lse, is_causal=False,
        dropout_p=args[6], **kwargs,
    )  # fmt: skip
    return _sharded(mesh, *gradients)


def _sharded(mesh: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(DTensor.from_local(x, mesh, [Shard(_SEQUENCE_DIM)], run_check=False) for x in tensors)
