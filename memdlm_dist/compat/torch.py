"""torch 2.11 to 2.13: private names, patches, and messages that carry no data of their own.

Shapes: S slots, n groups of slots.
"""

import contextlib
import inspect
import json
import pickle
import platform
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint import FileSystemReader, _async_process_executor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import _attention as ring_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "EntryReader", "FsspecEntryReader", "SaverProcess", "TorchDispatchMode", "add_product_", "all_to_all",
    "checkpointed", "collectives", "completed", "connection_loss", "construct_savers", "end_saver", "grouped_mm",
    "leave_ring_unbalanced", "local_block", "mark_dynamic", "operator_name", "raise_recompile_limit",
    "rendezvous_store", "skips_if_told", "storage_error", "told_to_skip", "tree_flatten", "tree_leaves",
    "tree_map_only", "tree_unflatten", "use_cpu", "varlen_attention",
]  # fmt: skip

# The trees (`tree_flatten` and the like) and `TorchDispatchMode` are what torch's own documentation uses, under
# modules with an underscore (2.13).


def use_cpu(memory_stats: Callable[[], dict[str, int]], total_memory: int) -> None:
    """Make the CPU the available device, and give `torch.cpu` what torchtitan 0.2 asks of a device module.

    torchtitan takes "cuda" where `_get_available_device_type` finds no accelerator (2.13).
    """
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu: Any = torch.cpu
    cpu.current_device = lambda: 0
    cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=total_memory)
    cpu.memory_stats = lambda device=None: memory_stats()
    cpu.reset_peak_memory_stats = lambda device=None: None
    cpu.empty_cache = lambda: None
    if not hasattr(torch.histc, "of_integers"):
        torch.histc = _histc_of_integers(torch.histc)


def _histc_of_integers(histc: Any) -> Any:
    """`torch.histc`, which on a CPU takes no integers (2.13); torchtitan counts the tokens of experts with it."""

    def counted(x: Tensor, bins: int, min: int = 0, max: int = 0, **rest: Any) -> Tensor:
        if x.device.type != "cpu" or x.is_floating_point() or (min, max) != (0, bins):
            found: Tensor = histc(x, bins, min, max, **rest)
            return found
        # Not bincount, of whose result's size a compiler knows nothing.
        return torch.zeros(bins, dtype=x.dtype).scatter_add(0, x, torch.ones_like(x))

    counted.of_integers = True  # type: ignore[attr-defined]
    return counted


def completed(x: Tensor) -> Tensor:
    """Wait for a collective's pending result; other tensors are returned as they are.

    A compiled block returns no gradient for a pending input (2.13), and the embedding would not train.
    """
    return x.clone() if isinstance(x, AsyncCollectiveTensor) else x


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part c of `[C, ...]` to rank c, with a gradient. torch.distributed's public one has none (2.13)."""
    exchanged: Tensor = all_to_all_single_autograd(x, None, None, group)
    return exchanged


def leave_ring_unbalanced(rotation: Any) -> None:
    """Set how ring attention rotates keys and values, and switch off its load balancing, which is for causal
    attention and has no public switch (2.13)."""
    ring_attention._cp_options.enable_load_balance = False
    ring_attention.set_rotate_method(rotation)


def local_block(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the block of a tensor that this rank holds, and the indices in the whole of its first element.

    By DCP's protocol for sharded tensors, which knows a DTensor that tensor parallelism and FSDP2 shard on the same
    dimension too (2.13).
    """
    if not isinstance(x, DTensor):
        return x, (0,) * x.ndim
    local: Tensor = x.to_local()
    (chunk,) = x.__create_chunk_list__()
    assert local.numel() == 0 or chunk.sizes == local.shape
    return local, tuple(chunk.offsets)


# CUDA's grouped product takes fewer than 1,024 groups (2.13).
MAX_GROUPS = 1023


def grouped_mm(x_Si: Tensor, weight_noi: Tensor, ends_n: Tensor) -> Tensor:
    """Multiply each group of slots by its own matrix, `[S, o]`; `torch.nn.functional.grouped_mm` is newer than 2.11.

    Slots behind the last group get undefined values or zeros, and so does their gradient; the gradient of the matrix of
    a group without slots is undefined too (pytorch/pytorch#172439).

    More than `MAX_GROUPS` groups are multiplied in parts. Where a part's slots begin is known to the device alone, so
    each part takes all slots: those before it and behind it are two groups more, whose matrices are zero.
    """
    if len(weight_noi) <= MAX_GROUPS:
        return torch._grouped_mm(x_Si, weight_noi.transpose(-2, -1), offs=ends_n)
    zero_1oi = weight_noi.new_zeros(1, *weight_noi.shape[1:])
    begins_n, all_1 = F.pad(ends_n, (1, 0)), ends_n.new_full((1,), len(x_Si))
    most = MAX_GROUPS - 2
    y_So, first = None, 0
    for part_noi in weight_noi.split(most):
        # The first end is the one of the slots before this part.
        ends = torch.cat([begins_n[first : first + len(part_noi) + 1], all_1])
        part_So = grouped_mm(x_Si, torch.cat([zero_1oi, part_noi, zero_1oi]), ends)
        y_So = part_So if y_So is None else y_So + part_So
        first += most
    assert y_So is not None
    return y_So


# torch 2.11 takes fewer heads of keys than of queries as they are, 2.13 only where it is told.
_GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, end_n: Tensor, longest: int) -> Tensor:
    """Attend within sequences that stand end to end, `[T, H, d]`; `end_n` begins with 0.

    Each version has another argument for causal attention; without it all attend in both directions.
    """
    options: dict[str, Any] = _GROUPED_QUERIES if k_THd.shape[1] != q_THd.shape[1] else {}
    y_THd: Any = varlen_attn(q_THd, k_THd, v_THd, end_n, end_n, longest, longest, **options)
    return cast(Tensor, y_THd)


def add_product_(sum_ij: Tensor, a_ik: Tensor, b_kj: Tensor) -> None:
    """Add a product to a sum that may be of a wider type, in which it is not rounded before.

    Products that keep their float32 sums are CUDA's (2.8 to 2.13); elsewhere the factors are cast.
    """
    if sum_ij.dtype == a_ik.dtype:
        sum_ij.addmm_(a_ik, b_kj)
    elif sum_ij.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(sum_ij, a_ik, b_kj, out_dtype=sum_ij.dtype, out=sum_ij)
    else:
        sum_ij.addmm_(a_ik.to(sum_ij.dtype), b_kj.to(sum_ij.dtype))


def mark_dynamic(x: Tensor, dim: int) -> None:
    """Let what is compiled take every size of a dimension; the function's module is private by name (2.13)."""
    torch._dynamo.mark_dynamic(x, dim)


def checkpointed(block: nn.Module) -> nn.Module | None:
    """Return the module inside an activation checkpoint, None if `block` is not wrapped in one (2.13)."""
    return block._checkpoint_wrapped_module if isinstance(block, CheckpointWrapper) else None


def raise_recompile_limit(limit: int) -> None:
    """Let a function be compiled at least `limit` times; torch fails at the ninth by default (2.13)."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def skips_if_told(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether an optimizer's step honours `told_to_skip` with a flag on `device`: fused Adam and AdamW do.

    The flag's own copy to another device would be in flight when a CPU's kernel reads it (2.11 to 2.13).
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    groups = optimizer.param_groups
    return fused and all(group.get("fused") and group["params"][0].device.type == device.type for group in groups)


@contextlib.contextmanager
def told_to_skip(optimizers: Iterable[torch.optim.Optimizer], flag: Tensor) -> Iterator[None]:
    """Let steps in this context change neither weights nor optimizer state if `flag` is 1; the host need not know.

    `torch.amp.GradScaler`'s protocol with fused optimizers: their kernels read `found_inf` (2.11 to 2.13).

    Args:
        flag: float32 scalar, 0 or 1.
    """
    told: list[Any] = list(optimizers)
    for optimizer in told:
        optimizer.found_inf = flag
    try:
        yield
    finally:
        for optimizer in told:
            del optimizer.found_inf


def collectives() -> list[tuple[int, int]]:
    """Return (last enqueued, last completed) of the collectives of each process group, in the order of the groups.

    Read off torch's flight recorders, NCCL's and the other backends', which have no public reader (2.13); empty if the
    backend records nothing.
    """
    keys = ("last_enqueued_collective", "last_completed_collective")
    for recorder in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, recorder, None)
        if groups := json.loads(dump(False, False)).get("pg_status", {}) if dump else {}:
            return [(int(groups[name][keys[0]]), int(groups[name][keys[1]])) for name in sorted(groups, key=int)]
    return []


def rendezvous_store() -> Any:
    """Return a connection of its own to the store of the process group's rendezvous (2.13)."""
    store: Any = _get_default_store()
    return store.clone()


_SaverProcess: Any = _async_process_executor._AsyncCheckpointProcess


class SaverProcess(_SaverProcess):
    """DCP's process for background saves, whose body has a public name here; a subclass overrides it (2.13)."""

    @staticmethod
    def serve(group: Any, pipe: Any) -> None:
        """Save what comes through the pipe, until it closes; the process's body."""
        _SaverProcess._checkpointing_subprocess(group, pipe)

    @property
    def _checkpointing_subprocess(self) -> Any:
        return self.serve

    def end(self) -> None:
        """End the process, whatever it is at."""
        self._save_process.terminate()
        self._save_process.join()


def construct_savers(saver: type[SaverProcess]) -> None:
    """Let DCP construct `saver` for background saves: it has no builder for it (2.13)."""
    vars(_async_process_executor)["_AsyncCheckpointProcess"] = saver


def end_saver() -> None:
    """End this rank's process for background saves; the next save starts another. DCP would keep a dead one (2.13)."""
    saver, _async_process_executor._CHECKPOINT_PROCESS = _async_process_executor._CHECKPOINT_PROCESS, None
    if isinstance(saver, SaverProcess):
        saver.end()


_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


_BUILT = (
    Metadata, TensorStorageMetadata, BytesStorageMetadata, TensorProperties, ChunkStorageMetadata, MetadataIndex,
    StorageMeta, _StorageInfo,
)  # fmt: skip


class MetadataUnpickler(pickle._Unpickler):
    """Unpickler of DCP's metadata that admits only the classes DCP writes; DCP's own admits every one (2.13).

    Python's own in Python, for it lets `BUILD` be refused: on a class or a function that opcode sets attributes, and so
    replaces code. A third of the speed of the one in C: 14 s for the 220,000 chunks of 8 B parameters on 256 ranks.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)

    def load_build(self) -> None:
        *_, built, state = self.stack  # type: ignore[attr-defined]
        if type(built) not in _BUILT or not (isinstance(state, dict) or hasattr(built, "__setstate__")):
            raise pickle.UnpicklingError(f"it changes a {type(built).__name__}, which no checkpoint of ours does")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class _Entries:
    """Reads DCP's metadata with `MetadataUnpickler`, and hands every entry's bytes to `check_entry` before DCP
    deserialises them; its readers have no hook for either (2.13)."""

    fs: Any
    load_id: Any

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        path = self._get_metadata_path(options.get("rank"))  # type: ignore[attr-defined]
        with self.fs.create_stream(path, "rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is not the metadata of a checkpoint")
        for entry in (metadata.storage_data or {}).values():
            if not re.fullmatch(r"[\w.-]+", entry.relative_path) or entry.relative_path in (".", ".."):
                raise pickle.UnpicklingError(f"it names the file {entry.relative_path!r} outside of its folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file: Any, entry: Any) -> Any:
        return self.check_entry(file, entry.offset, entry.length, entry.relative_path)

    @abstractmethod
    def check_entry(self, file: Any, offset: int, length: int, name: str) -> Any:
        """Return the entry as an open file of bytes."""


class EntryReader(_Entries, FileSystemReader):
    """DCP's reader of a folder on disk, entry by entry."""


class FsspecEntryReader(_Entries, FsspecReader):
    """DCP's reader of a folder at a URL, entry by entry; DCP keeps it private (2.13)."""


def operator_name(operator: Any) -> str:
    """Return an operator's name, such as `c10d::allreduce_`, as a `TorchDispatchMode` gets it (2.13)."""
    name: str = operator.overloadpacket._qualified_op_name
    return name


def storage_error(message: str) -> str:
    """Say in words what `torch.save` makes of any error of the file it writes to, a full disk for one (2.13)."""
    return "a file could not be written to its end" if "inline_container.cc" in message else message


def connection_loss(error: RuntimeError) -> str:
    """Return why a collective failed, if another rank is gone or did not come in time; else an empty text.

    gloo raises plain RuntimeErrors that name its source files (2.13).
    """
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return ""
    return re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
