"""The published sampler's fixtures: token ids, which must be the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.golden.fixture import Unsupported, get_sd_adapter, load_model
from memdlm_dist.inference import sampler
from memdlm_dist.inference.sampler import Canvas, Decoding
from memdlm_dist.models.llada import LLaDA

# What the fixtures' keys must be, where we have only one way.
_FIXED = {"stochastic_transfer": False, "cfg_scale": 0.0, "temperature": 0.0}


def sampler_differences(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """For each number of steps: (quantity, how many tokens differ) of the canvas after every step, and at the end.

    Raises:
        Unsupported: for a setting that we do not have.
    """
    settings = manifest["sampler"]
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise Unsupported(f"sampler.{key} = {settings[key]!r} is not supported")
    if settings["remasking"] != "low_confidence":
        raise Unsupported(f"sampler.remasking = {settings['remasking']!r} draws numbers of its own")
    part = {name: load_file(folder / path) for name, path in manifest["files"].items()}
    prompts = [
        part["inputs"][f"prompt{i}"].tolist() for i in range(len(part["inputs"])) if f"prompt{i}" in part["inputs"]
    ]
    new_tokens, block = settings["max_new_tokens"], settings["block_size"]
    start = sampler.canvas(prompts, new_tokens, manifest["mask_token_id"], manifest["eos_token_id"])
    sd_adapter = get_sd_adapter(manifest["arch"], start.tokens_BL.shape[1])
    model = load_model(sd_adapter, folder / manifest["files"]["weights"])
    for steps in settings["steps"]:
        decoding = Decoding(block_size=block, steps=-(-steps // -(-new_tokens // block)), stop_at_eos=False)
        canvases = [start.tokens_BL]
        for step in sampler.denoise(
            _reader(model, start), start, decoding, manifest["mask_token_id"], manifest["eos_token_id"]
        ):
            canvases.append(step.tokens_BL)
        outputs = part["outputs"]
        yield f"sequences in {steps} steps", _differing(canvases[-1], outputs[f"sequences_steps{steps}"])
        if f"histories_steps{steps}" in outputs:
            yield f"canvases of {steps} steps", _differing(torch.stack(canvases), outputs[f"histories_steps{steps}"])


def _differing(ours: Tensor, theirs: Tensor) -> int:
    return int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.numel()


def _reader(model: LLaDA, start: Canvas) -> sampler.Predict:
    @torch.no_grad()
    def predict(tokens_BL: Tensor, target_BL: Tensor) -> Tensor:
        index_M = target_BL.flatten().nonzero().squeeze(1)
        context = model.context(tokens_BL.shape[1], attended_BL=start.attended_BL)
        return model(tokens_BL, index_M, context=context)

    return predict
