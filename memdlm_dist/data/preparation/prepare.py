"""Preparation of shards from a corpus: plan, tokenizer, all units, completion."""

import contextlib
import hashlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import joblib
from tqdm import tqdm

from memdlm_dist.data import output, tokenizer
from memdlm_dist.data.hub_dataset import HubSource
from memdlm_dist.data.output import SPLITS, TOKENIZER
from memdlm_dist.data.preparation import deduplication, finish, tokenizer_sample, units, work_folder, workers
from memdlm_dist.data.preparation.jobs import Job
from memdlm_dist.data.preparation.plan import Plan, new_plan
from memdlm_dist.data.preparation.progress import Progress
from memdlm_dist.data.preparation.record import Record
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.summary import SHOWN_PROBLEMS, Summary, total
from memdlm_dist.data.preparation.unit_worker import prepare_unit
from memdlm_dist.data.preparation.units import Unit
from memdlm_dist.data.preparation.work_folder import FOLDER, WorkFolder
from memdlm_dist.data.shards import SHARD_SIZE, Card
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import is_remote
from memdlm_dist.runtime.writer import claimed, this_process

T = TypeVar("T")

_OTHER_SCRATCH = 16 << 20  # bytes that a worker needs in the scratch folder besides one shard


def prepare(config: PrepareConfig, report: Callable[[str], None] = tqdm.write) -> Summary:
    """Write `output/{tokenizer,train,heldout}` and `output/summary.json`, or a partition of the shards.

    Args:
        report: called with a sentence about each of the first bad rows.

    Returns:
        The counts; those of the partition's units if `config.partition` is set.

    Raises:
        UserError: if an input, the tokenizer or the output cannot be used, if the corpus makes no training sequence,
            and with `strict` for the first bad row.
    """
    config = _with_absolute_paths(config)
    config.check()
    if config.cluster is not None:
        workers.check_cluster(config.cluster)
    files = units.sources(config)
    if config.tokenizer is not None:
        config = replace(config, tokenizer=hub.tokenizer(config.tokenizer))
    all_units = units.cut(files, config.unit_size) if config.limit is None else units.whole(files)
    repositories = [str(file.repository) for file in files if isinstance(file, HubSource)]
    if config.tokenizer is not None and (origin := hub.origin(config.tokenizer)) is not None:
        repositories.append(str(origin))
    plan = new_plan(config, files, _fingerprint(config.tokenizer), len(all_units), repositories)
    partition = f"/{FOLDER}/partition-{_partition_name(config)}" if config.partition is not None else ""
    with _writing(str(config.output), partition):
        preparation = _begin(config, plan, all_units)
        try:
            return preparation.run(report)
        except BaseException:
            _discard_if_empty(preparation.work, config)
            raise
        finally:
            shutil.rmtree(preparation.scratch, ignore_errors=True)


def _absolute(location: str) -> str:
    return location if is_remote(location) else str(Path(location).absolute())


def _with_absolute_paths(config: PrepareConfig) -> PrepareConfig:
    """Return the settings with absolute paths: workers of a cluster may be in another working directory."""
    template = config.chat_template
    return replace(
        config,
        output=_absolute(str(config.output)),
        scratch=_absolute(config.scratch) if config.scratch is not None else None,
        chat_template=_absolute(template) if template is not None and Path(template).is_file() else template,
    )


def merge(location: str, overwrite: bool) -> Summary:
    """Complete a preparation whose partitions have ended, and return its counts.

    Raises:
        UserError: if a unit is missing, or the output cannot be written to.
    """
    location = _absolute(location)
    # A claim would make the folder.
    require(is_remote(location) or Path(location).is_dir(), f"There is no folder {location}; correct --output.")
    with _writing(location):
        work_folder.recover(location)
        work, plan = work_folder.read_plan(location)
        card, names = work.setup()
        work_folder.check_output(location, names, plan, overwrite)
        return _complete(work, plan, card, names)


def _complete(work: WorkFolder, plan: Plan, card: Card, names: tuple[str, ...]) -> Summary:
    records = finish.check_complete(work, plan.units)
    counts = total((record.summary for record in records), card.seq_len)
    if not counts.sequences.get("train"):
        work_folder.discard(work.location)
        raise UserError(_empty_message(card, counts))
    counts.repositories = plan.repositories
    finish.finish(work, records, counts, card, names)
    return counts


def _discard_if_empty(work: WorkFolder, config: PrepareConfig) -> None:
    """Remove the traces of a preparation that failed before any work was done."""
    with contextlib.suppress(OSError):  # the first error is the one to report
        if work.is_empty and config.partition is None and not work_folder.has_partitions(work.location):
            work_folder.discard(work.location)


@contextlib.contextmanager
def _writing(location: str, partition: str = "") -> Iterator[None]:
    """Claim the output, or a partition of it, and turn failures to write into sentences.

    Args:
        partition: path of the partition in the output.
    """
    try:
        with work_folder.outages_explained(location), claimed(location + partition, this_process()):
            yield
    except OSError as error:
        raise UserError(
            f"The output folder {location} cannot be written to ({one_line(error)}); free space there, or choose "
            "another --output."
        ) from None


def _partition_name(config: PrepareConfig) -> str:
    return "" if config.partition is None else "{}-of-{}".format(*config.partition)


def _scratch(config: PrepareConfig) -> str:
    """Create this command's scratch folder, without what a killed command left in it."""
    location = str(config.output)
    if config.scratch is None and not is_remote(location):
        parent, name = Path(location, FOLDER), "scratch"
    else:
        parent = Path(config.scratch or tempfile.gettempdir())
        # Several machines may share the folder.
        name = f"memdlm_{hashlib.sha256(f'{socket.gethostname()} {location}'.encode()).hexdigest()[:12]}"
    folder = parent / "-".join(filter(None, (name, _partition_name(config))))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({one_line(error)}); choose another --scratch.") from None
    return str(folder)


def _fingerprint(folder: str | None) -> str:
    """Return a hash of a tokenizer's files; empty if there is no such folder."""
    if folder is None:
        return ""
    state = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        path = Path(folder, name)
        state.update(path.read_bytes() if path.is_file() else b"\0")
    return state.hexdigest()[:12]


def _folder_names(config: PrepareConfig) -> tuple[str, ...]:
    """Return the folders to write, without tokenizer/ if the output's own tokenizer is used unchanged.

    Raises:
        UserError: if the tokenizer cannot be used.
    """
    source, target = config.tokenizer, Path(config.output) / TOKENIZER
    unchanged = (
        source is not None
        and Path(source).resolve() == target.resolve()
        and tokenizer.has_special_tokens(source, config.mask_token, config.eos_token)
    )
    return SPLITS if unchanged else (TOKENIZER, *SPLITS)


@dataclass(frozen=True)
class _Preparation:
    """Preparation that has begun: its work folder, units and jobs."""

    config: PrepareConfig
    plan: Plan
    work: WorkFolder
    names: tuple[str, ...]
    card: Card
    tokenizer: str
    units: Sequence[Unit]
    scratch: str

    def run(self, report: Callable[[str], None]) -> Summary:
        """Prepare all units, or those of the partition, and complete the output if it is not a partition."""
        if self.config.deduplicate:
            whole = self.config.partition is None
            if whole or self.config.hash_only:
                self._hash()
            if whole:
                deduplication.find_duplicates(self.work, self.units)
            if self.config.hash_only:
                return Summary()
            deduplication.check_known(self.work)
        records = self._prepare_units(report)
        if self.config.partition is not None:
            return total((record.summary for record in records), self.config.seq_len)
        return _complete(self.work, self.plan, self.card, self.names)

    def _jobs(self, selected: Sequence[Unit]) -> list[Job]:
        index, count = self.config.partition or (0, 1)
        config = replace(self.config, inputs=())  # may be a hundred thousand names, and every job has its files
        location = (str(self.config.output), self.work.fingerprint)
        return [
            Job(config, unit, location, self.tokenizer, self.card, self.scratch)
            for unit in selected
            if unit.number % count == index
        ]

    def _progress(self, label: str, jobs: Sequence[Job]) -> Progress:
        return Progress(label, sum(job.unit.size for job in jobs), self.scratch)

    def _results(
        self, action: Callable[[Job], T], jobs: Sequence[Job]
    ) -> "contextlib.closing[Generator[tuple[Job, T], None, None]]":
        """Return a context of the jobs' results; an error in it ends the workers before anything is removed."""
        return contextlib.closing(workers.results(action, jobs, n_workers(self.config), self.config.cluster))

    def _hash(self) -> None:
        jobs = self._jobs(deduplication.without_hashes(self.work, self.units))
        with self._progress("Hashing", jobs) as progress, self._results(deduplication.hash_unit, jobs) as results:
            for job, _ in results:
                progress.finish_unit(job.unit.size, 0)

    def _prepare_units(self, report: Callable[[str], None]) -> list[Record]:
        jobs, found, shown = self._jobs(self.units), [], 0
        finished = {name.partition("-")[0] for name in self.work.names() if "-" in name}
        with self._progress("Tokenising", jobs) as progress, self._results(prepare_unit, jobs) as results:
            for job, records in results:
                found += records
                bad_rows = sum(record.summary.bad_rows for record in records)
                progress.finish_unit(job.unit.size, bad_rows, earlier=f"{job.unit.number:06d}" in finished)
                problems = [problem for record in records for problem in record.summary.problems]
                for problem in problems[: max(SHOWN_PROBLEMS - shown, 0)]:
                    report(f"Skipped a bad row at {problem}.")
                if shown <= SHOWN_PROBLEMS < shown + bad_rows:
                    report("Further bad rows are counted, but not shown.")
                shown += bad_rows
        return found


def n_workers(config: PrepareConfig) -> int:
    """Return the number of worker processes, at most as many as the scratch folder has room for.

    Raises:
        UserError: if there is no room for one worker.
    """
    wanted = config.workers or joblib.cpu_count()
    if config.scratch_limit is None:
        return wanted
    needed = max(SHARD_SIZE, 5 * config.seq_len) + _OTHER_SCRATCH
    require(
        config.scratch_limit >= needed,
        f"--scratch-limit {config.scratch_limit:,} is too small for one worker; give at least {needed:,} bytes.",
    )
    return min(wanted, config.scratch_limit // needed)


def _begin(config: PrepareConfig, plan: Plan, all_units: Sequence[Unit]) -> _Preparation:
    """Check the output, make the tokenizer and write the plan, or go on with what an earlier command began."""
    location = str(config.output)
    n_workers(config)
    work_folder.recover(location)
    names = _folder_names(config)
    work_folder.check_output(location, names, plan, config.overwrite)
    work = WorkFolder(location, plan.fingerprint)
    scratch = _scratch(config)
    try:
        place = f"{location}/{work.staged(TOKENIZER) if TOKENIZER in names else TOKENIZER}"
        has_begun = work.has_begun
        work.claim(plan)
        if not has_begun:
            folder = str(Path(scratch, TOKENIZER))
            if TOKENIZER in names:
                made = _make_tokenizer(config, work, all_units, folder, scratch)
            else:
                made = DiffusionTokenizer(place)
            card = config.card(made)
            if not work.storage.remote:
                if config.partition is None and work.is_empty:  # another partition may be at the same point
                    output.discard(Path(location))  # files whose records are gone
                for name in names:
                    output.begin(Path(location, work.staged(name)))
            if TOKENIZER in names:
                for path in Path(folder).iterdir():
                    work.storage.take(path, f"{work.staged(TOKENIZER)}/{path.name}")
            work.begin(card, names)
        card, names = work.setup()
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        _discard_if_empty(work, config)
        raise
    return _Preparation(config, plan, work, names, card, place, all_units, scratch)


def _make_tokenizer(
    config: PrepareConfig, work: WorkFolder, all_units: Sequence[Unit], folder: str, scratch: str
) -> DiffusionTokenizer:
    """Train a tokenizer in a folder, or copy one to it."""
    if config.train_tokenizer is None:
        assert config.tokenizer is not None
        return tokenizer.adopt(config.tokenizer, Path(folder), config.mask_token, config.eos_token)
    lenient, card = replace(config, strict=False), Card(config.seq_len, 0, 0, 0)
    jobs = [Job(lenient, unit, (work.location, work.fingerprint), "", card, scratch) for unit in all_units]
    sample = tokenizer_sample.texts(jobs, n_workers(config), config.cluster)
    return tokenizer.train(sample, config.train_tokenizer, Path(folder))


def _empty_message(card: Card, counts: Summary) -> str:
    if not counts.rows:
        return "The corpus is empty: the input holds no row; check --input."
    if counts.bad_rows == counts.rows:
        return f"All rows of the corpus are bad (the first at {counts.problems[0]}); correct them."
    # Every unit drops its incomplete last row.
    unit = "raise --unit-size, " if counts.tail_tokens_dropped >= card.seq_len else ""
    return (
        f"The corpus makes no training sequence of {card.seq_len} tokens: {counts.rows} rows read, {counts.bad_rows} "
        f"bad, {counts.overlong_dropped} too long, {counts.tokens} tokens; {unit}add text, lower --seq-len, or pass "
        "--overlong clip-response."
    )
