"""Plain masked diffusion, straightforward MemDLM and ours, in turn on one sharded model: time, memory, communication.

    python tools/bench.py [CONFIG.toml] [options] [--section.key value ...]

CONFIG.toml is a training configuration (default: train_configs/bench_cpu.toml); its backbone, batch, layout,
precision, checkpointing and compilation are measured, on random weights and tokens. A step is forward, backward,
clipping and optimizer. Each round takes one step of each kind on the same batch; a ratio is the median over the
rounds of the ratio within a round. The straightforward step is that of tests/straightforward.py.

Starts its own processes; under torchrun it is one of them.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]

import straightforward  # noqa: E402
from collectives import Collectives, by_kind  # noqa: E402
from torchtitan.components.optimizer import build_optimizers  # noqa: E402
from torchtitan.config import TORCH_DTYPE_MAP  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.tools.utils import device_module, device_type, get_peak_flops, set_default_dtype  # noqa: E402

from memdlm_dist import bilevel, fast_weights, parse_config  # noqa: E402
from memdlm_dist.errors import EXIT_STATUS, UserError  # noqa: E402
from memdlm_dist.flops import Recomputation, step_flops  # noqa: E402
from memdlm_dist.models import BACKBONES, backbone_args  # noqa: E402
from memdlm_dist.models.llada import LLaDA, LLaDAArgs  # noqa: E402
from memdlm_dist.models.parallelize import parallelize_llada  # noqa: E402
from memdlm_dist.objective import Objective, build_objective  # noqa: E402
from memdlm_dist.trajectory import MicroBatch  # noqa: E402

DEFAULT_CONFIG = ROOT / "train_configs/bench_cpu.toml"
KINDS = ("plain", "straightforward", "ours")
DATA_PARALLEL = ("dp_replicate", "fsdp")  # dimensions of the mesh over which FSDP2 communicates
_SEED = 0


@dataclass
class Bench:
    """A sharded backbone with everything a step needs, of which three kinds can be taken."""

    config: Any
    args: LLaDAArgs
    dims: ParallelDims
    model: LLaDA
    objective: Objective
    flops_per_token: float  # of plain training, as torchtitan counts them
    autocast: Any  # as torchtitan's trainer has it

    @classmethod
    def build(cls, config: Any, layers: int | None = None) -> "Bench":
        """On all processes, which torch.distributed knows."""
        parallel = config.parallelism
        dims = ParallelDims(
            dp_replicate=parallel.data_parallel_replicate_degree,
            dp_shard=parallel.data_parallel_shard_degree,
            cp=1,
            tp=parallel.tensor_parallel_degree,
            pp=1,
            ep=1,
            etp=1,
            world_size=dist.get_world_size(),
        )
        dims.build_mesh()
        args = backbone_args(config.model.name, config.model.flavor)
        args = replace(args, n_layers=layers or args.n_layers)
        args.update_from_config(config)
        torch.manual_seed(_SEED)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = BACKBONES[config.model.name][0](args)
        _, flops = args.get_nparams_and_flops(model, config.training.seq_len)
        model = parallelize_llada(model, dims, config)
        model.to_empty(device=device_type)
        with torch.no_grad():
            model.init_weights()
        objective = build_objective(config, args, args.vocab_size - 1, dims)
        autocast = dist_utils.maybe_enable_amp(dims, config.training.mixed_precision_param, device_type)
        return cls(config, args, dims, model, objective, flops, autocast)

    def batch(self, number: int) -> MicroBatch:
        """Random tokens with their noise; the same on the ranks of a tensor-parallel group."""
        training = self.config.training
        mesh = self.dims.get_optional_mesh("batch")
        ids = torch.arange(training.local_batch_size) + training.local_batch_size * (
            mesh.get_local_rank() if mesh is not None else 0
        )
        generator = torch.Generator().manual_seed(int(ids[0]) + 1_000_003 * number)
        shape = (training.local_batch_size, training.seq_len)
        tokens = torch.randint(0, self.args.vocab_size - 1, shape, generator=generator)
        return self.objective.micro_batch(tokens, tokens, ids, step=number).to(device_type)

    def loss_sum(self, kind: str, batch: MicroBatch, step: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Any]:
        """The outer loss by one of the three `KINDS` of step, and the inner loop's statistics.

        Args:
            dtype: of the fast weights, if not as drawn.
        """
        memory = self.objective.memory
        assert memory is not None
        run = straightforward.outer_loss if kind == "straightforward" else bilevel.outer_loss
        shard = self.objective.shard
        with self.autocast:
            if kind == "plain":
                return run(self.model, batch, None, None, shard)
            fast = memory.draw(_SEED, step, batch.sample_ids_B)
            if dtype is not None:
                fast = fast_weights.map_leaves(lambda x: x.to(dtype), fast)
            return run(self.model, batch, memory, fast, shard)

    def groups(self, *names: str) -> list[dist.ProcessGroup]:
        """Process groups of the mesh's dimensions, as far as they exist."""
        meshes = (self.dims.get_optional_mesh(name) for name in names)
        return [mesh.get_group() for mesh in meshes if mesh is not None]

    def collectives(self, kind: str, number: int = 0) -> Collectives:
        """Those of one forward and backward pass."""
        batch = self.batch(number)
        # A compiled block would hide its collectives.
        with torch.compiler.set_stance("force_eager"), Collectives() as counted:
            self.loss_sum(kind, batch, number)[0].backward()
        self.model.zero_grad()
        return counted


def measure(bench: Bench, rounds: int, warm_up: int, profile: str | None) -> dict[str, Any]:
    """Everything that is reported, on every rank."""
    config = bench.config
    optimizer = build_optimizers([bench.model], config.optimizer, bench.dims)
    parameters = list(bench.model.parameters())

    def step(kind: str, number: int, batch: MicroBatch) -> None:
        loss, _ = bench.loss_sum(kind, batch, number)
        (loss / batch.maskable).backward()
        dist_utils.clip_grad_norm_(parameters, config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    flops: dict[str, list[float]] = {"outer": [], "inner": []}
    recomputation = Recomputation(config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option)
    for number in range(warm_up + rounds):
        batch = bench.batch(number)
        for place in range(len(KINDS)):
            kind = KINDS[(place + number) % len(KINDS)]
            taken = _timed(partial(step, kind, number, batch))
            if number >= warm_up:
                seconds[kind].append(taken)
        if number >= warm_up:
            of_step = step_flops(bench.args, batch, bench.objective.memory, recomputation)
            flops["outer"].append(of_step.outer)
            flops["inner"].append(of_step.inner)
        _say(f"round {number + 1} of {warm_up + rounds}" + (" (warm-up)" if number < warm_up else ""))

    counted = {kind: bench.collectives(kind) for kind in KINDS}
    data_parallel = {kind: by_kind(found.on(*bench.groups(*DATA_PARALLEL))) for kind, found in counted.items()}
    tensor_parallel = {kind: by_kind(found.on(*bench.groups("tp"))) for kind, found in counted.items()}
    memory = _peaks(lambda kind: step(kind, 0, bench.batch(0)))
    if profile is not None:
        _profile(lambda: step("ours", 0, bench.batch(0)), profile)

    def by_kind_of_step(value: Callable[[str], Any]) -> dict[str, Any]:
        return {kind: value(kind) for kind in KINDS}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    tokens = config.training.local_batch_size * config.training.seq_len  # of a data-parallel rank
    replicas = bench.dims.dp_replicate * bench.dims.dp_shard
    peak = get_peak_flops(device_module.get_device_name()) if device_type != "cpu" else None
    model_flops = bench.flops_per_token * tokens
    return {
        "device": device_module.get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "rounds": rounds,
        "step_seconds": median,
        "step_seconds_range": by_kind_of_step(lambda kind: [min(seconds[kind]), max(seconds[kind])]),
        "ratio": {
            "ours_over_plain": ratio("ours", "plain"),
            "straightforward_over_plain": ratio("straightforward", "plain"),
            "ours_over_straightforward": ratio("ours", "straightforward"),
        },
        "tokens_per_second": by_kind_of_step(lambda kind: tokens * replicas / median[kind]),
        "all_gathers": by_kind_of_step(lambda kind: data_parallel[kind]["all_gather"]),
        "reduce_scatters": by_kind_of_step(lambda kind: data_parallel[kind]["reduce_scatter"]),
        "all_reduces": by_kind_of_step(lambda kind: data_parallel[kind]["all_reduce"]),
        "tensor_parallel_collectives": by_kind_of_step(lambda kind: dict(tensor_parallel[kind])),
        "peak_bytes": by_kind_of_step(lambda kind: memory[kind][0]),
        "peak_bytes_within_step": by_kind_of_step(lambda kind: memory[kind][1]),
        "flops": {
            "model": model_flops,
            "hardware_outer": statistics.median(flops["outer"]),
            "hardware_inner": statistics.median(flops["inner"]),
        },
        "hardware_flops_ratio": statistics.median(
            (a + b) / a for a, b in zip(flops["outer"], flops["inner"], strict=True)
        ),
        "mfu": by_kind_of_step(
            lambda kind: None if peak is None else model_flops / bench.dims.tp / median[kind] / peak
        ),
    }


def _timed(run: Callable[[], None]) -> float:
    dist.barrier()
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    dist.barrier()
    return time.perf_counter() - began


def _synchronise() -> None:
    if device_type != "cpu":
        device_module.synchronize()


def _peaks(step: Callable[[str], None]) -> dict[str, tuple[int, int]]:
    """Per kind of step: the largest memory of any rank in it, and how much of that came on top of what was there."""
    peaks = {}
    for kind in KINDS:
        gc.collect()
        before = _start_peak()
        step(kind)
        _synchronise()
        pair = torch.tensor([_peak(), _peak() - before], device=device_type)
        dist.all_reduce(pair, dist.ReduceOp.MAX)
        peaks[kind] = cast(tuple[int, int], tuple(pair.tolist()))
    return peaks


def _start_peak() -> int:
    """Forget the peak so far; returns what is in use."""
    if device_type != "cpu":
        device_module.empty_cache()
        device_module.reset_peak_memory_stats()
        return device_module.memory_allocated()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc: give every freed block of 64 KiB or more back at once, so that what is resident is what is used.
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2**16))
        libc.malloc_trim(ctypes.c_size_t(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if device_type == "cpu" else device_module.max_memory_allocated()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _profile(run: Callable[[], None], path: str) -> None:
    """Write a table of one step's operators, or kernels, by the time they take."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        _synchronise()
    order = f"self_{device_type}_time_total"
    if dist.get_rank() == 0:
        Path(path).write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    seconds, spread = result["step_seconds"], result["step_seconds_range"]
    shares = {"plain": 1.0} | {kind: result["ratio"][f"{kind}_over_plain"] for kind in KINDS[1:]}
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("step, median (s)", lambda kind: f"{seconds[kind]:.3f}"),
        ("  fastest to slowest", lambda kind: f"{spread[kind][0]:.3f} to {spread[kind][1]:.3f}"),
        ("  over plain", lambda kind: f"{shares[kind]:.3f}"),
        ("tokens/s", lambda kind: f"{result['tokens_per_second'][kind]:,.0f}"),
        ("peak memory of a rank (MiB)", lambda kind: f"{result['peak_bytes'][kind] / 2**20:,.0f}"),
        ("  of it, within the step", lambda kind: f"{result['peak_bytes_within_step'][kind] / 2**20:,.0f}"),
        ("data-parallel all-gathers", lambda kind: str(result["all_gathers"][kind])),
        ("data-parallel reduce-scatters", lambda kind: str(result["reduce_scatters"][kind])),
        ("data-parallel all-reduces", lambda kind: str(result["all_reduces"][kind])),
        ("tensor-parallel collectives", lambda kind: str(sum(result["tensor_parallel_collectives"][kind].values()))),
    ]
    if result["mfu"]["plain"] is not None:
        rows.append(("MFU, by plain model FLOPs (%)", lambda kind: f"{100 * result['mfu'][kind]:.1f}"))
    lines = [f"{'':<32}" + "".join(f"{kind:>18}" for kind in KINDS)]
    lines += [f"{name:<32}" + "".join(f"{value(kind):>18}" for kind in KINDS) for name, value in rows]
    flops = result["flops"]
    lines.append(
        f"TFLOP a micro-batch: model {flops['model'] / 1e12:.3f}; hardware {flops['hardware_outer'] / 1e12:.3f}, "
        f"and for the inner loop {flops['hardware_inner'] / 1e12:.3f}: x {result['hardware_flops_ratio']:.3f}"
    )
    lines.append(f"ours over straightforward: {result['ratio']['ours_over_straightforward']:.3f}")
    return "\n".join(lines)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One rank's part.

    Raises:
        UserError: for a configuration that cannot be measured.
    """
    config = _configuration(options.config, overrides, int(os.environ["WORLD_SIZE"]))
    device_module.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device_type == "cpu" else None)
    result = measure(Bench.build(config, options.layers), options.rounds, options.warm_up, options.profile)
    result = {"config": str(options.config), "overrides": list(overrides), "layers": options.layers, **result}
    if dist.get_rank() == 0:
        print(table(result), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"Written to {options.json}.", flush=True)
    dist.destroy_process_group()


def _check_output(path: str | None) -> None:
    """A file can be written there; makes its folder."""
    try:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another file.") from None


def _configuration(path: Path, overrides: Sequence[str], world_size: int) -> Any:
    config = parse_config.parse(["--job.config_file", str(path), *overrides])
    parse_config.check_launch(config, world_size)
    args = backbone_args(config.model.name, config.model.flavor)
    parse_config.check_backbone(config, args)
    if not config.parametric_memory.enable:
        raise UserError("parametric_memory.enable is false, so there is nothing to compare; set it to true.")
    return config


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        usage="bench.py [CONFIG.toml] [options] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The file comes first, or the value of a configuration's key could be taken for it.
    given = [Path(argument) for argument in argv[:1] if not argument.startswith("-")]
    parser.set_defaults(config=given[0] if given else DEFAULT_CONFIG)

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    parser.add_argument("--rounds", type=positive, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--warm-up", type=positive, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--layers", type=positive, help="number of layers, if not the flavour's")
    parser.add_argument("--processes", type=positive, help="default: all accelerators, or 2 without any")
    parser.add_argument("--json", default="outputs/bench.json", help="default: outputs/bench.json; '' writes none")
    parser.add_argument("--profile", metavar="FILE", help="also write a table of one step's operators or kernels")
    return parser.parse_known_args(argv[len(given) :])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options, overrides = _options(argv)
    try:
        if "RANK" in os.environ:
            run(options, overrides)
            return 0
        processes = options.processes or torch.accelerator.device_count() or 2
        # Mistakes are found here, before anything is started.
        _configuration(options.config, overrides, processes)
        _check_output(options.json)
        _check_output(options.profile)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return EXIT_STATUS
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--local-ranks-filter=0", __file__, *argv,
    ]  # fmt: skip
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main())
