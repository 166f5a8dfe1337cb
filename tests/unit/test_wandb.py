"""Logging to Weights & Biases with torchtitan's switch."""

import json
import subprocess
import sys

import pytest

from memdlm_dist import train
from tests.support.launching import debug, launch, scalars

SWITCH = "--metrics.enable_wandb"
# Prints one JSON object for each logged step. A .wandb file has 7 bytes of header, then LevelDB's log format: blocks of
# 32 KiB with pieces of records, each after its checksum (4 bytes), length (2) and type (1: whole, 4: last piece).
READ = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record
data, position, message = open(sys.argv[1], "rb").read(), 7, b""
while position + 7 <= len(data):
    if (left := -position % 32768) and left < 7:
        position += left
        continue
    length, kind = struct.unpack("<4xHB", data[position : position + 7])
    message += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):
        record, message = Record.FromString(message), b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            print(json.dumps({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}))
"""


def test_a_missing_package_is_named(tmp_path, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train.main(debug(tmp_path / "out", SWITCH)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: metrics.enable_wandb needs the package wandb, which is not installed; install the")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # as the package itself writes
    assert train.main(debug(tmp_path / "out", SWITCH)) == 2


@pytest.mark.slow
def test_an_offline_run_has_the_scalars_of_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    launch(2, tmp_path, "--model.flavor", "tiny", "--training.steps", "3", "--metrics.log_freq", "1", SWITCH,
           "--validation.enable", "--validation.freq", "2")  # fmt: skip
    (file,) = tmp_path.glob("tb/*/wandb/offline-run-*/run-*.wandb")  # of rank 0 alone
    done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
    logged: dict[str, dict[int, float]] = {}
    for row in map(json.loads, done.stdout.splitlines()):
        for name, value in row.items():
            if not name.startswith("_"):
                logged.setdefault(name, {})[row["_step"]] = value
    expected = scalars(tmp_path)
    assert set(logged) == set(expected) and {"validation/loss_memory_off", "grad_norm"} <= set(logged)
    for name, values in expected.items():
        assert logged[name] == pytest.approx(values, rel=1e-6), name  # TensorBoard rounds to float32
