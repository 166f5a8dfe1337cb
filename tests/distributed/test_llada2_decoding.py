"""Decoding of LLaDA2.1 by its two algorithms: the same tokens on every layout, with and without a cache."""

import json

import pytest

from tests.support import zygote
from tests.workers.decoding_experts import LAYOUTS, write_weights


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    root = tmp_path_factory.mktemp("llada2")
    write_weights(root)
    for name, (processes, _) in LAYOUTS.items():
        status, output = zygote.run(processes, "tests.workers.decoding_experts:decode_rank", root, name)
        assert status == 0, output
    return {name: json.loads((root / f"{name}.json").read_text()) for name in LAYOUTS}


def test_every_layout_decodes_alike(responses):
    one = responses["one"]
    assert len(one) == 6 and len(responses["fsdp2-tp2"]) == 3 and len(responses["ep2-tp2"]) == 2
    for name, result in responses.items():
        for key, tokens in result.items():
            assert tokens == one[key], (name, key)


def test_the_cache_of_complete_blocks_is_exact(responses):
    one = responses["one"]
    for key, tokens in one.items():
        assert tokens == one[key.replace("cache prefix", "cache none")], key


def test_editing_and_memory_change_the_tokens(responses):
    """The comparisons above would detect a setting that is not read, or fast weights of another prompt."""
    uncached = [tokens for key, tokens in responses["one"].items() if "cache none" in key]
    assert all(x[row] != y[row] for x in uncached for y in uncached if x is not y for row in range(2))
