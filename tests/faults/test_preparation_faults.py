"""Failures of a preparation, caused for real in its processes; the same command then finishes the same folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from memdlm_dist.data.preparation import prepare
from memdlm_dist.data.preparation.unit_worker import prepare_unit
from memdlm_dist.data.preparation.work_folder import FOLDER
from tests.support import zygote
from tests.support.launching import _descendants
from tests.unit.test_parallel_preparation import DONE, TOKENIZER, digests, documents, folders
from tests.unit.test_preparation import jsonl
from tests.workers.preparing import dying_unit, endless_unit, frequent_progress, mistaken_writer, never_begun, slow_unit
from tools import prepare_data

PATIENCE = 60.0  # seconds, on a busy machine


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Prepare a corpus of about ten units with one worker; return (input, digests of the output)."""
    folder = tmp_path_factory.mktemp("expected")
    rows = jsonl(folder / "rows.jsonl", [{"text": text} for text in documents(7, 60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        assert prepare_data.main(arguments(rows, folder / "out", workers=1)) == 0
    return rows, digests(folder / "out")


def arguments(rows, output, workers=2, *more):
    return [
        "--input", rows, "--output", str(output), "--seq-len", "32", "--tokenizer", TOKENIZER, "--unit-size", "700",
        "--held-out", "0.2", "--workers", str(workers), *more,
    ]  # fmt: skip


def n_records(output):
    return len(list(output.glob(f"{FOLDER}/*/*-*.json")))


class Command:
    """Running command in a process of the zygote; see tests/workers/preparing.py."""

    def __init__(self, folder, argv, unit=prepare_unit, change=None, limit=None):
        mark = folder / "process"
        mark.unlink(missing_ok=True)
        self._connection = zygote.connect()
        call = "tests.workers.preparing:prepare_rank", (argv, mark, unit, change, limit)
        self._connection.send(zygote.RunRequest(1, *call, {**os.environ, "TOKENIZERS_PARALLELISM": "false"}))
        wait(mark.exists, zygote.TIMEOUT)  # the zygote may still be starting
        self.process = int(mark.read_text())

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and the output."""
        with self._connection:
            return zygote.receive(self._connection)


def run(folder, argv, unit=prepare_unit, change=None, limit=None) -> tuple[int, list[str]]:
    """Run the command; return the exit status and the lines that it printed."""
    status, said = Command(folder, argv, unit, change, limit).end()
    return status, said.splitlines()


def deaths(tmp_path, unit, count):
    (tmp_path / "deaths").mkdir()
    (tmp_path / "deaths" / str(unit)).write_text(str(count))


# A worker ends.


def test_a_killed_worker_s_unit_is_done_again(tmp_path, expected):
    rows, whole = expected
    deaths(tmp_path, 3, 2)
    status, said = run(tmp_path, arguments(rows, tmp_path / "out"), dying_unit)
    assert status == 0, said
    # On a busy machine a forked worker may also end before it begins.
    assert len([s for s in said if re.search(r"^A worker process ended unex.* \(in progress: .*\b3\b", s)]) == 2, said
    assert (tmp_path / "deaths/3").read_text() == "0"
    assert digests(tmp_path / "out") == whole and folders(tmp_path / "out") == DONE


def test_a_unit_that_always_kills_its_worker_is_named(tmp_path, expected):
    rows, whole = expected
    deaths(tmp_path, 4, 99)
    status, (*_, sentence) = run(tmp_path, arguments(rows, tmp_path / "out"), dying_unit)
    assert status == 2 and f"Unit 4 ({rows}) was interrupted 3 times because a worker process ended" in sentence
    assert (tmp_path / "deaths/4").read_text() == "96" and "Traceback" not in sentence
    assert n_records(tmp_path / "out") >= 4, "finished units are kept"
    (tmp_path / "deaths/4").unlink()
    assert run(tmp_path, arguments(rows, tmp_path / "out"))[0] == 0
    assert digests(tmp_path / "out") == whole and folders(tmp_path / "out") == DONE


def test_workers_that_never_begin(tmp_path, expected):
    status, said = run(tmp_path, arguments(expected[0], tmp_path / "out"), never_begun)
    assert status == 2 and "Worker processes end before they begin with a unit (" in said[-1]


# The command ends.


def wait(condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def are_gone(processes):
    """Return whether processes have ended; one that nobody has waited for yet is a zombie (Z)."""
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            return False
    return True


def test_a_killed_command_goes_on(tmp_path, expected):
    rows, whole = expected
    output, generator = tmp_path / "out", np.random.default_rng(int(time.time()))
    for records in (1, 4):
        command = Command(tmp_path, arguments(rows, output), slow_unit)
        wait(lambda records=records: n_records(output) >= records)
        time.sleep(generator.uniform(0, 0.3))
        workers = _descendants(command.process)
        assert len(workers) >= 2 or records > 1  # a busy machine may notice the fourth record when all units are done
        os.kill(command.process, signal.SIGKILL)
        assert command.end()[0] == -signal.SIGKILL
        wait(lambda workers=workers: are_gone(workers))
    assert run(tmp_path, arguments(rows, output))[0] == 0
    assert digests(output) == whole and folders(output) == DONE


def test_workers_end_with_their_command_in_the_middle_of_a_unit(tmp_path, expected):
    output = tmp_path / "out"
    command = Command(tmp_path, arguments(expected[0], output), endless_unit)
    wait(lambda: n_records(output) == 2)
    time.sleep(0.2)
    workers, began = _descendants(command.process), time.monotonic()
    os.kill(command.process, signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    wait(lambda: are_gone(workers))
    assert time.monotonic() - began < 5 and n_records(output) == 2


@pytest.mark.parametrize("whole_session", [False, True])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_asked_to_end(tmp_path, expected, number, status, whole_session):
    rows, whole = expected
    output = tmp_path / "out"
    command = Command(tmp_path, arguments(rows, output), slow_unit)
    wait(lambda: n_records(output) >= 2)
    workers = _descendants(command.process)
    (os.killpg if whole_session else os.kill)(command.process, number)
    ended, said = command.end()
    assert ended == status, said
    wait(lambda: are_gone(workers))
    records = n_records(output)
    assert "Traceback" not in said and (number == signal.SIGINT or "Received SIGTERM: finished units are kept" in said)
    assert 2 <= records < 10 and not (output / "train").exists()
    assert run(tmp_path, arguments(rows, output))[0] == 0
    assert digests(output) == whole and folders(output) == DONE


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_command_in_processes_of_its_own(tmp_path, number, status):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": text * 20} for text in documents(8, 2000)])
    command = [sys.executable, "-m", "tools.prepare_data"]
    once = subprocess.run([*command, *arguments(rows, tmp_path / "one", 1, "--unit-size", "50kb")], check=True)
    assert once.returncode == 0
    output, more = tmp_path / "out", ("--unit-size", "50kb")
    with subprocess.Popen([*command, *arguments(rows, output, 2, *more)], stderr=subprocess.PIPE, text=True) as process:
        wait(lambda: n_records(output) >= 2)
        workers = _descendants(process.pid)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == status and "Traceback" not in said
    wait(lambda: are_gone(workers))
    assert not (output / "train").exists()
    subprocess.run([*command, *arguments(rows, output, 2, *more)], check=True)
    assert digests(output) == digests(tmp_path / "one") and folders(output) == DONE


# Disks and inputs.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence(tmp_path, expected, workers):
    rows, whole = expected
    output = tmp_path / "out"
    assert prepare_data.main([*arguments(rows, output, 1), "--partition", "0/2"]) == 0
    largest = max(path.stat().st_size for path in output.rglob("*.mds"))
    status, (sentence,) = run(tmp_path, arguments(rows, output, workers), limit=largest // 2)
    assert status == 2
    assert re.search(r"cannot be written to \(.*File too large.*\); (free space|check the folder)", sentence), sentence
    assert n_records(output) >= 4
    assert run(tmp_path, arguments(rows, output, workers))[0] == 0
    assert digests(output) == whole and folders(output) == DONE


def test_an_input_that_changes_between_units_is_one_sentence(tmp_path, expected, monkeypatch, capsys):
    _, whole = expected
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in documents(7, 60)])
    before = os.stat(rows)
    content = Path(rows).read_bytes()

    def changing(job):
        if job.unit.number == 3:
            Path(rows).write_bytes(content + b"\n")
        return prepare_unit(job)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare_unit", changing)
        assert prepare_data.main(arguments(rows, tmp_path / "out", 1)) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert f"The input {rows} has changed since the preparation began (" in sentence
    assert n_records(tmp_path / "out") == 3
    Path(rows).write_bytes(content)
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare_data.main(arguments(rows, tmp_path / "out", 1)) == 0
    assert digests(tmp_path / "out") == whole


# Progress.


def test_progress_is_a_line_of_a_log(tmp_path, expected):
    bad = jsonl(tmp_path / "bad.jsonl", ["bad", "bad"])
    argv = arguments(expected[0], tmp_path / "out")
    status, said = run(tmp_path, [argv[0], bad, *argv[1:]], slow_unit, frequent_progress)
    lines = [line for line in said if line.startswith("Tokenising: ")]
    assert status == 0 and all(
        re.fullmatch(r"Tokenising: 0 of 0 MB, 0\.\d MB/s, (\d:\d\d:\d\d left|no .*), \d bad rows", x) for x in lines
    )
    assert len(lines) > 5 and lines[0].endswith("0 bad rows") and lines[-1].endswith("2 bad rows")


def test_rows_that_a_worker_cannot_write_do_not_end_it(tmp_path, expected):
    status, said = run(tmp_path, arguments(expected[0], tmp_path / "out"), change=mistaken_writer)
    assert status == 1 and said[-1] == "ZeroDivisionError: division by zero"
    assert not (tmp_path / "out/train").exists()
