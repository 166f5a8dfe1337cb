"""Compilation happens in the first step after a start, for any documents in the rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed import destroy_process_group

from memdlm_dist.config import parse_config
from memdlm_dist.data.row_shape import RowShape
from memdlm_dist.runtime import device
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer

COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "tiny", "--training.seq_len", "32",
    "--training.local_batch_size", "2", "--metrics.log_freq", "100", "--metrics.no_enable_tensorboard",
    "--parametric_memory.start_step", "2", "--validation.enable",
]  # fmt: skip
COMPILED = ["--compile.enable", "--compile.backend", "eager"]  # the eager backend needs no C++ compiler
DROPOUT = ["--model.converters", "lora", "--lora.dropout", "0.1", "--parametric_memory.dropout", "0.2"]
MOST_DOCUMENTS = 5  # per row, as the shards' card states


@pytest.fixture
def build():
    """Return `built(arguments)`, which builds a trainer and its `batch(number, documents per row)`."""
    init_fake_process_group(1)

    def built(arguments, most_documents=MOST_DOCUMENTS, grouped=False):
        config = parse_config.parse([*COMMON, *arguments])
        sizes = replace(get_model_args(config), n_layers=2, grouped=grouped)
        trained = trainer.build(config, sizes, get_layout(config, 1), "cpu")
        trained.dataloader = SimpleNamespace(rows=RowShape(most_documents))
        trained.validator = SimpleNamespace(rows=RowShape(2))
        slots = trained._document_slots("data.train", trained.dataloader.rows)
        trained.objective = replace(trained.objective, slots=slots)

        def batch(number, documents):
            length = config.training.seq_len
            numbers = [torch.arange(length) * n // length for n in documents]
            return trainer.batch(config, sizes, number)._replace(documents_BL=torch.stack(numbers))

        trained.validator = trainer.held_out(trained, [batch(9, (1, 2))])
        trained.validator.rows = RowShape(2)
        return trained, batch

    yield built
    destroy_process_group()


@pytest.mark.parametrize("options", [[], pytest.param(DROPOUT, marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_step_of_a_start(build, monkeypatch, options):
    """Plain objective, memory with grouped products, and validation on rows of 1 to 5 documents.

    Micro-batches are views of one buffer in several sizes, as on an accelerator.
    """
    monkeypatch.setattr(device, "is_host", lambda _: False)
    monkeypatch.setattr(device, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    torch._dynamo.reset()
    counters.clear()
    # The compiler knows the shapes of grouped products only in bfloat16.
    trained, batch = build([*COMPILED, *options, "--training.mixed_precision_param", "bfloat16"], grouped=True)
    assert trained.objective.slots == 8
    graphs = []

    def take(number, documents):
        trainer.step(trained, number, [batch(number, documents)])
        graphs.append(counters["stats"]["unique_graphs"])

    take(1, (3, 1))
    trained._compile_ahead(resumed=True)
    after_start = counters["stats"]["unique_graphs"]
    for number, documents in enumerate([(1, 1), (2, 4), (5, 3)], 2):
        take(number, documents)
    trained.validator.validate(trained.model_parts, 4)
    # First the plain pass and the head's loss; then inner steps, outer pass and validation. With adapters, the input of
    # the lowest layer needs no gradient, unlike those of the others.
    assert graphs[0] == (3 if options else 2) < after_start
    assert graphs[1:] == [after_start] * 3 and counters["stats"]["unique_graphs"] == after_start
    assert not counters["graph_break"]


ROWS = [
    "--training.local_batch_size", "4", "--parametric_memory.start_step", "1", "--parametric_memory.probability",
    "0.5", "--metrics.log_freq", "2", "--validation.no_enable",
]  # fmt: skip


@pytest.mark.parametrize("unit, expected", [("sample", {0, 1, 2, 4}), ("step", {0, 4})])
def test_nothing_is_compiled_for_other_numbers_of_rows_with_the_memory(build, unit, expected):
    """In steps that log, which take one more pass, and in others."""
    torch._dynamo.reset()
    counters.clear()
    trained, batch = build([*COMPILED, *ROWS, "--parametric_memory.probability_unit", unit], most_documents=0)
    seen = set()
    for number in range(1, 60):
        rows = batch(number, (1, 1, 1, 1))._replace(documents_BL=None)
        chosen = trained.objective.at_step(number).micro_batch(*rows[:3], number)
        read = len(chosen.inner[0].scored.count_U) if chosen.inner else 0
        if (read, number % 2) not in seen:
            seen.add((read, number % 2))
            trainer.step(trained, number, [rows])
        if number == 1:
            trained._compile_ahead(resumed=False)
            after_start = counters["stats"]["unique_graphs"]
    assert seen == {(size, odd) for size in expected for odd in (0, 1)}
    assert counters["stats"]["unique_graphs"] == after_start > 3 and not counters["graph_break"]


def test_compiling_ahead_changes_nothing(build):
    """Same weights and biases bit for bit, expert loads and generator state; uncompiled blocks take the same path."""

    def run(ahead):
        trained, batch = build(["--model.name", "llada2", "--model.load_balance_coeff", "0.01"])
        trainer.step(trained, 1, [batch(1, (3, 1))])
        if ahead:
            trained.job_config.compile.enable = True
            state = torch.get_rng_state()
            trained._compile_ahead(resumed=True)
            assert torch.equal(torch.get_rng_state(), state)
            assert all(p.grad is None for p in trained.model.parameters())
        trainer.step(trained, 2, [batch(2, (2, 5))])
        return {**trained.model.state_dict(), "load": trained.model.take_load()}

    plain, ahead = run(False), run(True)
    assert plain["load"].sum() > 0
    for name, x in plain.items():
        assert torch.equal(x, ahead[name]), name


def test_shards_that_do_not_say_their_documents_are_named_once(build, caplog):
    caplog.set_level("WARNING")  # another test's command may have left a higher level
    trained, _ = build([], most_documents=None)
    assert trained.objective.slots is None
    (warning,) = [record.message for record in caplog.records if "documents a row holds" in record.message]
    assert warning.startswith("The cards of the shards in data.train do not say") and "prepare the data anew" in warning
