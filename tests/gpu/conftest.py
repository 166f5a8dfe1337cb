"""Marks this folder's tests `gpu` and skips them on machines without an accelerator."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from memdlm_dist.runtime.device import device_module, device_type, has_accelerator


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def device():
    """Return the accelerator with TF32 off, in child processes as well."""
    if not has_accelerator():
        _explain_absence()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0")
        environment.setenv("NVIDIA_TF32_OVERRIDE", "0")
        yield torch.device(device_type())
    torch.set_float32_matmul_precision(before)


def _explain_absence() -> None:
    """Skip without an accelerator; fail if the machine has one that torch does not find."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has no accelerator")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("CUDA_VISIBLE_DEVICES hides the accelerators; -m gpu alone leaves them visible")
    reason = "torch is a build for CPUs; install one for CUDA" if torch.version.cuda is None else "check the driver"
    pytest.fail(f"torch {torch.__version__} finds no accelerator, but this machine has one: {reason}", pytrace=False)


@pytest.fixture(scope="session")
def compiler(device: torch.device) -> None:
    """Fail without a C compiler and Python headers, which all Triton kernels need.

    Inductor, flex attention and torchtitan use Triton.
    """
    c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    for present, missing in ((c_compiler, "a C compiler (CC, gcc or clang)"), (headers.is_file(), f"{headers}")):
        if not present:
            pytest.fail(f"Triton needs {missing}: install gcc and Python's development package", pytrace=False)


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip(f"torch has this for CUDA alone, and this machine has {device.type}")
    return device


@pytest.fixture(scope="module")
def one_rank(device: torch.device):
    """Initialise a process group with this process as its only rank."""
    device_module().set_device(0)
    store = dist.TCPStore("localhost", 0, world_size=1, is_master=True)
    dist.init_process_group(store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def build(one_rank: None):
    """Return `built(*arguments)`: `Bench.build` on train_configs/debug.toml with the arguments added."""
    from memdlm_dist.config import parse_config  # imported late: torchtitan must follow `cpu.prepare()`
    from memdlm_dist.performance.bench_steps import Bench

    def built(*arguments: str, layers: int | None = None) -> Bench:
        config = parse_config.parse(["--job.config_file", "train_configs/debug.toml", *arguments])
        return Bench.build(config, layers)

    return built


@pytest.fixture
def flex_without_autotuning(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile flex attention without autotuning, which takes most of a minute, as under debug.deterministic."""
    from torch.nn.attention.flex_attention import flex_attention
    from torchtitan.models.attention import FlexAttentionWrapper  # imported late, too

    torch._dynamo.reset()  # other tests' shapes count towards the recompile limit
    monkeypatch.setattr(FlexAttentionWrapper, "_compiled_flex_attn", torch.compile(flex_attention))
