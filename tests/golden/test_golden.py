"""Check our results against the published implementation's, through tools/check_golden.py.

The fixtures in tests/golden do not contain the inner gradients of each step, which the tool does not compare.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from memdlm_dist.golden import sampler_check
from memdlm_dist.golden.fixture import get_sd_adapter, load_model
from memdlm_dist.inference.canvas import canvas
from tests.support.computed_fixture import DenseLayer, LLaDA2, write_fixture
from tools import check_golden

CASES = (
    "dense_pmc_ce", "dense_pmc_distill", "dense_pmc_full", "dense_pre_only", "dense_progressive_memory", "moe_pmc_ce",
    "llada21_pmc_ce",
)  # fmt: skip


def copy(root, tmp_path, case, change=None, **tensors):
    """Copy a case with changes, and return the folder of the copy.

    Args:
        root: root of the repository.
        tmp_path: folder of the copy.
        case: name of the case.
        change: function that changes the manifest in place.
        tensors: file name in the manifest -> function that changes its tensors in place, or returns new ones.
    """
    source = root / "tests/golden" / case
    manifest = json.loads((source / "manifest.json").read_text())
    for name, path in manifest["files"].items():
        if name in tensors:
            changed = load_file(source / path)
            save_file(tensors[name](changed) or changed, tmp_path / f"{name}.safetensors")
            manifest["files"][name] = f"{name}.safetensors"
        else:
            manifest["files"][name] = str((source / path).resolve())
    if change:
        change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return str(tmp_path)


def report_lines(capsys):
    return capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize("case", CASES)
def test_fixture_passes(root, capsys, case):
    assert check_golden.main([str(root / "tests/golden" / case)]) == 0
    lines = report_lines(capsys)
    quantities = {line[2:36].split(" (")[0].strip() for line in lines}
    assert quantities >= {
        "plain loss", "plain logits", "plain base gradients", "trajectory: masks", "trajectory: targets",
        "trajectory: weights", "inner losses", "inner gradient norms", "fast weights", "outer loss", "outer logits",
        "outer base gradients", "outer gradient norm",
    }  # fmt: skip
    assert all(line.endswith(" ok") for line in lines)


def test_a_fixture_without_a_memory_is_checked_for_what_it_has(root, capsys):
    assert check_golden.main([str(root / "tests/golden/dense_base")]) == 0
    assert [line.split()[1] for line in report_lines(capsys)] == ["loss", "logits", "base", "gradient"]


def test_the_architecture_of_llada_8b(root, tmp_path, capsys):
    assert check_golden.main([str(root / "tests/golden/llada8b_forward")]) == 0
    assert [line.split()[0] for line in report_lines(capsys)] == ["logits", "logits_padded"]

    def change(manifest):
        manifest["arch"]["rope_theta"] = 10_000.0

    assert check_golden.main([copy(root, tmp_path, "llada8b_forward", change)]) == 1


def test_the_architecture_of_llada21(root, tmp_path, capsys):
    """Logits and routers under full and block-causal attention; every value of the manifest has an effect."""
    assert check_golden.main([str(root / "tests/golden/llada21_forward")]) == 0
    assert [line[2:36].strip() for line in report_lines(capsys)] == [
        "logits", "logits_block_causal", "router logits", "router weights", "router logits_block_causal",
        "router weights_block_causal",
    ]  # fmt: skip
    changes = {
        "eps": 1e-5, "rope_theta": 5e5, "partial_rotary_factor": 1.0, "top_k": 3, "n_group": 2, "topk_group": 3,
        "renormalise_top_k": False, "routed_scaling_factor": 1.0,
    }  # fmt: skip
    for key, value in changes.items():

        def change(manifest, key=key, value=value):
            manifest["arch"][key] = value
            manifest["arch"].pop("rotary_dim", None)

        assert check_golden.main([copy(root, tmp_path, "llada21_forward", change)]) == 1, key

    def blocks(manifest):
        manifest["block_length"] += 1

    assert check_golden.main([copy(root, tmp_path, "llada21_forward", blocks)]) == 1
    without = {
        "weights": lambda tensors: {k: x for k, x in tensors.items() if "layers.2.mlp.gate.expert_bias" not in k}
    }
    assert check_golden.main([copy(root, tmp_path, "llada21_forward", **without)]) == 2
    assert "lack the tensor model.layers.2.mlp.gate.expert_bias" in capsys.readouterr().out


def test_the_sampler_of_llada(root, capsys):
    assert check_golden.main([str(root / "tests/golden/sampler_low_confidence")]) == 0
    lines = report_lines(capsys)
    assert len(lines) == 6 and all(line.split()[1] in ("in", "of") for line in lines)


def test_the_samplers_of_llada21(root, tmp_path, capsys):
    """Canvases after every step of both algorithms; every setting of a run has an effect."""
    case = root / "tests/golden/sampler_llada21"
    assert check_golden.main([str(case)]) == 0
    runs = {run["name"]: run for run in json.loads((case / "manifest.json").read_text())["sampler"]["runs"]}
    quantities = [line[2:36].strip() for line in report_lines(capsys)]
    names = [f"{name} (end filled)" if name == "edit_eos" else name for name in runs]
    assert quantities == [f"{kind} of {name}" for name in names for kind in ("sequences", "canvases")]
    changes = [
        ("schedule_low", "block_size", 16), ("schedule_low", "threshold", 0.5), ("schedule_3steps", "minimal_topk", 10),
        ("schedule_3steps", "steps_per_block", 4), ("schedule_eos", "eos_early_stop", False),
        ("schedule_eos", "eos_id", 2), ("edit", "max_new_tokens", 12), ("edit", "threshold", 0.5),
        ("edit", "editing_threshold", 0.7), ("edit_low", "max_post_steps", 3), ("edit_two", "num_to_transfer", 1),
        ("edit_eos", "eos_early_stop", False),
    ]  # fmt: skip

    def change(manifest):
        manifest["sampler"]["runs"] = [runs[name] | {key: value} for name, key, value in changes]

    assert check_golden.main([copy(root, tmp_path, "sampler_llada21", change)]) == 1
    verdicts = [line.endswith("NOT OK") for line in report_lines(capsys)]
    wrong = [each for number, each in enumerate(changes) if any(verdicts[2 * number : 2 * number + 2])]
    assert wrong == changes
    for key, value, message in (
        ("algorithm", "revise", "sampler.runs.algorithm = 'revise' is not supported"),
        ("top_p", 0.9, "sampler.runs.top_p is not supported with the algorithm 'edit'"),
    ):

        def refused(manifest, run=runs["edit"] | {key: value}):
            manifest["sampler"]["runs"] = [run]

        assert check_golden.main([copy(root, tmp_path, "sampler_llada21", refused)]) == 2
        assert message in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_prompts_decoded_together_with_a_cache_have_the_canvases_of_llada21(root, cache):
    """The published samplers take one prompt at a time and have no cache; ours takes both prompts of a run."""
    case = root / "tests/golden/sampler_llada21"
    manifest = json.loads((case / "manifest.json").read_text())
    tensors, mask_id = {name: load_file(case / path) for name, path in manifest["files"].items()}, 127
    model = load_model(get_sd_adapter(manifest["arch"], 40), case / manifest["files"]["weights"])
    for run in manifest["sampler"]["runs"]:
        decoding = replace(sampler_check.run_decoding(run), cache=cache)
        prompts = [tensors["inputs"][f"{run['name']}.prompt{number}"].tolist() for number in (0, 1)]
        histories = [tensors["outputs"][f"histories.{run['name']}.prompt{number}"] for number in (0, 1)]
        new_tokens = [history.shape[1] - len(prompt) for prompt, history in zip(prompts, histories, strict=True)]
        start = canvas(prompts, new_tokens, mask_id, run["eos_id"])
        ours = sampler_check.decode(model, decoding, start, mask_id, run["eos_id"])
        for row, history in enumerate(histories):
            expected = history.long()
            if decoding.stop_at_eos:
                expected[-1][expected[-1] == mask_id] = run["eos_id"]
            steps, length = expected.shape
            assert torch.equal(ours[:steps, row, :length], expected), run["name"]
            assert (ours[steps:, row, :length] == expected[-1]).all()


def test_weights_that_do_not_fit_are_named(root, tmp_path, capsys):
    without = {"weights": lambda tensors: {k: x for k, x in tensors.items() if "experts.3.up" not in k}}
    assert check_golden.main([copy(root, tmp_path, "moe_pmc_ce", **without)]) == 2
    assert "lack the tensor model.layers.0.mlp.experts.3.up_proj.weight" in capsys.readouterr().out


def scale(name):
    def changed(tensors):
        tensors[name] = tensors[name] * 1.001

    return changed


@pytest.mark.parametrize(
    "case, file, tensor, line",
    [
        ("dense_pmc_ce", "outputs", "B_final.model.layers.4.mlp.up_proj", "fast weights"),
        ("dense_pmc_ce", "inputs", "step_t", "inner losses"),
        ("moe_pmc_ce", "outputs", "B_final.model.layers.3.mlp.experts.1.up_proj", "fast weights"),
        ("moe_pmc_ce", "outputs", "grad.model.layers.1.mlp.experts.2.down_proj.weight", "outer base gradients"),
        ("moe_pmc_ce", "plain", "grad.model.layers.0.mlp.gate.weight", "plain base gradients"),
        ("llada21_pmc_ce", "outputs", "B_final.model.layers.4.mlp.shared_experts.down_proj", "fast weights"),
        ("llada21_pmc_ce", "outputs", "grad.model.layers.1.mlp.gate.weight", "outer base gradients"),
        ("llada21_pmc_ce", "plain", "grad.model.layers.0.attention.query_key_value.weight", "plain base gradients"),
        ("dense_pmc_ce", "inputs", "step_t", "trajectory: weights"),
        ("dense_pmc_full", "outputs", "delta_final.model.layers.3.mlp.up_proj", "fast weights"),
        ("dense_progressive_memory", "outputs", "grad.model.layers.0.self_attn.q_proj.weight", "outer base gradients"),
        ("dense_progressive_memory", "plain", "logits", "plain logits"),
    ],
)
def test_a_wrong_number_fails(root, tmp_path, capsys, case, file, tensor, line):
    assert check_golden.main([copy(root, tmp_path, case, **{file: scale(tensor)})]) == 1
    assert any(line in reported and reported.endswith("NOT OK") for reported in report_lines(capsys))


@pytest.mark.parametrize("result", ["inner_losses", "inner_grad_norms", "outer_loss", "outer_grad_norm_base"])
def test_a_wrong_scalar_fails(root, tmp_path, capsys, result):
    def change(manifest):
        value = manifest["results"][result]
        manifest["results"][result] = [x * 1.00001 for x in value] if isinstance(value, list) else value * 1.00001

    assert check_golden.main([copy(root, tmp_path, "dense_pmc_distill", change)]) == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("masking", "no_progressive"), ("masking", "progressive_memory"), ("loss", "ce"), ("loss", "distill_reverse"),
        ("loss_mask_mode", "newly_revealed"), ("loss_weight", "uniform: 1"), ("lr", 0.2), ("grad_clip", 0.5),
        ("alpha", 16.0), ("start_scale", 2.0),
    ],
)  # fmt: skip
def test_the_manifest_is_what_is_computed(root, tmp_path, capsys, key, value):
    """Any other setting than the fixture's own gives wrong numbers, so every setting is read and has an effect."""

    def change(manifest):
        manifest["memory"][key] = value

    assert check_golden.main([copy(root, tmp_path, "dense_pmc_distill", change)]) == 1


def test_what_a_fixture_lacks_is_not_checked(root, tmp_path, capsys):
    """Fixtures of adaptation at inference have no outer results, no noise level and no labels."""

    def change(manifest):
        del manifest["files"]["plain"]
        for name in list(manifest["results"]):
            if name.startswith(("outer", "plain")):
                del manifest["results"][name]

    folder = copy(
        root, tmp_path, "dense_pmc_ce", change,
        inputs=lambda tensors: {name: x for name, x in tensors.items() if name not in ("t", "anchor_mask")},
        outputs=lambda tensors: {name: x for name, x in tensors.items() if "_final." in name},
    )  # fmt: skip
    assert check_golden.main([folder]) == 0
    assert [line.split(" (")[0].split("  ")[1] for line in report_lines(capsys)] == [
        "inner losses", "inner gradient norms", "fast weights",
    ]  # fmt: skip


def test_what_is_not_supported_says_so(root, tmp_path, capsys):
    def unknown(manifest):
        manifest["memory"]["loss"] = "adversarial"

    def experts(manifest):
        manifest["arch"]["kind"] = "gpt"

    folders = []
    for number, change in enumerate((unknown, experts)):
        (tmp_path / str(number)).mkdir()
        folders.append(copy(root, tmp_path / str(number), "dense_pmc_ce", change))
    (tmp_path / "no draw").mkdir()
    without = {"inputs": lambda tensors: {name: x for name, x in tensors.items() if not name.startswith("A_init")}}
    folders.append(copy(root, tmp_path / "no draw", "dense_pmc_ce", **without))
    shutil.copytree(tmp_path / "0", tmp_path / "broken")
    (tmp_path / "broken/manifest.json").write_text("{")
    assert check_golden.main([*folders, str(tmp_path / "broken"), str(tmp_path / "absent")]) == 2
    out = capsys.readouterr().out
    assert "memory.loss = 'adversarial' is not supported yet" in out
    assert "architecture 'gpt' is not supported yet" in out and out.count("cannot read the fixture") == 3


# Fixtures in the published format, computed by the oracle, for options without a published fixture:
# (memory section, targets, batch shape, omitted tensors).
COMPUTED = {
    "one step, attention, odd sizes": (
        {"masking": "no_progressive", "steps": 2, "loss": "ce"},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        (3, 17),
        (),
    ),
    "three steps, newly revealed, all linears": (
        {"masking": "pmc", "steps": 3, "loss": "distill_reverse", "loss_mask_mode": "newly_revealed"},
        ["gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"],
        (4, 24),
        (),
    ),
    "a single step of pmc": (
        {"masking": "pmc", "steps": 1, "loss": "ce", "start_scale": 1.6},
        ["up_proj"],
        (2, 21),
        (),
    ),
    "hidden, as the reference": (
        {"masking": "pmc", "steps": 2, "loss": "distill_hidden", "hidden_type": "mse", "adapter_type": "full"},
        ["gate_proj", "v_proj"],
        (2, 20),
        (),
    ),
    "hidden, both after the norm": (
        {
            "masking": "pre_only", "steps": 2, "loss": "distill_hidden", "hidden_type": "cosine",
            "student_hidden": "post_final_norm", "teacher_hidden": "post_final_norm",
        },
        ["down_proj"],
        (1, 30),
        (),
    ),
    "adaptation at inference": (
        {"masking": "progressive_memory", "steps": 4, "loss": "distill", "loss_weight": "uniform: 1"},
        ["gate_proj", "up_proj", "down_proj"],
        (2, 19),
        ("labels", "t", "outer"),
    ),
    "LLaDA2.1 of other sizes, three steps, reverse KL": (
        {"masking": "pmc", "steps": 3, "loss": "distill_reverse", "epochs": 2},
        ["gate_proj", "up_proj", "down_proj"],
        (2, 13),
        (),
        LLaDA2,
    ),
    "LLaDA2.1, dense layer adapted, hidden": (
        {"masking": "pmc", "steps": 2, "loss": "distill_hidden", "hidden_type": "mse", "adapter_type": "full"},
        ["gate_proj", "down_proj"],
        (2, 11),
        (),
        DenseLayer,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_other_fixtures_of_the_format(name, tmp_path, capsys):
    memory, targets, shape, absent, *backbone = COMPUTED[name]
    write_fixture(tmp_path, memory, targets, shape, absent, *backbone)
    assert check_golden.main([str(tmp_path)]) == 0, capsys.readouterr().out
    lines = report_lines(capsys)
    assert any("inner losses" in line for line in lines) and any("trajectory: masks" in line for line in lines)
    assert any("outer base gradients" in line for line in lines) is ("outer" not in absent)
