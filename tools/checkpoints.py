#!/usr/bin/env python
"""The checkpoints of a run: list them, verify their content, remove those that are not needed.

    python tools/checkpoints.py list DIR
    python tools/checkpoints.py verify DIR [--step N]
    python tools/checkpoints.py prune DIR --keep-latest K [--keep-every N] [--incomplete] [--dry-run]

DIR is a folder or a URL with checkpoints step-N in it, such as outputs/quickstart/checkpoint or s3://bucket/run.
Verifying reads every file and compares the checksums in it; it exits with 1 if anything is wrong. Pruning keeps the K
newest good checkpoints, every one whose step is a multiple of N, and the best one of a run with checkpoint.keep_best.
It never removes a damaged one, or the only good one.
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
from memdlm_dist.runtime.entry_point import guarded, new_parser
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage
from memdlm_dist.runtime.writer import claimed, this_process


def arguments() -> argparse.ArgumentParser:
    assert __doc__
    parser = new_parser("checkpoints.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("directory", metavar="DIR", help="folder or URL that holds the checkpoints")
        return sub

    listing = command("list", "Show each checkpoint's step, size and state, from its files' sizes alone.")
    listing.add_argument("--json", action="store_true", help="one JSON object a line, for machines")
    verify = command("verify", "Read every file and compare the checksums in it.")
    verify.add_argument("--step", type=int, help="only this one (default: all)")
    prune = command("prune", "Remove checkpoints that are not needed.")
    prune.add_argument(
        "--keep-latest", type=int, required=True, metavar="K", help="how many of the newest good ones stay"
    )
    prune.add_argument("--keep-every", type=int, default=0, metavar="N", help="keep those at multiples of N steps too")
    prune.add_argument(
        "--incomplete", action="store_true",
        help="remove those as well whose saving was interrupted; refused while a run saves here",
    )  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    return parser


def state(saved: SavedCheckpoint) -> str:
    if saved.exported:
        return "weights alone (safetensors)"
    return saved.problem or "good"


def found(catalogue: Catalogue) -> list[SavedCheckpoint]:
    """All of them.

    Raises:
        UserError: if there are none.
    """
    everything = catalogue.all()
    if not everything:
        raise UserError(f"There is no checkpoint step-N in {catalogue.storage.url()}; name the folder that holds them.")
    return everything


def list_all(catalogue: Catalogue, as_json: bool) -> None:
    rows = found(catalogue)
    if not as_json:
        print(f"{'checkpoint':<14}{'size':>12}{'ranks':>7}{'global batch':>14}  state")
    for saved in rows:
        run = {}
        with contextlib.suppress(UserError):  # its other files may be good
            run = read_run(Storage(catalogue.storage.url(saved.name)))
        identity = run.get("identity")
        batch = identity.get("training.global_batch_size", "-") if isinstance(identity, dict) else "-"
        if as_json:
            values = {"step": saved.step, "bytes": saved.size, "good": saved.intact, "state": state(saved), "run": run}
            print(json.dumps(values))
        else:
            size = f"{saved.size / 2**20:,.1f} MiB"
            print(f"{saved.name:<14}{size:>12}{run.get('ranks', '-'):>7}{batch:>14}  {state(saved)}")


def verify_all(catalogue: Catalogue, step: int | None) -> int:
    """Exit status: 1 if something is wrong with any."""
    steps = [saved.step for saved in found(catalogue)] if step is None else [step]
    wrong = 0
    for number in steps:
        problems = []
        with tqdm(desc=folder_name(number), unit="file", leave=False) as progress:
            for problem in catalogue.verify(number):
                progress.update()
                problems += [problem] if problem else []
        print(f"{folder_name(number)}: {'; '.join(problems) or 'good'}", flush=True)
        wrong += bool(problems)
    return 1 if wrong else 0


def prune(catalogue: Catalogue, options: argparse.Namespace) -> None:
    if options.keep_latest < 1:
        raise UserError(f"--keep-latest must be at least 1, but is {options.keep_latest}: the newest one always stays.")
    if options.keep_every < 0:
        raise UserError(f"--keep-every must not be negative (0 is off), but is {options.keep_every}.")
    rows = found(catalogue)
    good = [saved.step for saved in rows if saved.intact]
    try:
        best = catalogue.best(good)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{catalogue.storage.url(SCORES)} is damaged ({one_line(error)}); restore the file or remove it."
        ) from None
    going = prunable_steps(good, options.keep_latest, options.keep_every, best)
    if options.incomplete:
        going += [saved.step for saved in rows if not saved.complete and not saved.exported]
    # What is incomplete may be in the writing.
    alone = claimed(options.directory, this_process()) if options.incomplete else contextlib.nullcontext()
    with alone:
        for step in sorted(going):
            print(f"{'would remove' if options.dry_run else 'removing'} {folder_name(step)}", flush=True)
            if not options.dry_run:
                catalogue.remove(step)
    print(f"{len(good) - len([step for step in going if step in good])} good checkpoints stay")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
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
