#!/usr/bin/env python
"""List the checkpoints of a run, verify their content, or remove those that are not needed.

Examples, after bash launch/quickstart.sh:
  python tools/checkpoints.py list outputs/quickstart/checkpoint
  python tools/checkpoints.py verify outputs/quickstart/checkpoint --step 240
  python tools/checkpoints.py prune outputs/quickstart/checkpoint --keep-latest 1 --dry-run

DIR is a folder or a URL that holds checkpoints step-N, such as outputs/quickstart/checkpoint or s3://bucket/run.
`checkpoints.py COMMAND --help` describes a command and its options.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.checkpoint.catalogue import SCORES, Catalogue, SavedCheckpoint, folder_name, prunable_steps, read_run
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.entry_point import add_command, guarded, new_parser
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage
from memdlm_dist.runtime.writer import claimed, this_process

_LIST = """Show each checkpoint's step, size and state.

Example:
  python tools/checkpoints.py list outputs/quickstart/checkpoint

The state is derived from the file sizes; the command `verify` reads the files themselves.
"""
_VERIFY = """Read every file of the checkpoints, except their exports (hf/), and compare its checksums.

Examples:
  python tools/checkpoints.py verify outputs/quickstart/checkpoint
  python tools/checkpoints.py verify outputs/quickstart/checkpoint --step 240

Exit status: 0 if all are intact, 1 if a checkpoint is damaged, incomplete or missing.
"""
_PRUNE = """Remove the checkpoints that no retention rule keeps.

Examples:
  python tools/checkpoints.py prune outputs/quickstart/checkpoint --keep-latest 1 --dry-run
  python tools/checkpoints.py prune s3://bucket/run --keep-latest 2 --keep-every 1000

Three rules keep a checkpoint: it is one of the K newest intact ones, its step is a multiple of N, or it is the best one
of a run with checkpoint.keep_best. The command never removes a damaged checkpoint, nor the only intact one.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser with its three subcommands."""
    p = new_parser("checkpoints.py", __doc__)
    p.usage = "checkpoints.py {list,verify,prune} DIR [options]"
    commands = p.add_subparsers(
        title="commands", dest="command", required=True, prog="checkpoints.py", metavar="COMMAND"
    )

    def command(name: str, description: str) -> argparse.ArgumentParser:
        sub = add_command(commands, name, description)
        data = sub.add_argument_group("data")
        data.add_argument("directory", metavar="DIR", help="folder or URL that holds the checkpoints step-N")
        return sub

    listing = command("list", _LIST)
    listing.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print one JSON object per checkpoint instead of the table"
    )
    verify = command("verify", _VERIFY)
    verify.add_argument_group("selection").add_argument(
        "--step", type=int, metavar="N", help="verify only checkpoint step-N (default: all checkpoints)"
    )
    prune = command("prune", _PRUNE)
    prune.usage = "checkpoints.py prune DIR --keep-latest K [options]"
    retention = prune.add_argument_group("retention")
    retention.add_argument(
        "--keep-latest", type=int, required=True, metavar="K", help="number of newest intact checkpoints to keep"
    )
    retention.add_argument(
        "--keep-every", type=int, default=0, metavar="N",
        help="keep also every checkpoint whose step is a multiple of N; 0 disables this rule (default: 0)",
    )  # fmt: skip
    retention.add_argument(
        "--incomplete", action="store_true",
        help="remove also checkpoints whose saving was interrupted; refused while a run saves to DIR",
    )  # fmt: skip
    prune.add_argument_group("output").add_argument(
        "--dry-run", action="store_true", help="print what would be removed, and remove nothing"
    )
    return p


def state(saved: SavedCheckpoint, intact: str = "intact") -> str:
    """Return a checkpoint's state in words: its problem, or `intact` if it has none."""
    if saved.exported:
        return "weights alone (safetensors)"
    return saved.problem or intact


def existing_checkpoints(catalogue: Catalogue) -> list[SavedCheckpoint]:
    """Return all checkpoints of the folder, damaged and incomplete ones too.

    Raises:
        UserError: if the folder has no checkpoint.
    """
    checkpoints = catalogue.all()
    if not checkpoints:
        raise UserError(f"There is no checkpoint step-N in {catalogue.storage.url()}; name the folder that holds them.")
    return checkpoints


def list_all(catalogue: Catalogue, as_json: bool) -> None:
    """Print one line per checkpoint: a table, or JSON objects."""
    checkpoints = existing_checkpoints(catalogue)
    if not as_json:
        print(f"{'checkpoint':<14}{'size':>12}{'ranks':>7}{'global batch':>14}  state")
    for saved in checkpoints:
        run = {}
        with contextlib.suppress(UserError):  # the run's description may be unreadable while the tensors are intact
            run = read_run(Storage(catalogue.storage.url(saved.name)))
        identity = run.get("identity")
        batch = identity.get("training.global_batch_size", "-") if isinstance(identity, dict) else "-"
        if as_json:
            # Programs read these lines, so an intact checkpoint keeps the word "good" in them.
            values = {"step": saved.step, "bytes": saved.size, "good": saved.intact, "state": state(saved, "good")}
            print(json.dumps(values | {"run": run}))
        else:
            size = f"{saved.size / 2**20:,.1f} MiB"
            print(f"{saved.name:<14}{size:>12}{run.get('ranks', '-'):>7}{batch:>14}  {state(saved)}")


def verify_all(catalogue: Catalogue, step: int | None) -> int:
    """Verify the checksums of all checkpoints or of one step; return exit status 1 if any has a problem, else 0."""
    steps = [saved.step for saved in existing_checkpoints(catalogue)] if step is None else [step]
    damaged = 0
    for number in steps:
        problems = []
        with tqdm(desc=folder_name(number), unit="file", leave=False) as progress:
            for problem in catalogue.verify(number):
                progress.update()
                problems += [problem] if problem else []
        print(f"{folder_name(number)}: {'; '.join(problems) or 'intact'}", flush=True)
        damaged += bool(problems)
    return 1 if damaged else 0


def prune(catalogue: Catalogue, options: argparse.Namespace) -> None:
    """Remove the checkpoints that no retention rule keeps.

    Raises:
        UserError: if an option is out of range, scores.json is damaged, or --incomplete meets a run that saves here.
    """
    if options.keep_latest < 1:
        raise UserError(
            f"--keep-latest must be at least 1, but is {options.keep_latest}: the newest checkpoint always stays."
        )
    if options.keep_every < 0:
        raise UserError(f"--keep-every must not be negative (0 is off), but is {options.keep_every}.")
    checkpoints = existing_checkpoints(catalogue)
    intact = [saved.step for saved in checkpoints if saved.intact]
    try:
        best = catalogue.best(intact)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{catalogue.storage.url(SCORES)} is damaged ({one_line(error)}); restore the file or remove it."
        ) from None
    removed = prunable_steps(intact, options.keep_latest, options.keep_every, best)
    if options.incomplete:
        removed += [saved.step for saved in checkpoints if not saved.complete and not saved.exported]
    # A run may be writing an incomplete checkpoint at this moment: the lock makes sure that none is.
    lock = claimed(options.directory, this_process()) if options.incomplete else contextlib.nullcontext()
    with lock:
        for step in sorted(removed):
            print(f"{'would remove' if options.dry_run else 'removing'} {folder_name(step)}", flush=True)
            if not options.dry_run:
                catalogue.remove(step)
    print(f"{len(intact) - len([step for step in removed if step in intact])} intact checkpoints stay")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run the chosen subcommand and return the exit status."""
    catalogue = Catalogue(options.directory)
    if options.command == "verify":
        return verify_all(catalogue, options.step)
    if options.command == "list":
        list_all(catalogue, options.json)
    else:
        prune(catalogue, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
