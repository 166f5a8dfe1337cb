"""Golden checks of the sampler: its token ids must equal those of the published sampler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.golden.fixture import Unsupported, get_sd_adapter, load_model
from memdlm_dist.inference import sampler
from memdlm_dist.inference.canvas import canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.inference.sampler import Decoder

# Settings of which only one value is supported.
_FIXED = {"stochastic_transfer": False, "temperature": 0.0}


def sampler_differences(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (quantity, number of differing tokens), for the final sequences and the canvases after every step.

    Both are compared for each of the fixture's numbers of steps.

    Raises:
        Unsupported: the fixture has a setting that is not supported.
    """
    settings = manifest["sampler"]
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise Unsupported(f"sampler.{key} = {settings[key]!r} is not supported.")
    if settings["remasking"] != "low_confidence":
        raise Unsupported(f"sampler.remasking = {settings['remasking']!r} is not supported: it draws random numbers.")
    tensors = {name: load_file(folder / path) for name, path in manifest["files"].items()}
    prompts = [
        tensors["inputs"][f"prompt{i}"].tolist()
        for i in range(len(tensors["inputs"]))
        if f"prompt{i}" in tensors["inputs"]
    ]
    new_tokens, block = settings["max_new_tokens"], settings["block_size"]
    start = canvas(prompts, new_tokens, manifest["mask_token_id"], manifest["eos_token_id"])
    sd_adapter = get_sd_adapter(manifest["arch"], start.tokens_BL.shape[1])
    model = load_model(sd_adapter, folder / manifest["files"]["weights"])
    for steps in settings["steps"]:
        decoding = Decoding(
            block_size=block,
            steps=-(-steps // -(-new_tokens // block)),
            stop_at_eos=False,
            cfg_scale=settings.get("cfg_scale", 0.0),
        )
        canvases = [start.tokens_BL]
        batch, length = start.tokens_BL.shape
        reader = ModelReader(model, batch, length, torch.device("cpu"), guidance=decoding.cfg_scale)
        decoder = Decoder(reader, decoding, batch, length, manifest["mask_token_id"], manifest["eos_token_id"])
        decoder.load(range(batch), start)
        canvases += [step.tokens_BL for step in sampler.steps(decoder, length)]
        outputs = tensors["outputs"]
        yield f"sequences in {steps} steps", _count_differing(canvases[-1], outputs[f"sequences_steps{steps}"])
        if f"histories_steps{steps}" in outputs:
            yield (
                f"canvases of {steps} steps",
                _count_differing(torch.stack(canvases), outputs[f"histories_steps{steps}"]),
            )


def _count_differing(ours: Tensor, theirs: Tensor) -> int:
    return int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.numel()
