#!/usr/bin/env python
"""Kill a run at random points, start it again, and compare every step with an undisturbed run; for N minutes.

    python -m tests.workers.soak --minutes 20 [--ranks 2] [--seed 0] [--output FOLDER]

The undisturbed run comes first. Then the same run is started over and over through our launcher, and each time
something happens to it after a random number of seconds (see `HAPPENINGS`); in every other start one rank's clock is
wrong by a minute. After each start it must have gone on right after the newest good checkpoint, and each step's loss
(to the last bit), samples and masks must be those of the undisturbed run. A run that comes to its end must have its
very last checkpoint, and a new one begins. Ends with a table, and with 1 if anything differed.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL = 300, 10
SKEW = "SOAK_SKEW"  # seconds by which the clocks of all ranks but the first are wrong
ARGUMENTS = [
    "--job.config_file", "train_configs/debug.toml", "--debug.seed", "7", "--model.flavor", "tiny",
    "--data.train", "tests/assets/debug/heldout", "--training.local_batch_size", "2", "--training.steps", str(STEPS),
    "--checkpoint.enable", "--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest_k", "3",
    "--training.dataloader.num_workers", "1", "--metrics.disable_color_printing",
]  # fmt: skip


# The training process


def worker(folder: Path, arguments: list[str]) -> int:
    """One rank, which writes down what it draws and, rank 0, each step's loss."""
    from memdlm_dist import train
    from memdlm_dist.runtime import preemption
    from memdlm_dist.training.metrics import MemDLMMetrics
    from tests.workers.run_many import record

    rank = int(os.environ["RANK"])
    if rank and (skew := float(os.environ.get(SKEW, "0"))):
        clock = time.time
        time.time = lambda: clock() + skew
    record(str(folder), rank)
    plain = MemDLMMetrics.log_step
    losses = open(folder / f"losses{rank}.jsonl", "a", buffering=1)  # noqa: SIM115  (open until the process ends)

    def log(self, step, loss, *rest, **named):
        losses.write(json.dumps([step, float(loss).hex()]) + "\n")
        plain(self, step, loss, *rest, **named)

    MemDLMMetrics.log_step = log
    preemption.ignore_outside_of_training()  # as the program does
    return train.main(arguments)


# What happens to it


class Run:
    """The launcher and its ranks."""

    def __init__(self, out: Path, observed: Path, ranks: int, skew: float = 0):
        observed.mkdir(parents=True)
        self.out, self.checkpoints, self.observed, self.number = out, out / "checkpoint", observed, ranks
        self.log = open(observed / "log", "wb")  # noqa: SIM115
        command = [
            sys.executable, "-m", "memdlm_dist.runtime.launcher", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", "--role=rank", "--tee=3", "-m", "tests.workers.soak", "--worker",
            str(observed), *ARGUMENTS, "--job.dump_folder", str(out),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", SKEW: str(skew)},
        )

    def ranks(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            candidates = [int(child) for child in children.read_text().split()]
        except OSError:
            return []
        return [child for child in candidates if b"LOCAL_RANK=" in _read(child)]

    def steps_done(self) -> bool:
        file = self.observed / "losses0.jsonl"
        return file.exists() and file.stat().st_size > 0

    def incomplete(self) -> bool:
        return any(not (path / ".metadata").exists() for path in self.checkpoints.glob("step-*"))


def _read(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""


def kill(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was faster
        os.kill(process, number)


def kill_a_rank(run: Run, dice: random.Random) -> None:
    kill(dice.choice(run.ranks() or [run.process.pid]), signal.SIGKILL)


def kill_everything(run: Run, dice: random.Random) -> None:
    for process in [*run.ranks(), run.process.pid]:
        kill(process, signal.SIGKILL)


def kill_while_saving(run: Run, dice: random.Random) -> None:
    """As soon as a checkpoint has begun to be written and is not complete."""
    deadline = time.monotonic() + 10
    while not run.incomplete() and run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    kill_everything(run, dice)


def ask_to_stop(run: Run, dice: random.Random) -> None:
    kill(run.process.pid, dice.choice([signal.SIGTERM, signal.SIGUSR1]))


def ask_one_rank_to_stop(run: Run, dice: random.Random) -> None:
    kill(dice.choice(run.ranks() or [run.process.pid]), signal.SIGUSR1)


def kill_and_truncate(run: Run, dice: random.Random) -> None:
    """The newest checkpoint loses the end of one of its files, as on a file system that lost its last writes."""
    kill_everything(run, dice)
    run.process.wait()
    complete = [path for path in run.checkpoints.glob("step-*") if (path / ".metadata").exists() and _step(path) >= 0]
    if len(complete) > 1:
        file = dice.choice(sorted(max(complete, key=_step).glob("*.distcp")))
        os.truncate(file, file.stat().st_size - 100)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def ask_every_process(run: Run, dice: random.Random) -> None:
    """SIGTERM to launcher, ranks and their loader workers alike, as batch systems send it."""
    everyone = [run.process.pid]
    for process in everyone:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                everyone += map(int, children.read_text().split())
    for process in everyone:
        kill(process, signal.SIGTERM)


def start_a_second_run(run: Run, dice: random.Random) -> None:
    """It must end with the sentence that says who writes here, while the first one is held; then that is killed."""
    held = run.ranks()
    for rank in held:
        kill(rank, signal.SIGSTOP)
    if held and run.process.poll() is None:
        second = Run(run.out, run.observed / "second", run.number)
        status, said = second.process.wait(), (second.observed / "log").read_text()
        if status != 2 or "error: Another run writes to" not in said:
            raise AssertionError(f"a second run ended with {status}: {said[-2000:]}")
    kill_everything(run, dice)


HAPPENINGS = {
    "a second run, then kill -9": start_a_second_run,
    "kill -9 of one rank": kill_a_rank,
    "kill -9 of launcher and ranks": kill_everything,
    "kill -9 while saving": kill_while_saving,
    "kill -9, newest checkpoint truncated": kill_and_truncate,
    "SIGTERM or SIGUSR1 to the launcher": ask_to_stop,
    "SIGTERM to every process": ask_every_process,
    "SIGUSR1 to one rank": ask_one_rank_to_stop,
}


# What must come of it


def losses(observed: Path) -> dict[int, str]:
    file = observed / "losses0.jsonl"
    return dict(_lines(file)) if file.exists() else {}


def draws(observed: Path) -> dict[tuple, str]:
    return {(k, step, sample): d for file in observed.glob("rank*.jsonl") for k, step, sample, d in _lines(file)}


def _lines(file: Path) -> list:
    whole = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in whole if line.endswith("\n")]  # the last may be cut short by a kill


def good_steps(checkpoints: Path) -> list[int]:
    from memdlm_dist.checkpoint.catalogue import Catalogue

    return [saved.step for saved in Catalogue(str(checkpoints)).all() if saved.intact] if checkpoints.exists() else []


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}


def soak(minutes: float, ranks: int, seed: int, root: Path) -> int:
    dice = random.Random(seed)
    reference = Run(root / "straight", root / "observed-straight", ranks)
    assert reference.process.wait() == 0, f"the undisturbed run failed, see {reference.observed}/log"
    want_losses, want_draws = losses(reference.observed), draws(reference.observed)
    want_end = contents(root / f"straight/checkpoint/step-{STEPS}")
    assert set(want_losses) == set(range(1, STEPS + 1)) and want_end
    print(f"undisturbed run of {STEPS} steps done; now {minutes:g} minutes of starts", flush=True)

    kinds: collections.Counter[str] = collections.Counter()
    lost_of: collections.Counter[str] = collections.Counter()
    statuses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    mismatches: list[str] = []
    starts = completed = compared = 0
    deadline, furthest, happened = time.monotonic() + 60 * minutes, 0, ""
    while time.monotonic() < deadline:
        starts += 1
        newest = max(good_steps(root / "run/checkpoint"), default=0)
        run = Run(root / "run", root / f"observed-{starts}", ranks, skew=starts % 2 * dice.choice([-60, 60]))
        happening, wait = dice.choice(sorted(HAPPENINGS)), dice.uniform(0, 9)
        while not run.steps_done() and run.process.poll() is None:
            time.sleep(0.05)
        try:
            run.process.wait(wait)
        except subprocess.TimeoutExpired:
            kinds[happening] += 1
            HAPPENINGS[happening](run, dice)
        else:
            happening = "left alone to its end"
        status = run.process.wait()
        time.sleep(0.5)  # ranks that lost their launcher may still be ending
        statuses[happening][status] += 1
        found, drawn = losses(run.observed), draws(run.observed)
        compared += len(found)
        if not found or min(found) != newest + 1:
            mismatches.append(f"start {starts}: went on at step {min(found, default=None)}, not {newest + 1}")
        wrong = [step for step in found if found[step] != want_losses[step]]
        wrong_draws = [key for key in drawn if drawn[key] != want_draws.get(key)]
        if wrong or wrong_draws:
            mismatches.append(f"start {starts}: losses of steps {wrong[:5]}, draws {wrong_draws[:3]} differ")
        if happened:
            lost_of[happened] += furthest - newest
        furthest, happened = max(found, default=newest), happening
        if STEPS in good_steps(root / "run/checkpoint"):
            completed, furthest, happened = completed + 1, 0, ""
            if contents(root / f"run/checkpoint/step-{STEPS}") != want_end:
                mismatches.append(f"start {starts}: the last checkpoint differs")
            shutil.rmtree(root / "run")
        print(
            f"start {starts}: from step {newest}, to {max(found, default=0)}; {happening}: status {status}", flush=True
        )
        if mismatches:
            print("\n".join(mismatches), flush=True)
            break
        shutil.rmtree(run.observed)

    print("\n| what happened | times | exit status (times) | steps done again |\n|---|---|---|---|")
    for kind in [*sorted(kinds), "left alone to its end"]:
        ends = ", ".join(f"{status} ({n})" for status, n in sorted(statuses[kind].items()))
        print(f"| {kind} | {sum(statuses[kind].values())} | {ends} | {lost_of[kind]} |")
    print(
        f"\n{starts} starts, {completed} runs completed, {compared:,} steps compared, {sum(lost_of.values())} steps "
        f"done again (a checkpoint every {INTERVAL}), {len(mismatches)} mismatches."
    )
    return 1 if mismatches else 0


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="how long, the undisturbed run apart")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--output", type=Path, help="folder for everything; a temporary one by default")
    options = parser.parse_args()
    if options.minutes <= 0 or options.ranks < 1:
        parser.error("--minutes must be positive and --ranks at least 1")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = options.output or Path(folder)
        if root.exists() and any(root.iterdir()):
            parser.error(f"{root} is not empty; choose another --output")
        return soak(options.minutes, options.ranks, options.seed, root)


if __name__ == "__main__":
    sys.exit(main())
