"""Failures of a preparation, caused for real in its processes; the same command then finishes the same folder."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from joblib.externals.loky import reusable_executor
from joblib.externals.loky.backend import context

from memdlm_dist.data.preparation import prepare, progress
from memdlm_dist.data.preparation.unit_worker import prepare_unit
from memdlm_dist.data.preparation.work_folder import FOLDER, WorkFolder
from memdlm_dist.data.shards import ShardWriter
from tests.support.launching import _descendants
from tests.unit.test_parallel_preparation import DONE, TOKENIZER, digests, documents, folders
from tests.unit.test_preparation import jsonl
from tools import prepare_data

PATIENCE = 60.0  # seconds, on a busy machine


@pytest.fixture(autouse=True)
def forking(root, monkeypatch):
    """Fork the workers from this process, which has imported everything: a new process takes seconds to do so."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    previous = context.get_start_method()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        context.set_start_method("fork", force=True)
        yield
        if reusable_executor._executor is not None:
            reusable_executor._executor.shutdown(kill_workers=True)
            reusable_executor._executor = None  # not inherited by the processes of the next test
    context.set_start_method(previous, force=True)


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


# Work on a unit that goes wrong; workers find these functions by name.


def dying_unit(job):
    """Kill this worker after the shards of a unit, before its record, as often as the file `deaths/UNIT` says."""
    mark = Path(str(job.config.output)).with_name("deaths") / str(job.unit.number)
    if mark.exists() and (left := int(mark.read_text())):
        mark.write_text(str(left - 1))
        WorkFolder.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return prepare_unit(job)


def slow_unit(job):
    time.sleep(0.4)
    return prepare_unit(job)


def endless_unit(job):
    if job.unit.number > 1:
        job.begin()
        time.sleep(600)
    return prepare_unit(job)


def deaths(tmp_path, unit, count):
    (tmp_path / "deaths").mkdir()
    (tmp_path / "deaths" / str(unit)).write_text(str(count))


# A worker ends.


def test_a_killed_worker_s_unit_is_done_again(tmp_path, expected, monkeypatch, capfd):
    rows, whole = expected
    deaths(tmp_path, 3, 2)
    monkeypatch.setattr(prepare, "prepare_unit", dying_unit)
    assert prepare_data.main(arguments(rows, tmp_path / "out")) == 0
    said = capfd.readouterr().err.splitlines()
    # On a busy machine a forked worker may also end before it begins.
    assert len([s for s in said if re.search(r"^A worker process ended unex.* \(in progress: .*\b3\b", s)]) == 2, said
    assert (tmp_path / "deaths/3").read_text() == "0"
    assert digests(tmp_path / "out") == whole and folders(tmp_path / "out") == DONE


def test_a_unit_that_always_kills_its_worker_is_named(tmp_path, expected, monkeypatch, capfd):
    rows, whole = expected
    deaths(tmp_path, 4, 99)
    monkeypatch.setattr(prepare, "prepare_unit", dying_unit)
    assert prepare_data.main(arguments(rows, tmp_path / "out")) == 2
    (*_, sentence) = capfd.readouterr().err.splitlines()
    assert f"Unit 4 ({rows}) was interrupted 3 times because a worker process ended" in sentence
    assert (tmp_path / "deaths/4").read_text() == "96" and "Traceback" not in sentence
    assert n_records(tmp_path / "out") >= 4, "finished units are kept"
    (tmp_path / "deaths/4").unlink()
    assert prepare_data.main(arguments(rows, tmp_path / "out")) == 0
    assert digests(tmp_path / "out") == whole and folders(tmp_path / "out") == DONE


def never_begun(job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_never_begin(tmp_path, expected, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "prepare_unit", never_begun)
    assert prepare_data.main(arguments(expected[0], tmp_path / "out")) == 2
    assert "Worker processes end before they begin with a unit (" in capfd.readouterr().err.splitlines()[-1]


# The command ends.


def begin(log, function, argv, limit=None):
    """Run the command in a forked process and a session of its own; return its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        prepare.prepare_unit = function
        status = prepare_data.main(argv)
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def wait(condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def end_of(process):
    return os.waitstatus_to_exitcode(wait(lambda: os.waitpid(process, os.WNOHANG) if process else None)[1])


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
        command = begin(tmp_path / "log", slow_unit, arguments(rows, output))
        wait(lambda records=records: n_records(output) >= records)
        time.sleep(generator.uniform(0, 0.3))
        workers = _descendants(command)
        assert len(workers) >= 2 or records > 1  # a busy machine may notice the fourth record when all units are done
        os.kill(command, signal.SIGKILL)
        os.waitpid(command, 0)
        wait(lambda workers=workers: are_gone(workers))
    assert prepare_data.main(arguments(rows, output)) == 0
    assert digests(output) == whole and folders(output) == DONE


def test_workers_end_with_their_command_in_the_middle_of_a_unit(tmp_path, expected):
    output = tmp_path / "out"
    command = begin(tmp_path / "log", endless_unit, arguments(expected[0], output))
    wait(lambda: n_records(output) == 2)
    time.sleep(0.2)
    workers, began = _descendants(command), time.monotonic()
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    wait(lambda: are_gone(workers))
    assert time.monotonic() - began < 5 and n_records(output) == 2


@pytest.mark.parametrize("whole_session", [False, True])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_asked_to_end(tmp_path, expected, number, status, whole_session):
    rows, whole = expected
    output, log = tmp_path / "out", tmp_path / "log"
    command = begin(log, slow_unit, arguments(rows, output))
    wait(lambda: n_records(output) >= 2)
    workers = _descendants(command)
    (os.killpg if whole_session else os.kill)(command, number)
    _, ended = os.waitpid(command, 0)
    said = log.read_text()
    assert os.waitstatus_to_exitcode(ended) == status, said
    wait(lambda: are_gone(workers))
    records = n_records(output)
    assert "Traceback" not in said and (number == signal.SIGINT or "Received SIGTERM: finished units are kept" in said)
    assert 2 <= records < 10 and not (output / "train").exists()
    assert prepare_data.main(arguments(rows, output)) == 0
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
    output, log = tmp_path / "out", tmp_path / "log"
    assert prepare_data.main([*arguments(rows, output, 1), "--partition", "0/2"]) == 0
    largest = max(path.stat().st_size for path in output.rglob("*.mds"))
    status = os.waitpid(begin(log, prepare_unit, arguments(rows, output, workers), limit=largest // 2), 0)[1]
    (sentence,) = log.read_text().splitlines()
    assert os.waitstatus_to_exitcode(status) == 2
    assert re.search(r"cannot be written to \(.*File too large.*\); (free space|check the folder)", sentence), sentence
    assert n_records(output) >= 4
    assert prepare_data.main(arguments(rows, output, workers)) == 0
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


def test_progress_is_a_line_of_a_log(tmp_path, expected, monkeypatch, capfd):
    monkeypatch.setattr(progress, "_LINE", 0.02)
    monkeypatch.setattr(progress, "_REFRESH", 0.01)
    monkeypatch.setattr(prepare, "prepare_unit", slow_unit)
    bad = jsonl(tmp_path / "bad.jsonl", ["bad", "bad"])
    argv = arguments(expected[0], tmp_path / "out")
    assert prepare_data.main([argv[0], bad, *argv[1:]]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Tokenising: ")]
    assert all(
        re.fullmatch(r"Tokenising: 0 of 0 MB, 0\.\d MB/s, (\d:\d\d:\d\d left|no .*), \d bad rows", x) for x in lines
    )
    assert len(lines) > 5 and lines[0].endswith("0 bad rows") and lines[-1].endswith("2 bad rows")


def test_rows_that_a_worker_cannot_write_do_not_end_it(tmp_path, expected, monkeypatch, capfd):
    monkeypatch.setattr(ShardWriter, "write", lambda *_: 1 / 0)  # a mistake of this program
    with pytest.raises(ZeroDivisionError):
        prepare_data.main(arguments(expected[0], tmp_path / "out"))
    assert not (tmp_path / "out/train").exists()
