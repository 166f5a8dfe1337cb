"""torchao >= 0.18: `NF4Tensor`, the only 4-bit tensor that FSDP2 shards and that runs on a CPU. An optional dependency.

torchao's modules are imported on first use, because the import is slow and reports missing CUDA kernels on stderr.
"""

import importlib.util
import logging
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

NOT_INSTALLED = "torchao 0.18 or later, which is not installed; run .venv/bin/pip install -e '.[nf4]'"

# Elements that share one scale, and scales that share one factor (double quantisation). Both are torchao's defaults.
BLOCK, SCALES = 64, 256
# Tensors of an NF4Tensor that are split along its rows, with the number of its elements that one entry stands for.
_SPLIT = {"quantized_data": 2, "quantized_scalers": BLOCK, "quantization_factor": BLOCK * SCALES}
# Tensors of an NF4Tensor that every shard has whole: the mean of the scales, and the 16 values of the type.
_WHOLE = ("scaler_mean", "nf4")


def is_installed() -> bool:
    """Return whether torchao is installed, with `NF4Tensor` at its present place."""
    try:
        return importlib.util.find_spec("torchao") is not None and bool(_nf4())
    except (ImportError, AttributeError):  # AttributeError: before torchao 0.18
        return False


@cache
def _nf4() -> Any:
    """Import torchao's NF4 module, without its messages about kernels that this machine cannot load."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao import quantization
    finally:
        logging.disable(logging.NOTSET)
    return quantization.NF4Tensor, quantization.to_nf4


def local(x: Tensor) -> Tensor:
    """Return the local tensor object of a parameter itself; `DTensor.to_local` returns a view of it."""
    return x._local_tensor if isinstance(x, DTensor) else x


def is_nf4(x: Tensor) -> bool:
    """Return whether a tensor or this rank's shard of it is quantised."""
    return type(local(x)).__name__ == "NF4Tensor"


def quantize(x: Tensor) -> Any:
    """Quantise a whole two-dimensional tensor, on any device."""
    _, to_nf4 = _nf4()
    return to_nf4(x.detach().contiguous(), BLOCK, SCALES)


def materialize(x: Tensor) -> None:
    """Give an NF4Tensor that `Module.to_empty` has moved from the meta device the tensors that the move leaves out."""
    shard: Any = local(x)
    for name in _WHOLE:
        if (tensor := getattr(shard, name)).is_meta:
            setattr(shard, name, torch.empty_like(tensor, device=shard.quantized_data.device))


def write_rows(x: Tensor, whole: Any, first: int) -> None:
    """Copy rows of a quantised tensor into a shard, beginning at row `first`."""
    shard: Any = local(x)
    start, count = first * whole.shape[1], shard.numel()
    for name, elements in _SPLIT.items():
        getattr(shard, name).copy_(getattr(whole, name)[start // elements : (start + count) // elements])
    for name in _WHOLE:
        getattr(shard, name).copy_(getattr(whole, name))


def dequantize(x: Tensor) -> Tensor:
    """Return this rank's shard of a quantised tensor in the dtype that it was quantised from."""
    shard: Any = local(x)
    weight: Tensor = shard.get_original_weight()
    return weight


def stored_bytes(x: Tensor) -> int:
    """Return the bytes of this rank's shard of a quantised tensor."""
    shard: Any = local(x)
    return sum(getattr(shard, name).numel() * getattr(shard, name).itemsize for name in (*_SPLIT, *_WHOLE))
