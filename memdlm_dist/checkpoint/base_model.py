"""Quantised base of outer LoRA: read once at the start, identified in run.json, and never saved in checkpoints."""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import ModelWrapper

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.checkpoint.catalogue import METADATA, is_export, read_run
from memdlm_dist.checkpoint.model_check import check_model
from memdlm_dist.checkpoint.reading import load_states, read_metadata
from memdlm_dist.compat.torchao import NOT_INSTALLED, is_installed, is_nf4
from memdlm_dist.errors import UserError, require
from memdlm_dist.models import initial_weights, lora, nf4
from memdlm_dist.models.state_dict_adapters import BackboneStateDictAdapter, stored_dtype
from memdlm_dist.runtime.rank_0 import failure_reason, from_rank_0
from memdlm_dist.runtime.storage import Storage

logger = logging.getLogger()

BASE, TYPE = "base", "nf4"  # key of run.json, and its value's type
_SAMPLE = 2**20  # bytes at each end of a file of weights that enter the fingerprint
_PROGRESS = 30.0  # seconds between two lines of progress


class AdapterWrapper(ModelWrapper):
    """torchtitan's wrapper of a model for checkpoints, reduced to the adapters."""

    def state_dict(self) -> dict[str, Any]:
        """Return the adapters by parameter name."""
        return {name: tensor for name, tensor in super().state_dict().items() if lora.is_adapter(name)}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base, with quantised weights as they are stored."""
    return lora.without_adapters(ModelWrapper(model).state_dict())


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has a quantised base."""
    return any(map(is_nf4, model.parameters()))


def identity(location: str) -> dict[str, str]:
    """Return what identifies a base in run.json: its location, and a fingerprint of its files.

    Args:
        location: folder or URL of weights; empty for weights that were drawn from torch's seed.
    """
    if not location:
        return {"type": TYPE, "location": "", "fingerprint": f"random weights of seed {torch.initial_seed()}"}
    return {"type": TYPE, "location": location, "fingerprint": _fingerprint(Storage(location))}


def _fingerprint(storage: Storage) -> str:
    """Hash the sizes of the files of weights, and both ends of each, which hold its names, shapes and some values."""
    digest = hashlib.sha256()
    for name, size in sorted(storage.sizes().items()):
        if size is not None and (name.endswith((".safetensors", ".distcp")) or name == METADATA):
            digest.update(f"{name} {size}\n".encode())
            with storage.open(name) as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


def check_identity(checkpoint: str, run: Mapping[str, Any], current: Mapping[str, str]) -> None:
    """Check that a checkpoint's adapters were trained on this run's base.

    Args:
        run: content of the checkpoint's run.json.
        current: `identity` of this run's base.

    Raises:
        UserError: if they were not, or if the checkpoint holds a whole model.
    """
    saved = saved_identity(checkpoint, run)
    if saved is None:
        raise UserError(
            f"The checkpoint {checkpoint} was trained without a 4-bit base; set lora.base to 'unquantized', or change "
            "job.dump_folder to start anew."
        )
    if saved["fingerprint"] != current["fingerprint"]:
        raise UserError(
            f"The adapters in the checkpoint {checkpoint} were trained on the base {_named(saved)}, but this run's "
            f"base is {_named(current)}; correct checkpoint.initial_load_path, or change job.dump_folder to start anew."
        )


def saved_identity(checkpoint: str, run: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the identity of a checkpoint's base; None if the checkpoint holds a whole model.

    Raises:
        UserError: if run.json is damaged.
    """
    if BASE not in run:
        return None
    saved = run[BASE]
    valid = isinstance(saved, dict) and all(isinstance(saved.get(k), str) for k in ("location", "fingerprint"))
    if not valid or saved.get("type") != TYPE:
        raise UserError(f"{checkpoint}/run.json is damaged (base is {saved!r}); restore the file.")
    return saved


def _named(base: Mapping[str, str]) -> str:
    return f"{base['location']} (fingerprint {base['fingerprint']})" if base["location"] else base["fingerprint"]


@torch.no_grad()
def load(model: nn.Module, sd_adapter: BackboneStateDictAdapter, location: str, ignore_adapters: bool = False) -> None:
    """Read a base and quantise it, one whole tensor at a time; call on all ranks.

    Each rank reads every tensor, quantises it and keeps its rows.

    Args:
        location: folder of Hugging Face weights, or a checkpoint of all weights.
        ignore_adapters: the checkpoint may hold adapters of an unquantised base, which are not loaded.

    Raises:
        UserError: if the folder does not hold exactly this model's weights, or cannot be read.
    """
    exported = from_rank_0(lambda: is_export(Storage(location).sizes()))
    state, count = base_state(model), nf4.expert_count(model.model_args)
    plain = {name: tensor for name, tensor in state.items() if not is_nf4(tensor)}
    if exported:
        from_rank_0(lambda: hugging_face_folder.check(location, sd_adapter))
    else:
        shapes = {
            name: torch.empty(nf4.stored_shape(name, tensor, count), device="meta") for name, tensor in state.items()
        }
        if problem := from_rank_0(lambda: _checkpoint_problem(location, shapes, ignore_adapters)):
            raise UserError(f"The checkpoint {location} {problem}")

    def read(tensors: dict[str, Any]) -> dict[str, Any]:
        if exported:
            return hugging_face_folder.read_into(tensors, sd_adapter, location)
        try:
            load_states(tensors, location)
        except CheckpointException as failure:
            raise UserError(
                f"The checkpoint {location} cannot be read ({failure_reason(failure)}); choose another."
            ) from None
        return tensors

    ModelWrapper(model).load_state_dict(read(plain))
    reported = time.perf_counter()
    quantized = {name: tensor for name, tensor in state.items() if is_nf4(tensor)}
    for number, (name, tensor) in enumerate(quantized.items(), 1):
        whole = nf4.empty(tensor).view(nf4.stored_shape(name, tensor, count))
        nf4.assign(tensor, read({name: whole})[name])
        if time.perf_counter() - reported > _PROGRESS:
            logger.info(f"Quantised {number} of {len(quantized)} tensors of {location}.")
            reported = time.perf_counter()


def _checkpoint_problem(location: str, shapes: Mapping[str, Tensor], ignore_adapters: bool) -> str:
    """Return the problem of a checkpoint of all weights as a predicate with its remedy, or an empty string."""
    if BASE in read_run(Storage(location)):
        return "holds adapters of a 4-bit base alone; name that base instead."
    if problem := check_model(location, shapes, ignore_adapters=True):
        return f"{problem}; choose another."
    if ignore_adapters or not any(map(lora.is_adapter, read_metadata(location).state_dict_metadata)):
        return ""
    return "holds adapters of a base without quantisation; set lora.base to 'unquantized', or name its base."


@torch.no_grad()
def restore(
    model: nn.Module, sd_adapter: BackboneStateDictAdapter, checkpoint: str, run: Mapping[str, Any], initial: str
) -> None:
    """Load the base that a checkpoint's adapters were trained on; call on all ranks.

    Args:
        run: content of the checkpoint's run.json.
        initial: another location where the base may be, if it is not where it was in training.

    Raises:
        UserError: if the model's base is not quantised, or the base cannot be read or has changed.
    """
    saved = saved_identity(checkpoint, run)
    assert saved is not None
    if not is_quantized(model):
        raise needs_quantized_base(checkpoint)
    if saved["location"]:
        load(model, sd_adapter, from_rank_0(lambda: _find(checkpoint, saved, [initial])))
    else:
        sizes: Any = model.model_args
        initial_weights.draw(model, sizes, _seed(checkpoint, saved))


def read(
    tensors: Mapping[str, Tensor], sd_adapter: BackboneStateDictAdapter, checkpoint: str, copies: Sequence[str]
) -> dict[str, Tensor]:
    """Read the base that a checkpoint's adapters were trained on, dequantised, in one process on the CPU.

    Args:
        tensors: the unquantised model's tensors without storage, in the compute dtype.
        checkpoint: location of the checkpoint.
        copies: other locations where the base may be, if it is not where it was in training.

    Raises:
        UserError: if the base cannot be read or has changed.
    """
    saved = saved_identity(checkpoint, read_run(Storage(checkpoint)))
    assert saved is not None
    require(
        is_installed(),
        f"The checkpoint {checkpoint} holds adapters of a 4-bit base, which needs {NOT_INSTALLED}.",
    )
    location, base = saved["location"], lora.without_adapters(tensors)
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in base.items()}
    if not location:
        initial_weights.fill(state, sd_adapter.args, _seed(checkpoint, saved))
    else:
        location = _find(checkpoint, saved, copies)
        if is_export(Storage(location).sizes()):
            hugging_face_folder.check(location, sd_adapter)
            state = hugging_face_folder.read_into(state, sd_adapter, location)
        else:
            load_states(state, location, no_dist=True)
    return {
        name: nf4.round_trip(tensor, base[name].dtype) if nf4.is_linear(name) else tensor
        for name, tensor in state.items()
    }


def needs_quantized_base(checkpoint: str) -> UserError:
    """Return the error for a checkpoint of adapters alone that is read into a model without a quantised base."""
    return UserError(
        f"The checkpoint {checkpoint} holds adapters of a 4-bit base; set lora.base to 'nf4', as in the run that "
        "saved it."
    )


def _find(checkpoint: str, saved: Mapping[str, str], copies: Sequence[str]) -> str:
    """Return the location of the base that a checkpoint's adapters were trained on: the saved one, or a copy."""
    for location in (saved["location"], *filter(None, copies)):
        if identity(location)["fingerprint"] == saved["fingerprint"]:
            return location
    raise UserError(
        f"The weights in {saved['location']}, on which the adapters in {checkpoint} were trained, are missing or have "
        "changed; restore them, or name a copy with checkpoint.initial_load_path."
    )


def _seed(checkpoint: str, saved: Mapping[str, str]) -> int:
    seed = saved["fingerprint"].rpartition(" ")[2]
    if not seed.isdecimal() or int(seed) >= 2**64:
        raise UserError(f"{checkpoint}/run.json is damaged (its base has no seed); restore the file.")
    return int(seed)


def exported_state(model: nn.Module, scale: float, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the dequantised model with its adapters merged, sharded, on the CPU.

    Args:
        scale: alpha / R.
        dtype: dtype of the result; None for the compute dtype.
    """
    state, count = ModelWrapper(model).state_dict(), nf4.expert_count(model.model_args)
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if lora.is_adapter(name):
            adapters.setdefault(lora.base_weight_name(name), {})[name] = tensor
    result = {}
    for name, tensor in lora.without_adapters(state).items():
        # One weight at a time, because the device may have no room for the whole model.
        weight = lora.merged({name: nf4.dequantized(name, tensor, count), **adapters.get(name, {})}, scale)[name]
        result[name] = weight.to(stored_dtype(name, dtype or weight.dtype)).cpu()
    return result
