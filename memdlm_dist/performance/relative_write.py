"""Relative write at several widths: how much fast weights change the linears of a backbone with random weights.

The relative write of a linear is the norm of its fast-weight term divided by the norm of its own output, after the
inner loop, over the tokens of all rows. The law is derived in docs/performance.md.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import require
from memdlm_dist.models import backbone_args
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.models.mixture import MixtureArgs
from memdlm_dist.performance.bench_steps import Bench


def scaled_args(
    config: JobConfig, width: int, layers: int, vocab_size: int | None, init_std: float | None
) -> LLaDAArgs:
    """Return the configured backbone's sizes scaled to a width: FFN, experts, heads.

    Args:
        width: model width.
        layers: number of layers.
        vocab_size: None for the flavour's.
        init_std: standard deviation of the initial weights; None for 1 / sqrt(width).

    Raises:
        UserError: if the width does not scale all sizes to whole numbers.
    """
    args = backbone_args(config.model.name, config.model.flavor)

    def scaled(size: int) -> int:
        require(
            size * width % args.dim == 0,
            f"--widths {width} scales a size of {size} at width {args.dim} to {size * width / args.dim:g}; choose "
            "divisors or multiples of the flavour's width.",
        )
        return size * width // args.dim

    heads = max(1, args.n_heads * width // args.dim)
    changes: dict[str, Any] = {"hidden_dim": scaled(args.hidden_dim)}
    if isinstance(args, MixtureArgs):
        names = ("shared_hidden_dim", "dense_hidden_dim")
        changes |= {name: scaled(getattr(args, name)) for name in names} | {"n_dense_layers": 0}
    return replace(
        args,
        dim=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=max(1, heads * args.n_kv_heads // args.n_heads) if args.n_kv_heads else None,
        vocab_size=vocab_size or args.vocab_size,
        init_std=width**-0.5 if init_std is None else init_std,
        **changes,
    )


def measure(
    config: JobConfig,
    widths: Sequence[int],
    *,
    layers: int = 2,
    vocab_size: int | None = None,
    init_std: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the inner loop on the same random rows at every width; return the numbers of the report.

    torch.distributed must be initialised, with one process.

    Args:
        config: a resolved configuration.
        widths: model widths.
        layers: number of layers.
        vocab_size: None for the flavour's.
        init_std: standard deviation of the initial weights; None for 1 / sqrt(width).
        progress: callback with a line of text for every width.

    Raises:
        UserError: if the backbone cannot be scaled to a width.
    """
    sizes = [scaled_args(config, width, layers, vocab_size, init_std) for width in widths]
    results = []
    for args in sizes:
        progress(f"width {args.dim}")
        results.append(_measure(config, args))
        gc.collect()  # a backbone's autograd hooks hold references to it in cycles
    linears = list(results[0]["linears"])
    by_linear = {name: [x["linears"][name] for x in results] for name in linears}
    return {
        "model": f"{config.model.name} {config.model.flavor}",
        "layers": layers,
        "vocab_size": sizes[0].vocab_size,
        "rows": config.training.local_batch_size,
        "seq_len": config.training.seq_len,
        "widths": results,
        "exponents": {
            name: exponent(widths, values)
            for name, values in {**by_linear, "mean": [x["mean"] for x in results]}.items()
        },
    }


def _measure(config: JobConfig, args: LLaDAArgs) -> dict[str, Any]:
    """Return the relative write of each kind of linear, and norms of the inner loop, medians over the sets."""
    bench = Bench.build(config, args=args)
    memory = bench.objective.memory
    assert memory is not None
    with torch.no_grad():  # the inner loop enables gradients for itself
        _, statistics = bench.loss_sum("ours", bench.batch(0), 0)
    assert statistics.write_X2 is not None
    writes: dict[str, list[float]] = {}
    for linear, (term, own) in zip(memory.linears, statistics.write_X2.tolist(), strict=True):
        writes.setdefault(linear.target, []).append(math.sqrt(term / own) if own else 0.0)
    every = [write for of_layers in writes.values() for write in of_layers]
    return {
        "width": args.dim,
        "init_std": args.init_std,
        "linears": {target: sum(of_layers) / len(of_layers) for target, of_layers in writes.items()},
        "mean": sum(every) / len(every),
        "gradient_norms": statistics.grad_norm_KG.median(1).values.tolist(),
        "change": statistics.written_norm_G.median().item(),
    }


def exponent(widths: Sequence[int], values: Sequence[float]) -> float | None:
    """Return p of the power law value ~ width^p, by least squares of the logarithms; None without two widths."""
    if len(set(widths)) < 2 or min(values) <= 0:
        return None
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (widths, values))
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def table(result: dict[str, Any]) -> str:
    """Format the results of `measure` as a table."""
    exponents = result["exponents"]
    steps = len(result["widths"][0]["gradient_norms"])
    lines = [
        f"{'width':>9}{'init std':>10}"
        + "".join(f"{name:>13}" for name in (*exponents, *(f"gradient {k + 1}" for k in range(steps)), "change"))
    ]
    for x in result["widths"]:
        writes = [*x["linears"].values(), x["mean"]]
        lines.append(
            f"{x['width']:>9,}{x['init_std']:>10.4f}"
            + "".join(f"{write:>13.2%}" for write in writes)
            + "".join(f"{norm:>13.3f}" for norm in (*x["gradient_norms"], x["change"]))
        )
    if None not in exponents.values():
        lines.append(f"{'exponent':>9}{'':>10}" + "".join(f"{p:>13.2f}" for p in exponents.values()))
    lines += [
        f"{result['model']} scaled to each width, {result['layers']} layers, vocabulary {result['vocab_size']:,}; "
        f"{result['rows']} rows of {result['seq_len']} random tokens",
        "gradient k: norm of a set's gradient in inner step k, before clipping; change: norm of its total change",
        "both are medians over the sets",
    ]
    return "\n".join(lines)
