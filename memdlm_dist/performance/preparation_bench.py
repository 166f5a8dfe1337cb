"""Benchmark of the data preparation on one core: throughput, and the share of each stage."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data import tokenizer
from memdlm_dist.data.corpus import Row
from memdlm_dist.data.output import SPLITS
from memdlm_dist.data.preparation import units
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.sequence_builder import SequenceBuilder, batches, training_text
from memdlm_dist.data.preparation.summary import Summary
from memdlm_dist.data.shards import ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime import hub

STAGES = {
    "read": "read and parse rows",
    "tokenise": "text to token ids",
    "build": "choose the split, cut, pad or pack",
    "write": "write shards",
}
_MEGABYTE = 1_000_000


class _StageClock:
    """CPU time of this process by stage; the time of a nested stage counts for that stage alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage: str | None = None
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer = self._stage
        self._switch(stage)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, stage: str | None) -> None:
        now = time.process_time()
        if self._stage is not None:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now


class _ClockedTokenizer(DiffusionTokenizer):
    """Tokenizer that measures its encoding of a corpus."""

    clock: _StageClock

    def encode_arrays(self, texts: Sequence[str], parse_special_tokens: bool = False) -> list[NDArray[np.uint32]]:
        """Encode as the base class does, in the stage "tokenise"."""
        with self.clock("tokenise"):
            return super().encode_arrays(texts, parse_special_tokens)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let the tokenizers library use one thread."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def measure(config: PrepareConfig, megabytes: float) -> dict[str, Any]:
    """Prepare the beginning of a corpus in a temporary folder, and return the numbers of the report.

    Loading or training the tokenizer is not measured. A tokenizer is trained on the text that is measured.

    Args:
        config: settings of the preparation; its output is not used.
        megabytes: least size of the text to prepare in MB of UTF-8; a smaller corpus is prepared as a whole.

    Raises:
        UserError: if the corpus or the tokenizer cannot be used, or the corpus has no text.
    """
    with tempfile.TemporaryDirectory() as folder, _one_thread(), ExitStack() as stack:
        diffusion_tokenizer = _ClockedTokenizer(_tokenizer_folder(config, megabytes, Path(folder, "tokenizer")))
        clock = diffusion_tokenizer.clock = _StageClock()
        card = config.card(diffusion_tokenizer)
        # The tokenizer prepares its tables at the first text.
        diffusion_tokenizer.encode_arrays([""], config.parse_special_tokens)
        clock.seconds["tokenise"] = 0.0
        writers = {split: stack.enter_context(ShardWriter(Path(folder, split), card)) for split in SPLITS}
        summary, size, began = Summary(), 0, time.perf_counter()

        def report(location: str, problem: str) -> None:
            summary.add_bad_row(location, problem)

        builder = SequenceBuilder(config, diffusion_tokenizer, summary, report)

        def write(completed: Iterator[tuple[str, Any]]) -> None:
            with clock("build"):
                for split, sequence in completed:
                    with clock("write"):
                        writers[split].write(sequence)

        pending = batches(_rows(config, summary))
        while size < megabytes * _MEGABYTE:
            with clock("read"):
                batch = next(pending, None)
            if batch is None:
                break
            size += sum(_text_size(row.values) for row in batch)
            write(builder.add(batch))
        write(builder.finish())
        with clock("write"):
            stack.close()
        seconds = time.perf_counter() - began
        sequences = sum(writer.card.sequences for writer in writers.values())
    if not summary.tokens:
        raise UserError("The corpus has no text to measure; check --input.")
    total = sum(clock.seconds.values())
    return {
        "megabytes": size / _MEGABYTE,
        "rows": summary.rows,
        "bad_rows": summary.bad_rows,
        "tokens": summary.tokens,
        "sequences": sequences,
        "seq_len": config.seq_len,
        "vocab_size": card.vocab_size,
        "pack_documents": config.pack_documents,
        "cpu_seconds": clock.seconds,
        "share": {stage: x / total for stage, x in clock.seconds.items()},
        "wall_seconds": seconds,
        "megabytes_per_second": size / _MEGABYTE / total,
    }


def _rows(config: PrepareConfig, summary: Summary) -> Iterator[Row]:
    """Yield the good rows of the corpus, and count all rows."""
    for unit in units.whole(units.sources(config)):
        for row, _ in units.rows(unit):
            summary.rows += 1
            if row.problem is None:
                yield row
            else:
                summary.add_bad_row(row.location, row.problem)


def _tokenizer_folder(config: PrepareConfig, megabytes: float, folder: Path) -> str:
    """Return the folder of the given tokenizer, or train one in `folder`."""
    if config.tokenizer is not None:
        return hub.tokenizer(config.tokenizer)
    assert config.train_tokenizer is not None

    def texts() -> Iterator[str]:
        size = 0
        for row in _rows(config, Summary()):
            if size >= megabytes * _MEGABYTE:
                return
            size += _text_size(row.values)
            yield training_text(row, config)

    tokenizer.train(texts(), config.train_tokenizer, folder)
    return str(folder)


def _text_size(values: Any) -> int:
    """Return the number of bytes in UTF-8 of all text in the values of a row."""
    if isinstance(values, str):
        return len(values.encode(errors="surrogatepass"))
    if isinstance(values, dict | list):
        return sum(map(_text_size, values.values() if isinstance(values, dict) else values))
    return 0


def table(result: dict[str, Any]) -> str:
    """Format the results of `measure` as a table."""
    megabytes, cpu_seconds = result["megabytes"], result["cpu_seconds"]
    lines = [f"{'stage':<10}{'CPU (s)':>10}{'share':>9}{'MB/s':>10}"]
    for stage, seconds in cpu_seconds.items():
        speed = f"{megabytes / seconds:,.1f}" if seconds else "-"
        lines.append(f"{stage:<10}{seconds:>10.2f}{100 * result['share'][stage]:>8.1f}%{speed:>10}  {STAGES[stage]}")
    speed = result["megabytes_per_second"]
    lines.append(f"{'total':<10}{sum(cpu_seconds.values()):>10.2f}{100:>8.1f}%{speed:>10,.1f}")
    lines.append(
        f"{megabytes:,.1f} MB of text, {result['rows']:,} rows ({result['bad_rows']:,} bad), {result['tokens']:,} "
        f"tokens, {result['sequences']:,} sequences; wall-clock time {result['wall_seconds']:.2f} s"
    )
    lines.append(f"a terabyte of such text takes {1e6 / speed / 3600:,.0f} core-hours")
    return "\n".join(lines)
