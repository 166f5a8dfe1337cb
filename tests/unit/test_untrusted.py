"""Untrusted weights, checkpoints and shards run no code and touch no files outside their own folders."""

import json
import os
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from memdlm_dist.checkpoint import weights
from memdlm_dist.checkpoint.catalogue import Catalogue, prunable_steps
from memdlm_dist.checkpoint.model_check import check_model
from memdlm_dist.checkpoint.reading import load_states
from memdlm_dist.data.dataset import ERROR_KEY, open_dataset
from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.data.settings import Data
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.errors import UserError

TENSORS = {"norm.weight": torch.ones(3)}


class Hostile:
    """Object that creates the canary folder when unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "a pickle ran code"


def save(folder: Path, **states) -> str:
    dcp.save({**TENSORS, **states}, checkpoint_id=folder, no_dist=True)
    return str(folder)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path, canary):
    for folder in (tmp_path / "weights", tmp_path / "run/step-3"):
        folder.mkdir(parents=True)
        save_file(TENSORS, folder / "model.safetensors")
        (folder / ".metadata").write_bytes(pickle.dumps(Hostile(canary)))
    assert weights.find(str(tmp_path / "weights")) == str(tmp_path / "weights")
    (saved,) = Catalogue(str(tmp_path / "run")).all()
    assert saved.exported and not saved.complete and not Catalogue(str(tmp_path / "run")).complete_steps()


def test_metadata_names_no_foreign_class(tmp_path, canary):
    checkpoint = save(tmp_path / "run/step-2")
    assert Catalogue(str(tmp_path / "run")).inspect(2).intact and check_model(checkpoint, TENSORS) == ""
    (tmp_path / "run/step-2/.metadata").write_bytes(pickle.dumps(Hostile(canary)))
    problem = "has a .metadata that cannot be read (it names posix.mkdir, which no checkpoint of ours does)"
    assert Catalogue(str(tmp_path / "run")).inspect(2).problem == problem
    assert "metadata that cannot be read (it names posix.mkdir" in check_model(checkpoint, TENSORS)


def build_pickle(target, attributes: dict) -> bytes:
    """Return a pickle that sets attributes of a class or function with the opcode BUILD."""
    state = pickle.dumps((None, attributes), protocol=2)[2:-1]
    name = f"c{target.__module__}\n{target.__qualname__}\n".encode()
    return b"\x80\x02" + name + state + b"b."


def test_metadata_changes_no_code(tmp_path):
    save(tmp_path / "run/step-2")
    cache = dict(torch.serialization._get_layout.cache)
    for target, attributes in (
        (torch.serialization._get_layout, {"cache": {"torch.strided": "other"}}),
        (Metadata, {"__init__": 1}),
    ):
        (tmp_path / "run/step-2/.metadata").write_bytes(build_pickle(target, attributes))
        assert "cannot be read (it changes a " in Catalogue(str(tmp_path / "run")).inspect(2).problem
    assert torch.serialization._get_layout.cache == cache and callable(Metadata.__init__)


def test_metadata_names_files_of_its_folder(tmp_path):
    folder = Path(save(tmp_path / "run/step-2"))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = "../secret.bin"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert (
        "it names the file '../secret.bin' outside of its folder" in Catalogue(str(tmp_path / "run")).inspect(2).problem
    )


def test_values_beside_tensors_are_data(tmp_path, canary):
    states = {"step": 0, "names": []}
    load_states(states, save(tmp_path / "good", step=7, names=["a", 1.5]), no_dist=True)
    assert states == {"step": 7, "names": ["a", 1.5]}
    with pytest.raises(CheckpointException, match=r"posix\.mkdir"):
        load_states({"step": 0}, save(tmp_path / "hostile", step=Hostile(canary)), no_dist=True)
    swapped = save(tmp_path / "swapped", extra=3)
    with pytest.raises(CheckpointException, match="extra is a tensor"):
        load_states({"extra": torch.zeros(2)}, swapped, no_dist=True)
    assert check_model(swapped, {**TENSORS, "extra": torch.zeros(2)}) == "holds extra, which is not a tensor"


def write_shards(folder: Path, rows: int = 200, size_limit: int = 4000) -> Path:
    """Write shards of about ten sequences each."""
    with ShardWriter(folder, Card(64, 512, 1, 2), size_limit) as writer:
        for _ in range(rows):
            writer.write(TrainingSequence(np.arange(64), np.ones(64, dtype=np.bool_)))
    return folder


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_cache_limit_deletes_copies_alone(tmp_path):
    local, remote = write_shards(tmp_path / "mine"), write_shards(tmp_path / "remote")
    before, cache = file_names(local), tmp_path / "cache"
    data = Data(cache_folder=str(cache), cache_limit="20kb")
    dataset = open_dataset(data, [str(local), f"file://{remote}"], [], batch_size=1, shuffle=False, predownload=1)
    for sample in (samples := list(islice(dataset, 400))):
        assert ERROR_KEY not in sample, sample
    assert {sample["sample_id"] for sample in samples} == set(range(400))
    assert file_names(local) == before and file_names(remote) == before
    cached_sizes = [path.stat().st_size for path in cache.glob("*/*.mds")]
    assert 0 < sum(cached_sizes) <= 20 * 1024, "the limit holds for the copies"
    small = Data(cache_folder=str(cache), cache_limit="3kb")
    with pytest.raises(UserError, match=r"data.cache_limit = '3kb' is less than four of the largest shards, [\d,]+ b"):
        open_dataset(small, [f"file://{remote}"], [], batch_size=1)
    with pytest.raises(UserError, match=r"data\.cache_limit = .much. is not a size"):
        open_dataset(Data(cache_limit="much"), [f"file://{remote}"], [], batch_size=1)


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        if key == "basename":
            index["shards"][0]["raw_data"]["basename"] = value
        else:
            index["shards"][0][key] = value
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"basename": "../outside.mds"}, "names the file '../outside.mds' outside of its folder"),
        ({"basename": "{root}/outside.mds"}, "outside.mds' outside of its folder"),
        ({"basename": "a\\..\\b"}, "outside of its folder"),
        ({"basename": "link/outside.mds"}, "names the file 'link/outside.mds' outside of its folder"),
        ({"zip_data": {"basename": "../outside.zip", "bytes": 1, "hashes": {}}}, "'../outside.zip' outside"),
        ({"split": "../.."}, "has the key 'split'"),
        ({"column_encodings": ["bytes", "pkl"]}, "of encoding 'pkl'"),
        ({"format": "json"}, "names the format 'json'"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path, remote, changes, message):
    folder = write_shards(tmp_path / "shards", rows=20)
    location = f"file://{folder}" if remote else str(folder)
    cache, outside = tmp_path / "cache", tmp_path / "elsewhere"
    outside.mkdir()
    data = Data(cache_folder=str(cache))
    if remote:  # an earlier run's cache, into which somebody put a link
        open_dataset(data, [location], [], batch_size=1)
        (cached,) = cache.iterdir()
        (cached / "index.json").unlink()
    (cached if remote else folder).joinpath("link").symlink_to(outside)
    edit_index(folder, **json.loads(json.dumps(changes).replace("{root}", str(tmp_path))))
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    with pytest.raises(UserError) as error:
        next(iter(open_dataset(data, [location], [], batch_size=1)))
    assert message in str(error.value) and str(error.value).endswith("use shards whose origin you know.")
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} == before


def test_one_good_checkpoint_is_always_left(tmp_path):
    catalogue = Catalogue(str(tmp_path))
    for step in (1, 2):
        save(tmp_path / f"step-{step}")
    for negative in (-1, -2):
        with pytest.raises(UserError, match=f"must not be negative, but is {negative}"):
            prunable_steps([1, 2], negative, 0)
    assert prunable_steps([1, 2, 3, 4], 1, 0, best=2) == [1, 3]
    catalogue.remove(1)
    with pytest.raises(UserError, match="step-2 is the only intact checkpoint and is not removed"):
        catalogue.remove(2)
    (tmp_path / "step-2/__0_0.distcp").write_bytes(b"")
    catalogue.remove(2)  # damaged checkpoints may be removed
