"""Training steps, validation and decoding on a fake accelerator: no waits, no mixed devices, CUDA kernels only.

tests/gpu covers real kernels and streams.
"""

import json

import pytest

from tests.support import zygote


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("fake") / "found.json"
    status, output = zygote.run(1, "tests.workers.fake_step:write", path)
    assert status == 0, output
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "case",
    [
        "dense", "dense, plain", "dense, distilled", "packed", "pairs", "packed, pairs", "experts", "experts, packed",
        "decoding",
    ],
)  # fmt: skip
def test_no_operator_waits_for_the_device_or_lacks_a_cuda_kernel(results, case):
    """Unintended waits, copies or mixed devices already end the worker with an error."""
    ran, without_kernel = results["operators"][case]
    assert ran > 50 and without_kernel == []


def test_an_operator_of_the_cpu_alone_is_found(results):
    assert results["of a CPU alone"] == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]


def test_mistakes_are_refused(results):
    refused = dict.fromkeys(results["mistakes"], "Refused")
    assert len(refused) > 10
    assert results["mistakes"] == refused | {"boolean indexing": "DynamicOutputShapeException"}
