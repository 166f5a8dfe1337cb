"""All ranks issue the same collectives in the same order, whatever their rows: otherwise a run hangs."""

import json

import pytest

from tests.support import zygote
from tests.workers.collective_order import BATCHES, LAYOUTS

# Numbers of elements that depend on a rank's rows: of scored tokens, and of slots that experts exchange.
VARYING = ("tp", "ep")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree(tmp_path, layout):
    ranks = LAYOUTS[layout][0]
    status, output = zygote.run(ranks, "tests.workers.collective_order:write_rank", layout, tmp_path)
    assert status == 0, output
    of_ranks = [json.loads((tmp_path / f"{layout}-{rank}.json").read_text()) for rank in range(ranks)]
    expected = of_ranks[0]["found"]["ordinary"]
    assert of_ranks[0]["found"].keys() == BATCHES.keys() and len(expected) > 10
    of_rows = {}
    for number, rank in enumerate(of_ranks):
        for batch, collectives in rank["found"].items():
            where = f"rank {number}, {batch}"
            assert [(kind, mesh) for kind, mesh, _ in collectives] == [(kind, mesh) for kind, mesh, _ in expected], (
                where
            )
            for one, other in zip(collectives, expected, strict=True):
                assert one == other or one[1] in VARYING, where
            # Ranks with the same rows also agree on how many tokens are scored.
            assert of_rows.setdefault((rank["place"], batch), collectives) == collectives, where
