"""Table of the streams of a run: what streaming draws from each, in an epoch and in the run."""

import logging
from pathlib import Path

import numpy as np
import pytest

from memdlm_dist.data import stream_shares
from memdlm_dist.data.dataset import open_dataset
from memdlm_dist.data.loader import training_loader
from memdlm_dist.data.output import CARD, INDEX, LENGTHS
from memdlm_dist.data.row_shape import Requirements
from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.data.settings import Data
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.data.stream_shares import StreamShare
from memdlm_dist.runtime.storage import Storage

SIZES = (40, 10, 25, 25)
REQUIREMENTS = Requirements(128, 512, "debug", mask_token_id=1, ring_attention=False)
PROPORTIONS = [1.0, 3.5, 2.0, 0.7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return streams of `SIZES` rows, in shards of a few rows."""
    row = TrainingSequence(np.ones(128, dtype=np.int64), np.ones(128, dtype=np.bool_))
    folders = [str(tmp_path_factory.mktemp("streams") / f"{number}/train") for number in range(len(SIZES))]
    for folder, size in zip(folders, SIZES, strict=True):
        with ShardWriter(Path(folder), Card(128, 512, 1, 0), size_limit=2000) as writer:
            for _ in range(size):
                writer.write(row)
    return folders


def open_streams(folders, proportions):
    return open_dataset(Data(), folders, proportions, batch_size=1, shuffle=True, num_canonical_nodes=1)


@pytest.mark.parametrize("proportions", [PROPORTIONS, [], [1e-9, 1, 1, 1]])
def test_an_epoch_has_the_samples_of_the_table(folders, proportions):
    dataset = open_streams(folders, proportions)
    shares = dataset.stream_shares()
    assert [share.location for share in shares] == folders and [share.rows for share in shares] == list(SIZES)
    bounds = np.cumsum([0, *SIZES])
    assert len(dataset.shards) > 10
    for epoch in range(3):
        drawn = np.bincount(dataset.epoch_order(epoch), minlength=bounds[-1])
        for share, first, last in zip(shares, bounds[:-1], bounds[1:], strict=True):
            times = drawn[first:last]
            assert times.sum() == share.samples
            # Each row as often as the stream fits whole, and some rows once more.
            assert set(times) <= {share.samples // share.rows, -(-share.samples // share.rows)}
    if not proportions:
        assert [share.samples for share in shares] == list(SIZES)
    elif proportions is PROPORTIONS:
        wanted = 100 * np.array(PROPORTIONS) / sum(PROPORTIONS)
        assert np.abs([share.samples for share in shares] - wanted).max() < 1
        half = [frozenset(np.unique(dataset.epoch_order(epoch)).tolist()) for epoch in range(2)]
        assert half[0] != half[1], "the rows of a down-sampled stream are chosen anew in every epoch"


def test_epochs_of_a_run_are_those_of_the_samples_that_it_reads(folders):
    sizes = {"local_batch_size": 10, "global_batch_size": 20, "dp_size": 1, "world_size": 1}
    loader = training_loader(Data(train=folders, proportions=PROPORTIONS), REQUIREMENTS, **sizes)
    steps = 3 * loader.steps_per_epoch
    read = np.zeros(sum(SIZES))
    for _, batch in zip(range(2 * steps), loader, strict=False):
        read += np.bincount(batch.sample_ids_B, minlength=len(read))
    epochs = [times.mean() for times in np.split(read, np.cumsum(SIZES)[:-1])]
    assert np.allclose(stream_shares.run_epochs(loader.stream_shares(), steps * 20), epochs)
    assert epochs[0] < 3 < 12 < epochs[1]


def test_the_table_has_a_line_for_each_of_many_streams():
    shares = [StreamShare(f"s3://{'bucket' * i}/{i}/train", 10**i, 10**5) for i in range(2, 12)] * 5
    lines = stream_shares.table(shares, stream_shares.run_epochs(shares, 10**7)).splitlines()
    assert len(lines) == 51 and len(set(map(len, lines))) == 1 and len(lines[0]) < 150
    assert lines[1].split() == ["s3://bucketbucket/2/train", "100", "2.00", "100,000", "1,000.00", "2,000.00"]
    assert lines[10].startswith("...") and lines[10].split()[0].endswith("/11/train")
    assert lines[10].split()[-2:] == ["1.0e-06", "2.0e-06"]


def test_often_repeated_and_unread_streams_are_named(caplog):
    shares = [StreamShare("a", 100, 50), StreamShare("b", 10, 41), StreamShare("c", 10, 40), StreamShare("d", 10, 0)]
    with caplog.at_level(logging.INFO):
        stream_shares.log(shares[:1], 100, 131)
        assert not caplog.records, "one stream needs no table"
        stream_shares.log(shares, 1, 131)
    table, repeated, unread = (record.getMessage() for record in caplog.records)
    assert "in the run's 1 steps:\nstream " in table
    assert "reads 1 of 4 streams more than 4 times: b (4.1). " in repeated
    assert "never reads 1 of 4 streams: d. " in unread
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        stream_shares.log([StreamShare(name, 1, 5) for name in "abcdef"], 1, 30)
    assert "6 of 6 streams more than 4 times: a (5.0), b (5.0), c (5.0) and 3 others. " in caplog.text


def test_streams_open_with_one_read_of_each_card(tmp_path, monkeypatch):
    locations = []
    for number, length in enumerate((64, 128)):
        folder = tmp_path / f"{number}/train"
        with ShardWriter(folder, Card(128, 512, 1, 0, pad_multiple=16)) as writer:
            writer.write(TrainingSequence(np.ones(length, dtype=np.int64), np.ones(length, dtype=np.bool_), content=9))
        locations.append(f"file://{folder}")
    reads = []
    read = Storage.read

    def counted(storage, name):
        reads.append((storage.location, name))
        return read(storage, name)

    monkeypatch.setattr(Storage, "read", counted)
    data = Data(train=locations, cache_folder=str(tmp_path / "cache"))
    loader = training_loader(data, REQUIREMENTS, local_batch_size=1, global_batch_size=1, dp_size=1, world_size=1)
    assert loader.rows.varying == (locations[0],), "rows of one length need no lengths"
    read_of_each = {name: [location for location, file in reads if file == name] for _, name in reads}
    assert read_of_each == {CARD: locations, INDEX: locations, LENGTHS: locations[:1]}
