"""LLaDA2.1's recipe with a debug-size model: published weights, training, a stop, another layout, an export, tools."""

import json
import warnings

import pytest
import torch

from memdlm_dist.checkpoint.hugging_face_folder import INDEX
from memdlm_dist.checkpoint.reading import load_states, read_metadata
from memdlm_dist.config import parse_config
from memdlm_dist.inference.trained_model import TrainedModel
from tests.support.launching import run_many
from tests.support.published import RECIPES, SMALL, contents, draw_expert_biases
from tools import checkpoints, convert_checkpoint, evaluate, generate, random_weights

RECIPE = RECIPES["llada2"]
ADAPTED = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")
FUSED = (64, 32, 32)  # rows of queries, keys and values
BFLOAT16 = ["--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "bfloat16"]


def arguments_of(root, run="run"):
    return [*SMALL, "--job.dump_folder", str(root / run), "--checkpoint.initial_load_path", str(root / "weights")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return the folder of bfloat16 weights, a run of two steps, and one that goes on after its first step under EP."""
    root = tmp_path_factory.mktemp("llada2")
    assert random_weights.main([RECIPE, "--output", str(root / "weights"), *arguments_of(root)]) == 0
    draw_expert_biases(root / "weights")
    common = ["--training.steps", "2", "--checkpoint.interval", "1", "--validation.no-enable", *BFLOAT16]
    second_step = [
        "--checkpoint.initial_load_path", str(root / "run/checkpoint/step-1"), "--checkpoint.no-initial_load_in_hf",
        "--checkpoint.no-initial_load_model_only", "--checkpoint.last_save_in_hf",
        "--parallelism.expert_parallel_degree", "2",
    ]  # fmt: skip
    file = ["--job.config_file", RECIPE]
    run_many([
        (2, [*file, *arguments_of(root), *common]),
        (2, [*file, *arguments_of(root, "exported"), *common, *second_step]),
    ])  # fmt: skip
    return root


@pytest.fixture
def base(root):
    return contents(root / "weights")


def test_the_export_of_a_resumed_run(root, base):
    """All tensors come out in the published layout; those without adapters, the biases included, bit for bit."""
    folder = root / "exported/checkpoint/step-2"
    ours = contents(folder)
    assert {key: (x.shape, x.dtype) for key, x in ours.items()} == {key: (x.shape, x.dtype) for key, x in base.items()}
    kept = [key for key in base if key.split(".")[-2] not in ADAPTED]
    biases = [key for key in kept if key.endswith("expert_bias")]
    assert len(biases) == 3 and all(base[key].dtype == torch.float32 and base[key].std() > 0.5 for key in biases)
    assert len(kept) == 3 + 4 * 4 + 3 * 2 and all(torch.equal(ours[key], base[key]) for key in kept)
    for key in base.keys() - set(kept):
        changed = ours[key] != base[key]
        if ".experts." not in key:  # an expert without a token stays unchanged
            assert changed.any(), key
        if "query_key_value" in key:
            assert all(rows.any() for rows in changed.split(FUSED)), key
    assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == base.keys()
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["topk_group"], config["rotary_dim"]) == (["LLaDA2MoeModelLM"], 2, 4)
    assert (folder / "tokenizer.json").read_bytes() == (root / "weights/tokenizer.json").read_bytes()


def test_checkpoints_hold_the_biases_in_float32(root, base, capsys):
    """Also the checkpoint of the model alone, in bfloat16."""
    for step, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        checkpoint = root / f"run/checkpoint/step-{step}"
        saved = read_metadata(str(checkpoint)).state_dict_metadata
        assert saved["tok_embeddings.weight"].properties.dtype == dtype
        for layer in (1, 2, 3):
            name = f"layers.{layer}.moe.expert_bias"
            state = {name: torch.empty(16, dtype=saved[name].properties.dtype)}
            with warnings.catch_warnings(action="ignore"):
                load_states(state, str(checkpoint), no_dist=True)
            expected = base[f"model.layers.{layer}.mlp.gate.expert_bias"]
            assert state[name].dtype == torch.float32 and torch.equal(state[name], expected)
    assert checkpoints.main(["verify", str(root / "run/checkpoint")]) == 0
    out = capsys.readouterr().out
    assert "step-1" in out and "step-2" in out


def test_merged_equals_unmerged(root, tmp_path):
    step = ["--checkpoint", str(root / "run/checkpoint/step-1")]
    convert = ["to-hf", RECIPE, *step, *arguments_of(root), "--output"]
    assert convert_checkpoint.main([*convert, str(tmp_path / "merged")]) == 0
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(tokens).bool()
    config = parse_config.parse(["--job.config_file", RECIPE, *arguments_of(root)])
    with TrainedModel(config, step[1]) as model:
        unmerged = model.logits(tokens, everywhere, everywhere)
        model.load(str(tmp_path / "merged"))
        # float32 rounding: W x + B A x against (W + B A) x.
        torch.testing.assert_close(model.logits(tokens, everywhere, everywhere), unmerged, rtol=0, atol=2e-5)
        model.load(str(root / "weights"))
        assert (model.logits(tokens, everywhere, everywhere) - unmerged).abs().max() > 0.01
    # In PEFT's format queries, keys and values are one linear.
    assert convert_checkpoint.main([*convert, str(tmp_path / "adapter"), "--adapter"]) == 0
    config.model.converters = []
    with TrainedModel(config, str(root / "weights"), str(tmp_path / "adapter")) as model:
        assert torch.equal(model.logits(tokens, everywhere, everywhere), unmerged)


def test_the_tools_read_the_export(root, tmp_path, capsys):
    """Block-causal decoding with a cache gives the tokens that it gives without, with memory."""
    decoding = ["--new-tokens", "12", "--block-size", "8", "--attention", "block-causal", "--memory", "on"]
    command = [RECIPE, *decoding, *arguments_of(root, "exported")]
    capsys.readouterr()
    answers = []
    for cache in ("none", "prefix", "dual"):
        assert generate.main([*command, "--prompt", "def read(self):", "--cache", cache, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert len({answer["response"] for answer in answers}) == 1 and answers[0]["response"]
    assert {answer["checkpoint"] for answer in answers} == {str(root / "exported/checkpoint/step-2")}
    needle = ["--tasks", "facts_1", "--lengths", "250", "--samples", "1", "--output", str(tmp_path / "needle")]
    assert evaluate.main(["needle", *command, *needle, "--training.seq_len", "300"]) == 0
    assert "facts_1" in capsys.readouterr().out
