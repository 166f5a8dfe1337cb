#!/usr/bin/env python
"""Kill and restart a run at random points for N minutes, and compare every step with an undisturbed run.

    python -m tests.workers.soak --minutes 20 [--ranks 2] [--seed 0] [--output FOLDER]

The undisturbed run comes first. Then our launcher starts the same run again and again, and after a random number of
seconds an event disturbs it (see `EVENTS`). In every other start, the clocks of all ranks but rank 0 are off by a
minute. Every start must resume right after the newest intact checkpoint, and every step's loss (bit for bit), samples
and masks must equal the undisturbed run's. A completed run must have the undisturbed run's last checkpoint; then a new
run begins. The program ends with a table, and with exit status 1 if anything differed.
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
SKEW = "SOAK_SKEW"  # seconds by which the clocks of all ranks but rank 0 are off
ARGUMENTS = [
    "--job.config_file", "train_configs/debug.toml", "--debug.seed", "7", "--model.flavor", "tiny",
    "--data.train", "tests/assets/debug/heldout", "--training.local_batch_size", "2", "--training.steps", str(STEPS),
    "--checkpoint.enable", "--checkpoint.interval", str(INTERVAL), "--checkpoint.keep_latest_k", "3",
    "--training.dataloader.num_workers", "1", "--metrics.disable_color_printing",
]  # fmt: skip


# The training process


def worker(folder: Path, arguments: list[str]) -> int:
    """Train as one rank; record its draws and every step's loss."""
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

    def log(self, step, loss, *rest, **kwargs):
        losses.write(json.dumps([step, float(loss).hex()]) + "\n")
        plain(self, step, loss, *rest, **kwargs)

    MemDLMMetrics.log_step = log
    preemption.ignore_outside_of_training()  # like the training program
    return train.main(arguments)


# Events


class Run:
    """Launcher process and its ranks."""

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
    with contextlib.suppress(ProcessLookupError):  # the process has ended already
        os.kill(process, number)


def kill_a_rank(run: Run, rng: random.Random) -> None:
    kill(rng.choice(run.ranks() or [run.process.pid]), signal.SIGKILL)


def kill_everything(run: Run, rng: random.Random) -> None:
    for process in [*run.ranks(), run.process.pid]:
        kill(process, signal.SIGKILL)


def kill_while_saving(run: Run, rng: random.Random) -> None:
    """Kill launcher and ranks as soon as a checkpoint is incomplete."""
    deadline = time.monotonic() + 10
    while not run.incomplete() and run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    kill_everything(run, rng)


def ask_to_stop(run: Run, rng: random.Random) -> None:
    kill(run.process.pid, rng.choice([signal.SIGTERM, signal.SIGUSR1]))


def ask_one_rank_to_stop(run: Run, rng: random.Random) -> None:
    kill(rng.choice(run.ranks() or [run.process.pid]), signal.SIGUSR1)


def kill_and_truncate(run: Run, rng: random.Random) -> None:
    """Kill everything and truncate a file of the newest checkpoint, like a file system that lost its last writes."""
    kill_everything(run, rng)
    run.process.wait()
    complete = [path for path in run.checkpoints.glob("step-*") if (path / ".metadata").exists() and _step(path) >= 0]
    if len(complete) > 1:
        file = rng.choice(sorted(max(complete, key=_step).glob("*.distcp")))
        os.truncate(file, file.stat().st_size - 100)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def ask_every_process(run: Run, rng: random.Random) -> None:
    """Send SIGTERM to launcher, ranks and their loader workers, like a batch system."""
    processes = [run.process.pid]
    for process in processes:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                processes += map(int, children.read_text().split())
    for process in processes:
        kill(process, signal.SIGTERM)


def start_a_second_run(run: Run, rng: random.Random) -> None:
    """Suspend the run and start a second one on its folder, which must end with the writer's error; kill the first."""
    suspended = run.ranks()
    for rank in suspended:
        kill(rank, signal.SIGSTOP)
    if suspended and run.process.poll() is None:
        second = Run(run.out, run.observed / "second", run.number)
        status, output = second.process.wait(), (second.observed / "log").read_text()
        if status != 2 or "error: Another run writes to" not in output:
            raise AssertionError(f"a second run ended with {status}: {output[-2000:]}")
    kill_everything(run, rng)


EVENTS = {
    "a second run, then kill -9": start_a_second_run,
    "kill -9 of one rank": kill_a_rank,
    "kill -9 of launcher and ranks": kill_everything,
    "kill -9 while saving": kill_while_saving,
    "kill -9, newest checkpoint truncated": kill_and_truncate,
    "SIGTERM or SIGUSR1 to the launcher": ask_to_stop,
    "SIGTERM to every process": ask_every_process,
    "SIGUSR1 to one rank": ask_one_rank_to_stop,
}


# Checks


def losses(observed: Path) -> dict[int, str]:
    file = observed / "losses0.jsonl"
    return dict(_lines(file)) if file.exists() else {}


def draws(observed: Path) -> dict[tuple, str]:
    return {(k, step, sample): d for file in observed.glob("rank*.jsonl") for k, step, sample, d in _lines(file)}


def _lines(file: Path) -> list:
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may truncate the last line


def intact_steps(checkpoints: Path) -> list[int]:
    from memdlm_dist.checkpoint.catalogue import Catalogue

    return [saved.step for saved in Catalogue(str(checkpoints)).all() if saved.intact] if checkpoints.exists() else []


def contents(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}


def soak(minutes: float, ranks: int, seed: int, root: Path) -> int:
    rng = random.Random(seed)
    reference = Run(root / "straight", root / "observed-straight", ranks)
    assert reference.process.wait() == 0, f"the undisturbed run failed, see {reference.observed}/log"
    expected_losses, expected_draws = losses(reference.observed), draws(reference.observed)
    expected_end = contents(root / f"straight/checkpoint/step-{STEPS}")
    assert set(expected_losses) == set(range(1, STEPS + 1)) and expected_end
    print(f"undisturbed run of {STEPS} steps done; now {minutes:g} minutes of starts", flush=True)

    events: collections.Counter[str] = collections.Counter()
    steps_lost: collections.Counter[str] = collections.Counter()
    statuses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    mismatches: list[str] = []
    starts = completed = compared = 0
    deadline, furthest, last_event = time.monotonic() + 60 * minutes, 0, ""
    while time.monotonic() < deadline:
        starts += 1
        newest = max(intact_steps(root / "run/checkpoint"), default=0)
        run = Run(root / "run", root / f"observed-{starts}", ranks, skew=starts % 2 * rng.choice([-60, 60]))
        event, wait = rng.choice(sorted(EVENTS)), rng.uniform(0, 9)
        while not run.steps_done() and run.process.poll() is None:
            time.sleep(0.05)
        try:
            run.process.wait(wait)
        except subprocess.TimeoutExpired:
            events[event] += 1
            EVENTS[event](run, rng)
        else:
            event = "left alone to its end"
        status = run.process.wait()
        time.sleep(0.5)  # ranks that lost their launcher may still be exiting
        statuses[event][status] += 1
        measured, drawn = losses(run.observed), draws(run.observed)
        compared += len(measured)
        if not measured or min(measured) != newest + 1:
            mismatches.append(f"start {starts}: continued at step {min(measured, default=None)}, not {newest + 1}")
        wrong = [step for step in measured if measured[step] != expected_losses[step]]
        wrong_draws = [key for key in drawn if drawn[key] != expected_draws.get(key)]
        if wrong or wrong_draws:
            mismatches.append(f"start {starts}: losses of steps {wrong[:5]}, draws {wrong_draws[:3]} differ")
        if last_event:
            steps_lost[last_event] += furthest - newest
        furthest, last_event = max(measured, default=newest), event
        if STEPS in intact_steps(root / "run/checkpoint"):
            completed, furthest, last_event = completed + 1, 0, ""
            if contents(root / f"run/checkpoint/step-{STEPS}") != expected_end:
                mismatches.append(f"start {starts}: the last checkpoint differs")
            shutil.rmtree(root / "run")
        print(
            f"start {starts}: from step {newest}, to {max(measured, default=0)}; {event}: status {status}", flush=True
        )
        if mismatches:
            print("\n".join(mismatches), flush=True)
            break
        shutil.rmtree(run.observed)

    print("\n| what happened | times | exit status (times) | steps done again |\n|---|---|---|---|")
    for event_name in [*sorted(events), "left alone to its end"]:
        ends = ", ".join(f"{status} ({n})" for status, n in sorted(statuses[event_name].items()))
        print(f"| {event_name} | {sum(statuses[event_name].values())} | {ends} | {steps_lost[event_name]} |")
    print(
        f"\n{starts} starts, {completed} runs completed, {compared:,} steps compared, {sum(steps_lost.values())} steps "
        f"done again (a checkpoint every {INTERVAL}), {len(mismatches)} mismatches."
    )
    return 1 if mismatches else 0


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="minutes of restarts after the undisturbed run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random events and their times")
    parser.add_argument("--output", type=Path, help="folder for all files; a temporary one by default")
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
