"""Our step on sharded models: the straightforward step's numbers with plain training's communication."""

import pytest

from tests.support import zygote
from tests.workers.sharded_step import COMPILATIONS, COMPILED, LAYOUTS, builds, get_layout

# float64: rounding of sums. float32: summation order, 1e-6 measured. bfloat16: 8 bits, although equal products give
# equal results here.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat1": 1e-3}
SLOW = f"{COMPILED[0]}-compiled"


def steps(layouts):
    marks = {SLOW: pytest.mark.slow}
    return [pytest.param(layout, step, marks=marks.get(layout, ())) for layout in layouts for step in builds(layout)]


@pytest.fixture(scope="module")
def results():
    return find(*LAYOUTS)


@pytest.fixture(scope="module")
def slow_results():
    return find(SLOW)


def find(*names):
    processes = {name: LAYOUTS[get_layout(name)][0] for name in names}
    return {name: zygote.call(processes[name], "tests.workers.sharded_step:find", name) for name in names}


@pytest.fixture
def layout_results(request, layout):
    return request.getfixturevalue("slow_results" if layout == SLOW else "results")[layout]


@pytest.mark.parametrize("layout, step", steps([*LAYOUTS, SLOW]))
def test_the_same_numbers(layout_results, layout, step):
    results = layout_results["steps"][step]
    assert results["difference"] < TOLERANCES[step[:7]]
    # Token weights and sums stay in float32 under mixed precision, too.
    assert results["difference of the first inner losses"] < 1e-6


@pytest.mark.parametrize(
    "layout, step",
    [x for x in steps([*LAYOUTS, SLOW]) if x.values[1].endswith(" default")],
)
def test_every_block_measures_the_same_relative_write(results, layout_results, layout, step):
    """Compiled blocks, checkpointed ones, and both at once; also in bfloat16."""
    expected = results[get_layout(layout)]["steps"]["float64 default"]["relative write"]
    assert len(expected) == 6 and min(expected) > 1e-3
    tolerance = 0.03 if step.startswith("bfloat16") else 1e-5  # bfloat16 carries 8 bits
    assert layout_results["steps"][step]["relative write"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "layout, step",
    [x for x in steps([*LAYOUTS, SLOW]) if x.values[0] == "fsdp2" or x.values[1].endswith(" default")],
)
def test_no_more_communication_than_plain_training(layout_results, layout, step):
    results = layout_results["steps"][step]
    gathers, scatters = results["all_gathers"], results["reduce_scatters"]
    # Embedding, five layers and head are gathered once each. In the backward pass, plain training gathers everything
    # it resharded (by default all but the head), ours only the trunk: embedding and three layers.
    gathered_again = {"never": (0, 0), "always": (7, 4)}.get(step.split()[0].split("-")[-1], (6, 4))
    assert gathers["plain"] == 7 + gathered_again[0] and gathers["ours"] == 7 + gathered_again[1]
    assert gathers["ours"] <= gathers["plain"] < gathers["straightforward"]
    assert scatters["ours"] == scatters["plain"] == scatters["straightforward"] == 7
    # Our data-parallel collectives are a subset of plain training's by kind and size: none carries fast weights.
    assert results["beyond_plain"] == []


def test_a_sequence_shard_goes_through_the_ffn_in_chunks(results):
    """Chunks of three tokens of each rank's shard change nothing but rounding in float64."""
    assert results["fsdp2-tp2"]["change in chunks"] < 1e-12


def test_the_backward_pass_prefetches(results):
    """All-gathers (a) are issued before the reduce-scatter (r) of the layer above: parameters are prefetched."""
    order = results["fsdp2"]["steps"]["float32 default"]["order"]
    assert order["plain"] == "a" * 7 + "ar" * 6 + "r"
    # Head and upper tail layer are gathered already; the lower tail layer prefetches the trunk's last layer.
    assert order["ours"] == "a" * 7 + "rr" + "ar" * 4 + "r"


def test_the_tail_is_resident_from_the_inner_loop_to_the_backward_pass(results):
    gathered = results["fsdp2"]["gathered"]
    nothing, tail = [0] * 7, [0, 0, 0, 0, 1, 1, 1]
    assert gathered["before"] == nothing
    assert gathered["after the inner steps"] == gathered["before the backward pass"] == tail
    assert gathered["after the backward pass"] == gathered["after validation"] == nothing


def test_a_failure_in_the_step_leaves_nothing_gathered_and_the_next_step_sound(results):
    gathered = results["fsdp2"]["gathered"]
    assert gathered["after a failure in inner loop"] == gathered["after a failure in between the loops"] == [0] * 7
    assert gathered["difference after a failure"] == 0.0


@pytest.mark.parametrize(
    "layout, kind",
    [
        *(("fsdp2", kind) for kind in COMPILATIONS["fsdp2"]),
        *(pytest.param(SLOW, kind, marks=pytest.mark.slow) for kind in COMPILATIONS[COMPILED[0]]),
    ],
)
def test_nothing_is_compiled_after_the_second_step(layout_results, layout, kind):
    compiled = layout_results["compilations"][kind]
    assert compiled["breaks"] == {}
    assert compiled["graphs"][1:] == [compiled["graphs"][1]] * 3
    # Trunk with and without gradient; tail in two inner steps and the outer step; the head's loss.
    assert 1 <= compiled["graphs"][0] <= (2 if kind == "plain" else 6)
