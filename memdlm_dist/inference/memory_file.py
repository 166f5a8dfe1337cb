"""File of a prompt's memory: the fast weights as safetensors, with the identity of the base and of the prompt.

One set of fast weights, whole, in float32. The header names the weights of the base by their fingerprint, since fast
weights mean nothing on another base.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from memdlm_dist.errors import UserError, require
from memdlm_dist.inference.prompt_memory import AdaptedMemory, MemorySettings, PromptIdentity
from memdlm_dist.method import fast_weight_tree
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loss import full_tensor
from memdlm_dist.runtime.rank_0 import from_rank_0, on_all_ranks, one_line

_FORMAT = "memdlm_dist memory 1"


def check_target(path: Path, overwrite: bool) -> None:
    """Check that a memory can be written to a file; for rank 0.

    Raises:
        UserError: if its folder is missing, or if the file exists and `overwrite` is False.
    """
    for problem, found in (("its folder does not exist", not path.parent.is_dir()), ("it is a folder", path.is_dir())):
        require(not found, f"The memory cannot be written to {path} ({problem}); choose another file.")
    require(overwrite or not path.exists(), f"{path} exists; choose another file, or pass --overwrite to replace it.")


def save(path: Path, memory: AdaptedMemory, base: str, kind: Mapping[str, str]) -> None:
    """Write the memory of one prompt atomically; a collective call, rank 0 writes.

    Args:
        memory: memory of one prompt.
        base: fingerprint of the base.
        kind: settings of the fast weights that the base must have to read them.

    Raises:
        UserError: if it is the memory of several prompts or is not finite, or cannot be written.
    """
    count = len(memory.prompts)
    require(count == 1, f"A memory file holds one prompt's memory, not {count}; adapt to one prompt.")
    tensors = {name: full_tensor(x).float().cpu().contiguous() for name, x in _named(memory.fast).items()}
    require(
        all(bool(x.isfinite().all()) for x in tensors.values()),
        "The memory is not finite, so it is not saved; lower parametric_memory.learning_rate.",
    )
    (prompt,) = memory.prompts
    header = {
        "format": _FORMAT,
        "base": base,
        "prompt": prompt.sha256,
        "prompt_tokens": str(prompt.tokens),
        **kind,
        "settings": json.dumps(asdict(memory.settings)),
    }

    def write() -> None:
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            unfinished.write_bytes(safetensors.torch.save(tensors, header))
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UserError(
                f"The memory cannot be written to {path} ({one_line(error)}); choose another file."
            ) from None

    from_rank_0(write)


def load(
    path: Path, empty: FastWeights, base: Callable[[], str], kind: Mapping[str, str], settings: MemorySettings
) -> AdaptedMemory:
    """Read a memory onto any layout; a collective call, every rank reads the file.

    Args:
        empty: one set of fast weights of this model, with its layout.
        base: returns the fingerprint of this model's base.
        kind: settings of this model's fast weights.
        settings: settings of a refresh.

    Raises:
        UserError: if the file cannot be read, is no memory, or is one of another base, kind or shape.
    """
    expected = {name: tuple(x.shape) for name, x in _named(empty).items()}
    try:
        header, shapes = on_all_ranks(lambda: _read_header(path), "Reading a memory")
    except OSError as error:
        raise _unreadable(path, error) from None
    require(
        header.get("format") == _FORMAT and re.fullmatch(r"[0-9]{1,18}", header.get("prompt_tokens", "")) is not None,
        f"{path} is no memory of a prompt; name a file that --save-memory has written.",
    )
    for key, value in kind.items():
        found = header.get(key, "")
        require(
            found == value,
            f"The memory {path} has fast weights with {key} = {found[:50]}, but this model has {value}; use the "
            "configuration with which it was saved.",
        )
    for name in sorted(expected.keys() | shapes.keys()):
        require(
            shapes.get(name) == expected.get(name),
            f"The memory {path} has {_described(shapes.get(name))} {name[:200]}, but this model has "
            f"{_described(expected.get(name))}; use the configuration with which it was saved.",
        )
    require(
        header.get("base") == base(),
        f"The memory {path} was written with other weights of the base; use the checkpoint with which it was saved, or "
        "write the memory again.",
    )
    try:
        tensors = on_all_ranks(lambda: _read_tensors(path), "Reading a memory")
    except OSError as error:
        raise _unreadable(path, error) from None
    require(
        all(x.dtype == torch.float32 and bool(x.isfinite().all()) for x in tensors.values()),
        f"The memory {path} is damaged (it has numbers that are not finite, or not float32); save it again.",
    )

    def place(leaf: Tensor, name: str) -> Tensor:
        whole = tensors[name].to(leaf.device, leaf.dtype)
        if not isinstance(leaf, DTensor):
            return whole
        # Every rank has read the same values.
        return distribute_tensor(whole, leaf.device_mesh, leaf.placements, src_data_rank=None)

    fast = fast_weight_tree.map_leaves(place, empty, list(expected))
    prompt = PromptIdentity(int(header["prompt_tokens"]), header.get("prompt", ""))
    return AdaptedMemory(fast, settings, (prompt,), seconds=0.0, steps=0)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"The memory {path} cannot be read ({one_line(error)}); correct the path, or save it again.")


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the metadata and the tensors' shapes, without reading the tensors: the file may be any."""
    with _opened(path) as file:
        names = file.keys()
        return file.metadata() or {}, {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise OSError(one_line(error)) from None


def _named(fast: FastWeights) -> dict[str, Tensor]:
    """Return the tensors of the tree by name, layer.target.tensor, in the order of `fast_weight_tree.leaves`."""
    return {
        f"{layer}.{target}.{field.partition('_')[0]}": x
        for layer, targets in fast.items()
        for target, linear in targets.items()
        for field, x in linear._asdict().items()
        if isinstance(x, Tensor)
    }


def _described(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"a tensor of shape {'x'.join(map(str, shape))} as"
