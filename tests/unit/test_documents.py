"""Packed rows: every document gives the results of a row that holds it alone."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributed import destroy_process_group, is_initialized
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torchtitan.distributed.utils import init_fake_mode

from memdlm_dist.compat import torch as compat_torch
from memdlm_dist.compat.fake_device import FakeTensorMode
from memdlm_dist.compat.torch import TorchDispatchMode, grouped_mm
from memdlm_dist.errors import UserError
from memdlm_dist.method import fast_weights, trajectory
from memdlm_dist.method.bilevel import Memory, outer_loss
from memdlm_dist.method.documents import PADDING, Documents
from memdlm_dist.method.fast_weights import AdaptedLinear
from memdlm_dist.method.inner_loss import inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.models import attention, llada
from memdlm_dist.models.flops import step_flops
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.runtime.device import has_grouped_mm
from memdlm_dist.training.validator import even_levels
from tests.support.bilevel import ARGS, MASK_ID, build, double, gradients, memory, objective
from tests.support.varlen import naive_varlen
from tests.workers.sharded_context import configuration, micro_batches

LENGTH = 24
SIZES = [[7, 10, 5], [24], [1, 20], [3, 4, 5, 12]]  # documents' lengths per row; rows 0 and 2 end with padding
ROW_IDS = torch.tensor([5, 9, 2, 40])
STEP = 3


def close(ours, theirs):
    """Assert equality to 1e-6 of the largest value: float64, except the float32 clipping norms."""
    if isinstance(ours, dict):
        for name, x in ours.items():
            close(x, theirs[name])
    else:
        assert (ours.double() - theirs.double()).abs().max() <= 1e-6 * theirs.double().abs().max()


def numbers():
    def row(sizes):
        number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return F.pad(number, (0, LENGTH - sum(sizes)), value=PADDING)

    return torch.stack([row(sizes) for sizes in SIZES])


def packed():
    """Return tokens, labels and documents; in every second document the first two tokens are a prompt."""
    documents = numbers()
    tokens = torch.randint(0, MASK_ID, (len(SIZES), LENGTH), generator=torch.Generator().manual_seed(1))
    prompt = ((Documents.from_numbers(documents).position_BL < 2) & (documents % 2 == 1)) | (documents == PADDING)
    return tokens, torch.where(prompt, trajectory.IGNORE_INDEX, tokens), documents


def alone(slots=None):
    """Yield (sample, tokens, labels, id) of every document as a row of its own length."""
    tokens, labels, documents = packed()
    ids = Documents.from_numbers(documents, slots).ids(ROW_IDS)
    slots = len(ids) // len(SIZES)
    for row, sizes in enumerate(SIZES):
        for number in range(len(sizes)):
            chosen = documents[row] == number
            sample = row * slots + number
            yield sample, tokens[row][chosen][None], labels[row][chosen][None], ids[sample : sample + 1]


def step(model, goal, *arguments, **options):
    """Return loss, inner statistics and gradients of a step."""
    batch = goal.micro_batch(*arguments, step=STEP, **options)
    slots = batch.documents.slots if batch.documents is not None else 1
    fast = double(goal.memory.draw(3, STEP, batch.sample_ids_U, slots)) if goal.memory else None
    model.zero_grad()
    loss, inner = outer_loss(model, batch, goal.memory, fast)
    loss.backward()
    return loss.detach(), inner, gradients(model)


OPTIONS = {
    "off": (None, {}),
    "default": ({}, {}),
    "full": ({"fast_weight_type": "full", "loss": "hidden_cosine"}, {"supervision": "newly_revealed"}),
    "all linears": ({"targets": ("ffn", "attention"), "loss": "kl"}, {"inner_steps": 3}),
    "progressive": (
        {"loss": "reverse_kl", "inner_epochs": 2},
        {"trajectory": "progressive", "schedule": "cosine", "supervision": "anchor", "progressive_end": 0.5},
    ),
}


@pytest.mark.parametrize(
    "options, shifted, slots",
    [
        ("off", False, None), ("off", True, 8), ("default", False, None), ("full", True, 8),
        ("all linears", True, 8), ("progressive", False, None),
    ],
)  # fmt: skip
def test_a_packed_document_is_what_it_is_alone(options, shifted, slots):
    """Equal loss, gradients, and per document inner losses, norms and fast-weight norm; float64."""
    settings, plan = OPTIONS[options]
    goal = replace(objective(None if settings is None else memory(**settings), **plan), shifted=shifted, slots=slots)
    goal = replace(goal, loss_norm="token" if options == "default" else "answer")
    model = build()
    tokens, labels, documents = packed()
    loss, inner, gradients_packed = step(model, goal, tokens, labels, ROW_IDS, documents_BL=documents)
    total, expected = torch.zeros(()), {name: torch.zeros_like(x) for name, x in gradients_packed.items()}
    for sample, *document in alone(slots):
        loss_alone, statistics, gradients_alone = step(model, goal, *document)
        total = total + loss_alone
        expected = {name: x + gradients_alone[name] for name, x in expected.items()}
        if inner is not None:
            for name in ("loss_KG", "grad_norm_KG", "counted_KG", "written_norm_G"):
                ours, theirs = getattr(inner, name)[..., sample], getattr(statistics, name)[..., 0]
                close(ours, theirs)
    close(loss, total)
    close(gradients_packed, expected)
    if inner is not None:
        assert (inner.written_norm_G > 0).sum() >= 6, "several documents adapt"


def in_rows_of_their_own(slots, chosen):
    """Return tokens, labels, ids and documents of rows with one of the documents `chosen` each, padded to one length.

    Args:
        slots: document slots of the packed rows.
        chosen: numbers of samples of the packed rows.
    """
    rows = {sample: document for sample, *document in alone(slots) if sample in chosen}

    def padded(x, value):
        return F.pad(x, (0, LENGTH - x.shape[1]), value=value)

    tokens, labels, ids = zip(*rows.values(), strict=True)
    documents = torch.cat([padded(torch.zeros_like(x), PADDING) for x in tokens])
    labels = torch.cat([padded(x, trajectory.IGNORE_INDEX) for x in labels])
    return torch.cat([padded(x, 0) for x in tokens]), labels, torch.cat(ids), documents


@pytest.mark.parametrize("samples_per_set", [2, 3, 4, None])
@pytest.mark.parametrize("settings", [{}, {"fast_weight_type": "full", "targets": ("ffn", "attention")}])
def test_documents_that_share_a_set_share_it_in_rows_of_their_own(samples_per_set, settings):
    """Each set as a micro-batch of its own with granularity "batch": equal losses, gradients and statistics.

    The last set of a row has fewer documents. As many samples in a set as slots in a row make one set for each row;
    None makes one for all rows.
    """
    goal = replace(objective(memory(samples_per_set=samples_per_set, **settings)), slots=4)
    one_set = replace(goal, slots=1, memory=replace(goal.memory, samples_per_set=None))
    model = build()
    tokens, labels, documents = packed()
    loss, inner, gradients_packed = step(model, goal, tokens, labels, ROW_IDS, documents_BL=documents)
    total, expected = torch.zeros(()), {name: torch.zeros_like(x) for name, x in gradients_packed.items()}
    filled = [row * 4 + slot for row, sizes in enumerate(SIZES) for slot in range(len(sizes))]
    n, per_row = samples_per_set or 4, -(-4 // (samples_per_set or 4))
    first = [row * 4 + slot for row in range(4) for slot in range(0, 4, n)]
    sets = [[s for s in filled if a <= s < min(a + n, a // 4 * 4 + 4)] for a in first]
    if samples_per_set is None:
        sets, per_row = [filled], 1 / 4
    assert len(sets) == 4 * per_row == inner.loss_KG.shape[1]
    for number, samples in enumerate(sets):
        if not samples:
            assert not inner.counted_KG[:, number].any()
            continue
        *rows, documents_alone = in_rows_of_their_own(4, samples)
        part, statistics, gradients_part = step(model, one_set, *rows, documents_BL=documents_alone)
        total = total + part
        expected = {name: x + gradients_part[name] for name, x in expected.items()}
        for name in ("loss_KG", "grad_norm_KG", "counted_KG", "written_norm_G"):
            close(getattr(inner, name)[..., number], getattr(statistics, name)[..., 0])
    close(loss, total)
    close(gradients_packed, expected)


def test_a_row_of_one_document_is_a_row_without_documents():
    goal, model = objective(memory()), build()
    tokens, labels, _ = packed()
    documents = torch.zeros(len(SIZES), LENGTH, dtype=torch.int64)
    one, other = (step(model, goal, tokens, labels, ROW_IDS, documents_BL=x) for x in (documents, None))
    close(one[0], other[0])
    close(one[2], other[2])


@pytest.mark.parametrize("shifted", [False, True])
def test_a_row_does_not_depend_on_its_fill_or_on_its_neighbours(shifted):
    """Rows filled up to two lengths, in one micro-batch, are the rows alone; so are their noise and their memory."""
    goal, model = replace(objective(memory()), shifted=shifted, slots=1, loss_norm="answer"), build()
    tokens, labels, _ = packed()
    sizes = [LENGTH - 3 * row for row in range(len(SIZES))]
    labels[:, -2:] = tokens[:, -2:]  # padding that is scored
    alone_, total = [], torch.zeros(())
    for row, size in enumerate(sizes):
        alone_.append(step(model, goal, tokens[row : row + 1, :size], labels[row : row + 1, :size], ROW_IDS[row][None]))
        total = total + alone_[-1][0]
    for length in (LENGTH, LENGTH + 8):
        filled_tokens, filled_labels = F.pad(tokens, (0, 8)), F.pad(labels, (0, 8), value=trajectory.IGNORE_INDEX)
        documents = torch.where(torch.arange(length) < torch.tensor(sizes)[:, None], 0, PADDING)
        filled_labels = torch.where(documents == 0, filled_labels[:, :length], trajectory.IGNORE_INDEX)
        loss, inner, summed = step(
            model, goal, filled_tokens[:, :length], filled_labels, ROW_IDS, documents_BL=documents
        )
        close(loss, total)
        for name, x in summed.items():
            close(x, sum(one[2][name] for one in alone_))
        for row, one in enumerate(alone_):
            close(inner.loss_KG[:, row], one[1].loss_KG[:, 0])
            close(inner.written_norm_G[row], one[1].written_norm_G[0])


@pytest.mark.parametrize("fast_weight_type", ["lora", "full"])
def test_experts_have_fast_weights_for_every_document(fast_weight_type):
    """In routed and shared experts and, with full matrices, in a dense layer."""
    args = LLaDA2Args(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=16, vocab_size=61, max_seq_len=24, n_experts=8,
        experts_per_token=2, expert_groups=4, groups_per_token=2, shared_hidden_dim=24, dense_hidden_dim=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LLaDAMixture(args)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention and router are not flat
        for mixture in model.mixtures():
            mixture.expert_bias.uniform_(-0.1, 0.1)
    model, first = model.double(), 0 if fast_weight_type == "full" else 1
    settings = Memory(
        first, args.adapted_linears(first, ["ffn", "o"]), fast_weight_type, 4, 8.0,
        inner_loss("cross_entropy", "pre_final_norm", "post_final_norm"), InnerSGD(0.3, 1.0), samples_per_set=1,
    )  # fmt: skip
    goal = objective(settings)
    tokens, labels, documents = packed()
    loss, inner, packed_gradients = step(model, goal, tokens, labels, ROW_IDS, documents_BL=documents)
    results = {sample: step(model, goal, *document) for sample, *document in alone()}
    close(loss, sum(x[0] for x in results.values()))
    for sample, (_, statistics, _) in results.items():
        close(inner.written_norm_G[sample], statistics.written_norm_G[0])
    for name, gradient in packed_gradients.items():
        close(gradient, sum(x[2][name] for x in results.values()))
    assert (inner.written_norm_G > 0.01).sum() >= 6


@pytest.fixture
def flex(monkeypatch):
    """Run flex attention uncompiled, with the kernel that torch has on every device."""
    monkeypatch.setattr(attention, "create_attention_mask", create_block_mask)
    monkeypatch.setattr(attention.FlexAttentionWrapper, "_compiled_flex_attn", flex_attention)
    # Flex attention refuses gradients on a CPU because compiled code would not support them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.fixture
def blocks(flex, monkeypatch):
    """Use block masks, as on an accelerator; return the list of masks built."""
    masks, document_mask = [], attention.document_mask

    def recorded(documents, method):
        masks.append(document_mask(documents, "blocks"))
        return masks[-1]

    monkeypatch.setattr(llada, "document_mask", recorded)
    return masks


METHODS = [  # device, flash kernels, head dim, dtype -> method
    ("cpu", False, 128, torch.bfloat16, "dense"),
    ("cuda", True, 128, torch.bfloat16, "varlen"),
    ("cuda", True, 8, torch.float16, "varlen"),
    ("cuda", True, 128, torch.float32, "blocks"),
    ("cuda", True, 512, torch.bfloat16, "blocks"),
    ("cuda", True, 20, torch.bfloat16, "blocks"),
    ("cuda", False, 128, torch.bfloat16, "blocks"),  # an old GPU, or a torch build without the kernels
    ("cuda", False, 8, torch.bfloat16, "dense"),  # flex attention's kernels need a head dim of 16 or more
    ("xpu", True, 128, torch.bfloat16, "blocks"),
]


@pytest.mark.parametrize("device, flash, width, dtype, method", METHODS)
def test_attention_is_chosen_by_what_runs(monkeypatch, device, flash, width, dtype, method):
    monkeypatch.setattr(attention, "has_flash_attention", lambda: flash)
    assert attention.attention_method(device, width, dtype) == method


@pytest.mark.parametrize("capability, grouped", [((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)])
def test_grouped_products_are_used_where_torch_has_a_kernel(monkeypatch, capability, grouped):
    """Other devices loop over the groups, after a device-to-host sync."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_grouped_mm() == grouped


@pytest.fixture
def varlen(monkeypatch):
    """Replace variable-length attention, which torch has only on CUDA; return a list with one entry per call."""
    calls = []
    monkeypatch.setattr(
        compat_torch, "varlen_attn", lambda *args, **options: calls.append(1) or naive_varlen(*args, **options)
    )
    return calls


@pytest.mark.parametrize("method", ["varlen", "blocks"])
def test_attention_within_documents_is_the_dense_masks(flex, varlen, method):
    documents = Documents.from_numbers(numbers(), slots=8)
    dense, other = (attention.document_mask(documents, x) for x in ("dense", method))
    assert dense.shape == (4, 1, LENGTH, LENGTH) and isinstance(other, {"blocks": BlockMask}.get(method, tuple))
    kernel = attention.BidirectionalAttentionKernel()
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, heads, LENGTH, 16, requires_grad=True) for heads in (4, 2, 2))
    if method == "varlen":
        q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    results = []
    for mask in (dense, other):
        out = kernel(q, k, v, enable_gqa=True, mask=mask)
        assert out.shape == q.shape
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    # The naive function runs in float64; blocks run in float32 with another kernel.
    tolerance = {"varlen": {"rtol": 1e-12, "atol": 1e-12}, "blocks": {"rtol": 1e-4, "atol": 1e-5}}[method]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert len(varlen) == (method == "varlen")


def test_sequences_end_where_documents_and_padding_do():
    """cu_seqlens has a fixed length with empty slots as repeated ends.

    Rows hold one document, as many as there are slots, or none.
    """
    full = torch.arange(LENGTH) // 3
    rows = torch.stack([torch.zeros_like(full), full, torch.full_like(full, PADDING), full.clamp(max=1)])
    for number, sizes in ((numbers(), SIZES), (rows, [[LENGTH], [3] * 8, [], [3, LENGTH - 3]])):
        ends = Documents.from_numbers(number, slots=8).cu_seqlens()
        assert ends.dtype == torch.int32 and len(ends) == 4 * 9 + 1 and ends[0] == 0
        lengths = ends.diff().view(4, 9).tolist()
        assert lengths == [[*row, *[0] * (8 - len(row)), LENGTH - sum(row)] for row in sizes]


def test_a_step_makes_its_sequences_once(monkeypatch, varlen):
    """One cu_seqlens serves all passes of a step, inner and outer; results equal the dense mask's."""
    goal = objective(memory(), inner_steps=2)
    tokens, labels, documents = packed()
    model = build()
    dense = step(model, goal, tokens, labels, ROW_IDS, documents_BL=documents)
    calls, cu_seqlens = [], Documents.cu_seqlens
    monkeypatch.setattr(llada, "attention_method", lambda *_: "varlen")
    monkeypatch.setattr(Documents, "cu_seqlens", lambda self: calls.append(1) or cu_seqlens(self))
    ours = step(model, goal, tokens, labels, ROW_IDS, documents_BL=documents)
    close(ours[0], dense[0])
    close(ours[1].loss_KG, dense[1].loss_KG)
    close(ours[2], dense[2])
    assert len(calls) == 1 and len(varlen) > 6


def test_a_step_makes_its_blocks_once(request):
    """One block mask serves all passes of a step, inner and outer; the loss equals the dense mask's."""
    goal, model = objective(memory(), inner_steps=3), build(torch.float32)
    tokens, labels, documents = packed()

    def loss():
        batch = goal.micro_batch(tokens, labels, ROW_IDS, STEP, documents_BL=documents)
        return goal.loss_sum(model, batch, STEP)[0].detach()

    dense = loss()
    masks = request.getfixturevalue("blocks")
    # float32 with another kernel.
    torch.testing.assert_close(loss(), dense, rtol=1e-5, atol=0)
    assert len(masks) == 1 and isinstance(masks[0], BlockMask)


def test_blocks_pass_through_fsdp_and_checkpoints(blocks):
    """One process with three fake ranks; their values are missing, so only shapes are checked."""
    if is_initialized():
        destroy_process_group()
    init_fake_mode(4)
    try:
        bench = Bench.build(
            configuration("--parallelism.data_parallel_shard_degree", "2", "--parallelism.context_parallel_degree", "2",
                          "--activation_checkpoint.mode", "full")
        )  # fmt: skip
        (batch,) = micro_batches(bench, 1, "packed")
        loss, inner = bench.loss_sum("ours", batch, 1)
        loss.backward()
        assert len(blocks) == 1 and inner.loss_KG.shape == (2, 2 * 4) and batch.inputs[0].shape == (2, 16)
        assert all(p.grad is not None for p in bench.model.parameters())
    finally:
        destroy_process_group()


def test_documents_know_their_places():
    documents = Documents.from_numbers(numbers())
    assert documents.slots == 4
    assert documents.position_BL[0].tolist() == [*range(7), *range(10), *range(5), 0, 1]
    assert documents.ids(ROW_IDS).view(4, 4)[:, 0].tolist() == ROW_IDS.tolist(), "the first document keeps the row's id"
    assert len(set(documents.ids(torch.arange(1000)).tolist())) == 4000
    sizes = documents.count_per_sample(numbers() != PADDING).view(4, 4)
    assert [[n for n in row if n] for row in sizes.tolist()] == SIZES
    pairs = sum(n * n for row in SIZES for n in row) + 2 * 2 + 3 * 3
    assert documents.mean_attended() == pytest.approx(pairs / (4 * LENGTH))
    cp_slice = documents.slice(8, 8)
    assert torch.equal(cp_slice.position_BL, documents.position_BL[:, 8:16]) and cp_slice.slots == 4
    assert documents.assign_sets().mask().sum(-1).eq(1).all()
    assert [Documents.from_numbers(numbers()[rows]).slots for rows in ([0], [1], [2])] == [4, 1, 2], "powers of two"
    assert Documents.from_numbers(numbers(), slots=8).slots == 8
    with pytest.raises(UserError, match="A row of the shards holds 4 documents, more than most_documents in their"):
        Documents.from_numbers(numbers(), slots=2)


@pytest.mark.parametrize("slots", [None, 8])
def test_noise_of_a_document_does_not_depend_on_its_row(slots):
    _, labels, documents = packed()
    packing = Documents.from_numbers(documents, slots)
    draw = trajectory.draw(3, STEP, packing.ids(ROW_IDS), labels != trajectory.IGNORE_INDEX, None, packing)
    for sample, _, labels_alone, ids in alone(slots):
        single = trajectory.draw(3, STEP, ids, labels_alone != trajectory.IGNORE_INDEX)
        row, number = divmod(sample, packing.slots)
        assert single.t_U[0] == draw.t_U[sample]
        assert torch.equal(single.u_BL[0], draw.u_BL[row][documents[row] == number])
        count = torch.tensor([2])
        counts = torch.zeros(len(draw.t_U), dtype=torch.int64).index_fill(0, torch.tensor(sample), 2)
        assert torch.equal(
            single.smallest(single.u_BL, count)[0], draw.smallest(draw.u_BL, counts)[row][documents[row] == number]
        )


def test_held_out_levels_are_even_and_do_not_depend_on_the_batch():
    levels = even_levels(torch.arange(1000), 3)
    assert torch.equal(levels[:30], even_levels(torch.arange(10), 3))
    assert torch.equal(levels.view(1000, 3)[:, 0], even_levels(torch.arange(1000), 1))
    assert len(levels[:3].unique()) == 3, "a row's documents differ"
    counts = torch.histc(levels.float(), 20, 0, 1)
    assert counts.min() > 140 and counts.max() < 160


def test_packed_rows_cost_their_documents_attention_and_every_sets_terms():
    tokens, labels, documents = packed()
    settings = memory()
    goal = objective(settings)
    unpacked_flops = step_flops(ARGS, goal.micro_batch(tokens, labels, ROW_IDS, STEP), None)
    batch = goal.micro_batch(tokens, labels, ROW_IDS, STEP, documents_BL=documents)
    packed_flops = step_flops(ARGS, batch, None)
    attended = Documents.from_numbers(documents).mean_attended()
    head = 3 * 2 * ARGS.dim * ARGS.vocab_size
    heads = head * (len(batch.anchor.label_N) - len(goal.micro_batch(tokens, labels, ROW_IDS, STEP).anchor.label_N))
    # Two products per attended token: forward 1, backward 2.5.
    saved = 3.5 * 4 * tokens.numel() * ARGS.dim * ARGS.n_layers * (LENGTH - attended)
    assert unpacked_flops.outer - packed_flops.outer + heads == pytest.approx(saved)
    one_set = step_flops(ARGS, batch, memory(samples_per_set=None))
    assert step_flops(ARGS, batch, settings).inner > one_set.inner
    assert batch.sets(settings.samples_per_set).count == 16


def test_tokens_are_laid_out_document_after_document():
    documents = Documents.from_numbers(numbers(), slots=8)
    for rows in (documents, documents.slice(8, 8)):
        grouped, sample_T = rows.grouped(), rows.sample_BL.flatten()
        sizes = torch.bincount(sample_T, minlength=32)
        ends = grouped.offsets_U.tolist()
        assert ends[-1] == grouped.n_rows == len(sample_T) + 8 * 32 and grouped.offsets_U.dtype == torch.int32
        starts = [0, *ends[:-1]]
        occupied = []
        for sample, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # Empty slots get 8 rows too: a device may leave the gradient of an empty group undefined.
            assert (end - start) % 8 == 0 < end - start
            assert sample == 31 or end - start - sizes[sample] in range(8) or (end - start, sizes[sample]) == (8, 0)
            occupied += range(start, start + int(sizes[sample]))
        assert grouped.row_T.tolist() == occupied
        x = torch.randn(*rows.number_BL.shape, 3)
        laid_out = grouped.scatter(x)
        assert torch.equal(grouped.gather(laid_out, len(x)), x)
        assert laid_out.count_nonzero() == x.numel(), "all other rows are zero"


def fast_terms(fast_weight_type, number, slots, dtype, grouped):
    """Return the output of a linear's fast-weight term and all gradients."""
    generator = torch.Generator().manual_seed(2)
    documents = Documents.from_numbers(number, slots)
    sets = documents.assign_sets(grouped)
    linear = AdaptedLinear("0", "up", 24, 40, False, 0)
    keys = torch.arange(len(number) * slots)
    fast = fast_weights.FAST_WEIGHT_TYPES[fast_weight_type].start(linear, 8, 16.0, keys, None)
    leaves = [torch.randn(x.shape, generator=generator).to(dtype).requires_grad_() for x in fast if torch.is_tensor(x)]
    x = torch.randn(*number.shape, 24, generator=generator).to(dtype).requires_grad_()
    fast = type(fast)(*leaves, *(value for value in fast if not torch.is_tensor(value)))
    y = fast.term(x, sets)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *leaves], upstream)]


@pytest.mark.parametrize("fast_weight_type", fast_weights.FAST_WEIGHT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_terms_are_the_masked_ones(monkeypatch, fast_weight_type, dtype):
    """Same output and gradients with empty slots, padding and one-token documents; masked form in float64."""
    calls = []
    monkeypatch.setattr(fast_weights, "grouped_mm", lambda *arguments: calls.append(1) or grouped_mm(*arguments))
    masked = fast_terms(fast_weight_type, numbers(), 8, torch.float64, grouped=False)
    assert not calls
    # float32 rounds to 6e-8 and bfloat16 to 4e-3, in inputs and intermediates as well; sums have 40 terms.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in zip(fast_terms(fast_weight_type, numbers(), 8, dtype, grouped=True), masked, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() and ours.dtype == dtype
    assert len(calls) == {"lora": 2, "full": 1}[fast_weight_type]


def test_sizes_that_accelerators_do_not_group_take_the_masked_form():
    sets = Documents.from_numbers(numbers()).assign_sets(grouped=True)
    x = torch.zeros(4, LENGTH, 24)
    dtype_of = partial(fast_weights._grouped_dtype, sets)
    assert dtype_of(x, torch.zeros(16, 8, 24)) == torch.float32 and dtype_of(x.double(), torch.zeros(16, 8, 24)) is None
    assert dtype_of(x, torch.zeros(16, 4, 24)) is None, "rank 4 is not grouped"
    with FakeTensorMode():
        on_gpu, A_GRi = torch.zeros(4, LENGTH, 24, device="cuda"), torch.zeros(16, 8, 24, device="cuda")
        assert dtype_of(on_gpu, A_GRi) is None and dtype_of(on_gpu.bfloat16(), A_GRi) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert dtype_of(x, torch.zeros(16, 8, 24)) == torch.bfloat16


@pytest.mark.parametrize("samples_per_set", [1, 3])
def test_a_step_with_grouped_terms_is_the_step_with_masked_ones(samples_per_set):
    """Same loss, fast-weight norm and gradients in float32; product shapes do not depend on the documents."""
    goal = objective(memory(rank=8, targets=("ffn", "attention"), samples_per_set=samples_per_set))
    goal = replace(goal, slots=4)
    tokens, labels, documents = packed()
    fewer_documents = torch.where(documents == PADDING, PADDING, documents.clamp(max=1))

    def run(grouped, of_rows):
        model = build(torch.float32)
        model.model_args = replace(model.model_args, grouped=grouped)
        batch = goal.micro_batch(tokens, labels, ROW_IDS, STEP, documents_BL=of_rows)
        with Products() as products:
            loss, inner = goal.loss_sum(model, batch, STEP)
            loss.backward()
        return loss.detach(), inner.written_norm_G, gradients(model), products.made

    masked, grouped, other = run(False, documents), run(True, documents), run(True, fewer_documents)
    for ours, theirs in zip(grouped[:2], masked[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, theirs in masked[2].items():
        # Summation order differs, amplified by two inner steps.
        assert (grouped[2][name] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    assert masked[3] == {} and grouped[3] == other[3] and sum(grouped[3].values()) > 20


class Products(TorchDispatchMode):
    """Counter of the shapes of grouped products while active."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._grouped_mm.default:
            self.made[args[0].shape, args[1].shape] += 1
        return operator(*args, **(kwargs or {}))


def test_the_flops_of_grouped_terms_do_not_depend_on_the_number_of_documents():
    goal = objective(memory())
    tokens, labels, documents = packed()

    def inner(grouped, slots, rank=8):
        batch = replace(goal, slots=slots).micro_batch(tokens, labels, ROW_IDS, STEP, documents_BL=documents)
        return step_flops(replace(ARGS, grouped=grouped), batch, memory(rank=rank)).inner

    assert inner(True, 4) == inner(True, 64) < inner(False, 4) < inner(False, 64)
    assert inner(True, 64, rank=4) == inner(False, 64, rank=4), "rank 4 is not grouped"
