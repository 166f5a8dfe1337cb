"""Checkpoint manager on top of torchtitan's: skips interrupted and damaged checkpoints, and manages retention."""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import DATALOADER, MODEL, OPTIMIZER, AsyncMode
from torchtitan.config.job_config import Checkpoint as TitanCheckpoint
from torchtitan.tools.utils import GarbageCollection

from memdlm_dist.checkpoint import base_model, continuity, hugging_face_folder, peft_folder
from memdlm_dist.checkpoint.catalogue import (
    EXPORT,
    METADATA,
    RUN,
    Catalogue,
    folder_name,
    is_export,
    prunable_steps,
    read_run,
)
from memdlm_dist.checkpoint.exports import Exporter, tensor_bytes
from memdlm_dist.checkpoint.model_check import check_model, matching_states
from memdlm_dist.checkpoint.reading import load_states
from memdlm_dist.compat.torch import end_saver, supports_reuse_of_stagers
from memdlm_dist.compat.torchtitan import HookedCheckpoints
from memdlm_dist.errors import UserError
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.state_dict_adapters import in_dtype
from memdlm_dist.runtime import hub, storage
from memdlm_dist.runtime.rank_0 import (
    failure_reason,
    first_reason,
    from_rank_0,
    is_rank_0,
    log_unexpected,
    one_line,
)
from memdlm_dist.runtime.storage import Storage, is_remote
from memdlm_dist.runtime.writer import Claim

logger = logging.getLogger()

# TensorBoard tags of the validation losses.
MEMORY_OFF: Final = "validation/loss_memory_off"
MEMORY_ON: Final = "validation/loss_memory_on"
KeepBest = Literal["", "validation/loss_memory_off", "validation/loss_memory_on"]


@dataclass
class Checkpoint(TitanCheckpoint):
    """torchtitan's section with one changed default and five new keys.

    `folder` may be a URL, such as s3://bucket/run.
    """

    last_save_model_only: bool = False
    """Save only the model at the last step. False, unlike in torchtitan, so that a finished run can be continued."""

    initial_adapter: str = ""
    """Folder or hub repository of an adapter in PEFT's format, from which a run with model.converters = ["lora"]
    starts, on the base of initial_load_path. The [lora] section must have its rank, alpha and target_modules. Ignored
    when the run resumes, like initial_load_path."""

    save_in_hf: bool = False
    """Also export the model with every checkpoint, to the Hugging Face folder hf in the folder of the checkpoint.
    The ranks wait for the export, also with async_mode. It is removed together with the checkpoint."""

    keep_every: int = 0
    """Interval, in steps, of the checkpoints that are kept in addition to the latest ones; 0: none."""

    keep_best: KeepBest = ""
    """Validation loss whose best checkpoint (lowest loss) is kept in addition to the latest ones; empty: none."""

    accept_changes: list[str] = field(default_factory=list)
    """Keys whose change since the checkpoint is accepted, such as training.global_batch_size or data.train.
    Any other change of the data or the noise stops the run, because it would not continue the interrupted run."""


class ResumableCheckpoints(HookedCheckpoints):
    """Checkpoint manager for a path or URL that resumes from the newest intact checkpoint and logs skipped ones.

    Rank 0 alone inspects the folder and broadcasts the result, so that all ranks act alike. DCP reads and writes; a
    failure on one rank is a failure on all ranks.
    """

    # Set by the trainer after construction: the run's identity and experiment (see `continuity`), and whether a failed
    # save stops the run.
    identity: Mapping[str, Any]
    experiment: Mapping[str, Any]
    length: Mapping[str, Any]  # length of the run, recorded and not compared
    stop_on_save_failure: bool
    timeout: float  # of collectives, in seconds; set by the trainer as well
    base: dict[str, str] | None = None  # identity of a quantised base, which checkpoints leave out
    lora: LoRA | None = None  # settings of the adapters; None if none are trained
    writer: Claim | None = None  # rank 0's claim to the folder
    save_future: Any
    stager: Any
    sd_adapter: Any

    def __init__(self, *, checkpoint_config: Checkpoint, base_folder: str = "", **components: Any):
        if is_remote(checkpoint_config.folder):
            base_folder = ""
        super().__init__(checkpoint_config=checkpoint_config, base_folder=base_folder, **components)
        self.identity, self.experiment, self.length, self.stop_on_save_failure = {}, {}, {}, False
        # Save after this step regardless of the interval; set when the run is asked to stop.
        self.save_now = False
        self._config = checkpoint_config
        self._saving_step: int | None = None  # step of an asynchronous save that may be in progress
        if not self.enable:
            return
        self._catalogue = Catalogue(self.folder)
        self._remover = ThreadPoolExecutor(1)
        if base_model.is_quantized(self._model):
            self.states[MODEL] = base_model.AdapterWrapper(self._model)

    @property
    def _model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.states[MODEL].model[0]
        return model

    # Loading

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load the checkpoint of `step`, or the newest intact one (-1), or else the initial weights.

        Returns:
            False if there is nothing to load.

        Raises:
            UserError: if the requested checkpoint or all checkpoints are damaged, or if one belongs to another run.
        """
        if not self.enable:
            return False
        for name in self.exclude_from_loading:
            if name not in self.states:
                raise UserError(f"checkpoint.exclude_from_loading names {name}; choose among {', '.join(self.states)}.")
        folder = self._catalogue.storage
        if base_model.is_quantized(self._model):
            self._load_base()
        steps = from_rank_0(lambda: self._catalogue.steps()[::-1]) if step == -1 else [step]
        damaged = []
        for candidate in steps:
            saved = from_rank_0(lambda candidate=candidate: self._catalogue.inspect(candidate))
            location = folder.url(saved.name)
            if saved.exported:
                problem = "holds only exported weights, in safetensors"
            else:
                # A checkpoint of step 0 holds only initial weights.
                problem = saved.problem or self._load_from(location, model_only=candidate == 0)
            if not problem:
                if self._config.save_in_hf and is_rank_0() and EXPORT not in folder.sizes(saved.name):
                    logger.warning(
                        f"The checkpoint {location} has no export, though checkpoint.save_in_hf is set; write one with "
                        "tools/convert_checkpoint.py to-hf."
                    )
                return True
            if step != -1:
                raise UserError(f"The checkpoint {location} {problem}; choose another checkpoint.load_step, or -1.")
            damaged += [location] if saved.complete else []
            logger.warning(f"Skipping the checkpoint {location}: it {problem}.")
        if damaged:
            raise UserError(
                f"No checkpoint in {folder.url()} can be used ({', '.join(damaged)} are damaged); restore one, or "
                "change job.dump_folder to start anew."
            )
        if self._config.initial_adapter:
            return self._load_initial_adapter(self._config.initial_adapter)
        return self._load_initial()

    def _load_initial_adapter(self, folder: str) -> bool:
        lora_ = self.lora
        assert lora_ is not None, "the configuration check requires adapters"
        # Loading the base may take long.
        adapter = from_rank_0(lambda: peft_folder.check(folder, self.sd_adapter, lora_))
        loaded = self._load_initial()
        peft_folder.load(self.states[MODEL].state_dict(), self.sd_adapter, folder, lora_)
        base = adapter.base or "a base that it does not name"
        logger.info(f"Loaded the adapter in {folder}, trained on {base} with dropout {adapter.dropout:g}.")
        return loaded

    def _load_base(self) -> None:
        """Load the quantised base, which is not in the run's checkpoints; without a location it is already drawn."""
        location = self._initial_location()
        if location:
            began = time.perf_counter()
            logger.info(f"Quantising the weights in {location}.")
            base_model.load(self._model, self.sd_adapter, location)
            logger.info(f"Quantised the weights in {time.perf_counter() - began:.1f} s.")
        # Absolute, because tools look for the base from other folders.
        location = os.path.abspath(location) if location and not is_remote(location) else location
        self.base = from_rank_0(lambda: base_model.identity(location))

    def _initial_location(self) -> str:
        """Return the location of the initial weights; empty for weights drawn at random.

        Raises:
            UserError: if `checkpoint.initial_load_path` and `checkpoint.initial_load_in_hf` do not fit together.
        """
        location: str = self.initial_load_path or ""
        if self.initial_load_in_hf:
            location = location or self.sd_adapter.assets or ""
            return location
        if not location:
            return ""
        files = from_rank_0(Storage(location).sizes)
        if is_export(files):
            raise UserError(f"{location} holds safetensors; set checkpoint.initial_load_in_hf to start from them.")
        if METADATA not in files:
            remedy = "correct checkpoint.initial_load_path"
            if hub.parse(location) is not None:
                remedy += ", or set checkpoint.initial_load_in_hf to start from a repository of the hub"
            raise UserError(f"There is no complete checkpoint in {location}; {remedy}.")
        return location

    def _load_initial(self) -> bool:
        location = self._initial_location()
        if self.base is not None:
            return bool(location)
        if self.initial_load_in_hf:
            logger.info(f"Loading the weights in {location}.")
            began = time.perf_counter()
            hugging_face_folder.load(self.states[MODEL], self.sd_adapter, location)
            logger.info(f"Loaded the weights in {time.perf_counter() - began:.1f} s.")
            return True
        if not location:
            return False
        # A run that trains adapters starts from a base without adapters.
        problem = self._load_from(location, self.initial_load_model_only, base=self.initial_load_model_only)
        if problem:
            raise UserError(f"The checkpoint {location} {problem}; choose another checkpoint.initial_load_path.")
        return True

    def _load_from(self, location: str, model_only: bool, base: bool = False) -> str:
        """Load one checkpoint; return its problem as a predicate, such as "cannot be read (...)", or an empty string.

        Args:
            base: the checkpoint may lack adapters, which then keep their initial values.

        Raises:
            UserError: if the checkpoint is intact, but belongs to another model or run.
        """
        run = from_rank_0(lambda: read_run(Storage(location)))
        if self.base is not None:
            base_model.check_identity(location, run, self.base)
        elif base_model.BASE in run:
            raise base_model.needs_quantized_base(location)
        if problem := from_rank_0(lambda: check_model(location, self.states[MODEL].state_dict(), base)):
            return problem
        same_data = True
        if not model_only:
            same_data = continuity.check(location, run, self.identity, self.experiment, self._config.accept_changes)
        logger.info(f"Loading the checkpoint {location}.")
        began = time.perf_counter()
        try:
            states = self.states_to_load(model_only)
            states = matching_states(location, states) if base else states
            load_states(states, location)
            self.states[MODEL].load_state_dict(states)  # torchtitan keeps the model's tensors at the top level
        except CheckpointException as failure:  # raised on every rank
            return f"cannot be read ({failure_reason(failure)})"
        if not same_data and DATALOADER not in self.exclude_from_loading:
            self.states[DATALOADER].next_epoch()
        GarbageCollection.collect("after loading a checkpoint")
        logger.info(f"Loaded the checkpoint in {time.perf_counter() - began:.1f} s.")
        return ""

    # Saving

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save if a checkpoint is due; a failed save leaves earlier checkpoints unchanged.

        Raises:
            UserError: if the save fails, and if no later save can follow or `reliability.on_save_failure` is "stop".
        """
        if not self.is_due(curr_step, last_step):
            return
        self.wait()
        began, pause = time.monotonic(), storage.FIRST_WAIT
        while True:
            reason, on_all_ranks = first_reason(self._try_to_save(curr_step, last_step))
            if not reason:
                self._export_if_due(curr_step, last_step)
                return
            self._drop_failed_save()
            # A store that is unavailable may come back; a full disk stays full.
            out_of_time = time.monotonic() + pause - began > storage.PATIENCE
            if (
                not on_all_ranks
                or not self._catalogue.storage.remote
                or from_rank_0(lambda out_of_time=out_of_time: out_of_time)
            ):
                # The saver threads of other ranks still wait for the failed ranks, and would disturb later saves.
                blocked = not on_all_ranks and self.async_mode == AsyncMode.ASYNC
                self._handle_save_failure(curr_step, reason, final=last_step or self.save_now or blocked)
                return
            logger.warning(f"Saving the checkpoint of step {curr_step} failed ({reason}); trying again in {pause:g} s.")
            time.sleep(pause)
            pause *= 2

    def _try_to_save(self, step: int, last_step: bool) -> str:
        """Save, or start an asynchronous save; return the reason for a failure, or an empty string."""
        try:
            self._prepare_folder(step)
            if self.stager is not None and not supports_reuse_of_stagers():
                self.stager.close()
                self.stager = None  # torchtitan constructs another one
            super().save(step, last_step)
            if last_step:
                self.purge()  # torchtitan does not purge after the last step
            elif self.async_mode != AsyncMode.DISABLED:
                self._saving_step = step
                if self.save_now:
                    self._finish_save()
        except UserError:
            raise
        except (CheckpointException, Exception) as failure:  # CheckpointException is a BaseException
            self._drop_failed_save()  # at once, because savers of other ranks may wait for this rank's saver
            reason = failure_reason(failure)
            log_unexpected(failure, f"Saving the checkpoint of step {step}")
            return reason
        return ""

    def maybe_wait_for_staging(self) -> None:
        """Wait until an asynchronous save has copied the parameters, so that the optimizer may change them."""
        try:
            super().maybe_wait_for_staging()
        except Exception:  # the save fails for the same reason, and `wait` reports it
            self.staging = False

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *rest: Any, **options: Any) -> Any:
        """Save with DCP, or with `to_hf` as a Hugging Face folder or an adapter.

        torchtitan has cast all tensors of a model that is saved alone. Here such a model is cast again, since some
        tensors stay in float32, and adapters are merged before the cast.
        """
        if options.get("to_hf"):
            self._exporter.write(self.states[MODEL].state_dict(), checkpoint_id)
            return None
        if OPTIMIZER not in state_dict:
            state_dict = in_dtype(self.states[MODEL].state_dict(), self._exporter.dtype)
        return super().dcp_save(state_dict, checkpoint_id, *rest, **options)

    @property
    def _exporter(self) -> Exporter:
        # In torchtitan, float32 keeps the weights' dtype.
        dtype = None if self.export_dtype == torch.float32 else self.export_dtype
        return Exporter(
            self._model, self.sd_adapter, self.lora, self.initial_load_path or "", dtype, self._catalogue, self.timeout
        )

    def _export_if_due(self, step: int, last_step: bool) -> None:
        """Export the model beside the checkpoint of this step, with `checkpoint.save_in_hf`.

        A stop request leaves no time for an export. If the export fails, the checkpoint stays as it is.

        Raises:
            UserError: if the export fails at the last step, or `reliability.on_save_failure` is "stop".
        """
        exported_already = last_step and self.last_save_in_hf
        if not self._config.save_in_hf or exported_already:
            return
        if self.save_now and not last_step:
            logger.info(f"The checkpoint of step {step} gets no export, because the run was asked to stop.")
            return
        began = time.perf_counter()
        location = self._catalogue.storage.url(f"{folder_name(step)}/{EXPORT}")
        reason = self._exporter.write_beside(step, self.states[MODEL].state_dict(), self._pending_bytes)
        if not reason:
            logger.info(f"Exported the model to {location} in {time.perf_counter() - began:.1f} s.")
            return
        reason = self._with_free_room(reason)
        from_rank_0(lambda: _try_housekeeping(self._exporter.remove_partial, "Removing an incomplete export"))
        sentence = f"The export {location} could not be written ({reason}); its checkpoint is not affected"
        if last_step or self.stop_on_save_failure:
            self.wait()
            raise UserError(f"{sentence}: make room, and export it with tools/convert_checkpoint.py.")
        logger.error(f"{sentence}, and training goes on.")

    def _pending_bytes(self) -> int:
        """Return the bytes of a checkpoint that is still being written; 0 if none is."""
        if self._saving_step is None:
            return 0
        return sum(tensor_bytes(self.states[name].state_dict()) for name in (MODEL, OPTIMIZER))

    def _finish_save(self) -> None:
        self._saving_step = None
        self.save_future.result()

    def wait(self) -> None:
        """Wait for an asynchronous save in progress, and report its failure.

        Raises:
            UserError: if the save failed and `reliability.on_save_failure` is "stop".
        """
        if (step := self._saving_step) is None:
            return
        reason = ""
        try:
            self._finish_save()
        except (CheckpointException, Exception) as failure:
            self._drop_failed_save()
            reason = failure_reason(failure)
        reason, _ = first_reason(reason)
        if reason:
            self._drop_failed_save()
            self._handle_save_failure(step, reason, final=False)

    def _drop_failed_save(self) -> None:
        """Drop a save that has failed on some rank; with a saver process, end the process."""
        self._saving_step = self.save_future = None
        if self.async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            end_saver()

    def _handle_save_failure(self, step: int, reason: str, final: bool) -> None:
        location = self._catalogue.storage.url(folder_name(step))
        reason = self._with_free_room(reason)
        export = "any export of it is removed, and " if self._config.save_in_hf else ""
        sentence = f"The checkpoint {location} could not be saved ({reason}); {export}earlier ones are unchanged"
        from_rank_0(lambda: _try_housekeeping(lambda: self._remove(step)))
        if final or self.stop_on_save_failure:
            raise UserError(f"{sentence}; make room or choose another checkpoint.folder, and start again.")
        logger.error(f"{sentence}, and training goes on and saves again after {self.interval} steps.")

    def _with_free_room(self, reason: str) -> str:
        """Append the free room on the disk to the reason of a failed save."""
        if self._catalogue.storage.remote:
            return reason
        return f"{reason}; {shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB were free"

    def _prepare_folder(self, step: int) -> None:
        """Create the folder and run.json; rename a complete checkpoint of the step, or remove an incomplete one."""

        def prepare() -> OSError | None:
            name, folder = folder_name(step), self._catalogue.storage
            try:
                self._check_writer()
                files = folder.sizes(name)
                if METADATA in files or is_export(files):
                    # The run resumed from an earlier step and has reached this step again.
                    others = [other for other in folder.sizes() if other.startswith(f"{name}.replaced")]
                    kept_name = f"{name}.replaced-{len(others) + 1}"
                    folder.move(name, kept_name)
                    logger.warning(f"Keeping the earlier checkpoint of step {step} as {kept_name}.")
                elif files:
                    self._remove(step)  # left by an interrupted save
                run = {
                    "format": continuity.FORMAT, "step": step, "ranks": dist.get_world_size(),
                    "identity": dict(self.identity), "experiment": dict(self.experiment), "length": dict(self.length),
                }  # fmt: skip
                if self.base is not None:
                    run[base_model.BASE] = self.base
                folder.write_json(f"{name}/{RUN}", run)
            except UserError:
                raise
            except OSError as error:
                return error
            except Exception as error:  # each remote file system has different error classes
                return OSError(f"{type(error).__name__}: {error}")
            return None

        if failure := from_rank_0(prepare):
            raise failure

    def is_due(self, step: int, last_step: bool = False) -> bool:
        """Return whether to save after this step: if torchtitan would, or if `save_now` is set."""
        if self.enable and not self.load_only and self.save_now:
            return True
        return super().is_due(step, last_step)

    def note_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation loss of `checkpoint.keep_best` in scores.json, if the loss is finite."""
        best = self._config.keep_best
        if self.enable and not self.load_only and is_rank_0() and math.isfinite(losses.get(best, math.nan)):
            _try_housekeeping(
                lambda: self._catalogue.add_score(step, losses[best]), "Recording the validation loss in scores.json"
            )

    def purge(self) -> None:
        """Remove the complete checkpoints that retention does not keep, in a background thread."""
        # torchtitan calls `purge` right after it has started an asynchronous save; that checkpoint is still incomplete.
        if is_rank_0():
            self._remover.submit(_try_housekeeping, self._prune)

    def _prune(self) -> None:
        complete = self._catalogue.complete_steps()
        if not complete or self._catalogue.inspect(complete[-1]).problem:
            return
        best = self._catalogue.best(complete) if self._config.keep_best else None
        for step in prunable_steps(complete, self._config.keep_latest_k, self._config.keep_every, best):
            logger.info(f"Removing the checkpoint of step {step}.")
            self._remove(step)

    def _remove(self, step: int) -> None:
        self._check_writer()
        self._catalogue.remove(step)

    def _check_writer(self) -> None:
        if self.writer is not None:
            self.writer.check()

    def close(self) -> None:
        """Wait for pending removals and release the threads."""
        super().close()
        if hasattr(self, "_remover"):
            self._remover.shutdown()


def _try_housekeeping(action: Any, task: str = "Removing a checkpoint") -> None:
    """Run a housekeeping action; a failure is only logged, because it must not end the run."""
    try:
        action()
    except Exception as error:
        logger.warning(f"{task} failed ({one_line(error)}).")
