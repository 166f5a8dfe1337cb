"""Runs on one accelerator through the launch script: async save, stop, resume, generation."""

import json
import re
import signal

import pytest

from tests.support.launching import Launched, debug, launch, run_module, scalars
from tests.workers.reading import BOLD

TINY = ["--model.flavor", "tiny", "--parametric_memory.layer_fraction", "0.5"]
# An accelerator repeats a run bit for bit only under debug.deterministic.
TRAINING = [
    *TINY, "--debug.deterministic", "--training.mixed_precision_param", "bfloat16", "--training.local_batch_size", "2",
    "--optimizer.implementation", "fused", "--lr_scheduler.total_steps", "1000",
]  # fmt: skip
SAVE = ["--checkpoint.enable", "--checkpoint.interval", "10", "--checkpoint.async_mode", "async_with_pinned_mem"]
CURVES = (
    "loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/inner_loss_step_1",
    "parametric_memory/inner_loss_step_2", "parametric_memory/fast_weight_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def stopped(device, tmp_path_factory):
    """Return folder, exit status and output of a run.

    All its processes got SIGTERM after a save from pinned memory.
    """
    root = tmp_path_factory.mktemp("runs")
    config, *arguments = debug(root / "stopped", *TRAINING, *SAVE, "--training.steps", "1000")[1:]
    run = Launched(root / "log", "launch/train.sh", config, *arguments, NGPU="1")
    try:
        run.until(r" step: 12 ")
        run.signal_all(signal.SIGTERM)
        status = run.status()
    finally:
        if run.process.poll() is None:
            run.kill()
    return root / "stopped", status, run.text()


def test_sigterm_ends_a_run_with_status_75_and_a_checkpoint(stopped):
    out, status, text = stopped
    assert status == 75, text[-5000:]
    step = int(re.search(r"Stopped after step (\d+), saved in", text)[1])
    assert step >= 12 and "Traceback" not in text
    for saved in (10, step):
        assert (out / f"checkpoint/step-{saved}/.metadata").is_file()


def test_a_process_beside_the_run_writes_what_was_staged(stopped):
    """Saves from pinned memory use torch's saver process, whose lines go to the run's output."""
    _, _, text = stopped
    assert re.search(r"Received async checkpoint request with id=\S*/step-10\s", text)
    assert re.search(r"Completed checkpoint save request for \S*checkpoint_id='?\S*/step-10\b", text)
    step = re.search(r"Stopped after step (\d+)", text)[1]
    assert re.search(rf"Completed checkpoint save request for \S*checkpoint_id='?\S*/step-{step}\b", text)


def test_the_run_resumed_is_the_run_without_a_stop_bit_for_bit(stopped, tmp_path):
    out, _, text = stopped
    step = int(re.search(r"Stopped after step (\d+)", text)[1])
    steps = ["--training.steps", str(step + 3)]
    resumed = launch(1, out, *TRAINING, *SAVE, *steps)
    assert re.search(rf"Loading the checkpoint \S+step-{step}\.", resumed)
    launch(1, tmp_path, *TRAINING, *steps)
    halves, straight = scalars(out), scalars(tmp_path)
    for name in CURVES:
        assert set(straight[name]) == set(range(1, step + 4))
        assert halves[name] == straight[name], name


def test_a_response_with_memory_has_the_cpus_tokens(cuda, stopped):
    """Greedy decoding in float32, with inner steps large enough to change the response."""
    out, _, _ = stopped
    arguments = [
        "train_configs/debug.toml", "--checkpoint", str(out / "checkpoint/step-10"), "--memory", "on", "--json",
        "--prompt", "def read(self, size):", "--new-tokens", "24", "--block-size", "4", "--steps", "2", "--no-eos-stop",
        "--job.dump_folder", str(out), "--training.mixed_precision_param", "float32", *TINY, *BOLD,
    ]  # fmt: skip

    def generated(**env):
        output = run_module("tools.generate", *arguments, **env)
        return json.loads(next(line for line in output.splitlines() if line.startswith("{")))

    on_device, on_cpu = generated(), generated(CUDA_VISIBLE_DEVICES="")
    assert on_device["memory"] == "on" and on_device["passes"] == on_cpu["passes"] == 12
    assert on_device["text"] == on_cpu["text"]
