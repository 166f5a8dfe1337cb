"""PEFT folders: outer LoRA adapters alone, as adapter_config.json and adapter_model.safetensors.

PEFT names a tensor after the base model's module: base_model.model.<module>.lora_A.weight. The adapters of a layer's
experts are one stacked tensor here, `[E, R, in]` or `[E, out, R]`, and one tensor per expert there.

Some linears here are rows of one fused linear there, such as queries, keys and values, n = 3. Their adapters are one
adapter of rank n R there: A `[n R, in]` stacks theirs, and B `[out, n R]` has theirs as blocks. An adapter of rank R
that was trained on the fused linear gives each of them a copy of A, and its rows of B.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.compat.torch import local_block
from memdlm_dist.errors import UserError, require
from memdlm_dist.models import lora
from memdlm_dist.models.linears import ALL_LINEAR, GROUPS, LINEARS, ROUTER, adapter_linear_names
from memdlm_dist.models.lora import LoRA, add_adapters
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.models.row_slices import RowSlice
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import from_rank_0, on_all_ranks, one_line

CONFIG, TENSORS, _PICKLE = hub.ADAPTER_CONFIG, hub.ADAPTER_TENSORS, "adapter_model.bin"
_PREFIX = "base_model.model."
_DTYPES = ("F64", "F32", "F16", "BF16")  # by safetensors' names

# Keys of adapter_config.json that are read, that the names of the tensors imply, or that do not affect the result of a
# trained adapter on its base.
_READ_OR_IGNORED = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "base_model_name_or_path",
    "revision", "task_type", "auto_mapping", "peft_version", "inference_mode", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config",
)  # fmt: skip
# Accepted values of the other keys. Any other key must be unset: null, false or empty.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other initialisations, such as pissa, also change the weights of the base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """Description of the adapter in a PEFT folder.

    Attributes:
        rank: rank of the adapters.
        alpha: numerator of their scale, alpha / rank.
        targets: linears with an adapter, in all layers, as values of lora.target_modules.
        dropout: dropout that the adapter was trained with.
        base: name or path of the base model, as written in the folder; may be empty.
        stacked: adapters of fused linears have the rank n R.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float
    base: str
    stacked: bool = False

    def settings(self, section: LoRA) -> LoRA:
        """Return a copy of a [lora] section with the rank, alpha and targets of this adapter."""
        return replace(section, rank=self.rank, alpha=self.alpha, target_modules=list(self.targets))


class _Place(NamedTuple):
    """Place of a PEFT tensor's block in the model: parameter, index of the expert in it, shape and offset."""

    name: str
    expert: int | None
    shape: tuple[int, ...]
    offset: tuple[int, int] = (0, 0)  # of the block in the PEFT tensor

    def block(self) -> tuple[slice, slice]:
        """Return the rows and columns of the PEFT tensor that the block takes."""
        rows, columns = (slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))
        return rows, columns


def read(folder: str, sd_adapter: BackboneStateDictAdapter) -> Adapter:
    """Read and check the description of a PEFT folder, and the names, shapes and dtypes of its tensors.

    Raises:
        UserError: naming the file, the key of adapter_config.json or the tensor that does not fit this backbone.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"There is no folder {folder} with an adapter in PEFT's format; correct the path.")
    fused = _fused(sd_adapter)
    config = _read_config(path / CONFIG, fused)
    rank, alpha = config["r"], float(config["lora_alpha"])
    stacked = bool(config.get("rank_pattern"))
    alpha *= math.sqrt(rank) if config.get("use_rslora") else 1.0  # the scale is then alpha / sqrt(rank)
    targets = _check_tensors(path, sd_adapter, rank, stacked)
    dropout, base = config.get("lora_dropout") or 0.0, config.get("base_model_name_or_path") or ""
    return Adapter(rank, alpha, targets, float(dropout), str(base), stacked)


def check(folder: str, sd_adapter: BackboneStateDictAdapter, section: LoRA) -> Adapter:
    """Read a folder's description, and check that the [lora] section describes the same adapters.

    Raises:
        UserError: see `read`; also if rank, alpha or targets differ, naming the key to change.
    """
    adapter = read(folder, sd_adapter)
    has_router = issubclass(sd_adapter.model_cls, LLaDAMixture)
    ours, theirs = (set(adapter_linear_names(x, has_router)) for x in (section.target_modules, adapter.targets))
    values = {
        "rank": (adapter.rank, section.rank, adapter.rank == section.rank),
        "alpha": (adapter.alpha, section.alpha, math.isclose(adapter.alpha, section.alpha, rel_tol=1e-6)),
        "target_modules": (list(adapter.targets), section.target_modules, ours == theirs),
    }
    for key, (found, configured, same) in values.items():
        require(
            same,
            f"The adapter in {folder} has {key} {json.dumps(found)}, but lora.{key} is {json.dumps(configured)}; set "
            f"lora.{key} = {json.dumps(found)}.",
        )
    return adapter


def load(state: Mapping[str, Tensor], sd_adapter: BackboneStateDictAdapter, folder: str, section: LoRA) -> Adapter:
    """Load the adapters of a folder into a model with any parallel layout, in place; call on all ranks.

    Each rank reads only its own shards.

    Args:
        state: the model's tensors by parameter name, sharded or not; those of the base are ignored.
        section: the adapters' settings, which must be the folder's.

    Raises:
        UserError: on all ranks, if the folder is not an adapter of this model, or a rank cannot read it.
    """
    adapter: Adapter = from_rank_0(lambda: check(folder, sd_adapter, section))
    try:
        on_all_ranks(lambda: _read_shards(state, sd_adapter, folder, adapter.stacked), "Reading an adapter")
    except OSError as error:
        raise UserError(f"The adapter in {folder} cannot be read ({one_line(error)}); copy it to all nodes.") from None
    return adapter


@torch.no_grad()
def _read_shards(state: Mapping[str, Tensor], sd_adapter: BackboneStateDictAdapter, folder: str, stacked: bool) -> None:
    adapters = _adapters(state)
    places = _places({name: x.shape for name, x in adapters.items()}, sd_adapter, stacked)
    try:
        with safe_open(Path(folder) / TENSORS, framework="pt") as opened:
            for key, place in ((key, place) for key, blocks in places.items() for place in blocks):
                local, first = local_block(adapters[place.name])
                if place.expert is not None:
                    if not 0 <= place.expert - first[0] < len(local):
                        continue  # another rank's expert
                    local, first = local[place.expert - first[0]], first[1:]
                rows, columns = (
                    slice(offset + start, offset + start + size)
                    for offset, start, size in zip(place.offset, first, local.shape, strict=True)
                )
                if local.numel():
                    local.copy_(opened.get_slice(key)[rows, columns])
    except SafetensorError as error:
        raise OSError(one_line(error)) from None


def _adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if lora.is_adapter(name)}


def _read_config(file: Path, fused: Mapping[str, int]) -> dict[str, Any]:
    """Return the keys of adapter_config.json; raises UserError if one of them is not supported.

    Args:
        fused: see `_fused`.
    """
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}); name a folder that PEFT has saved.") from None
    require(isinstance(config, dict), f"{file} is not a JSON object; name a folder that PEFT has saved.")
    patterns = _patterns(config.get("r"), config.get("lora_alpha"), fused)
    has_patterns = all(config.get(key) == value for key, value in patterns.items()) and not config.get("use_rslora")
    for key, value in {"peft_type": None, **config}.items():
        if has_patterns and key in patterns:
            continue
        accepted = value in _ACCEPTED[key] if key in _ACCEPTED else key in _READ_OR_IGNORED or not value
        require(
            accepted,
            f"{file} sets {key} to {json.dumps(value)}, which is not supported; use an adapter of plain LoRA, or merge "
            "it into its base with PEFT.",
        )
    for key, types in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(key)
        valid = isinstance(value, types) and not isinstance(value, bool) and 0 < value < math.inf
        require(valid, f"{file} sets {key} to {json.dumps(value)}, not a positive number; correct it.")
    dropout = config.get("lora_dropout") or 0.0
    require(
        isinstance(dropout, (int, float)) and 0 <= dropout <= 1,
        f"{file} sets lora_dropout to {json.dumps(dropout)}, not a probability; correct it.",
    )
    return config


def _fused(sd_adapter: BackboneStateDictAdapter) -> dict[str, int]:
    """Return the fused linears of the published weights, and the number n of linears here that each of them holds."""
    names: dict[str, set[RowSlice]] = {}
    with torch.device("meta"):
        state = sd_adapter.to_hf(dict(sd_adapter.model_cls(sd_adapter.args).state_dict()))
    for part in filter(None, map(RowSlice.parse, state)):
        linear = part.whole.removesuffix(".weight").rpartition(".")[2]
        names.setdefault(linear, set()).add(part._replace(whole=linear))
    return {linear: len(parts) for linear, parts in names.items()}


def _patterns(rank: Any, alpha: Any, fused: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the keys of adapter_config.json that give adapters of fused linears the rank n R, with the same scale."""
    if not fused or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        return {}
    return {
        "rank_pattern": {linear: n * rank for linear, n in fused.items()},
        "alpha_pattern": {linear: n * alpha for linear, n in fused.items()},
    }


def _check_tensors(path: Path, sd_adapter: BackboneStateDictAdapter, rank: int, stacked: bool) -> tuple[str, ...]:
    """Check names, shapes and dtypes of all tensors; return the linears with adapters, grouped if complete."""
    file = path / TENSORS
    require(
        file.is_file() or not (path / _PICKLE).exists(),
        f"The adapter in {path} is a pickle ({_PICKLE}), which is not read because it can run code; save it with PEFT "
        "as safetensors.",
    )
    with torch.device("meta"):
        model = sd_adapter.model_cls(sd_adapter.args)
    add_adapters(model, LoRA(rank=rank, target_modules=[ALL_LINEAR]), torch.float32, torch.float32)
    known = _places({name: x.shape for name, x in _adapters(model.state_dict()).items()}, sd_adapter, stacked)
    try:
        with safe_open(file, framework="pt") as opened:
            found = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            headers = {key: (tuple(x.get_shape()), x.get_dtype()) for key, x in found.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}); save the adapter again.") from None
    require(bool(headers), f"{file} holds no adapters; save the adapter again.")
    for key, (shape, dtype) in headers.items():
        require(
            key in known,
            f"The adapter in {path} holds a tensor that has no place in this model, {key}; choose the model.name and "
            "model.flavor of its base, or an adapter of attention, FFN and router linears alone.",
        )
        expected = _size(known[key])
        require(
            shape == expected,
            f"The tensor {key} of the adapter in {path} has shape {shape}, but {expected} in this model with "
            f"rank {rank}; choose the model.flavor of its base.",
        )
        require(
            dtype in _DTYPES,
            f"The tensor {key} of the adapter in {path} is of type {dtype}, not one of {', '.join(_DTYPES)}; save it "
            "in floating point.",
        )
    adapted = {lora.target_name(place.name) for key in headers for place in known[key]}
    for key, (place, *_) in known.items():
        require(
            key in headers or lora.target_name(place.name) not in adapted,
            f"The adapter in {path} lacks the tensor {key}, though it has other tensors of that kind; all layers and "
            "experts must have adapters of the same linears.",
        )
    if stacked:
        _check_blocks(path, {key: blocks for key, blocks in known.items() if key in headers})
    return _grouped(adapted)


def _check_blocks(path: Path, places: Mapping[str, Sequence[_Place]]) -> None:
    """Check that the adapters of fused linears have no elements outside the blocks of the linears here."""
    with safe_open(path / TENSORS, framework="pt") as opened:
        for key, blocks in places.items():
            if len(blocks) == 1 or all(block.offset[1] == 0 for block in blocks):
                continue
            rest = opened.get_tensor(key)
            for block in blocks:
                rest[block.block()] = 0
            require(
                not rest.any(),
                f"The adapter in {path} mixes the parts of a fused linear in {key}; merge it into its base with PEFT.",
            )


def _grouped(names: set[str]) -> tuple[str, ...]:
    """Return targets for the linears `names`: groups where they are complete, else single linears."""
    groups = [group for group in reversed(GROUPS) if names.issuperset(GROUPS[group])]
    single = names.difference(*(GROUPS[group] for group in groups))
    return (*groups, *(name for name in (*LINEARS, ROUTER) if name in single))


def _places(
    shapes: Mapping[str, torch.Size], sd_adapter: BackboneStateDictAdapter, stacked: bool
) -> dict[str, list[_Place]]:
    """Return the places of the blocks of every tensor of a PEFT folder, by its key.

    Args:
        shapes: unsharded shapes of the model's adapters, by parameter name.
        stacked: adapters of fused linears have the rank n R.
    """
    places: dict[str, list[_Place]] = {}
    for name, shape in shapes.items():
        of_experts = len(shape) == 3
        full = torch.empty(shape, device="meta")
        for expert, weight in enumerate(sd_adapter.to_hf({lora.base_weight_name(name): full})):
            part = RowSlice.parse(weight)
            blocks = places.setdefault(_key(part.whole if part else weight, name), [])
            number, start = (len(blocks) * stacked, part.start) if part else (0, 0)
            rank = shape[-2] if name.endswith(lora.A) else shape[-1]
            offset = (number * rank, 0) if name.endswith(lora.A) else (start, number * rank)
            blocks.append(_Place(name, expert if of_experts else None, tuple(shape[-2:]), offset))
    return places


def _size(blocks: Sequence[_Place]) -> tuple[int, int]:
    """Return the shape of a PEFT tensor with these blocks."""
    rows, columns = (max(block.offset[i] + block.shape[i] for block in blocks) for i in range(2))
    return rows, columns


def _key(weight: str, name: str) -> str:
    """Return PEFT's key of an adapter's tensor, by its weight's Hugging Face name and our parameter name."""
    return f"{_PREFIX}{weight.removesuffix('.weight')}.{name[-len(lora.A) :]}.weight"


def write(
    state: Mapping[str, Tensor], folder: str, sd_adapter: BackboneStateDictAdapter, section: LoRA, base: str
) -> None:
    """Write the adapters as a PEFT folder.

    Args:
        state: unsharded tensors; those that are not adapters are ignored.
        section: the adapters' settings.
        base: name or path of the base model. For a folder in the hub's cache, the repository is written instead.
    """
    repository = hub.origin(base)
    adapters = _adapters(state)
    places = _places({name: x.shape for name, x in adapters.items()}, sd_adapter, stacked=True)
    fused = _fused(sd_adapter) if any(len(blocks) > 1 for blocks in places.values()) else {}
    tensors, modules = {}, set()
    for key, blocks in places.items():
        # New tensors, because tensors of one file may not share memory.
        tensors[key] = adapters[blocks[0].name].new_zeros(_size(blocks))
        for place in blocks:
            tensor = adapters[place.name]
            tensors[key][place.block()] = tensor if place.expert is None else tensor[place.expert]
        modules.add(key.removeprefix(_PREFIX).rpartition(".lora_")[0])
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True,
        "base_model_name_or_path": repository.id if repository else base,
        "revision": repository.revision if repository else None,
        "r": section.rank, "lora_alpha": section.alpha, "lora_dropout": section.dropout,
        "bias": "none", "fan_in_fan_out": False,
        # Full names, because LLaDA-8B's output head has the same last component as the down projections.
        "target_modules": sorted(modules),
        **_patterns(section.rank, section.alpha, fused),
    }  # fmt: skip
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the adapters in a model's state dict as unsharded CPU tensors; call on all ranks."""
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in _adapters(state).items()}
