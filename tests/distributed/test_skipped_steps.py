"""Steps with a non-finite loss change nothing, and all ranks learn of them one step later."""

import re

from tests.support import zygote


def test_fused_optimizers_skip_before_the_host_knows():
    ranks = zygote.call(2, "tests.workers.skipped_steps:find")
    errors = {result.pop("error") for result in ranks}
    expected = {
        "unknown": 0, "unchanged": True, "known a step later": 1, "changed": True, "steps taken": {3},
        "stops early": False, "stops": True, "skipped": 1, "unchanged for long": True, "skipped by now": 2,
        "unchanged at the end": True,
    }  # fmt: skip
    assert ranks == [expected, expected]
    (error,) = errors
    samples = re.escape(", ".join(map(str, (2 * (2 * 8 + 1), 2 * (2 * 8 + 1) + 1))))
    assert re.match(rf"Step 8 is the last of 2 steps .*: the loss is nan on at least .* {samples};", error), error
