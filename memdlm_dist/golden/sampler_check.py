"""Golden checks of the sampler: its token ids must equal those of the published sampler."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from memdlm_dist.golden.fixture import Unsupported, get_sd_adapter, load_model
from memdlm_dist.inference import sampler
from memdlm_dist.inference.canvas import Canvas, canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.inference.sampler import Decoder
from memdlm_dist.models.llada import LLaDA

# Settings of which only one value is supported.
_FIXED = {"stochastic_transfer": False, "temperature": 0.0}
# Keys of all runs of LLaDA2.1's fixtures, and those of each algorithm.
_RUN_KEYS = {"name", "algorithm", "block_size", "max_new_tokens", "threshold", "eos_early_stop", "eos_id"}
_ALGORITHM_KEYS = {
    "schedule": {"steps_per_block", "minimal_topk"},
    "edit": {"editing_threshold", "max_post_steps", "num_to_transfer"},
}


def sampler_differences(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (quantity, number of differing tokens), for the final sequences and the canvases after every step.

    Both are compared for each of the fixture's numbers of steps, or for each of its runs.

    Raises:
        Unsupported: the fixture has a setting that is not supported.
    """
    settings = manifest["sampler"]
    for key, value in _FIXED.items():
        if settings.get(key, value) != value:
            raise Unsupported(f"sampler.{key} = {settings[key]!r} is not supported.")
    tensors = {name: load_file(folder / path) for name, path in manifest["files"].items()}
    weights = folder / manifest["files"]["weights"]
    compare = _compare_runs if "runs" in settings else _compare_steps
    yield from compare(manifest, weights, tensors["inputs"], tensors["outputs"])


def _compare_steps(
    manifest: dict[str, Any], weights: Path, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[tuple[str, int]]:
    """Compare decoding in several numbers of steps, with all prompts in one batch."""
    settings, mask_id, eos_id = manifest["sampler"], manifest["mask_token_id"], manifest["eos_token_id"]
    if settings["remasking"] != "low_confidence":
        raise Unsupported(f"sampler.remasking = {settings['remasking']!r} is not supported: it draws random numbers.")
    new_tokens, block = settings["max_new_tokens"], settings["block_size"]
    start = canvas(_prompts(inputs), new_tokens, mask_id, eos_id)
    model = load_model(get_sd_adapter(manifest["arch"], start.tokens_BL.shape[1]), weights)
    for steps in settings["steps"]:
        decoding = Decoding(
            block_size=block,
            steps=-(-steps // -(-new_tokens // block)),
            stop_at_eos=False,
            cfg_scale=settings.get("cfg_scale", 0.0),
        )
        canvases = decode(model, decoding, start, mask_id, eos_id)
        yield f"sequences in {steps} steps", _count_differing(canvases[-1], outputs[f"sequences_steps{steps}"])
        if f"histories_steps{steps}" in outputs:
            yield f"canvases of {steps} steps", _count_differing(canvases, outputs[f"histories_steps{steps}"])


def _compare_runs(
    manifest: dict[str, Any], weights: Path, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[tuple[str, int]]:
    """Compare runs of LLaDA2.1's algorithms, each with prompts of its own, one at a time."""
    runs, mask_id = manifest["sampler"]["runs"], manifest["mask_token_id"]
    decodings = [run_decoding(run) for run in runs]
    model = load_model(get_sd_adapter(manifest["arch"], max(len(x) for x in outputs.values() if x.ndim == 1)), weights)
    for run, decoding in zip(runs, decodings, strict=True):
        differing = {"sequences": 0, "canvases": 0}
        for number, prompt in enumerate(_prompts(inputs, f"{run['name']}.")):
            # The published canvas ends with a whole block.
            blocks = -(-(len(prompt) + run["max_new_tokens"]) // run["block_size"])
            start = canvas([prompt], blocks * run["block_size"] - len(prompt), mask_id, run["eos_id"])
            canvases = decode(model, decoding, start, mask_id, run["eos_id"])[:, 0]
            sequence, history = (outputs[f"{kind}.{run['name']}.prompt{number}"] for kind in ("sequences", "histories"))
            if decoding.stop_at_eos:
                # The published sampler leaves the blocks after end-of-text masked; ours fills them with end-of-text.
                sequence = sequence.masked_fill(sequence == mask_id, run["eos_id"])
                history = torch.cat([history[:-1], sequence.unsqueeze(0)])
            differing["sequences"] += _count_differing(canvases[-1], sequence)
            differing["canvases"] += _count_differing(canvases, history)
        note = " (end filled)" if decoding.stop_at_eos else ""
        yield from ((f"{kind} of {run['name']}{note}", count) for kind, count in differing.items())


def run_decoding(run: dict[str, Any]) -> Decoding:
    """Return the decoding settings of a run.

    Raises:
        Unsupported: the algorithm or a setting is not supported; the message names it.
    """
    algorithm = run["algorithm"]
    if algorithm not in _ALGORITHM_KEYS:
        raise Unsupported(f"sampler.runs.algorithm = {algorithm!r} is not supported.")
    if unknown := sorted(run.keys() - _RUN_KEYS - _ALGORITHM_KEYS[algorithm]):
        raise Unsupported(f"sampler.runs.{unknown[0]} is not supported with the algorithm {algorithm!r}.")
    common = Decoding(block_size=run["block_size"], threshold=run["threshold"], attention="block_causal")
    if algorithm == "schedule":
        steps = min(run["steps_per_block"], run["max_new_tokens"] // run["minimal_topk"])
        if not steps:
            raise Unsupported(
                f"sampler.runs.minimal_topk = {run['minimal_topk']} is not supported with max_new_tokens = "
                f"{run['max_new_tokens']}: it leaves no step."
            )
        return replace(common, steps=steps, stop_at_eos=False, leave_masks=run["eos_early_stop"])
    return replace(
        common,
        min_tokens=run["num_to_transfer"],
        edit_threshold=run["editing_threshold"],
        post_steps=run["max_post_steps"],
        stop_at_eos=run["eos_early_stop"],
    )


def _prompts(inputs: dict[str, Tensor], prefix: str = "") -> list[list[int]]:
    names = takewhile(inputs.__contains__, (f"{prefix}prompt{number}" for number in count()))
    return [inputs[name].tolist() for name in names]


def decode(model: LLaDA, decoding: Decoding, start: Canvas, mask_id: int, eos_id: int) -> Tensor:
    """Return the canvases before the first step and after every step, `[steps + 1, B, L]`."""
    batch, length = start.tokens_BL.shape
    reader = ModelReader(
        model,
        batch,
        length,
        torch.device("cpu"),
        cached=decoding.cache != "none",
        causal_block=decoding.block_size if decoding.attention == "block_causal" else None,
        guidance=decoding.cfg_scale,
    )
    decoder = Decoder(reader, decoding, batch, length, mask_id, eos_id)
    decoder.load(range(batch), start)
    return torch.stack([start.tokens_BL, *(step.tokens_BL for step in sampler.steps(decoder, length))])


def _count_differing(ours: Tensor, theirs: Tensor) -> int:
    return int((ours != theirs).sum()) if ours.shape == theirs.shape else theirs.numel()
