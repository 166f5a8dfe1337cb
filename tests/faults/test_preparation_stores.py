"""Preparation from a store and to a store: the local bytes, through outages, within the limit of the scratch folder."""

import contextlib
import gzip
import json
import re
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import s3fs

from memdlm_dist.config import parse_config
from memdlm_dist.data import corpus, shards
from memdlm_dist.data.dataset import TokenDataset, open_dataset
from memdlm_dist.data.output import MANIFEST
from memdlm_dist.data.preparation import prepare, unit_worker, work_folder
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.errors import UserError
from memdlm_dist.runtime import storage, writer
from tests.support.object_store import BUCKET, object_store
from tests.support.zygote import ROOT

ROWS = [{"text": f"row {i}: the quick brown fox jumps over the lazy dog. " * 3} for i in range(40)]


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Make a JSONL file of four units, a compressed file of two parts with duplicates, and a Parquet file."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "a.jsonl").write_text(jsonl(ROWS[:30]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((jsonl(ROWS[20:35]) + "not JSON\n").encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[30:]), folder / "c.parquet", row_group_size=5)
    return folder


@pytest.fixture(scope="module")
def store(inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        with object_store() as live:
            s3fs.S3FileSystem().put(f"{inputs}/", f"{BUCKET}/in/", recursive=True)
            yield live


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch, root):
    monkeypatch.chdir(root)
    monkeypatch.setattr(writer, "SETTLING", 0)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.05)


def run(output, *inputs, **changes):
    settings = {
        "seq_len": 32, "tokenizer": "tests/assets/debug/tokenizer", "held_out": 0.1, "unit_size": 1700, "workers": 1,
    } | changes  # fmt: skip
    return prepare.prepare(PrepareConfig(output=output, inputs=inputs, **settings), report=lambda _: None)


def url(name: str) -> str:
    return f"s3://{BUCKET}/{name}"


def content(location) -> dict[str, bytes]:
    """Return the files at a path or URL, without those that only a disk has and without the folder of the input."""
    filesystem, folder = fsspec.core.url_to_fs(str(location))
    filesystem.invalidate_cache()
    paths = [path for path in filesystem.find(folder) if Path(path).name != MANIFEST]
    found = {path.removeprefix(f"{folder}/"): filesystem.cat_file(path) for path in paths}
    return {name: re.sub(rb"\S+/(?=b.jsonl.gz:)", b"", data) for name, data in found.items()}


@pytest.fixture(scope="module")
def local(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    run(out, str(inputs))
    return out


@pytest.fixture(scope="module")
def one_file(inputs, tmp_path_factory) -> dict[str, bytes]:
    """Return the files of the local preparation of the JSONL file, which is three units."""
    out = tmp_path_factory.mktemp("one") / "out"
    run(out, str(inputs / "a.jsonl"))
    return content(out)


@pytest.fixture(scope="module")
def prepared(store) -> str:
    """Prepare the same corpus from the store to the store."""
    run(url("plain"), url("in"))
    return url("plain")


def interrupt_at(monkeypatch, number: int, error: BaseException) -> None:
    """Raise an error before the record of the n-th part is written, once."""
    plain, written = work_folder.WorkFolder.write, []

    def write(self, record):
        written.append(record)
        if len(written) == number:
            raise error
        plain(self, record)

    monkeypatch.setattr(work_folder.WorkFolder, "write", write)


# The same bytes.


def test_a_store_holds_the_files_of_the_local_preparation(store, inputs, local, prepared, tmp_path):
    assert content(prepared) == content(local)
    options = {"deduplicate": True, "pack_documents": True, "tokenizer": None, "train_tokenizer": 300}
    run(tmp_path / "out", str(inputs), **options)
    counts = run(url("options"), url("in"), **options)
    assert content(url("options")) == content(tmp_path / "out")
    assert (counts.rows, counts.duplicates, counts.bad_rows) == (56, 15, 1)
    assert counts.sequences["train"] > counts.sequences["heldout"] > 0


def test_partitions_are_merged_in_a_store(store, local):
    out = url("merged")
    run(out, url("in"), partition=(1, 2))
    with pytest.raises(UserError, match=rf"^3 of 6 units in {out} are not prepared \(0, 2, 4\); run the partitions"):
        prepare.merge(out, overwrite=False)
    run(out, url("in"), partition=(0, 2))
    assert prepare.merge(out, overwrite=False).rows == 56 and content(out) == content(local)
    with pytest.raises(UserError, match=rf"There is no unfinished preparation in {out}; prepare the data"):
        prepare.merge(out, overwrite=False)


def test_a_run_reads_the_samples_of_a_store(local, prepared, tmp_path):
    argv = ["--job.config_file", "train_configs/debug.toml", "--data.cache_folder", str(tmp_path)]
    data = parse_config.parse(argv).data
    options = {"batch_size": 1, "shuffle": False}
    remote = open_dataset(data, [f"{prepared}/train"], [], **options)
    expected = TokenDataset(local=str(local / "train"), check_hash="xxh64", **options)
    assert remote.size == expected.size > 50
    assert all(np.array_equal(remote[i]["tokens"], expected[i]["tokens"]) for i in range(remote.size))


def test_any_other_file_system(inputs, local):
    run("memory://prepared", f"file://{inputs}")
    assert content("memory://prepared") == content(local)


def test_listings_do_not_grow_with_the_number_of_units(store, monkeypatch):
    """The records of all units are listed a fixed number of times."""
    listings: list[str] = []

    def counted(plain):
        return lambda self, name="": listings.append(name) or plain(self, name)

    for method in ("sizes", "find"):
        monkeypatch.setattr(storage.Storage, method, counted(getattr(storage.Storage, method)))
    numbers = []
    for unit_size in (1700, 1000):
        listings.clear()
        run(url(f"counted-{unit_size}"), url("in/a.jsonl"), unit_size=unit_size)
        numbers.append(len(listings))
    assert numbers[0] == numbers[1] and 5 < numbers[0] < 20


# Resume and refusal.


@pytest.mark.parametrize("part", [1, 3])
def test_an_interrupted_preparation_goes_on(store, one_file, monkeypatch, part):
    out = url(f"resumed-{part}")
    with monkeypatch.context() as patch:
        interrupt_at(patch, part, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(out, url("in/a.jsonl"))
    left = content(out)
    assert any("/000002-0000/" in name for name in left) if part > 1 else not left, "nothing done, nothing left"
    prepared, plain = [], unit_worker._prepare_part
    monkeypatch.setattr(unit_worker, "_prepare_part", lambda *a: prepared.append(a[0].unit.number) or plain(*a))
    run(out, url("in/a.jsonl"))
    assert content(out) == one_file and prepared[0] == part - 1


def test_what_a_store_holds_is_not_replaced(store, prepared, monkeypatch):
    before = content(prepared)
    with pytest.raises(UserError, match=rf"^{prepared}/tokenizer exists already; choose another --output, or remove"):
        run(prepared, url("in"), seq_len=16)
    with pytest.raises(UserError, match=rf"^{prepared}/tokenizer exists already; --overwrite replaces no data in a st"):
        run(prepared, url("in"), seq_len=16, overwrite=True)
    assert content(prepared) == before

    out = url("other")
    interrupt_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(out, url("in/a.jsonl"))
    sentence = rf"^{out} holds 2 finished parts of another preparation \(--seq-len was 32, and is now 16\); repeat its"
    with pytest.raises(UserError, match=sentence):
        run(out, url("in/a.jsonl"), seq_len=16)
    run(out, url("in/a.jsonl"), seq_len=16, overwrite=True, unit_size=9000)
    assert {name.split("/")[1] for name in content(out) if name.endswith(".mds")} == {"000000-0000"}
    assert shards.read_card(f"{out}/train").seq_len == 16


def test_a_tokenizer_of_an_array_job_that_has_just_begun_is_no_obstacle(store, one_file, monkeypatch):
    """All tasks of a job array begin at once: one finds the other's tokenizer before its card."""
    out, plain = url("array"), work_folder.WorkFolder.begin

    def begin(self, *arguments):
        monkeypatch.setattr(work_folder.WorkFolder, "begin", plain)
        run(out, url("in/a.jsonl"), partition=(1, 2))
        plain(self, *arguments)

    monkeypatch.setattr(work_folder.WorkFolder, "begin", begin)
    run(out, url("in/a.jsonl"), partition=(0, 2))
    prepare.merge(out, overwrite=False)
    assert content(out) == one_file


def test_an_object_that_changes_is_named(store, inputs, monkeypatch):
    name = url("changing.jsonl")
    object_, before = storage.Storage(url("")), (inputs / "a.jsonl").read_bytes()
    object_.write("changing.jsonl", before)
    plain = work_folder.WorkFolder.write
    after = before.replace(b"quick", b"quack")

    def write(self, record):
        plain(self, record)
        object_.write("changing.jsonl", after)

    monkeypatch.setattr(work_folder.WorkFolder, "write", write)
    sentence = rf"^The input {name} has changed since .* began \({len(before)} bytes, version [0-9a-f]{{32}}; "
    with pytest.raises(UserError, match=sentence):
        run(url("changed"), name)


# Outages.


def away(monkeypatch, store, seconds: float | None, events: tuple[str, ...] = ("reading", "writing")) -> list[str]:
    """Shut the store for some seconds or for good, once for each event; return the events that have happened."""
    shut, plain, take = [], corpus.rows, storage.Storage.take

    def once(event: str) -> None:
        if event in events and event not in shut:
            shut.append(event)
            store.proxy.shut() if seconds is None else store.shut_for(seconds)

    def rows(segment, skip=0):
        if segment.start > 0:
            once("reading")
        return plain(segment, skip)

    def taking(self, source, name):
        if "/000001-0000/" in name:
            once("writing")
        take(self, source, name)

    monkeypatch.setattr(corpus, "rows", rows)
    monkeypatch.setattr(storage.Storage, "take", taking)
    return shut


def test_a_store_that_is_away_for_a_moment_is_waited_for(store, one_file, monkeypatch, caplog):
    shut = away(monkeypatch, store, 0.3)
    run(url("away"), url("in/a.jsonl"))
    assert content(url("away")) == one_file and shut == ["reading", "writing"]


@pytest.mark.parametrize("what, sentence", [
    ("reading", rf"^The store of the input {url('in/a.jsonl')} does not answer \(.*\); check the store or the connec"),
    ("writing", rf"^The output {url('gone-writing')} cannot be written to \(.*\); check the folder or store. Finished"),
])  # fmt: skip
def test_a_store_that_is_gone_is_named(store, one_file, monkeypatch, what, sentence):
    out = url(f"gone-{what}")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "PATIENCE", 0)
        away(patch, store, None, (what,))
        with pytest.raises(UserError, match=sentence):
            run(out, url("in/a.jsonl"))
    store.proxy.open()
    storage.Storage(out).remove(writer.LEASE)  # expires after a minute
    run(out, url("in/a.jsonl"))
    assert content(out) == one_file


@pytest.mark.slow
def test_twenty_seconds_without_a_store(store, one_file, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 1.0)
    shut = away(monkeypatch, store, 20)
    began = time.monotonic()
    run(url("long"), url("in/a.jsonl"))
    assert content(url("long")) == one_file and len(shut) == 2 and time.monotonic() - began > 40


# Scratch folder.


def folder_size(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a shard that has just been uploaded
            sizes.append(path.stat().st_size * path.is_file())
    return sum(sizes)


def test_scratch_stays_within_its_limit(store, tmp_path, monkeypatch):
    """Shards leave the scratch folder one at a time; it is largest before each upload."""
    shard, other = 1 << 13, 30_000
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS * 10))
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (shard, lambda path: None))
    monkeypatch.setattr(prepare, "SHARD_SIZE", shard)
    monkeypatch.setattr(prepare, "_OTHER_SCRATCH", other)
    sizes, take = [], storage.Storage.take

    def taking(self, source, name):
        sizes.append(folder_size(tmp_path / "scratch"))
        take(self, source, name)

    monkeypatch.setattr(storage.Storage, "take", taking)
    options = {"scratch": str(tmp_path / "scratch"), "unit_size": 1 << 20}
    run(url("scratch"), str(tmp_path / "rows.jsonl"), scratch_limit=shard + other, workers=8, **options)
    uploaded = sum(len(data) for name, data in content(url("scratch")).items() if name.endswith(".mds"))
    assert uploaded > 2 * (shard + other) and shard < max(sizes) <= shard + other
    assert not list((tmp_path / "scratch").iterdir())
    with pytest.raises(
        UserError, match=r"^--scratch-limit 38,191 is too small for one worker; give at least 38,192 bytes"
    ):
        run(url("scratch-2"), str(tmp_path / "rows.jsonl"), scratch_limit=shard + other - 1, **options)
    assert not content(url("scratch-2"))


def test_fewer_workers_share_a_small_scratch_folder():
    config = PrepareConfig("s3://b/o", 32, workers=8, scratch_limit=3 * (shards.SHARD_SIZE + prepare._OTHER_SCRATCH))
    assert prepare.n_workers(config) == 3
