"""Measure time, memory and communication of plain masked diffusion, straightforward MemDLM and this implementation.

Examples:
  # All three kinds of step with train_configs/bench_cpu.toml
  python tools/bench.py
  # Another training configuration, with a changed key
  python tools/bench.py train_configs/debug.toml --rounds 3 --training.local_batch_size 2
  # Our step on fine-tuning rows of mixed lengths
  python tools/bench.py --mix --rounds 4
  # Plain and ours at several row lengths
  python tools/bench.py train_configs/debug.toml --rounds 2 --lengths 128 256 512
  # What parametric_memory.probability saves, with either unit
  python tools/bench.py --probabilities 0 0.25 0.5 1

CONFIG.toml is a training configuration (default: train_configs/bench_cpu.toml). The bench uses the configured
backbone, batch, layout, precision, activation checkpointing and compilation; weights and tokens are random. A step is
forward pass, backward pass, clipping and optimizer. Each round takes one step of each kind on the same batch. A ratio
is computed within each round; the table shows its median over the rounds. The straightforward step is implemented in
memdlm_dist/performance/straightforward.py. The memory trains in every step and with all samples, except with
--probabilities.

With --probabilities a round takes several steps at each probability and with each unit, on the same tokens. In each
round the share of samples that train with the memory equals the probability. The table has, in columns: seconds of a
step; its ratio to plain; this ratio by FLOPs, on the mean and on the slowest rank; the share of the rows that the inner
loop reads on the slowest rank, in these steps and expected; and the data-parallel all-gathers of a step.

The command starts its own processes; under torchrun it runs as one rank. Override configuration keys with
--section.key value.

bench.py decode measures decoding instead, bench.py prepare the data preparation, and bench.py write how much the memory
changes backbones of several widths; each has its own --help.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import check_layout, launch, parse_config
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.errors import UserError
from memdlm_dist.inference import decode_bench
from memdlm_dist.inference.decoding import Cache
from memdlm_dist.inference.memory_arguments import add_memory_arguments, get_memory
from memdlm_dist.inference.model_arguments import add_model_arguments, load_model
from memdlm_dist.models import backbone_args
from memdlm_dist.performance import preparation_bench, relative_write
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.length_mix import measure_mix, table_of_mix
from memdlm_dist.performance.measure import measure, say, sweep, table, table_of_lengths
from memdlm_dist.performance.probability_bench import (
    LARGEST_DENOMINATOR,
    measure_probabilities,
    table_of_probabilities,
)
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, positive, positive_number
from memdlm_dist.runtime.process_environment import set_process_environment
from memdlm_dist.runtime.process_group import Processes, launched_processes
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.runtime.single_process import single_process_environment

DEFAULT_CONFIG = Path(__file__).parent.parent / "train_configs/bench_cpu.toml"

DECODE = """Measure the speed of decoding with caches and a confidence threshold, memory off and on.

Examples:
  # The quickstart's model, after bash launch/quickstart.sh
  python tools/bench.py decode train_configs/quickstart.toml
  # Random weights of the same sizes, which tools/random_weights.py has written
  python tools/bench.py decode train_configs/quickstart.toml --checkpoint outputs/random
  # Fewer settings and a longer prompt
  python tools/bench.py decode train_configs/quickstart.toml --cache dual --memory off --prompt-tokens 4096

CONFIG is the configuration of the run that trained the model. The prompts are the text of data.validation, or the
Python standard library's sources if that is empty. In each round every setting decodes the same prompts. Ratios are
computed within a round; the table shows their medians. Each setting is compared with the plain loop, which reads whole
rows in every step and keeps one token per step: time, forward passes, and the share of equal tokens. With random
weights the share says little.

The command runs in one process. Start it under torchrun to use the configuration's layout; then each data-parallel rank
decodes --batch-size prompts. Override configuration keys with --section.key value.
"""


PREPARE = """Measure the speed of the data preparation on one core: read, tokenise, build rows, write shards.

Examples:
  # The Python standard library's sources
  python tools/bench.py prepare
  # A corpus, its tokenizer and its row length
  python tools/bench.py prepare --input corpus.jsonl --tokenizer data/corpus/tokenizer --seq-len 32768 --pack-documents

The command prepares the beginning of the corpus in a temporary folder, in one thread. Times are CPU times of the
process; they do not contain the loading or training of the tokenizer. MB/s count the bytes of the rows' text in UTF-8.
"""

WRITE = """Measure the relative write of the inner loop at several widths, on random weights and tokens.

Examples:
  # The quickstart's proportions, which are those of LLaDA-8B
  python tools/bench.py write --widths 128 256 512 1024
  # Initial weights with the same standard deviation at every width
  python tools/bench.py write --widths 128 256 512 1024 --init-std 0.02
  # Another configuration, and updates that are always clipped: steps of 0.1 for every fast tensor
  python tools/bench.py write train_configs/debug.toml --parametric_memory.gradient_clip 1e-6 \\
      --parametric_memory.learning_rate 1e5

CONFIG is a training configuration (default: train_configs/quickstart.toml). Its backbone is scaled to each width, with
the proportions of FFN, experts and heads kept. The relative write of a linear is the norm of its fast-weight term
divided by the norm of its own output. All widths read the same rows. The table ends with the exponent p of the power
law width^p. Training logs the relative write of trained weights as parametric_memory/relative_write.

The command runs in one process. Override configuration keys with --section.key value.
"""


def run(options: argparse.Namespace, argv: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the bench on this rank and return its exit status; rank 0 prints the table and writes the JSON file.

    Raises:
        UserError: if the configuration cannot be measured.
    """
    config = _configuration(options.config, overrides, launched_processes())
    device_module().set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device_type() == "cpu" else None)
    result = {"config": str(options.config), "overrides": list(overrides), "layers": options.layers}
    if options.lengths:
        result["lengths"] = sweep(config, options.lengths, options.rounds, options.warm_up, options.layers)
        text = table_of_lengths(result["lengths"])
    elif options.mix:
        result |= measure_mix(config, options.rounds, options.warm_up, options.layers)
        text = table_of_mix(result)
    elif options.probabilities:
        bench = Bench.build(config, options.layers)
        result |= measure_probabilities(bench, options.probabilities, options.rounds, options.warm_up)
        text = table_of_probabilities(result)
    else:
        bench = Bench.build(config, options.layers)
        result |= measure(bench, options.rounds, options.warm_up, options.profile)
        text = table(result)
    if is_rank_0():
        _write(text, result, options.json)
    dist.destroy_process_group()
    return 0


def probability(text: str) -> float:
    """Parse a multiple of 1 / n from 0 to 1, n <= `LARGEST_DENOMINATOR` (argparse type).

    Raises:
        ValueError: if the text is no such number.
    """
    try:
        exact = Fraction(text)
    except ZeroDivisionError:
        raise ValueError from None
    if not 0 <= exact <= 1 or exact.denominator > LARGEST_DENOMINATOR:
        raise ValueError
    return float(exact)


def _check_output(path: str | None) -> None:
    """Raise a UserError if the file cannot be written; create its folder."""
    try:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another file.") from None


def _configuration(path: Path, overrides: Sequence[str], processes: Processes, length: int | None = None) -> JobConfig:
    """Return the configuration to measure, checked against the device and the backbone.

    Args:
        length: overrides training.seq_len.
    """
    config = parse_config.parse(["--job.config_file", str(path), *overrides])
    config.training.seq_len = length or config.training.seq_len
    config.parametric_memory.probability = 1.0  # the memory trains in every step and with all samples
    config = launch.resolve(config, *processes)
    check_layout.check_device(config, device_type())
    args = backbone_args(config.model.name, config.model.flavor)
    check_layout.check_backbone(config, args)
    if not config.parametric_memory.enable:
        raise UserError("parametric_memory.enable is false, so the bench has nothing to compare; set it to true.")
    return config


def parser() -> argparse.ArgumentParser:
    """Return the parser of the bench's options; CONFIG.toml comes before them."""
    p = new_parser("bench.py", __doc__)
    p.usage, p.allow_abbrev = "bench.py [CONFIG.toml] [options] [--section.key value ...]", False

    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--rounds", type=positive, default=7, metavar="N", help="measured rounds (default: 7)")
    sampling.add_argument(
        "--warm-up", type=positive, default=2, metavar="N", help="rounds before the measured ones (default: 2)"
    )
    rows = sampling.add_mutually_exclusive_group()
    rows.add_argument(
        "--lengths", type=positive, nargs="+", metavar="N",
        help="row lengths in tokens; measures plain and ours at each (default: all three kinds at training.seq_len)",
    )  # fmt: skip
    rows.add_argument(
        "--mix",
        action="store_true",
        help="measure our step on fine-tuning rows of mixed lengths, as in LongAlpaca: padded to training.seq_len, in "
        "buckets, and grouped by length",
    )
    rows.add_argument(
        "--probabilities", type=probability, nargs="+", metavar="P",
        help="values of parametric_memory.probability, such as 0 0.25 0.5 1 (multiples of 1/n, n up to "
        f"{LARGEST_DENOMINATOR}); measures plain and ours at each, with both values of probability_unit",
    )  # fmt: skip
    model = p.add_argument_group("model")
    model.add_argument("--layers", type=positive, metavar="N", help="number of layers (default: the flavour's)")
    hardware = p.add_argument_group("hardware")
    hardware.add_argument(
        "--processes", type=positive, metavar="N", help="number of processes (default: all accelerators, or 2 on a CPU)"
    )
    output = p.add_argument_group("output")
    output.add_argument(
        "--json", default="outputs/bench.json", metavar="FILE",
        help="file for the numbers; '' writes none (default: outputs/bench.json)",
    )  # fmt: skip
    output.add_argument(
        "--profile", metavar="FILE", help="file for a table of one step's operators or kernels (default: none)"
    )
    return p


def decode_parser() -> argparse.ArgumentParser:
    """Return the parser of `bench.py decode`."""
    p = new_parser("bench.py decode", DECODE)
    p.usage = "bench.py decode CONFIG [options] [--section.key value ...]"
    add_model_arguments(p)
    add_memory_arguments(p, decodes=False)
    decoding = p.add_argument_group("decoding")
    decoding.add_argument(
        "--prompt-tokens", type=positive, default=1024, metavar="N", help="tokens of a prompt (default: 1024)"
    )
    decoding.add_argument(
        "--new-tokens", type=positive, default=128, metavar="N", help="tokens to decode per prompt (default: 128)"
    )
    decoding.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="prompts per data-parallel rank (default: 1)"
    )
    decoding.add_argument(
        "--block-size", type=positive, default=32, metavar="N", help="block size in tokens (default: 32)"
    )
    decoding.add_argument(
        "--cache", choices=get_args(Cache), nargs="+", default=get_args(Cache),
        help="caches to compare with none, see generate.py --help (default: all)",
    )  # fmt: skip
    decoding.add_argument(
        "--threshold", type=float, default=0.9, metavar="P",
        help="confidence threshold that is compared with one token per step (default: 0.9)",
    )  # fmt: skip
    decoding.add_argument(
        "--memory", choices=("off", "on"), nargs="+", default=("off", "on"),
        help="memory settings to measure (default: both)",
    )  # fmt: skip
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--rounds", type=positive, default=3, metavar="N", help="measured rounds (default: 3)")
    output = p.add_argument_group("output")
    output.add_argument(
        "--json", default="outputs/bench_decode.json", metavar="FILE",
        help="file for the numbers; '' writes none (default: outputs/bench_decode.json)",
    )  # fmt: skip
    return p


def decode(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the bench of decoding and return its exit status; rank 0 prints the table and writes the JSON file.

    Raises:
        UserError: if a value is out of range, or if the model or the data does not fit.
    """
    chosen = decode_bench.settings(options.cache, options.threshold, [x == "on" for x in dict.fromkeys(options.memory)])
    if is_rank_0():
        _check_output(options.json)
    with load_model(options, overrides, options.checkpoint) as model:
        config = parse_config.parse(["--job.config_file", options.config, *overrides])
        prompts = decode_bench.prompts(
            config, model, options.batch_size * model.data_parallel.dp_size, options.prompt_tokens
        )
        result = {"config": options.config, "overrides": list(overrides), "checkpoint": model.checkpoint}
        result |= decode_bench.measure(
            model, prompts, chosen, new_tokens=options.new_tokens, block_size=options.block_size,
            rounds=options.rounds, memory=get_memory(options), progress=say,
        )  # fmt: skip
        if is_rank_0():
            _write(decode_bench.table(result), result, options.json)
    return 0


def prepare_parser() -> argparse.ArgumentParser:
    """Return the parser of `bench.py prepare`."""
    p = new_parser("bench.py prepare", PREPARE)
    data = p.add_argument_group("data")
    data.add_argument(
        "--input", nargs="+", default=(), metavar="PATH",
        help="JSONL or Parquet files, folders, patterns or URLs (default: the Python standard library's sources)",
    )  # fmt: skip
    data.add_argument(
        "--megabytes", type=positive_number, default=10.0, metavar="X",
        help="least size of the text to prepare, in MB (default: 10)",
    )  # fmt: skip
    tokens = p.add_argument_group("tokenizer").add_mutually_exclusive_group()
    tokens.add_argument(
        "--tokenizer", metavar="DIR", help="folder of a tokenizer that prepare_data.py wrote (default: train one)"
    )
    tokens.add_argument(
        "--train-tokenizer", type=positive, default=32768, metavar="SIZE",
        help="train a byte-level BPE tokenizer of SIZE tokens on the same text (default: 32768)",
    )  # fmt: skip
    layout = p.add_argument_group("layout")
    layout.add_argument(
        "--seq-len", type=positive, default=4096, metavar="N", help="row length in tokens (default: 4096)"
    )
    layout.add_argument(
        "--pack-documents", action="store_true", help="pack whole documents (default: documents concatenated and cut)"
    )
    output = p.add_argument_group("output")
    output.add_argument(
        "--json", default="outputs/bench_prepare.json", metavar="FILE",
        help="file for the numbers; '' writes none (default: outputs/bench_prepare.json)",
    )  # fmt: skip
    return p


def prepare(options: argparse.Namespace) -> int:
    """Run the bench of the preparation and return its exit status; print the table and write the JSON file.

    Raises:
        UserError: if a value is out of range, or if corpus or tokenizer cannot be used.
    """
    config = PrepareConfig(
        output="",
        seq_len=options.seq_len,
        inputs=tuple(options.input),
        tokenizer=options.tokenizer,
        train_tokenizer=None if options.tokenizer else options.train_tokenizer,
        pack_documents=options.pack_documents,
    )
    config.check()
    _check_output(options.json)
    result = preparation_bench.measure(config, options.megabytes)
    result |= {"input": list(config.inputs), "tokenizer": config.tokenizer}
    _write(preparation_bench.table(result), result, options.json)
    return 0


def write_parser() -> argparse.ArgumentParser:
    """Return the parser of `bench.py write`; CONFIG.toml comes before the options."""
    p = new_parser("bench.py write", WRITE)
    p.usage, p.allow_abbrev = "bench.py write [CONFIG.toml] [options] [--section.key value ...]", False
    model = p.add_argument_group("model")
    model.add_argument(
        "--widths", type=positive, nargs="+", default=[128, 256, 512], metavar="N",
        help="widths of the backbone (default: 128 256 512)",
    )  # fmt: skip
    model.add_argument("--layers", type=positive, default=2, metavar="N", help="number of layers (default: 2)")
    model.add_argument(
        "--vocab-size", type=positive, metavar="N", help="size of the vocabulary (default: the flavour's)"
    )
    model.add_argument(
        "--init-std", type=positive_number, metavar="X",
        help="standard deviation of the initial weights (default: 1 / sqrt(width))",
    )  # fmt: skip
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--rows", type=positive, default=32, metavar="N", help="rows (default: 32)")
    output = p.add_argument_group("output")
    output.add_argument(
        "--json", default="outputs/bench_write.json", metavar="FILE",
        help="file for the numbers; '' writes none (default: outputs/bench_write.json)",
    )  # fmt: skip
    return p


def write(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the bench of the relative write and return its exit status; print the table and write the JSON file.

    Raises:
        UserError: if a value is out of range, or if the backbone cannot be scaled to a width.
    """
    rows = ["--training.local_batch_size", str(options.rows), "--training.global_batch_size", str(options.rows)]
    config = _configuration(options.config, [*rows, *overrides], Processes(1, 1))
    _check_output(options.json)
    single_process_environment()
    dist.init_process_group("gloo" if device_type() == "cpu" else None)
    result = {"config": str(options.config), "overrides": list(overrides)}
    result |= relative_write.measure(
        config, options.widths, layers=options.layers, vocab_size=options.vocab_size, init_std=options.init_std,
        progress=say,
    )  # fmt: skip
    dist.destroy_process_group()
    _write(relative_write.table(result), result, options.json)
    return 0


def _write(text: str, result: dict[str, Any], path: str | None) -> None:
    """Print a table and write its numbers to a JSON file."""
    print(text, flush=True)
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(f"Written to {path}.", flush=True)


def _options(
    parser: argparse.ArgumentParser, argv: Sequence[str], default: Path
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into the bench's options and the configuration's overrides.

    Args:
        default: configuration file of a command line that names none.
    """
    # Only the first argument can be the file: a later word may be the value of a configuration key.
    leading = [Path(argument) for argument in argv[:1] if not argument.startswith("-")]
    options, overrides = parser.parse_known_args(argv[len(leading) :])
    options.config = leading[0] if leading else default
    return options, overrides


def start(options: argparse.Namespace, argv: Sequence[str], overrides: Sequence[str]) -> int:
    """Check configuration and output files, start the ranks with torchrun, and return the exit status."""
    if options.profile and (options.mix or options.lengths or options.probabilities):
        raise UserError("--profile profiles a step of `ours` alone; omit it with --mix, --lengths and --probabilities.")
    processes = options.processes or torch.accelerator.device_count() or 2
    for length in options.lengths or [None]:
        _configuration(options.config, overrides, Processes(processes, processes), length)
    _check_output(options.json)
    _check_output(options.profile)
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--local-ranks-filter=0", __file__, *argv,
    ]  # fmt: skip
    set_process_environment(processes)
    return subprocess.run(command).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; without torchrun's environment, start the ranks of steps first."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["decode"]:
        options, overrides = parse_with_overrides(decode_parser(), argv[1:])
        return guarded(lambda: decode(options, overrides))
    if argv[:1] == ["prepare"]:
        options = prepare_parser().parse_args(argv[1:])
        return guarded(lambda: prepare(options))
    if argv[:1] == ["write"]:
        options, overrides = _options(write_parser(), argv[1:], DEFAULT_CONFIG.parent / "quickstart.toml")
        return guarded(lambda: write(options, overrides))
    options, overrides = _options(parser(), argv, DEFAULT_CONFIG)
    if "RANK" not in os.environ:
        return guarded(lambda: start(options, argv, overrides))
    # Only rank 0's output is shown. record() writes another rank's exception to torchrun's error file; torchrun prints
    # it at the end.
    return guarded(lambda: record(run)(options, argv, overrides) or 0)


if __name__ == "__main__":
    sys.exit(main())
