"""Training run: configuration, checks, trainer, exit status."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch

from memdlm_dist.checkpoint.catalogue import Catalogue
from memdlm_dist.checkpoint.manager import ResumableCheckpoints
from memdlm_dist.checkpoint.saver import Saver
from memdlm_dist.compat.torch import connection_loss, construct_savers
from memdlm_dist.compat.torchtitan import construct_checkpoints
from memdlm_dist.config import check_layout, launch, parse_config, repositories
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError, require
from memdlm_dist.models import backbone_args
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.runtime import preemption
from memdlm_dist.runtime.cpu import check_prepared
from memdlm_dist.runtime.device import device_type
from memdlm_dist.runtime.preemption import StopRequest
from memdlm_dist.runtime.process_group import launched_processes
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.runtime.single_process import single_process_environment
from memdlm_dist.runtime.storage import is_remote
from memdlm_dist.runtime.writer import Claim, claimed, this_process
from memdlm_dist.training import train_spec
from memdlm_dist.training.trainer import MemDLMTrainer, Tasks
from memdlm_dist.training.validation_summary import summary_table

logger = logging.getLogger()


def check_output(dump_folder: str) -> None:
    """Create the output folder and check that it is writable.

    Raises:
        UserError: if it is not.
    """
    try:
        os.makedirs(dump_folder, exist_ok=True)
        tempfile.TemporaryFile(dir=dump_folder).close()
    except OSError as error:
        raise UserError(
            f"The output folder {dump_folder} cannot be written to ({error}); change job.dump_folder."
        ) from None


def _check_wandb(config: JobConfig) -> None:
    """Check that the package of `metrics.enable_wandb` is installed; torchtitan would train without it.

    Raises:
        UserError: if it is not.
    """
    spec = find_spec("wandb") if config.metrics.enable_wandb else None
    require(
        not config.metrics.enable_wandb or (spec is not None and spec.origin is not None),  # no origin: a plain folder
        "metrics.enable_wandb needs the package wandb, which is not installed; install the extra wandb (pip install -e "
        "'.[wandb]'), or unset the key.",
    )


def _warn_of_length(config: JobConfig, args: LLaDAArgs) -> None:
    """Warn if training.seq_len exceeds the context length of the pretrained weights, after RoPE scaling."""
    length, native = config.training.seq_len, args.native_length * config.model.rope_scaling
    if config.checkpoint.initial_load_in_hf and length > native and is_rank_0():
        logger.warning(
            f"training.seq_len = {length} is longer than the {native:g} tokens of the pretrained context; set "
            f"model.rope_scaling = {length / args.native_length:g} to extend it."
        )


BuildTasks = Callable[[MemDLMTrainer], Tasks | None]


def run(
    argv: Sequence[str], read_tasks: Callable[[JobConfig], BuildTasks] = lambda config: lambda trainer: None
) -> int:
    """Train as the command line configures; return the exit status (docs/reliability.md).

    Args:
        argv: the command line.
        read_tasks: reads `validation.tasks`, and returns a function that builds what answers them with the model of a
            trainer.

    Raises:
        UserError: if the configuration, the data, a checkpoint or the launch is wrong.
    """
    check_prepared()
    config = launch.resolve(parse_config.parse(argv), *launched_processes())
    _check_wandb(config)
    check_layout.check_device(config, device_type())
    build_tasks = read_tasks(config)
    args = backbone_args(config.model.name, config.model.flavor)
    check_layout.check_backbone(config, args)
    _warn_of_length(config, args)
    config = repositories.downloaded(config, weights=not _resumes(config))
    check_output(config.job.dump_folder)
    single_process_environment()
    train_spec.register()
    construct_checkpoints(ResumableCheckpoints)
    construct_savers(Saver)
    with StopRequest() as stop, _writer(config) as writer:
        trainer = _train(config, stop, writer, build_tasks)
    if not trainer.stopped_early:
        return 0
    saved = f"saved in {trainer.checkpointer.folder}" if config.checkpoint.enable else "not saved (checkpoint.enable)"
    logger.info(f"Stopped after step {trainer.step}, {saved}; start the run again to continue.")
    return preemption.exit_status()


def _checkpoint_folder(config: JobConfig) -> str:
    folder: str = config.checkpoint.folder
    return folder if is_remote(folder) else os.path.join(config.job.dump_folder, folder)


def _resumes(config: JobConfig) -> bool:
    """Return whether the run continues from a checkpoint of its own that replaces the initial weights."""
    if config.model.converters and config.lora.base == "nf4":
        return False  # its checkpoints hold adapters alone
    initial = config.checkpoint.initial_load_in_hf or config.checkpoint.initial_adapter
    return bool(initial) and bool(Catalogue(_checkpoint_folder(config)).complete_steps())


def _writer(config: JobConfig) -> AbstractContextManager[Claim | None]:
    """Claim the checkpoint folder for this run; rank 0 holds the claim for all ranks."""
    if not config.checkpoint.enable or config.checkpoint.load_only or not is_rank_0():
        return nullcontext()
    return claimed(_checkpoint_folder(config), this_process())


def _train(config: JobConfig, stop: StopRequest, writer: Claim | None, build_tasks: BuildTasks) -> MemDLMTrainer:
    """Build the trainer, train and close everything; return the closed trainer."""
    trainer: MemDLMTrainer | None = None
    done = False
    try:
        trainer = MemDLMTrainer(config, stop)
        trainer.checkpointer.writer, trainer.tasks = writer, build_tasks(trainer)
        if config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
            logger.info("Saved the seed checkpoint.")
        else:
            trainer.train()
            trainer.checkpointer.wait()
            table = summary_table(config.job.dump_folder) if config.validation.enable else None
            if table and is_rank_0():
                print(table, flush=True)
        torch.distributed.barrier()  # rank 0 may host the rendezvous store, so it must not leave before the others
        done = True
    except RuntimeError as error:
        if trainer is None or not (reason := connection_loss(error)):
            raise
        if "timed out" in reason.lower():
            raise UserError(trainer.watchdog.explain()) from None
        raise UserError(
            f"Rank {os.environ['RANK']} lost another rank while {trainer.watchdog.doing} ({reason}); see the log of "
            "the rank that ended first, and start again from the last checkpoint."
        ) from None
    finally:
        if trainer is not None:
            trainer.close()
        # A rank that fails alone must not wait for the others; the launcher stops them.
        if torch.distributed.is_initialized() and (done or torch.distributed.get_world_size() == 1):
            torch.distributed.destroy_process_group()
    return trainer
