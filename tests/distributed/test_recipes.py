"""LLaDA-8B's and LLaDA-MoE's recipes from published weights to an export, and the quickstart, of debug size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from memdlm_dist.checkpoint.catalogue import read_metadata
from memdlm_dist.checkpoint.hugging_face_folder import INDEX
from memdlm_dist.config import parse_config
from memdlm_dist.inference.trained_model import TrainedModel
from tests.support.launching import run_many, scalars
from tests.support.published import RECIPES, SMALL, contents
from tools import convert_checkpoint, generate, random_weights

NAMES = ("llada", "llada_moe")
CODE = "raise AssertionError('executed')\n"  # modelling code beside the weights
EXPORT = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
EXPERTS = ["--parallelism.expert_parallel_degree", "2"]


def arguments_of(root, name, run="run"):
    return [
        "--job.config_file", RECIPES[name], *SMALL, "--job.dump_folder", str(root / run),
        "--checkpoint.initial_load_path", str(root / "weights"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return each recipe's folder with generated weights and the runs that start from them."""
    roots = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    runs = []
    for name, root in roots.items():
        recipe, *rest = arguments_of(root, name)[1:]
        assert random_weights.main([recipe, "--output", str(root / "weights"), "--dtype", "float32", *rest]) == 0
        (root / "weights/modeling.py").write_text(CODE)
        runs.append((2, [*arguments_of(root, name), "--checkpoint.save_in_hf"]))
    # Repeat the last step from the run's previous checkpoint, on another layout and then on the first one.
    root = roots["llada"]
    last_step = [
        *arguments_of(root, "llada", "exported"), *EXPORT, "--checkpoint.no-initial_load_in_hf",
        "--checkpoint.initial_load_path", str(root / "run/checkpoint/step-2"),
        "--checkpoint.no-initial_load_model_only", "--validation.no-enable",
    ]  # fmt: skip
    runs += [(2, [*last_step, "--parallelism.tensor_parallel_degree", "2"]), (2, last_step)]
    root = roots["llada_moe"]
    # Start from a checkpoint of the plain model with the same weights.
    recipe, *rest = arguments_of(root, "llada_moe")[1:]
    base = ["--input", str(root / "weights"), "--output", str(root / "base")]
    assert convert_checkpoint.main(["from-hf", recipe, *base, *rest]) == 0
    adapters = [
        "--lora.export", "adapter", "--validation.no-enable", "--checkpoint.no-initial_load_in_hf",
        "--checkpoint.initial_load_path", str(root / "base"),
    ]  # fmt: skip
    runs.append((2, [*arguments_of(root, "llada_moe", "exported"), *EXPERTS, *EXPORT]))
    runs.append((2, [*arguments_of(root, "llada_moe", "adapters"), *EXPERTS, *EXPORT, *adapters]))
    run_many(runs)
    return roots


@pytest.fixture(params=NAMES)
def run(request, trained):
    return request.param, trained[request.param]


def read(root, name, checkpoint):
    return TrainedModel(parse_config.parse(arguments_of(root, name)), str(checkpoint))


def logits(model, tokens):
    return model.logits(tokens, torch.ones_like(tokens).bool(), torch.ones_like(tokens).bool())


def test_training_changes_the_adapters_alone(run):
    name, root = run
    base = contents(root / "weights")
    model = read(root, name, root / "run/checkpoint")
    state = model.model.state_dict()
    adapters = {key: x for key, x in state.items() if "lora_" in key}
    frozen = model._sd_adapter.to_hf({key: x for key, x in state.items() if "lora_" not in key})
    assert frozen.keys() == base.keys() and all(torch.equal(x, base[key]) for key, x in frozen.items())
    # B starts at zero.
    assert adapters and all(x.abs().max() > 0 for x in adapters.values())
    linears = 4 * 7 if name == "llada" else 4 * (4 + 3 + 1)  # with the router
    assert len(adapters) == 2 * linears
    # AdamW has no state for the base.
    saved = read_metadata(str(root / "run/checkpoint/step-3")).state_dict_metadata
    moments = [key for key in saved if key.endswith(".exp_avg")]
    assert len(moments) == len(adapters) and all("lora_" in key for key in moments)
    model.close()


def test_adapters_train_alike_on_another_layout(trained):
    """Step 3 under tensor parallelism continues FSDP2's checkpoint, adapters and moments included."""
    root = trained["llada"]
    theirs, ours = scalars(root / "run"), scalars(root / "exported")
    for name in ("loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/inner_loss_step_2"):
        assert sorted(ours[name]) == [3]
        assert ours[name][3] == pytest.approx(theirs[name][3], rel=1e-5), name
    # The repeated step overwrote nothing. AdamW amplifies rounding where gradients are small.
    first, second = (contents(root / f"exported/checkpoint/step-3{end}") for end in (".replaced-1", ""))
    for key, x in first.items():
        torch.testing.assert_close(x, second[key], rtol=0, atol=1e-3)


def test_load_balance_in_tensorboard(trained):
    """Expert-load scalars cover the global batch, on two ranks with activation checkpointing."""
    for run in ("run", "exported"):
        curves = scalars(trained["llada_moe"] / run)
        for name, (low, high) in {"largest_load": (1, 8), "unused": (0, 0.75), "load_entropy": (0.2, 1)}.items():
            assert sorted(curves[f"experts/{name}"]) == [1, 2, 3]
            assert all(low <= value <= high for value in curves[f"experts/{name}"].values())
        # The first step's routing does not depend on how the experts are sharded.
    first, sharded = (scalars(trained["llada_moe"] / run)["experts/load_entropy"][1] for run in ("run", "exported"))
    assert first == pytest.approx(sharded, abs=1e-6)
    assert not any(name.startswith("experts/") for name in scalars(trained["llada"] / "run"))


def test_the_last_save_is_a_published_folder_with_the_adapters_merged(run):
    _, root = run
    folder = root / "exported/checkpoint/step-3"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "run.json"} <= files
    assert (folder / "modeling.py").read_text() == CODE
    assert "sharded" not in files
    base, ours = contents(root / "weights"), contents(folder)
    assert {key: x.shape for key, x in base.items()} == {key: x.shape for key, x in ours.items()}
    changed = {key for key, x in ours.items() if not torch.equal(x, base[key])}
    adapted = (
        "q_proj",
        "attn_out",
        "ff_proj",
        "up_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "down_proj",
        "gate_proj",
        "gate",
    )
    expected = {
        key for key in base if key.split(".")[-2] in adapted or (".blocks." in key and key.endswith(".ff_out.weight"))
    }
    # Experts without a token stay unchanged.
    assert changed <= expected and all(".experts." in key for key in expected - changed)


def test_every_checkpoint_has_an_export(run, tmp_path):
    """Exports equal offline conversions of their checkpoints, with merged adapters, code and tokenizer."""
    name, root = run
    recipe, *rest = arguments_of(root, name)[1:]
    for step in (2, 3):
        checkpoint, out = root / f"run/checkpoint/step-{step}", tmp_path / f"{step}"
        export = ["to-hf", recipe, "--checkpoint", str(checkpoint), "--output", str(out)]
        assert convert_checkpoint.main([*export, *rest]) == 0
        theirs, ours = contents(out), contents(checkpoint / "hf")
        assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[key]) for key, x in theirs.items())
        files = {path.name for path in out.iterdir()}
        assert files == {path.name for path in (checkpoint / "hf").iterdir()} >= {"modeling.py", "tokenizer.json"}
        for file in files - {path.name for path in out.glob("*.safetensors")} - {INDEX}:
            assert (out / file).read_bytes() == (checkpoint / "hf" / file).read_bytes(), file
        indices = [json.loads((folder / INDEX).read_text()) for folder in (out, checkpoint / "hf")]
        assert indices[0] == indices[1]
        for file in (checkpoint / "hf").glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}  # some versions of transformers require it


def test_what_is_merged_under_expert_parallelism(trained):
    """Merged export equals base plus adapters, expert by expert, for one run exported both ways."""
    root = trained["llada_moe"]
    base, merged = contents(root / "weights"), contents(root / "exported/checkpoint/step-3")
    adapters = load_file(root / "adapters/checkpoint/step-3/adapter_model.safetensors")
    for key, weight in base.items():
        A = adapters.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
        if A is not None:
            weight = weight + 2.0 * adapters[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"] @ A
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-6)


def test_merged_equals_unmerged(run, tmp_path):
    """Merged weights give the logits of base plus adapters, under the same configuration."""
    name, root = run
    recipe, *rest = arguments_of(root, name)[1:]
    assert convert_checkpoint.main(["to-hf", recipe, "--output", str(tmp_path / "merged"), *rest]) == 0
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    model = read(root, name, root / "run/checkpoint")
    unmerged = logits(model, tokens)
    model.load(str(tmp_path / "merged"))
    # float32 rounding: W x + B A x against (W + B A) x.
    torch.testing.assert_close(logits(model, tokens), unmerged, rtol=0, atol=2e-5)
    model.load(str(root / "weights"))
    assert (logits(model, tokens) - unmerged).abs().max() > 0.01
    model.close()


def test_the_adapters_alone_in_pefts_layout(run, tmp_path, capsys):
    name, root = run
    recipe, *rest = arguments_of(root, name)[1:]
    assert convert_checkpoint.main(["to-hf", recipe, "--adapter", "--output", str(tmp_path / "peft"), *rest]) == 0
    capsys.readouterr()
    base = contents(root / "weights")
    saved = root / "adapters/checkpoint/step-3"
    for folder in (tmp_path / "peft", *([saved] if name == "llada_moe" else [])):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (32, 64.0)
        tensors = load_file(folder / "adapter_model.safetensors")
        largest = 0.0
        for module in config["target_modules"]:
            A, B = (tensors.pop(f"base_model.model.{module}.lora_{letter}.weight") for letter in "AB")
            assert A.shape[0] == B.shape[1] == 32 and (B @ A).shape == base[f"{module}.weight"].shape
            largest = max(largest, B.abs().max().item())
        assert not tensors and largest > 0
        assert not list(folder.glob("model*"))
    # Base and adapter read like the checkpoint.
    command = [recipe, "--prompt", "def read", "--new-tokens", "4", "--json", "--memory", "on"]
    answers = []
    for read_from in (
        ["--checkpoint", str(root / "run/checkpoint")],
        ["--checkpoint", str(root / "weights"), "--adapter", str(tmp_path / "peft")],
    ):
        assert generate.main([*command, *read_from, *rest]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["response"] == answers[1]["response"]
    assert [answer["adapter"] for answer in answers] == [None, str(tmp_path / "peft")]


def test_generate_from_the_exported_folder(run, capsys):
    name, root = run
    recipe, *rest = arguments_of(root, name, "exported")[1:]
    folder = str(root / "exported/checkpoint/step-3")  # the newest of the run
    command = [recipe, "--prompt", "def read", "--new-tokens", "4", "--json", "--memory", "on"]
    assert generate.main([*command, *rest]) == 0
    response = json.loads(capsys.readouterr().out)
    assert response["passes"] == 4 and response["memory"] == "on" and response["checkpoint"] == folder


def test_the_quickstart_reads_the_same_samples_on_four_ranks(tmp_path):
    """Shipped configuration except model and data; the local batch size follows from the number of ranks."""
    for ranks in (4, 1):
        arguments = [
            "--job.config_file", "train_configs/quickstart.toml", *SMALL[:SMALL.index("--training.steps")],
            "--training.steps", "3", "--job.dump_folder", str(tmp_path / f"{ranks}"), "--metrics.log_freq", "1",
            "--validation.no-enable", "--checkpoint.no-enable", "--parametric_memory.start_step", "3",
        ]  # fmt: skip
        run_many([(ranks, arguments, {"record": str(tmp_path / f"drawn-{ranks}")})])
    drawn, losses = {}, {}
    for ranks in (4, 1):
        files = [tmp_path / f"drawn-{ranks}/rank{rank}.jsonl" for rank in range(ranks)]
        lines = [file.read_text().splitlines() for file in files]
        assert len({len(rank_lines) for rank_lines in lines}) == 1
        drawn[ranks] = sorted(line for rank_lines in lines for line in rank_lines)
        losses[ranks] = scalars(tmp_path / f"{ranks}")["loss_metrics/global_avg_loss"]
    assert drawn[4] == drawn[1] and sum('["level", 2' in line for line in drawn[4]) == 16
    # Summation order of float32 losses.
    assert sorted(losses[4]) == [1, 2, 3] and losses[4] == pytest.approx(losses[1], rel=1e-5)


def test_recipes_are_what_the_paper_trains():
    targets = {
        "llada": ["all-linear"],
        "llada_moe": ["all-linear"],
        "llada2": ["attention", "ffn"],
    }  # its router has none
    for name, path in RECIPES.items():
        config = parse_config.parse(["--job.config_file", path])
        memory, lora = config.parametric_memory, config.lora
        assert (memory.rank, memory.alpha, memory.layer_fraction, memory.learning_rate) == (32, 64.0, 0.1, 0.1)
        assert (memory.inner_steps, memory.gradient_clip, memory.pre_anchor_scale) == (2, 1.0, 1.5)
        assert (lora.rank, lora.alpha, config.optimizer.lr, config.training.seq_len) == (32, 64.0, 2e-5, 4096)
        assert (config.training.epochs, config.lr_scheduler.warmup_ratio) == (5, 0.1)
        assert config.lr_scheduler.decay_type == "cosine" and config.lr_scheduler.decay_ratio is None
        optimizer = config.optimizer
        assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
        assert (config.model.name, lora.base, lora.dropout, lora.target_modules) == (name, "nf4", 0.05, targets[name])
        assert (memory.granularity, memory.samples_per_set, config.training.local_batch_size) == ("sample", 2, 2)
        assert (config.training.max_norm, config.debug.seed, config.data.group_by_length) == (1.0, 42, True)
        assert config.checkpoint.initial_load_in_hf
        assert Path(path).is_file()
