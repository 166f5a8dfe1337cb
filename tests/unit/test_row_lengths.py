"""Fine-tuning rows of different lengths: padding by the row, buckets, grouping by length, the deal to ranks."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memdlm_dist.checkpoint import continuity
from memdlm_dist.compat import streaming
from memdlm_dist.config import parse_config
from memdlm_dist.config.job_config import Data
from memdlm_dist.data import row_lengths, shards
from memdlm_dist.data.dataset import ERROR_KEY, open_dataset
from memdlm_dist.data.loader import EpochLoader, training_loader
from memdlm_dist.data.preparation.prepare import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.row_lengths import MAX_BUCKETS, RowLengths, buckets, padded_length
from memdlm_dist.data.row_shape import RowShape, check_cards
from memdlm_dist.data.sequences import fine_tuning_document
from memdlm_dist.errors import UserError
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.training.backbone import get_shard_requirements

SEQ_LEN, MULTIPLE, ROWS, GLOBAL = 128, 16, 90, 8
DEBUG = "tests/assets/debug"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return the folder of shards with responses of very different lengths, and the summary of their preparation."""
    folder = tmp_path_factory.mktemp("varied")
    rows = [{"prompt": f"{i}:", "response": "x = f(y)\n" * (1 + i * 7 % 40)} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = PrepareConfig(
        folder / "out", SEQ_LEN, (str(folder / "rows.jsonl"),), f"{DEBUG}/tokenizer", held_out=0.0,
        pad_multiple=MULTIPLE, overlong="clip-response",
    )  # fmt: skip
    summary = prepare(request)
    for name, changes in {"whole": {"pad_multiple": None}, "packed": {"pack_documents": True}}.items():
        prepare(replace(request, output=folder / name, **changes))
    return folder, summary


def requirements(*arguments):
    config = parse_config.parse(["--job.config_file", "train_configs/debug.toml", *arguments])
    return get_shard_requirements(config, shards.read_card(f"{DEBUG}/train").mask_token_id)


@pytest.fixture(scope="module")
def dataset(prepared):
    folder = str(prepared[0] / "out/train")
    shape = check_cards([folder], requirements())
    assert shape == RowShape(1, (16, 32, 64, 128), (folder,))
    return open_dataset(Data(), [folder], [], shape, batch_size=2, shuffle=True, num_canonical_nodes=1)


@pytest.mark.parametrize("seq_len, multiple", [(4096, 128), (131072, 128), (100, 16), (128, 128), (128, 1), (5, 2)])
def test_buckets_are_few_and_at_most_double(seq_len, multiple):
    lengths = buckets(seq_len, multiple)
    assert lengths == tuple(sorted(set(lengths))) and lengths[-1] == seq_len and len(lengths) <= MAX_BUCKETS
    assert all(length % multiple == 0 for length in lengths[:-1])
    assert all(b <= 2 * a for a, b in pairwise(lengths))
    assert all(padded_length(length, multiple, seq_len) == length for length in lengths)


def test_rows_are_padded_to_a_multiple_and_no_further(prepared):
    folder, summary = prepared
    card = shards.read_card(str(folder / "out/train"))
    assert (card.pad_multiple, card.seq_len, card.documents, card.sequences) == (MULTIPLE, SEQ_LEN, False, ROWS)
    varied, whole = (
        open_dataset(Data(), [str(folder / name / "train")], [], batch_size=1, shuffle=False)
        for name in ("out", "whole")
    )
    assert not (folder / "whole/train/lengths.npy").exists() and not (folder / "packed/train/lengths.npy").exists()
    assert shards.read_card(str(folder / "whole/train")).pad_multiple == 0
    lengths = np.load(folder / "out/train/lengths.npy")
    for i in range(ROWS):
        row, padded = varied[i], whole[i]
        content, length = lengths[i].tolist()
        assert len(row["tokens"]) == length == min(-(-content // MULTIPLE) * MULTIPLE, SEQ_LEN)
        for key in ("tokens", "labels"):  # a row padded to seq_len continues with end-of-text
            assert torch.equal(row[key], padded[key][:length])
        assert (padded["labels"][content:] == card.eos_token_id).all()
    assert summary.padding["train"].content == lengths[:, 0].sum() and set(lengths[:, 1]) >= {16, 32, 64, 128}
    assert sum(lengths[:, 1]) == summary.padding["train"].content + summary.padding["train"].padding
    written = json.loads((folder / "out/summary.json").read_text())["padding"]["train"]
    whole_padding = json.loads((folder / "whole/summary.json").read_text())["padding"]["train"]
    assert whole_padding["padding"] == ROWS * SEQ_LEN - lengths[:, 0].sum()
    assert written == {"content": int(lengths[:, 0].sum()), "padding": summary.padding["train"].padding, "fill": 0}


def test_clipped_responses():
    texts = [([1, 2], False), ([3, 4], True), ([5, 6], False), ([7, 8], True)]
    parts = [(np.array(ids, dtype=np.uint32), is_response) for ids, is_response in texts]

    def cut(length, overlong="clip-response"):
        document, too_long = fine_tuning_document(parts, length, 0, overlong)
        return document and document.tokens.tolist(), too_long

    assert cut(10) == ([1, 2, 3, 4, 0, 5, 6, 7, 8, 0], False)
    assert cut(9) == ([1, 2, 3, 4, 0, 5, 6, 7, 8], True)
    assert cut(7) == cut(6) == cut(5) == ([1, 2, 3, 4, 0], True), "no prompt is left without its response"
    assert cut(7, "truncate") == ([1, 2, 3, 4, 0, 5, 6], True)
    assert cut(3) == ([1, 2, 3], True) and cut(2) == (None, True), "the prompt leaves no room"


def test_grouping_permutes_windows_of_global_batches():
    rng = np.random.default_rng(0)
    content = rng.integers(1, 4096, 5000).astype(np.uint32)
    padded = (-(-content // 128) * 128).astype(np.uint32)
    lengths = RowLengths(content, padded, buckets(4096, 128))
    ids = rng.permutation(5000)[:4800].astype(np.int64)
    grouped = lengths.group(ids, 16, seed=3, epoch=1)
    window = 32 * 16
    for start in range(0, len(ids), window):
        assert sorted(grouped[start : start + window]) == sorted(ids[start : start + window])
    assert np.array_equal(grouped, lengths.group(ids, 16, 3, 1))
    assert not any(np.array_equal(grouped, lengths.group(ids, 16, *other)) for other in ((3, 2), (4, 1)))
    batches = padded[grouped].reshape(-1, 16)
    assert (np.diff(batches.astype(int), axis=1) <= 0).all(), "longest first"
    assert (np.diff(batches[:32].max(1).astype(int)) < 0).any() and (np.diff(batches[:32].max(1).astype(int)) > 0).any()
    fill = {
        name: lengths.shares(order.reshape(-1, 4)).fill for name, order in {"as is": ids, "grouped": grouped}.items()
    }
    assert fill["grouped"] < fill["as is"] / 2
    shares = lengths.shares(grouped.reshape(-1, 4))
    naive = sum(4 * min(b for b in lengths.buckets if b >= padded[four].max()) for four in grouped.reshape(-1, 4))
    assert shares.content == content[ids].sum() and shares.content + shares.padding + shares.fill == naive


LAYOUTS = [*product((1, 2), (1, 2), (0, 3), (1, 2)), (1, 8, 0, 1)]  # nodes, ranks per node, workers, micro-batch


@pytest.mark.parametrize("grouped", [False, True], ids=["as is", "grouped"])
def test_every_layout_reads_the_same_steps_and_all_ranks_share_a_bucket(dataset, grouped):
    """Rows 2 k and 2 k + 1 of the order are in one micro-batch of one rank, if it has two rows."""
    dataset._global_batch_size, dataset._group_by_length = GLOBAL, grouped
    by_id = dataset.row_lengths.padded_N

    def steps(nodes, ranks, workers, size, first=0, epoch=0):
        """Return the set of micro-batches of every step, as torch's loaders would read them."""
        workers = max(workers, 1)
        dataset.batch_size = size
        world = SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers)
        dealt = streaming._deal(dataset, world, epoch, first)
        per_rank = dealt.transpose(0, 1, 3, 2, 4).reshape(nodes * ranks, -1, size + 1)  # worker t % workers, in turn
        ids, length = per_rank[..., :-1], per_rank[..., -1]
        used = ids[0, :, 0] != -1
        ids, length = ids[:, used], length[:, used]
        assert (length == length[0]).all(), "all ranks take one bucket"
        longest = by_id[ids].max((0, 2))
        assert all(length[0, t] == min(b for b in (16, 32, 64, 128) if b >= longest[t]) for t in range(len(longest)))
        order = ids.transpose(1, 0, 2).reshape(-1, GLOBAL // size, size)
        return [frozenset(map(tuple, step)) for step in order.tolist()]

    by_size = {size: steps(1, 1, 0, size) for size in (1, 2)}
    for size, reference in by_size.items():
        assert len(reference) == ROWS // GLOBAL
        assert len({row for step in reference for group in step for row in group}) == len(reference) * GLOBAL, size
    for layout in LAYOUTS:
        reference = by_size[layout[-1]]
        assert steps(*layout) == reference, layout
        assert steps(*layout, first=3 * GLOBAL) == reference[3:], "a resumed run continues inside a window"
    assert steps(1, 1, 0, 1, epoch=1) != by_size[1]
    dataset.batch_size, dataset._group_by_length = 2, False


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_fills_rows_up_and_resumes(prepared, workers):
    folder = str(prepared[0] / "out/train")
    data = Data(train=[folder], group_by_length=True, shuffle_seed=5)
    prompts = Data(train=[folder], group_by_length=True, shuffle_seed=5, mask_prompt=True)

    def loader(data=data):
        return training_loader(
            data, requirements(), local_batch_size=2, global_batch_size=GLOBAL, dp_size=1, world_size=1,
            num_workers=workers, persistent_workers=workers > 0, prefetch_factor=2 if workers else None,
        )  # fmt: skip

    first = loader()
    iterator = iter(first)
    read = [next(iterator) for _ in range(50)]  # 11 steps of 4 micro-batches an epoch
    rows = first._dataset.row_lengths
    for batch in read:
        ids = batch.sample_ids_B.numpy()
        assert batch.tokens_BL.shape == batch.labels_BL.shape == batch.documents_BL.shape == (2, rows.bucket(ids))
        for i, sample in enumerate(ids):
            length = int(rows.padded_N[sample])
            assert (batch.documents_BL[i, :length] == 0).all() and (batch.documents_BL[i, length:] == PADDING).all()
            assert (batch.labels_BL[i, length:] == IGNORE_INDEX).all()
    assert len({tuple(batch.tokens_BL.shape) for batch in read}) == 4
    assert len(set(np.concatenate([batch.sample_ids_B for batch in read[:44]]))) == 88
    assert first.token_shares().fill == sum(int((b.documents_BL == PADDING).sum()) for b in read[:44])
    if workers == 0:
        for ours, theirs in zip(loader(prompts), read[:4], strict=False):
            unlabelled = theirs.labels_BL == IGNORE_INDEX
            assert torch.equal(ours.labels_BL == IGNORE_INDEX, theirs.documents_BL == PADDING)
            assert (unlabelled & (theirs.documents_BL != PADDING)).any(), "the rows have prompts"
            assert torch.equal(ours.labels_BL[~unlabelled], theirs.labels_BL[~unlabelled])
        resumed = loader()
        resumed.load_state_dict(read[27].position)
        again = iter(resumed)
        for batch in read[28:]:
            assert torch.equal(next(again).tokens_BL, batch.tokens_BL)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_changed_global_batch_size_reads_no_row_twice(prepared, grouped):
    """Without grouping the rest of the epoch follows; a grouped epoch has another order, so the next one follows."""
    folder = str(prepared[0] / "out/train")
    data = Data(train=[folder], group_by_length=grouped)

    def loader(size):
        options = {"local_batch_size": 2, "global_batch_size": size, "dp_size": 1, "world_size": 1, "num_workers": 0}
        return training_loader(data, requirements(), **options)

    first = loader(12)
    iterator = iter(first)
    read = [next(iterator) for _ in range(6)]
    identity = {"training.global_batch_size": 12, "data.group_by_length": grouped}
    now = dict.fromkeys(continuity.IDENTITY_KEYS) | identity | {"training.global_batch_size": 8}
    run, accepted = {"identity": identity, "experiment": {}}, ["training.global_batch_size"]
    assert continuity.check("step-1", run, now, {}, accepted) is not grouped
    changed = loader(8)
    changed.load_state_dict(read[-1].position)
    if grouped:
        changed.next_epoch()
    rest = [batch.sample_ids_B for batch, _ in zip(changed, range(36), strict=False)]
    seen = torch.cat([batch.sample_ids_B for batch in read] + ([] if grouped else rest)).tolist()
    assert len(set(seen)) == len(seen) == 12 + (0 if grouped else 72)
    assert len(set(torch.cat(rest).tolist())) == 72


def test_shards_with_and_without_row_lengths_mix(prepared):
    folder = prepared[0]
    locations = [str(folder / name / "train") for name in ("whole", "out")]
    shape = check_cards(locations, requirements())
    assert shape.buckets == (16, 32, 64, 128)
    dataset = open_dataset(Data(), locations, [], shape, batch_size=1, shuffle=False, num_canonical_nodes=1)
    loader = EpochLoader(dataset, 1, dp_size=1, global_batch_size=1, rows=shape)
    lengths = [batch.tokens_BL.shape[1] for batch, _ in zip(loader, range(2 * ROWS), strict=False)]
    assert set(lengths[:ROWS]) == {SEQ_LEN} and set(lengths[ROWS:]) == {16, 32, 64, 128}
    assert check_cards([*locations, str(folder / "packed/train")], requirements()).most_documents > 1


@pytest.mark.parametrize("name, group_size", [("whole", 2), ("out", 2), ("packed", 1)])
def test_rows_of_several_documents_are_not_grouped(prepared, name, group_size):
    data = Data(train=[str(prepared[0] / name / "train")])
    sizes = {"local_batch_size": 2, "global_batch_size": GLOBAL, "dp_size": 1, "world_size": 1}
    assert training_loader(data, requirements(), **sizes, samples_per_set=2)._dataset.group_size == group_size


def test_mistakes_about_lengths(prepared, tmp_path, caplog):
    caplog.set_level("WARNING")  # another test's command may have left a higher level
    folder = prepared[0] / "out/train"
    run = requirements()
    with pytest.raises(UserError, match=r"rows of different lengths, which ring attention cannot .* --pad-to-length"):
        check_cards([str(folder)], replace(run, ring_attention=True))
    with pytest.raises(UserError, match="make micro-batches of 16 tokens, which 32 tensor- and context-parallel ranks"):
        check_cards([str(folder)], replace(run, sequence_shards=32))
    whole = Data(train=[str(prepared[0] / "whole/train")], group_by_length=True)
    training_loader(whole, run, local_batch_size=1, global_batch_size=1, dp_size=1, world_size=1)
    assert "data.group_by_length has no effect, because all rows of data.train have one length" in caplog.text

    copy = shutil.copytree(folder, tmp_path / "train")
    shape = check_cards([str(copy)], run)
    lengths = np.load(copy / "lengths.npy")

    def problem(change):
        change()
        dataset = open_dataset(Data(), [str(copy)], [], shape, batch_size=1, shuffle=False, num_canonical_nodes=1)
        return next(filter(lambda sample: ERROR_KEY in sample, dataset))

    def save(array, **options):
        return lambda: np.save(copy / "lengths.npy", array, **options)

    for change, message in (
        (save(lengths // 8), r"Sample \d+ has \d+ tokens, but lengths\.npy of its shards states \d+"),
        (save(lengths[1:]), f"do not fit the {ROWS} rows"),
        (save(lengths + np.uint32(SEQ_LEN)), f"do not fit the {ROWS} rows"),
        (save(np.array([{}]), allow_pickle=True), r"lengths\.npy cannot be read \(.*pickle"),
        (lambda: (copy / "lengths.npy").write_bytes(b"x"), r"lengths\.npy cannot be read"),
    ):
        assert re.search(message, problem(change)[ERROR_KEY])


def test_lengths_of_a_url_are_cached(prepared, tmp_path):
    location = f"file://{prepared[0] / 'out/train'}"
    shape = check_cards([location], requirements())
    data = Data(cache_folder=str(tmp_path))
    dataset = open_dataset(data, [location], [], shape, batch_size=1, shuffle=False, num_canonical_nodes=1)
    assert (dataset.row_lengths.padded_N == np.load(prepared[0] / "out/train/lengths.npy")[:, 1]).all()
    assert list(tmp_path.rglob("lengths.npy"))
    index = json.loads(next(tmp_path.rglob("index.json")).read_text())
    next(tmp_path.rglob("index.json")).write_text(json.dumps(index | {"version": 1}))
    with pytest.raises(UserError, match=r"holds other shards than file://.*, which has changed; delete the folder"):
        open_dataset(data, [location], [], shape, batch_size=1)
    with pytest.raises(UserError, match=r"lengths\.npy cannot be copied \(.*; restore the file"):
        row_lengths.fetch(f"file://{tmp_path / 'nothing'}", str(tmp_path / "new"))
