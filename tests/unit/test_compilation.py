"""When blocks are compiled: all of it in a start's first step, whatever the documents of the rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed import destroy_process_group

from memdlm_dist.config import parse_config
from memdlm_dist.runtime import device
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer

COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "tiny", "--training.seq_len", "32",
    "--training.local_batch_size", "2", "--metrics.log_freq", "100", "--metrics.no_enable_tensorboard",
    "--parametric_memory.start_step", "2", "--validation.enable",
]  # fmt: skip
COMPILED = ["--compile.enable", "--compile.backend", "eager"]  # which needs no C++ compiler
MOST = 5  # documents of a row, as the shards' card says


@pytest.fixture
def build():
    """Build a trainer and its batches of packed rows: `built(arguments)`, `batch(number, documents of each row)`."""
    init_fake_process_group(1)

    def built(arguments, most_documents=MOST, grouped=False):
        config = parse_config.parse([*COMMON, *arguments])
        sizes = replace(get_model_args(config), n_layers=2, grouped=grouped)
        made = trainer.build(config, sizes, get_layout(config, 1), "cpu")
        made.dataloader = SimpleNamespace(most_documents=most_documents)
        made.validator = SimpleNamespace(most_documents=2)
        made.objective = replace(made.objective, slots=made._document_slots())

        def batch(number, documents):
            length = config.training.seq_len
            numbers = [torch.arange(length) * n // length for n in documents]
            return trainer.batch(config, sizes, number)._replace(documents_BL=torch.stack(numbers))

        made.validator = trainer.held_out(made, [batch(9, (1, 2))])
        made.validator.most_documents = 2
        return made, batch

    yield built
    destroy_process_group()


def test_nothing_is_compiled_after_the_first_step_of_a_start(build, monkeypatch):
    """Plain objective, memory (with grouped products) and validation, on rows of 1 to 5 documents.

    Micro-batches are views of one buffer, of several sizes, as on an accelerator.
    """
    monkeypatch.setattr(device, "is_host", lambda _: False)
    monkeypatch.setattr(device, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    torch._dynamo.reset()
    counters.clear()
    # The grouped products' shapes are known to the compiler in bfloat16 alone.
    trained, batch = build([*COMPILED, "--training.mixed_precision_param", "bfloat16"], grouped=True)
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
    # First the plain pass and the head's loss; then the inner steps, the outer pass above them, and validation's.
    assert graphs[0] == 2 < after_start
    assert graphs[1:] == [after_start] * 3 and counters["stats"]["unique_graphs"] == after_start
    assert not counters["graph_break"]


def test_compiling_ahead_changes_nothing(build):
    """Weights to the last bit, experts' loads and torch's generator; uncompiled, which takes the same path."""

    def run(ahead):
        trained, batch = build(["--model.name", "llada_moe"])
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
    caplog.set_level("WARNING")  # whatever a command that another test has run has left
    trained, _ = build([], most_documents=None)
    assert trained.objective.slots is None
    (warning,) = [record.message for record in caplog.records if "documents a row holds" in record.message]
    assert warning.startswith("The cards of the shards in data.train do not say") and "prepare the data anew" in warning
