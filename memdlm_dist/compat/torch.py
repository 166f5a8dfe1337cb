"""torch 2.11 to 2.13: private names, patches, and error messages that must be parsed.

Shapes: S rows of a grouped matrix product, n groups of rows, i and o input and output features; T tokens of all
sequences, H heads, d head dim.
"""

import contextlib
import functools
import inspect
import json
import pickle
import platform
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.checkpoint import (
    FileSystemReader,
    _async_process_executor,
    _consolidate_hf_safetensors,
)
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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import _attention as ring_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "EntryReader", "FsspecEntryReader", "SaverProcess", "TorchDispatchMode", "add_product_", "all_to_all",
    "checkpointed", "collectives", "configure_ring_attention", "connection_loss", "consolidate_safetensors",
    "construct_savers", "end_saver", "grouped_mm", "local_block", "mark_dynamic", "operator_name",
    "raise_recompile_limit", "rendezvous_store", "skip_if_flagged", "storage_error", "supports_reuse_of_stagers",
    "supports_skip_flag", "tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten", "use_cpu",
    "varlen_attention", "wait_if_pending",
]  # fmt: skip

# torch's documentation uses `TorchDispatchMode` and the pytree functions, such as `tree_flatten`, but their modules are
# private by name (2.13).


def use_cpu(memory_stats: Callable[[], dict[str, int]], total_memory: int) -> None:
    """Make the CPU the available device, and add the functions to `torch.cpu` that torchtitan 0.2 calls.

    torchtitan selects "cuda" if `_get_available_device_type` finds no accelerator (2.13).

    Args:
        memory_stats: returns the memory statistics in bytes, under the keys of `torch.cuda.memory_stats`.
        total_memory: bytes.
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
    """Extend `torch.histc` to integers on the CPU (2.13 has floats only): torchtitan counts experts' tokens with it."""

    def histc_with_integers(x: Tensor, bins: int, min: int = 0, max: int = 0, **rest: Any) -> Tensor:  # noqa: A002 (torch's signature)
        if x.device.type != "cpu" or x.is_floating_point() or (min, max) != (0, bins):
            result: Tensor = histc(x, bins, min, max, **rest)
            return result
        # Not bincount: the compiler cannot infer the size of its result.
        return torch.zeros(bins, dtype=x.dtype).scatter_add(0, x, torch.ones_like(x))

    histc_with_integers.of_integers = True  # type: ignore[attr-defined]
    return histc_with_integers


def wait_if_pending(x: Tensor) -> Tensor:
    """Wait for the pending result of an asynchronous collective; other tensors are returned unchanged.

    A compiled block returns no gradient for a pending input (2.13), so that the embedding would not train.
    """
    return x.clone() if isinstance(x, AsyncCollectiveTensor) else x


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange equal splits of dimension 0 over the group, with a gradient; torch's public function has none (2.13)."""
    received: Tensor = all_to_all_single_autograd(x, None, None, group)
    return received


def configure_ring_attention(rotation: Any) -> None:
    """Set the rotation method of ring attention, and disable its load balancing.

    Load balancing is for causal attention and has no public option (2.13).

    Args:
        rotation: "allgather" or "alltoall".
    """
    ring_attention._cp_options.enable_load_balance = False
    ring_attention.set_rotate_method(rotation)


def local_block(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the local block of a tensor, and the index of its first element in the full tensor.

    Uses DCP's protocol for sharded tensors, which is also correct if tensor parallelism and FSDP2 shard the same
    dimension (2.13).
    """
    if not isinstance(x, DTensor):
        return x, (0,) * x.ndim
    local: Tensor = x.to_local()
    (chunk,) = x.__create_chunk_list__()
    assert local.numel() == 0 or chunk.sizes == local.shape
    return local, tuple(chunk.offsets)


# CUDA's grouped product supports fewer than 1,024 groups (2.13).
MAX_GROUPS = 1023


def grouped_mm(x_Si: Tensor, weight_noi: Tensor, ends_n: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix, `[S, o]`; `torch.nn.functional.grouped_mm` is newer than 2.11.

    Rows after the last group get undefined values or zeros, and so do their gradients. The gradient of an empty group's
    matrix is undefined too (pytorch/pytorch#172439).

    More than `MAX_GROUPS` groups are multiplied in chunks of groups. Only the device knows where a chunk's rows begin,
    so every chunk multiplies all rows: the rows before it and after it form two more groups, with zero matrices.

    Args:
        x_Si: rows, group by group.
        weight_noi: one matrix per group.
        ends_n: int32, end of each group.
    """
    if len(weight_noi) <= MAX_GROUPS:
        return torch._grouped_mm(x_Si, weight_noi.transpose(-2, -1), offs=ends_n)
    zero_1oi = weight_noi.new_zeros(1, *weight_noi.shape[1:])
    starts_n, total_1 = F.pad(ends_n, (1, 0)), ends_n.new_full((1,), len(x_Si))
    chunk_size = MAX_GROUPS - 2
    y_So, first = None, 0
    for chunk_noi in weight_noi.split(chunk_size):
        # The first end closes the group of the rows before this chunk.
        ends = torch.cat([starts_n[first : first + len(chunk_noi) + 1], total_1])
        chunk_So = grouped_mm(x_Si, torch.cat([zero_1oi, chunk_noi, zero_1oi]), ends)
        y_So = chunk_So if y_So is None else y_So + chunk_So
        first += chunk_size
    assert y_So is not None
    return y_So


# torch 2.11 accepts grouped-query attention implicitly; 2.13 needs a flag.
_GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Compute bidirectional attention within each of several concatenated sequences, `[T, H, d]`.

    The argument for causal attention differs between versions. Without it, attention is bidirectional in all of them.

    Args:
        cu_seqlens: int32 `[n + 1]`, cumulative lengths of the n sequences; starts with 0.
        max_seqlen: length of the longest sequence.
    """
    options: dict[str, Any] = _GROUPED_QUERIES if k_THd.shape[1] != q_THd.shape[1] else {}
    y_THd: Any = varlen_attn(q_THd, k_THd, v_THd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return cast(Tensor, y_THd)


def add_product_(sum_ij: Tensor, a_ik: Tensor, b_kj: Tensor) -> None:
    """Add a @ b to a sum in place; a sum of a wider dtype gets the product without rounding to the factors' dtype.

    Only CUDA can return the product in a wider dtype (2.8 to 2.13). Other devices cast the factors.
    """
    if sum_ij.dtype == a_ik.dtype:
        sum_ij.addmm_(a_ik, b_kj)
    elif sum_ij.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(sum_ij, a_ik, b_kj, out_dtype=sum_ij.dtype, out=sum_ij)
    else:
        sum_ij.addmm_(a_ik.to(sum_ij.dtype), b_kj.to(sum_ij.dtype))


def mark_dynamic(x: Tensor, dim: int) -> None:
    """Mark a dimension as dynamic for torch.compile; the function's module is private by name (2.13)."""
    torch._dynamo.mark_dynamic(x, dim)


def checkpointed(block: nn.Module) -> nn.Module | None:
    """Return the module inside an activation-checkpoint wrapper, None if `block` is not wrapped (2.13)."""
    return block._checkpoint_wrapped_module if isinstance(block, CheckpointWrapper) else None


def raise_recompile_limit(limit: int) -> None:
    """Allow at least `limit` compilations of a function; by default torch fails at the ninth (2.13)."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def supports_skip_flag(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether an optimizer supports `skip_if_flagged` with a flag on `device`, as fused Adam and AdamW do.

    Flag and parameters must be on the same device. Otherwise the optimizer copies the flag asynchronously, and a CPU
    kernel would read it before the copy has finished (2.11 to 2.13).
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    groups = optimizer.param_groups
    return fused and all(group.get("fused") and group["params"][0].device.type == device.type for group in groups)


@contextlib.contextmanager
def skip_if_flagged(optimizers: Iterable[torch.optim.Optimizer], flag: Tensor) -> Iterator[None]:
    """Make optimizer steps in this context a no-op if `flag` is 1, without a device-to-host sync.

    Neither weights nor optimizer state change. Uses `torch.amp.GradScaler`'s protocol with fused optimizers, whose
    kernels read `found_inf` (2.11 to 2.13).

    Args:
        optimizers: optimizers with `supports_skip_flag`.
        flag: float32 scalar, 0 or 1.
    """
    flagged_optimizers: list[Any] = list(optimizers)
    for optimizer in flagged_optimizers:
        optimizer.found_inf = flag
    try:
        yield
    finally:
        for optimizer in flagged_optimizers:
            del optimizer.found_inf


def collectives() -> list[tuple[int, int]]:
    """Return (last enqueued, last completed) collective of each process group, in the order of the groups.

    Read from torch's flight recorders, of NCCL and of the other backends, which have no public reader (2.13). Empty if
    the backend records nothing.
    """
    keys = ("last_enqueued_collective", "last_completed_collective")
    for recorder in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, recorder, None)
        if groups := json.loads(dump(False, False)).get("pg_status", {}) if dump else {}:
            return [(int(groups[name][keys[0]]), int(groups[name][keys[1]])) for name in sorted(groups, key=int)]
    return []


def rendezvous_store() -> Any:
    """Open a separate connection to the rendezvous store of the process group (2.13)."""
    store: Any = _get_default_store()
    return store.clone()


_SaverProcess: Any = _async_process_executor._AsyncCheckpointProcess


@functools.cache
def supports_reuse_of_stagers() -> bool:
    """Return whether a `DefaultStager` can stage more than once.

    Some versions close it after its first state dict; the second one then fails with a KeyError (pytorch#183413).
    """
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        for _ in range(2):
            stager.stage({})
    except KeyError:
        return False
    return True


class SaverProcess(_SaverProcess):
    """DCP's process for background saves, with a public name for its main function, to override (2.13)."""

    @staticmethod
    def serve(group: Any, pipe: Any) -> None:
        """Save the states that arrive through the pipe, until it closes; main function of the process."""
        _SaverProcess._checkpointing_subprocess(group, pipe)

    @property
    def _checkpointing_subprocess(self) -> Any:
        return self.serve

    def end(self) -> None:
        """Terminate the process at once and wait for its exit."""
        self._save_process.terminate()
        self._save_process.join()


def consolidate_safetensors(shards: str, folder: str, files: Mapping[str, str]) -> None:
    """Write whole tensors to the files of an export, from the shards that the ranks have written.

    torch's public functions (2.13) write all files on one rank, or leave the other ranks waiting if one rank fails.
    They also omit the key `format` from the files, without which transformers 4.46 does not open them.

    Args:
        shards: folder that `HuggingFaceStorageWriter` has written with `save_distributed`.
        folder: folder of the export.
        files: names of the files to write, by tensor.
    """
    module: Any = _consolidate_hf_safetensors
    write_headers = module._write_metadata

    def write_headers_with_format(outputs: Mapping[str, Any]) -> None:
        write_headers(outputs)
        for path in outputs:
            content = Path(path).read_bytes()  # the header alone: its length in 8 bytes, and JSON
            header = json.dumps({"__metadata__": {"format": "pt"}, **json.loads(content[8:])}).encode()
            header += b" " * (-len(header) % 8)
            Path(path).write_bytes(len(header).to_bytes(8, "little") + header)

    module._write_metadata = write_headers_with_format
    try:
        module._consolidate_safetensors_files(shards, folder, dict(files), num_threads=5)
    finally:
        module._write_metadata = write_headers


def construct_savers(saver: type[SaverProcess]) -> None:
    """Make DCP construct `saver` for background saves, for which it has no builder (2.13)."""
    vars(_async_process_executor)["_AsyncCheckpointProcess"] = saver


def end_saver() -> None:
    """Terminate this rank's process for background saves; the next save starts a new one.

    DCP would keep using a dead process (2.13).
    """
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
    """Unpickler for DCP's metadata that accepts only the classes that DCP writes; DCP's own accepts any class (2.13).

    Subclasses Python's pure-Python unpickler, because only that can reject the `BUILD` opcode. On a class or a function
    `BUILD` sets attributes, and can thus replace code. It has a third of the speed of the C unpickler: 14 s for the
    220,000 chunks of 8 B parameters on 256 ranks.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class; raise UnpicklingError for any other name."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Run the `BUILD` opcode on instances of DCP's classes; raise UnpicklingError for anything else."""
        *_, instance, state = self.stack  # type: ignore[attr-defined]
        if type(instance) not in _BUILT or not (isinstance(state, dict) or hasattr(instance, "__setstate__")):
            raise pickle.UnpicklingError(f"it changes a {type(instance).__name__}, which no checkpoint of ours does")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class _CheckedEntries:
    """Mixin for DCP's readers: `MetadataUnpickler` for the metadata, and a check of entries before deserialisation.

    DCP's readers have no hook for either (2.13).
    """

    fs: Any
    load_id: Any

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Read the metadata; raise UnpicklingError if it holds other classes, or files outside the checkpoint."""
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
        """Check an entry's bytes and return them as an open file.

        Args:
            file: open file that contains the entry.
            offset: first byte of the entry.
            length: bytes.
            name: path of the file in the checkpoint folder.
        """


class EntryReader(_CheckedEntries, FileSystemReader):
    """DCP's reader for a folder on disk, with checks of metadata and entries."""


class FsspecEntryReader(_CheckedEntries, FsspecReader):
    """DCP's reader for a folder at a URL, with checks of metadata and entries; private in DCP (2.13)."""


def operator_name(operator: Any) -> str:
    """Return the name, such as `c10d::allreduce_`, of an operator in a `TorchDispatchMode` (2.13)."""
    name: str = operator.overloadpacket._qualified_op_name
    return name


def storage_error(message: str) -> str:
    """Translate `torch.save`'s message for any error of the output file, such as a full disk (2.13)."""
    return "a file could not be written to its end" if "inline_container.cc" in message else message


def connection_loss(error: RuntimeError) -> str:
    """Return the reason if a collective failed because another rank died or timed out, else an empty string.

    gloo raises plain RuntimeErrors, recognisable by the names of its source files (2.13).
    """
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return ""
    return re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
