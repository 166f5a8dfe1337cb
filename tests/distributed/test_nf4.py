"""4-bit base: the recipes from published weights over a stop and another layout to an export."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from memdlm_dist.checkpoint import base_model
from memdlm_dist.checkpoint.catalogue import read_metadata
from memdlm_dist.config import check_layout, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.models import nf4
from memdlm_dist.models.flavours import LLADA, LLADA2, LLADA_MOE
from memdlm_dist.training import run as training_run
from memdlm_dist.training.backbone import get_conversion
from tests.support.launching import run_many, scalars
from tests.support.published import RECIPES, contents, draw_expert_biases
from tools import convert_checkpoint, random_weights

torchao = pytest.importorskip("torchao.quantization")

SMALL = [
    "--model.flavor", "nf4", "--model.hf_assets_path", "tests/assets/debug/tokenizer",
    "--data.train", "tests/assets/debug/train", "--data.validation", "tests/assets/debug/heldout",
    "--validation.no-enable",
    "--training.seq_len", "128", "--training.epochs", "0",
    "--training.global_batch_size", "4", "--training.local_batch_size", "2",
    "--training.mixed_precision_param", "float32", "--optimizer.implementation", "foreach", "--optimizer.lr", "0.005",
    "--lr_scheduler.total_steps", "3", "--checkpoint.interval", "2", "--checkpoint.async_mode", "disabled",
    "--compile.no-enable", "--parametric_memory.rank", "8", "--metrics.log_freq", "1", "--lora.rank", "8",
]  # fmt: skip
DENSE = ["--lora.base", "unquantized"]
# Linears of the layers, by the last part of their Hugging Face names.
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "gate_proj", "down_proj",
    "query_key_value", "dense",
)  # fmt: skip
FUSED = (256, 128, 128)  # rows of queries, keys and values, which are quantised each by itself


def arguments_of(root, name, run="run", steps=3):
    return [
        "--job.config_file", RECIPES[name], *SMALL, "--job.dump_folder", str(root / run), "--lora.base", "nf4",
        "--checkpoint.initial_load_path", str(root / "weights"), "--training.steps", str(steps),
    ]  # fmt: skip


def dequantized(weights):
    """Return Hugging Face weights after NF4, by torchao alone; a layer's experts are one tensor."""
    groups = {}
    for key in sorted(weights, key=lambda key: [int(x) if x.isdigit() else x for x in key.split(".")]):
        linear = key.split(".")[-2]
        if linear in LINEARS and any(part in key for part in (".layers.", ".blocks.")):
            head, experts, _ = key.partition(".experts.")
            groups.setdefault((head, linear) if experts else key, []).append(key)
    result = dict(weights)
    for keys in groups.values():
        whole = torch.cat([weights[key] for key in keys])
        parts = whole.split(FUSED) if "query_key_value" in keys[0] else [whole]
        rounded = torch.cat([torchao.to_nf4(part).get_original_weight() for part in parts])
        result |= dict(zip(keys, rounded.chunk(len(keys)), strict=True))
    return {key: x.contiguous() for key, x in result.items()}


@pytest.fixture(scope="module", params=["llada", "llada_moe", pytest.param("llada2", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """Return a recipe's name, and its folder with the runs from generated weights."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    recipe, *rest = arguments_of(root, name)[1:]
    assert random_weights.main([recipe, "--output", str(root / "weights"), "--dtype", "float32", *rest]) == 0
    draw_expert_biases(root / "weights")
    (root / "dense").mkdir()
    save_file(dequantized(contents(root / "weights")), root / "dense/model.safetensors")
    run_many([
        # The run is stopped after two steps on two ranks, and resumed on one.
        (2, arguments_of(root, name, steps=2)),
        (1, [*arguments_of(root, name), "--checkpoint.save_in_hf"]),
        (1, [*arguments_of(root, name, "dense-run"), *DENSE, "--checkpoint.initial_load_path", str(root / "dense")]),
    ])  # fmt: skip
    return name, root


def read(root, name, checkpoint, *arguments):
    return TrainedModel(parse_config.parse([*arguments_of(root, name), *arguments]), str(checkpoint))


def logits(model, tokens):
    return model.logits(tokens, torch.ones_like(tokens).bool(), torch.ones_like(tokens).bool())


def test_it_trains_as_its_dequantised_base(run):
    """Loss and gradient norm of each step equal those of an unquantised run from the dequantised weights."""
    _, root = run
    dense, ours = (scalars(root / folder) for folder in ("dense-run", "run"))
    for name in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert sorted(ours[name]) == [1, 2, 3]
        assert ours[name] == pytest.approx(dense[name], rel=1e-5), name  # float32 rounding, over three steps


def test_checkpoints_hold_adapters_and_name_their_base(run):
    _, root = run
    location = root / "run/checkpoint/step-2"
    saved = read_metadata(str(location)).state_dict_metadata
    assert saved and not any(".weight" in name for name in saved if name.startswith("layers"))
    assert not {"tok_embeddings.weight", "output.weight", "norm.weight"} & set(saved)


def test_the_export_is_the_dequantised_base_with_its_adapters(run, tmp_path):
    """The export equals the offline conversion, and has the logits of the checkpoint of adapters."""
    name, root = run
    recipe, *rest = arguments_of(root, name)[1:]
    convert = ["to-hf", recipe, "--checkpoint", str(root / "run/checkpoint/step-3"), "--output", str(tmp_path / "out")]
    assert convert_checkpoint.main([*convert, *rest]) == 0
    theirs, ours, base = (
        contents(path) for path in (tmp_path / "out", root / "run/checkpoint/step-3/hf", root / "dense")
    )
    assert theirs.keys() == ours.keys() == base.keys()
    assert not [key for key, x in ours.items() if not torch.equal(x, theirs[key])]
    trained = [key for key in theirs if key.split(".")[-2] in LINEARS or key.endswith(".gate.weight")]
    assert all(torch.equal(x, base[key]) for key, x in theirs.items() if key not in trained)
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    model = read(root, name, root / "run/checkpoint/step-3")
    quantized = logits(model, tokens)
    model.close()
    # The base has moved since the run.
    moved = ["--checkpoint.initial_load_path", str((root / "weights").rename(root / "moved"))]
    model = read(root, name, root / "run/checkpoint/step-3", *moved)
    (root / "moved").rename(root / "weights")
    assert torch.equal(logits(model, tokens), quantized)
    model.close()
    if name != "llada2":  # whose fused projections PEFT cannot adapt in parts
        # The adapters alone, on the base that is quantised again.
        convert[-1] = str(tmp_path / "adapter")
        assert convert_checkpoint.main([*convert, "--adapter", *rest]) == 0
        model = TrainedModel(parse_config.parse(arguments_of(root, name)), str(root / "weights"), convert[-1])
        assert torch.equal(logits(model, tokens), quantized)
        model.close()
    model = read(root, name, tmp_path / "out", *DENSE)
    torch.testing.assert_close(logits(model, tokens), quantized, rtol=1e-5, atol=5e-5)  # float32 rounding
    model.close()


@pytest.mark.parametrize("run", ["llada"], indirect=True)
def test_mistakes(run, tmp_path):
    _, root = run
    changed = tmp_path / "weights"
    shutil.copytree(root / "weights", changed)
    weights = contents(changed)
    for file in changed.glob("*.safetensors*"):
        file.unlink()
    save_file({key: x + 1 for key, x in weights.items()}, changed / "model.safetensors")
    other_base = ["--checkpoint.initial_load_path", str(changed)]
    outputs = run_many([
        (1, [*arguments_of(root, "llada"), *other_base], {"status": 2}),
        (1, [*arguments_of(root, "llada"), *DENSE], {"status": 2}),
        (1, [*arguments_of(root, "llada", "dense-run"), "--training.steps", "4"], {"status": 2}),
    ])  # fmt: skip
    assert "were trained on the base" in outputs[0] and str(changed) in outputs[0]
    assert "holds adapters of a 4-bit base; set lora.base to 'nf4'" in outputs[1]
    assert "was trained without a 4-bit base" in outputs[2]
    assert not any("Traceback" in output for output in outputs)

    # A run on a 4-bit base needs its initial weights when it resumes as well.
    assert not training_run._resumes(parse_config.parse(arguments_of(root, "llada")))
    assert training_run._resumes(parse_config.parse([*arguments_of(root, "llada"), *DENSE]))
    with pytest.raises(UserError, match=r"holds adapters of a base without quantisation; set lora\.base to 'unquant"):
        read(root, "llada", root / "dense-run/checkpoint/step-3")
    plain = parse_config.parse(arguments_of(root, "llada"))
    plain.model.converters = []
    with pytest.raises(UserError, match="adapters of a 4-bit base, but the configuration trains no adapters; set"):
        step_2 = str(root / "run/checkpoint/step-2")
        convert_checkpoint.to_hugging_face(get_conversion(plain), step_2, str(tmp_path / "export"), None)
    for damaged in (None, {"type": "int8", "location": "", "fingerprint": ""}):
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            base_model.saved_identity("step-2", {"base": damaged})

    def check(*arguments, sizes=LLADA["nf4"]):
        config = parse_config.parse([*arguments_of(root, "llada"), *arguments])
        config.parallelism.data_parallel_shard_degree = max(1, config.parallelism.data_parallel_shard_degree)
        with pytest.raises(UserError) as error:
            check_layout.check_backbone(config, sizes)
        return str(error.value)

    assert "tensor_parallel_degree = 2" in check("--parallelism.tensor_parallel_degree", "2")
    assert "the linear gate of a layer has 160 x 64 elements" in check(sizes=LLADA["debug"])
    assert "which 4 ranks cannot share" in check("--parallelism.data_parallel_shard_degree", "4")
    # An export needs whole experts on each rank.
    assert nf4.misfit(LLADA_MOE["7B-A1B"], 128) == "a layer has 64 experts, which 128 ranks cannot share evenly"
    assert {nf4.misfit(sizes, 64) for sizes in (LLADA["8B"], LLADA_MOE["7B-A1B"], LLADA2["mini"])} == {""}
    assert nf4.misfit(replace(LLADA2["mini"], shared_hidden_dim=500), 1) == (
        "the linear shared_gate of a layer has 500 x 2048 elements, which 16,384 does not divide"
    )
