"""Parsing and checking of a configuration: flags override the TOML file, which overrides defaults.

All user errors that the configuration alone reveals are found here, before anything is built, and reported in one
sentence.
"""

import contextlib
import difflib
import io
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import typeguard
from torchtitan.config import ConfigManager

from memdlm_dist.checkpoint.continuity import IDENTITY_KEYS as CONTINUITY
from memdlm_dist.checkpoint.manager import MEMORY_OFF, MEMORY_ON
from memdlm_dist.compat.torchao import NOT_INSTALLED, is_installed
from memdlm_dist.compat.torchtitan import without_assets_warning
from memdlm_dist.config import ranges
from memdlm_dist.config.job_config import FORMAT, JobConfig
from memdlm_dist.errors import UserError, require
from memdlm_dist.method.inner_loss import LOGIT_LOSSES
from memdlm_dist.method.trajectory import SINGLE_STATE, Plan
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import is_remote

# Keys for the same number, in steps and as a share: the flag of one overrides the other in the TOML file.
_ALTERNATIVES = {"training.steps": "training.epochs", "lr_scheduler.warmup_steps": "lr_scheduler.warmup_ratio"}
_CONFIG_FILE_FLAGS = ("--job.config_file", "--job.config-file")
OPTIMIZERS = ("Adam", "AdamW")  # names in torchtitan
# torchtitan keys without effect here, with the keys that replace them. Silent acceptance would mislead.
_UNREAD = {
    "training.dataset": "data.train",
    "training.dataset_path": "data.train",
    "validation.dataset": "data.validation",
    "validation.dataset_path": "data.validation",
}


def parse(argv: Sequence[str]) -> JobConfig:
    """Return the checked configuration of a command line: flags override the TOML file, which overrides defaults.

    The checks cover everything that does not depend on the number of processes, the device or the backbone's sizes.

    Raises:
        UserError: on the first mistake; the message names the key or the file, and the remedy.
    """
    manager = ConfigManager(JobConfig)
    file: dict[str, Any] = {}
    if not {"-h", "--help"} & set(argv):
        file = _read_file(manager.config_cls, argv)
        _check_flags(manager.config_cls, argv)
    try:
        # tyro prints errors as boxes for terminals; `_check_flag_values` reports them in one sentence instead.
        with contextlib.redirect_stderr(io.StringIO()), without_assets_warning():
            config: JobConfig = manager.parse_args(list(argv))
    except SystemExit as exit_request:
        if exit_request.code in (0, None):
            raise
        _check_flag_values(argv)
        raise UserError("The command line cannot be read (--help lists all keys).") from None
    except (AssertionError, ValueError) as error:  # raised by a section's __post_init__
        raise UserError(f"The configuration is not valid: {str(error).rstrip('.')}.") from None
    _settle_alternatives(config, file, argv)
    _check_values(config)
    return config


def _read_file(config_cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """Return the sections of the TOML file, empty without one.

    Raises:
        UserError: if the file is not readable, or a key does not exist or has a value of the wrong type.
    """
    path = _config_file(argv)
    if path is None:
        return {}
    try:
        content = Path(path).read_text(encoding="utf-8")
        require(
            not content.startswith("\ufeff"), f"{path} begins with a byte order mark; save it as UTF-8 without one."
        )
        values = tomllib.loads(content)
    except FileNotFoundError:
        raise UserError(f"The configuration file {path} does not exist; check --job.config_file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The configuration file {path} cannot be read ({one_line(error)}); save it as readable UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"The configuration file {path} is not valid TOML ({one_line(error)}); correct it.") from None
    _check_section(config_cls, values, path, "")
    return values


def _config_file(argv: Sequence[str]) -> str | None:
    """Return the path of the TOML file; None without --job.config_file."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in _CONFIG_FILE_FLAGS:
            if equals:
                return value
            if i + 1 < len(argv):
                return argv[i + 1]
            raise UserError("--job.config_file needs a value: the path of a TOML file.")
    return None


def _check_section(cls: type, values: dict[str, Any], path: str, prefix: str) -> None:
    """Check the keys and the types of a TOML section and its subsections.

    Args:
        cls: dataclass of the section.
        path: TOML file, for messages.
        prefix: dotted name of the section with a final dot, for messages.
    """
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        name = prefix + key
        _check_is_read(name, f"{name} in {path}")
        if key not in known:
            raise UserError(f"Unknown key {name} in {path}{_suggestion(key, known, prefix)}.")
        expected: Any = known[key].type
        if is_dataclass(expected):
            if not isinstance(value, dict):
                raise UserError(f"{name} in {path} must be a section, written [{name}], but is {value!r}.")
            _check_section(expected, value, path, name + ".")  # type: ignore[arg-type]
        elif not _has_type(value, expected):
            raise UserError(f"{name} in {path} must be {_type_name(expected)}, but is {value!r}.")


def _check_is_read(key: str, written: str) -> None:
    """Raise `UserError` if a key of torchtitan has no effect here.

    Args:
        written: the key as the user wrote it, for the message.
    """
    require(key not in _UNREAD, f"{written} has no effect; name folders of shards in {_UNREAD.get(key)}.")


def _has_type(value: Any, expected: Any) -> bool:
    """Return whether a TOML value has the type of its field."""
    if isinstance(value, bool) and expected in (int, float, int | None, float | None):
        return False  # Python counts a bool as an int
    try:
        typeguard.check_type(value, expected, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def _type_name(expected: Any) -> str:
    """Return a field's type, or its choices, for a message."""
    if getattr(expected, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(repr, expected.__args__))
    return expected.__name__ if isinstance(expected, type) else str(expected)


def _suggestion(key: str, known: dict[str, Any], prefix: str) -> str:
    """Return the end of a message: the known name closest to `key`, or all known names."""
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}"
    return f"; known keys are {', '.join(prefix + name for name in sorted(known))}"


def _check_flags(config_cls: type, argv: Sequence[str]) -> None:
    """Check that the section and the key of every flag exist."""
    for argument in argv:
        if argument.startswith("--") and argument != "--":
            _field_of(config_cls, argument)


def _key_of(argument: str) -> str:
    """Return the configuration key of a flag, as it is written in the documentation."""
    return argument[2:].partition("=")[0].replace("-", "_")


def _field_of(config_cls: type, argument: str) -> Any:
    """Return the dataclass field of a flag.

    Raises:
        UserError: if its section or its key does not exist.
    """
    flag = _key_of(argument)
    cls: Any = config_cls
    prefix = ""
    _check_is_read(flag, argument)
    *sections, key = flag.split(".")
    for section in sections:
        known = {f.name: f for f in fields(cls) if is_dataclass(f.type)}
        if section not in known:
            raise UserError(f"Unknown section {prefix}{section} in {argument}{_suggestion(section, known, prefix)}.")
        cls, prefix = known[section].type, f"{prefix}{section}."
    known = {f.name: f for f in fields(cls)}
    name = key.removeprefix("no_") if known.get(key.removeprefix("no_")) else key
    if name not in known:
        raise UserError(f"Unknown key {argument}{_suggestion(key, known, prefix)}.")
    return known[name]


def _settle_alternatives(config: JobConfig, file: Mapping[str, Any], argv: Sequence[str]) -> None:
    """Unset the share (`training.epochs`, ...) of each pair in `_ALTERNATIVES` whose steps are given as a flag.

    Args:
        file: sections of the TOML file.

    Raises:
        UserError: if both keys of a pair are set in the file, or both as flags.
    """
    flags = {_key_of(argument) for argument in argv if argument.startswith("--")}
    for steps, share in _ALTERNATIVES.items():
        section, name = share.split(".")
        unset, in_file = getattr(type(getattr(config, section)), name), file.get(section, {})
        written = {
            "the TOML file": steps.split(".")[1] in in_file and in_file.get(name, unset) != unset,
            "the flags": {steps, share} <= flags and getattr(getattr(config, section), name) != unset,
        }
        for place, both in written.items():
            require(not both, f"{steps} and {share} are both set in {place}, but only one can count; remove one.")
        if steps in flags:
            setattr(getattr(config, section), name, unset)


def _check_flag_values(argv: Sequence[str]) -> None:
    """Parse each flag alone, to find the one with an invalid value.

    Raises:
        UserError: for the first such flag; the message names the type or the choices of its value.
    """
    groups: list[list[str]] = []
    for argument in argv:
        if argument.startswith("--"):
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            raise UserError(f"The argument {argument!r} belongs to no key; write --section.key value.")
    for flag, *values in groups:
        if flag.partition("=")[0] in _CONFIG_FILE_FLAGS:
            continue
        try:
            # A section can reject a value that is valid together with another flag: suppress those errors.
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(AssertionError, ValueError):
                ConfigManager(JobConfig).parse_args([flag, *values])
        except SystemExit:
            name, equals, value = flag.partition("=")
            given = " ".join([value] * bool(equals) + values)
            config_field = _field_of(JobConfig, name)
            if config_field.type is bool:
                section = name.rpartition(".")[0]
                on, off = f"{section}.{config_field.name}", f"{section}.no_{config_field.name}"
                raise UserError(f"{name} takes no value, but is given {given!r}; write {on} or {off}.") from None
            expected = _type_name(config_field.type)
            raise UserError(
                f"{name} must be {expected}, but is {given!r} (--help lists all keys)."
                if given
                else f"{name} needs a value: {expected} (--help lists all keys)."
            ) from None


def _check_values(config: JobConfig) -> None:
    """Check all values that do not depend on the launch, the device or the backbone's sizes."""
    ranges.check(config)
    memory, parallel, optimizer = config.parametric_memory, config.parallelism, config.optimizer
    require(
        config.job.format <= FORMAT,
        f"job.format = {config.job.format} is newer than the format of this version ({FORMAT}); install the version "
        "that the file was written for.",
    )
    require(
        optimizer.name in OPTIMIZERS, f"optimizer.name must be {' or '.join(OPTIMIZERS)}, but is {optimizer.name!r}."
    )
    require(
        config.training.local_batch_size != -1 or config.training.global_batch_size != -1,
        "training.local_batch_size = -1 takes a share of training.global_batch_size, which is not set; set one of "
        "them.",
    )
    require(
        config.training.dtype == "float32" or config.training.mixed_precision_param == config.training.dtype,
        "training.dtype = 'bfloat16' keeps the weights in bfloat16, but training.mixed_precision_param = 'float32' "
        "computes in another dtype; set both to the same.",
    )
    profiling = config.profiling
    require(
        not profiling.enable_profiling
        or profiling.profile_freq >= profiling.profiler_warmup + profiling.profiler_active,
        f"profiling.profile_freq = {profiling.profile_freq} must be at least profiler_warmup + profiler_active = "
        f"{profiling.profiler_warmup + profiling.profiler_active}.",
    )
    best = config.checkpoint.keep_best
    require(not best or config.validation.enable, f"checkpoint.keep_best = {best!r} needs validation.enable; set it.")
    require(
        not best or config.checkpoint.interval % config.validation.freq == 0,
        f"checkpoint.keep_best = {best!r} needs a validation at every checkpoint; set checkpoint.interval "
        f"({config.checkpoint.interval}) to a multiple of validation.freq ({config.validation.freq}).",
    )
    option = config.activation_checkpoint.selective_ac_option
    require(
        option == "op" or (option.isdigit() and int(option) > 0),
        f"activation_checkpoint.selective_ac_option must be 'op' or a positive integer, but is {option!r}.",
    )
    require(
        best != MEMORY_ON or memory.enable,
        f"checkpoint.keep_best = {best!r} needs parametric_memory.enable; set it, or choose {MEMORY_OFF}.",
    )
    require(
        # The default, 2, is allowed, so that choosing such a trajectory takes one key.
        memory.trajectory not in SINGLE_STATE or memory.inner_steps <= 2,
        f"parametric_memory.inner_steps = {memory.inner_steps} cannot be taken along the {memory.trajectory} "
        "trajectory, which has a single state; remove inner_steps, or choose anchor_consistent or progressive.",
    )
    distilled = [name for name, loss in LOGIT_LOSSES.items() if loss.teacher]
    require(
        memory.distillation_temperature == 1 or memory.inner_loss in distilled,
        f"parametric_memory.distillation_temperature = {memory.distillation_temperature} has no effect on inner_loss = "
        f"'{memory.inner_loss}'; remove it, or choose {' or '.join(distilled)}.",
    )
    require(
        memory.progressive_end == Plan.progressive_end or memory.trajectory == "progressive",
        f"parametric_memory.progressive_end = {memory.progressive_end} has no effect on trajectory = "
        f"'{memory.trajectory}'; remove it, or choose progressive.",
    )
    require(
        memory.samples_per_set == 1 or memory.granularity == "sample",
        f"parametric_memory.samples_per_set = {memory.samples_per_set} contradicts granularity = 'batch', with which "
        "all samples of a micro-batch share a set; remove one of them.",
    )
    require(
        bool(memory.target_modules),
        "parametric_memory.target_modules is empty; name ffn, attention or some of their linears, or "
        "set parametric_memory.enable = false.",
    )
    require(
        bool(config.data.train),
        "data.train is empty; name at least one folder of shards (tools/prepare_data.py).",
    )
    require(
        len(config.data.proportions) in (0, len(config.data.train)),
        f"data.proportions has {len(config.data.proportions)} entries for {len(config.data.train)} streams in "
        "data.train; give one for each, or none.",
    )
    require(
        all(0 < share < math.inf for share in config.data.proportions), "data.proportions must all be positive numbers."
    )
    require(
        not config.validation.enable or bool(config.data.validation),
        "validation.enable is set but data.validation is empty; name the held-out shards or disable validation.",
    )
    require(
        not config.validation.tasks or config.validation.enable,
        "validation.tasks needs validation.enable; set it, or remove the tasks.",
    )
    for key in ("tasks_freq", "tasks_lengths", "tasks_sizes"):
        require(
            bool(config.validation.tasks) or not getattr(config.validation, key),
            f"validation.{key} has no effect without validation.tasks; name tasks, or remove it.",
        )
    unknown = [key for key in config.checkpoint.accept_changes if key not in CONTINUITY]
    require(
        not unknown,
        f"checkpoint.accept_changes names {', '.join(unknown)}; choose among {', '.join(CONTINUITY)}.",
    )
    require(
        config.reliability.on_nonfinite == "stop" or not config.optimizer.early_step_in_backward,
        "reliability.on_nonfinite = 'skip' needs all gradients before the optimizer step; unset "
        "optimizer.early_step_in_backward.",
    )
    require(
        parallel.pipeline_parallel_degree == 1,
        f"parallelism.pipeline_parallel_degree = {parallel.pipeline_parallel_degree} is not supported: the inner "
        "loop runs trunk and tail several times per step; use FSDP and tensor parallelism and set it to 1.",
    )
    require(
        parallel.context_parallel_load_balancer is None,
        f"parallelism.context_parallel_load_balancer = {parallel.context_parallel_load_balancer!r} is for causal "
        "attention, and MemDLM's attention is bidirectional: all ranks have the same work; remove it.",
    )
    # torchtitan parses an empty list on the command line as a list of one empty name.
    config.model.converters = [name for name in config.model.converters if name]
    require(
        config.model.converters in ([], ["lora"]),
        f'model.converters = {config.model.converters} is not supported, only ["lora"] is: fast weights attach to '
        "plain linears, and the output head computes its losses itself; remove it.",
    )
    require(
        not config.model.converters or config.lora.base == "unquantized" or is_installed(),
        f"lora.base = {config.lora.base!r} needs {NOT_INSTALLED}, or set it to 'unquantized'.",
    )
    require(
        bool(config.lora.target_modules), "lora.target_modules is empty; name attention, ffn or some of their linears."
    )
    _check_hugging_face(config)
    require(
        config.checkpoint.enable or not config.checkpoint.create_seed_checkpoint,
        "checkpoint.create_seed_checkpoint needs checkpoint.enable; set both.",
    )


def _check_hugging_face(config: JobConfig) -> None:
    """Check the keys of loading from and saving to Hugging Face folders."""
    checkpoint = config.checkpoint
    require(
        not checkpoint.initial_load_in_hf or checkpoint.enable,
        "checkpoint.initial_load_in_hf needs checkpoint.enable; set both.",
    )
    require(
        not checkpoint.initial_load_in_hf or checkpoint.initial_load_model_only,
        "checkpoint.initial_load_in_hf loads weights alone; set checkpoint.initial_load_model_only = true.",
    )
    require(
        not checkpoint.initial_adapter or bool(config.model.converters),
        'checkpoint.initial_adapter needs a run that trains adapters; set model.converters = ["lora"], or merge the '
        "adapter with tools/convert_checkpoint.py.",
    )
    require(
        not checkpoint.initial_adapter or checkpoint.enable,
        "checkpoint.initial_adapter needs checkpoint.enable; set both.",
    )
    require(
        not checkpoint.initial_adapter or checkpoint.initial_load_in_hf or bool(checkpoint.initial_load_path),
        "checkpoint.initial_adapter needs the base that the adapter was trained on; set checkpoint.initial_load_path.",
    )
    require(
        not checkpoint.initial_adapter or checkpoint.initial_load_model_only,
        "checkpoint.initial_adapter starts a new run; set checkpoint.initial_load_model_only = true.",
    )
    require(
        not checkpoint.initial_load_in_hf_quantized,
        "checkpoint.initial_load_in_hf_quantized is not supported; load weights that are not quantised and unset it.",
    )
    require(
        not checkpoint.last_save_in_hf or checkpoint.last_save_model_only,
        "checkpoint.last_save_in_hf saves weights alone, from which the run cannot continue; set "
        "checkpoint.last_save_model_only = true as well.",
    )
    require(not checkpoint.save_in_hf or checkpoint.enable, "checkpoint.save_in_hf needs checkpoint.enable; set both.")
    for key in ("last_save_in_hf", "save_in_hf"):
        require(
            not getattr(checkpoint, key) or not is_remote(checkpoint.folder),
            f"checkpoint.{key} needs a checkpoint.folder on disk, not {checkpoint.folder}; write there and copy, or "
            "convert a checkpoint with tools/convert_checkpoint.py.",
        )
