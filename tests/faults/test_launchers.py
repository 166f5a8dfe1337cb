"""Launch scripts with real processes: restarts, signals, several nodes, and a stand-in for Slurm."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from memdlm_dist.runtime import launcher, process_environment
from memdlm_dist.runtime.single_process import free_port
from tests.support.launching import Launched, debug, run_many, run_module, scalars
from tests.support.zygote import ROOT
from tools import bench

SCRIPTS = [
    "launch/train.sh", "launch/multinode.sh", "launch/slurm.sbatch", "launch/prepare.sbatch", "launch/setup.sh",
    "launch/quickstart.sh",
]  # fmt: skip
LOSS = "loss_metrics/global_avg_loss"
COMMON = ["--training.local_batch_size", "2", "--checkpoint.enable", "--checkpoint.interval", "5"]
TIMEOUT = 180


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *SCRIPTS, "tests/run.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "variables, message",
    [
        ({}, "NNODES must be a number of nodes, or MIN:MAX, but is ''"),
        ({"NNODES": "2"}, "RDZV_ENDPOINT must be HOST:PORT, the same on all nodes, but is ''"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NODE_RANK": "x"}, "NODE_RANK must be a number from 0"),
    ],
)
def test_mistakes_on_several_nodes(variables, message):
    done = subprocess.run(
        ["bash", "launch/multinode.sh", "train_configs/debug.toml"],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "name a configuration" in done.stderr


def test_tasks_of_a_job_array_prepare_partitions(tmp_path):
    """Slurm's variables become the partition and the number of workers."""
    (tmp_path / "python").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$@"\n')
    (tmp_path / "python").chmod(0o755)

    def prepare(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "SLURM_SUBMIT_DIR": str(ROOT)} | variables
        command = ["bash", f"{ROOT}/launch/prepare.sbatch", "--text-field", "a b", "--output", "s3://b/o"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = prepare(**array, SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="6")
    assert done.returncode == 0 and done.stdout.splitlines() == [
        str(ROOT), "tools/prepare_data.py", "--text-field", "a b", "--output", "s3://b/o", "--workers", "6",
        "--partition", "2/4",
    ]  # fmt: skip
    for variables, sentence in [({}, "this is no job array"), (array | {"SLURM_ARRAY_TASK_MIN": "1"}, "numbered 0, 1")]:
        done = prepare(**variables)
        assert done.returncode == 2 and sentence in done.stderr and not done.stdout


THREADS, ALLOCATOR = "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    "processes, quota, preset, expected",
    [
        ("3", "max 100000", {}, {THREADS: "2", ALLOCATOR: "expandable_segments:True"}),
        ("16", "max 100000", {}, {THREADS: "1", ALLOCATOR: "expandable_segments:True"}),
        ("1", "400000 100000", {}, {THREADS: "4", ALLOCATOR: "expandable_segments:True"}),
        ("1", "max 100000", {THREADS: "3", "PYTORCH_CUDA_ALLOC_CONF": "x:1"}, {THREADS: "3", ALLOCATOR: None}),
    ],
)
def test_ranks_share_the_cores_and_get_an_allocator_that_grows(
    monkeypatch, tmp_path, processes, quota, preset, expected
):
    """Launcher and bench derive threads from the usable cores and set the allocator, unless the user has."""
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(process_environment, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.setattr(launcher.SignalForwarder, "install", lambda self: None)
    monkeypatch.setattr(bench, "_configuration", lambda *_: None)
    starts = (
        (launcher.run, launcher.main),
        (bench.subprocess, lambda: bench.main(["--processes", processes, "--json", ""])),
    )
    monkeypatch.setattr(sys, "argv", ["launcher", f"--nproc-per-node={processes}", "train.py"])
    for module, start in starts:
        environment = {name: value for name, value in os.environ.items() if name not in (*expected, "RANK")} | preset
        monkeypatch.setattr(os, "environ", environment)
        seen: dict[str, str] = {}

        def run(*_, seen=seen):
            seen |= os.environ
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(module, "run", run)
        assert start() == 0
        assert {name: seen.get(name) for name in expected} == expected


NODES = ["--training.steps", "12", "--lr_scheduler.total_steps", "12"]


def with_faults(folder: Path, faults: list[dict]) -> None:
    """Copy the launch scripts so that they start tests/support/faults.py instead of the training module."""
    for script in ("train.sh", "multinode.sh"):
        text = (ROOT / "launch" / script).read_text()
        text = text.replace("-m memdlm_dist.train", f"-m tests.support.faults '{json.dumps(faults)}'")
        (folder / script).write_text(text.replace('$(dirname "${BASH_SOURCE[0]}")/..', str(ROOT)))


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_a_signal_ends_it(tmp_path):
    """Restart after kill -9 of a rank within a step, then SIGTERM to the launcher, then resume to the end."""
    out = tmp_path / "out"
    config, *arguments = debug(out, *COMMON, *NODES)[1:]
    killed = {"do": "SIGKILL", "at": "step", "step": 8, "rank": 1, "once": str(tmp_path / "killed")}
    with_faults(tmp_path, [killed, *({"do": "sleep", "at": "step", "step": step} for step in (11, 12))])
    run = Launched(tmp_path / "log", str(tmp_path / "train.sh"), config, "--max-restarts=1", "--", *arguments, NGPU="2")
    run.until(r"step: 10 ")
    run.process.send_signal(signal.SIGTERM)
    assert run.status() == 75, run.text()[-5000:]
    text = run.text()
    assert "failed (exitcode: -9) local_rank: 1" in text and "Traceback" not in text
    assert re.search(r"lost another rank while taking step 8 \(.*\); see the log of the rank that ended first", text)
    assert re.search(r"Loading the checkpoint \S+step-5\.", text) and re.search(r"Stopped after step 1\d, saved", text)
    assert not re.search(r"step: +12 ", text)
    run_many([(2, debug(out, *COMMON, *NODES)), (2, debug(tmp_path / "straight", *COMMON, *NODES))])
    assert scalars(out)[LOSS] == scalars(tmp_path / "straight")[LOSS]


@pytest.mark.slow
def test_two_nodes_of_which_one_is_asked_to_stop_or_killed(tmp_path):
    """Two agents on loopback, one rank each: a signal to one stops both; a killed one rejoins."""
    config, *arguments = debug(tmp_path / "out", *COMMON, *NODES)[1:]
    hang = {"do": "hang", "at": "step", "step": 8, "rank": 1, "once": str(tmp_path / "hung")}
    with_faults(tmp_path, [hang, *({"do": "sleep", "at": "step", "step": step} for step in (3, 4))])
    port = free_port()
    variables = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{port}", "NGPU": "1", "MAX_RESTARTS": "3"}

    def node(rank: int, log: str) -> Launched:
        script = str(tmp_path / "multinode.sh")
        return Launched(tmp_path / log, script, config, *arguments, NODE_RANK=str(rank), **variables)

    first, second = node(0, "asked0"), node(1, "asked1")
    first.until(r"step:  2 ")
    second.process.send_signal(signal.SIGUSR1)
    assert first.status() == 75 and second.status() == 75, first.text()[-5000:]
    assert re.search(r"Stopped after step [34], saved", first.text())

    first = node(0, "node0")
    # Node 0 must host the rendezvous; on one machine the first agent to start does.
    while socket.socket().connect_ex(("localhost", port)):
        time.sleep(0.1)
    second = node(1, "node1")
    first.until(r"step:  7 ")
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "hung").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second.kill()
    rejoined = node(1, "node1-again")
    assert first.status() == 0, first.text()[-5000:]
    assert rejoined.status() == 0, rejoined.text()[-5000:]
    text = first.text()
    assert "[node 0 rank 0]" in text and "[node 1 rank 1]" in second.text() + rejoined.text()
    assert " step:  " in text and " step:  " not in second.text() + rejoined.text(), "only rank 0 prints step lines"
    assert re.search(r"Loading the checkpoint \S+step-5\.", text)
    run_many([(2, debug(tmp_path / "straight", *COMMON, *NODES))])
    assert scalars(tmp_path / "out")[LOSS] == scalars(tmp_path / "straight")[LOSS]


@pytest.mark.slow
def test_the_soak_finds_no_difference():
    assert ", 0 mismatches." in run_module("tests.workers.soak", "--minutes", "1", "--seed", "1")


@pytest.mark.slow
def test_slurm_queues_the_job_again(tmp_path):
    """Batch script with stand-ins for Slurm's commands; srun starts one node here and signals it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    requeued = tmp_path / "requeued"
    commands = {
        "scontrol": f'if [[ $1 == requeue ]]; then echo "$2" > {requeued}; else echo localhost; echo other; fi',
        # Slurm signals every process of the step; so does this stand-in.
        "srun": 'while [[ $1 == --* ]]; do shift; done; setsid "$@" & pid=$!\n'
        f"until grep -q 'step:  3 ' {tmp_path}/log; do sleep 0.2; done\n"
        "pkill -USR1 -s $pid; wait $pid",
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    config, *arguments = debug(tmp_path / "out", *COMMON, "--training.steps", "3000")[1:]
    run = Launched(
        tmp_path / "log", "launch/slurm.sbatch", config, *arguments, PATH=f"{tools}:{os.environ['PATH']}", NGPU="1",
        SLURM_JOB_NODELIST="localhost", SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="4711", SLURM_SUBMIT_DIR=str(ROOT),
    )  # fmt: skip
    assert run.status() == 0, run.text()[-5000:]
    assert requeued.read_text() == "4711\n" and "queueing job 4711 again" in run.text()
    (saved,) = (path.name for path in (tmp_path / "out/checkpoint").iterdir() if int(path.name[5:]) % 5)
    assert f"Stopped after {saved.replace('-', ' ')}, saved" in run.text()
