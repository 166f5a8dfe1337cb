"""Command line of the lm-evaluation-harness, completed with the model name and the run's tokenizer."""

import atexit
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.config import parse_config
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import harness_chat
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import is_rank_0

_REMEDY = "install the package's [eval] extra (pip install -e '.[eval]')"
_OUTPUTS = ("output_path", "log_samples", "wandb_args", "hf_hub_log_args")


def run(argv: Sequence[str]) -> int:
    """Parse the harness's flags, complete them and run the harness; return the exit status.

    Raises:
        UserError: if lm-evaluation-harness is not installed, or --model_args names no configuration.
    """
    try:
        from lm_eval.utils import setup_logging

        from memdlm_dist.compat.lm_eval import command_line
        from memdlm_dist.evaluation import harness_model
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({error}); {_REMEDY}.") from None
    setup_logging()
    sys.argv = [sys.argv[0], *argv]  # the harness reads its flags from there
    cli = command_line()
    options = cli.parse_args()
    if getattr(options, "command", None) == "run":
        options.model = options.model or harness_model.NAME
        if options.model == harness_model.NAME:
            _complete(options)
    if not is_rank_0():
        # All ranks have all results; rank 0 writes them.
        for name in _OUTPUTS:
            if hasattr(options, name):
                delattr(options, name)
    cli.execute(options)
    return 0


def _complete(options: Any) -> None:
    """Set the run's tokenizer in the metadata, for tasks that generate documents of a given length.

    Raises:
        UserError: if --model_args names no configuration, or --apply_chat_template no template of this tokenizer.
    """
    arguments: dict[str, Any] = options.model_args or {}
    config = arguments.get("config")
    if not config:  # checked here since building the tasks can take minutes
        raise UserError("--model_args must name the run's configuration: --model_args config=FILE.toml.")
    parsed = parse_config.parse(["--job.config_file", str(config)])
    folder = hub.tokenizer(arguments.get("model.hf_assets_path") or parsed.model.hf_assets_path)
    tokenizer = DiffusionTokenizer(folder)
    if choice := getattr(options, "apply_chat_template", False):
        harness_chat.load(choice, tokenizer)
    elif getattr(options, "fewshot_as_multiturn", False):
        raise UserError("--fewshot_as_multiturn needs --apply_chat_template; set both, or none.")
    metadata: dict[str, Any] = dict(getattr(options, "metadata", None) or {})
    if not {"tokenizer", "pretrained"} & metadata.keys():
        metadata["tokenizer"] = _plain_copy(tokenizer)
    options.metadata = metadata


def _plain_copy(tokenizer: DiffusionTokenizer) -> str:
    """Copy a tokenizer into a temporary folder without code: the harness would execute code in the tokenizer's folder.

    Returns:
        The folder, which is removed when the process exits.
    """
    copy = tempfile.mkdtemp(prefix="memdlm_tokenizer_")
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copy(Path(tokenizer.tokenizer_path) / "tokenizer.json", copy)
    eos = tokenizer.tokenizer.id_to_token(tokenizer.eos_id)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "mask_token": tokenizer.mask_token}
    (Path(copy) / "tokenizer_config.json").write_text(json.dumps(config))
    return copy
