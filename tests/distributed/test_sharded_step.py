"""Our step against the straightforward one on sharded models: the same numbers, with plain training's communication."""

import pytest

from tests.workers.sharded_step import COMPILATIONS, COMPILED, LAYOUTS, builds, get_layout

# float64 leaves rounding of sums; float32 adds up the same numbers in another order (1e-6 is seen); bfloat16 carries
# 8 bits, though the same products are seen to give the same here.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat1": 1e-3}
SLOW = f"{COMPILED[0]}-compiled"


def steps(layouts):
    marks = {SLOW: pytest.mark.slow}
    return [pytest.param(layout, step, marks=marks.get(layout, ())) for layout in layouts for step in builds(layout)]


@pytest.fixture(scope="module")
def results(pools):
    return find(pools, *LAYOUTS)


@pytest.fixture(scope="module")
def slow_results(pools):
    return find(pools, SLOW)


def find(pools, *parts):
    processes = {part: LAYOUTS[get_layout(part)][0] for part in parts}
    return {part: pools(processes[part]).call("tests.workers.sharded_step:find", part) for part in parts}


@pytest.fixture
def of_layout(request, layout):
    return request.getfixturevalue("slow_results" if layout == SLOW else "results")[layout]


@pytest.mark.parametrize("layout, step", steps([*LAYOUTS, SLOW]))
def test_the_same_numbers(of_layout, layout, step):
    found = of_layout["steps"][step]
    assert found["difference"] < TOLERANCES[step[:7]]
    # In mixed precision too the weights of the tokens and the sums stay in float32.
    assert found["difference of the first inner losses"] < 1e-6


@pytest.mark.parametrize(
    "layout, step",
    [x for x in steps([*LAYOUTS, SLOW]) if x.values[0] == "fsdp2" or x.values[1].endswith(" default")],
)
def test_no_more_communication_than_plain_training(of_layout, layout, step):
    found = of_layout["steps"][step]
    gathers, scatters = found["all_gathers"], found["reduce_scatters"]
    # Embedding, five layers and head are gathered once each. Plain training gathers what it freed again in the
    # backward pass (all but the head, by default), ours only the trunk: embedding and three layers.
    again = {"never": (0, 0), "always": (7, 4)}.get(step.split()[0].split("-")[-1], (6, 4))
    assert gathers["plain"] == 7 + again[0] and gathers["ours"] == 7 + again[1]
    assert gathers["ours"] <= gathers["plain"] < gathers["straightforward"]
    assert scatters["ours"] == scatters["plain"] == scatters["straightforward"] == 7
    # Every data-parallel collective of ours is one of plain training's, by kind and size: none carries fast weights.
    assert found["beyond_plain"] == []


def test_the_backward_pass_prefetches(results):
    """A layer's parameters are asked for before the layer above is through: gathers (a) and reduce-scatters (r)."""
    order = results["fsdp2"]["steps"]["float32 default"]["order"]
    assert order["plain"] == "a" * 7 + "ar" * 6 + "r"
    # Head and upper tail layer have their parameters; the lower one asks for the trunk's last.
    assert order["ours"] == "a" * 7 + "rr" + "ar" * 4 + "r"


def test_the_tail_is_resident_from_the_inner_loop_to_the_backward_pass(results):
    found = results["fsdp2"]["residency"]
    nothing, tail = [0] * 7, [0, 0, 0, 0, 1, 1, 1]
    assert found["before"] == nothing
    assert found["after the inner steps"] == found["before the backward pass"] == tail
    assert found["after the backward pass"] == found["after validation"] == nothing


def test_a_failure_in_the_step_leaves_nothing_gathered_and_the_next_step_sound(results):
    found = results["fsdp2"]["residency"]
    assert found["after a failure in inner loop"] == found["after a failure in between the loops"] == [0] * 7
    assert found["difference after a failure"] == 0.0


@pytest.mark.parametrize(
    "layout, kind",
    [
        *(("fsdp2", kind) for kind in COMPILATIONS["fsdp2"]),
        *(pytest.param(SLOW, kind, marks=pytest.mark.slow) for kind in COMPILATIONS[COMPILED[0]]),
    ],
)
def test_nothing_is_compiled_after_the_second_step(of_layout, layout, kind):
    found = of_layout["compilations"][kind]
    assert found["breaks"] == {}
    assert found["graphs"][1:] == [found["graphs"][1]] * 3
    # With and without gradient through the trunk; two inner steps and the outer one through the tail; the head's loss.
    assert 1 <= found["graphs"][0] <= (2 if kind == "plain" else 6)
