"""Ranks issue the same collectives in the same order for any rows; otherwise a run hangs."""

import json

import pytest

from tests.support import zygote
from tests.workers.collective_order import BATCHES, LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree(tmp_path, layout):
    ranks = LAYOUTS[layout][0]
    status, output = zygote.run(ranks, "tests.workers.collective_order:write_rank", layout, tmp_path)
    assert status == 0, output
    first, calls_by_rows = None, {}
    for number in range(ranks):
        rank = json.loads((tmp_path / f"{layout}-{number}.json").read_text())
        assert rank["found"].keys() == BATCHES.keys()
        for batch, calls in rank["found"].items():
            where, first = f"rank {number}, {batch}", first or calls
            assert len(calls) == len(first) > 10, where
            for call, reference in zip(calls, first, strict=True):
                assert comparable(call) == comparable(reference), where
            # Ranks with the same rows also score equally many tokens.
            assert calls_by_rows.setdefault((rank["place"], batch), calls) == calls, where


def comparable(call):
    """Return the fields of a collective that must agree on all ranks.

    Sizes may differ in the head, which gets the scored tokens of a rank, and in the experts' all-to-all, which sends as
    many tokens as the router assigns.
    """
    operator, mesh, elements, dtypes, arguments = call
    if mesh == "tp":
        return operator, mesh, dtypes, arguments
    if mesh == "ep" and "all_to_all" in operator:
        return operator, mesh, dtypes
    return operator, mesh, elements, dtypes, arguments
