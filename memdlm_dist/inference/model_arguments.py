"""Command-line arguments for loading a trained model and for decoding."""

import argparse
import math
from collections.abc import Sequence
from typing import get_args

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.decoding import POST_STEPS, Cache, Decoding
from memdlm_dist.inference.memory_arguments import get_memory
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.models import backbone_args
from memdlm_dist.runtime.entry_point import positive, quiet


def add_model_arguments(p: argparse.ArgumentParser, several_checkpoints: bool = False) -> argparse._ArgumentGroup:
    """Add the group "model" (CONFIG, --checkpoint, --adapter, ...) to a parser; return the group."""
    g = p.add_argument_group("model")
    g.add_argument("config", metavar="CONFIG", help="TOML file of the run that trained the model")
    g.add_argument(
        "--checkpoint",
        nargs="+" if several_checkpoints else None,
        metavar="DIR",
        help="folder of a checkpoint step-N, folder or URL of several (the newest intact one is loaded), folder of "
        "Hugging Face weights, or repository ORG/NAME of the hub (default: the run's checkpoints). Load only "
        "checkpoints that you trust: their metadata is a pickle",
    )
    g.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder of an adapter in PEFT's format, or repository ORG/NAME of the hub: read its base from the "
        "checkpoint, and this adapter in place of the run's (default: none)",
    )
    return g


def token_ids(text: str) -> tuple[int, ...]:
    """Parse comma-separated token ids (argparse type).

    Raises:
        ValueError: if an item is not an integer of at least 0.
    """
    ids = tuple(int(item) for item in text.split(","))
    if min(ids) < 0:
        raise ValueError
    return ids


def add_decoding_arguments(p: argparse.ArgumentParser, new_tokens: int | None) -> argparse._ArgumentGroup:
    """Add the group "decoding" to a parser; return the group. `new_tokens` is the default of --new-tokens."""
    g = p.add_argument_group("decoding")
    default = "0 if the prompt has [MASK]s, else 64" if new_tokens is None else str(new_tokens)
    g.add_argument("--new-tokens", type=int, default=new_tokens, metavar="N",
                   help=f"[MASK] tokens appended to the prompt (default: {default})")  # fmt: skip
    g.add_argument("--block-size", type=positive, default=32, metavar="N", help="block size in tokens (default: 32)")
    g.add_argument("--steps", type=positive, metavar="N",
                   help="denoising steps per block; an upper limit with --threshold (default: one per token)"
                   )  # fmt: skip
    g.add_argument("--threshold", type=float, metavar="P",
                   help="keep all predictions with a confidence above this in each step, and at least its quota of the "
                   "most confident ones (default: none, a fixed number of steps)")  # fmt: skip
    g.add_argument("--min-tokens", type=positive, default=1, metavar="N",
                   help="quota of a step with --threshold and without --steps (default: 1)")  # fmt: skip
    g.add_argument("--edit-threshold", type=float, metavar="P",
                   help="replace decoded tokens of the present block by predictions with a confidence above this; "
                   "needs --threshold (default: none, decoded tokens stay)")  # fmt: skip
    g.add_argument("--post-steps", type=int, metavar="N",
                   help="with --edit-threshold, most steps in a block after its last [MASK] (default: "
                   f"{POST_STEPS})")  # fmt: skip
    g.add_argument("--cache", choices=get_args(Cache), default="none",
                   help="keys and values that a step takes from an earlier pass: those before the present block "
                   "(prefix), or those after it too (dual); faster, and approximate with full attention "
                   "(default: none)")  # fmt: skip
    g.add_argument("--cache-refresh", type=int, default=0, metavar="N",
                   help="steps of a block between two passes that read the whole text; 0 reads it once per block "
                   "(default: 0)")  # fmt: skip
    g.add_argument("--attention", choices=("full", "block-causal"), default="full",
                   help="tokens that each token attends to: all (full), or those of its block and of earlier ones, for "
                   "backbones that were trained so (default: full)")  # fmt: skip
    g.add_argument("--temperature", type=float, default=0.0, metavar="T",
                   help="temperature of the Gumbel noise; 0 decodes greedily (default: 0)")  # fmt: skip
    g.add_argument("--remasking", choices=("low_confidence", "random"), default="low_confidence",
                   help="rule that selects the predictions to mask again (default: low_confidence)")  # fmt: skip
    g.add_argument("--cfg-scale", type=float, default=0.0, metavar="S",
                   help="scale of classifier-free guidance, with a second forward pass per step that reads [MASK]s in "
                   "place of the prompt; 0 decodes without guidance (default: 0)")  # fmt: skip
    g.add_argument("--suppress-tokens", type=token_ids, default=(), metavar="ID,ID",
                   help="comma-separated ids of tokens that are never predicted (default: none)")  # fmt: skip
    g.add_argument("--no-eos-stop", action="store_true", help="continue decoding after end-of-text")
    g.add_argument("--decoding-seed", type=int, default=0, metavar="N",
                   help="seed of the Gumbel noise and of random remasking (default: 0)")  # fmt: skip
    return g


def get_decoding(options: argparse.Namespace) -> Decoding:
    """Return the decoding settings of the parsed arguments.

    Raises:
        UserError: if a value is out of range.
    """
    if options.temperature < 0:
        raise UserError(f"--temperature must not be negative, but is {options.temperature}.")
    if not 0 <= options.cfg_scale < math.inf:
        raise UserError(f"--cfg-scale must be a finite number of at least 0, but is {options.cfg_scale}.")
    if options.new_tokens is not None and options.new_tokens < 0:
        raise UserError(f"--new-tokens must not be negative, but is {options.new_tokens}.")
    return Decoding(
        block_size=options.block_size,
        steps=options.steps,
        temperature=options.temperature,
        remasking=options.remasking,
        stop_at_eos=not options.no_eos_stop,
        seed=options.decoding_seed,
        cfg_scale=options.cfg_scale,
        suppress_tokens=options.suppress_tokens,
        threshold=options.threshold,
        min_tokens=options.min_tokens,
        edit_threshold=options.edit_threshold,
        post_steps=options.post_steps,
        cache=options.cache,
        cache_refresh=options.cache_refresh,
        attention=options.attention.replace("-", "_"),
    )


def load_model(
    options: argparse.Namespace,
    overrides: Sequence[str],
    checkpoint: str | None = None,
    decoding: Decoding | None = None,
    memory: bool = True,
) -> TrainedModel:
    """Load the model of the parsed arguments, without torchtitan's log lines.

    `decoding` and the settings of the memory are checked first, since loading can take minutes. For `memory` see
    `TrainedModel`.

    Raises:
        UserError: if a value is out of range, or if the configuration or the checkpoint does not fit.
    """
    get_memory(options)
    quiet()
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    if decoding:
        decoding.check_vocabulary(backbone_args(config.model.name, config.model.flavor).vocab_size)
        decoding.check_context_parallel(config.parallelism.context_parallel_degree)
    return TrainedModel(config, checkpoint, options.adapter, memory_weights=options.memory_weights, memory=memory)
