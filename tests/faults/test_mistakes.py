# ruff: noqa: E501  (one line per mistake)
"""User mistakes: one clear sentence, a non-zero exit status, no traceback."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from memdlm_dist import train
from memdlm_dist.errors import EXIT_STATUS, UserError
from tools import generate, prepare_data, random_weights

DEBUG = "tests/assets/debug"
MOE, LLADA2 = ("--model.name", "llada_moe"), ("--model.name", "llada2")


@dataclass
class Mistake:
    name: str
    message: str  # part of the error message
    args: tuple[str, ...] = ()
    toml: str = ""  # appended to debug.toml
    env: dict[str, str] = field(default_factory=dict)


MISTAKES = [
    Mistake("missing config", "no/such.toml does not exist; check --job.config_file", ("--job.config_file", "no/such.toml")),
    Mistake("not TOML", "is not valid TOML", toml="= 3"),
    Mistake("unknown section in the file", "Unknown key parametric_memory2", toml="[parametric_memory2]\nranc = 3"),
    Mistake("unknown flag", "did you mean parametric_memory.rank", ("--parametric_memory.ranc", "3")),
    Mistake("unknown section", "did you mean parametric_memory", ("--parametric_memry.rank", "3")),
    Mistake("value of a switch", "error: --compile.enable takes no value, but is given 'true'; write --compile.enable or --compile.no_enable", ("--compile.enable", "true")),
    Mistake("wrong type of a flag", "error: --training.steps must be int, but is 'many'", ("--training.steps", "many")),
    Mistake("missing shards", "There are no shards in nowhere", ("--data.train", "nowhere")),
    Mistake("missing held-out shards", "no shards in nowhere", ("--validation.enable", "--data.validation", "nowhere")),
    Mistake("no tokenizer", "There is no tokenizer.json in nowhere", ("--model.hf_assets_path", "nowhere")),
    Mistake("world size", "3 processes cannot be divided", ("--parallelism.tensor_parallel_degree", "2"), env={"WORLD_SIZE": "3"}),
    Mistake("world size against the mesh", "but 3 processes", ("--parallelism.data_parallel_shard_degree", "2"), env={"WORLD_SIZE": "3"}),
    Mistake("sequence length", "hold sequences of 128 tokens, but training.seq_len is 64", ("--training.seq_len", "64")),
    Mistake("unwritable output", "cannot be written to", ("--job.dump_folder", "pyproject.toml/out")),
    Mistake("batch size", "must be a multiple of training.local_batch_size 4", ("--training.global_batch_size", "6")),
    Mistake("share of no batch", "training.local_batch_size = -1 takes a share of training.global_batch_size, which is not set; set one of them.", ("--training.local_batch_size", "-1")),
    Mistake("share of a rank", "training.global_batch_size = 16 cannot be divided among 3 data-parallel ranks; set it to a multiple of 3 (the nearest is 15), or change NGPU", ("--training.local_batch_size", "-1", "--training.global_batch_size", "16"), env={"WORLD_SIZE": "3"}),
    Mistake("uneven nodes", "needs the same number of processes on every node, but this one has 8 of the 12 on 2 nodes", ("--parallelism.data_parallel_shard_within", "node"), env={"WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "8"}),
    Mistake("ranks over TP and CP", "which needs a multiple of 8; change NGPU or the degrees under [parallelism].", ("--parallelism.context_parallel_degree", "4", "--parallelism.tensor_parallel_degree", "2"), env={"WORLD_SIZE": "4"}),
    Mistake("too few samples", "fewer than one global batch of 5000", ("--training.local_batch_size", "5000")),
    Mistake("no memory at all", "parametric_memory.probability must be above 0 and at most 1, but is 0.0; for no memory at all set", ("--parametric_memory.probability", "0")),
    Mistake("no layer", "parametric_memory.layer_fraction must be above 0 and at most 1, but is 0.0; for no memory", ("--parametric_memory.layer_fraction", "0")),
    Mistake("rank", "parametric_memory.rank must be at least 1", ("--parametric_memory.rank", "0")),
    Mistake("target module", "'gaet', which model llada does not have", ("--parametric_memory.target_modules", "gaet,up")),
    Mistake("group and member", "names a linear twice: ffn, up expands to gate, up, down, up", ("--parametric_memory.target_modules", "ffn,up")),
    Mistake("inner steps", "inner_steps must be at least 1", ("--parametric_memory.inner_steps", "0")),
    Mistake("steps of a single state", "cannot be taken along the anchor_only trajectory", ("--parametric_memory.inner_steps", "3", "--parametric_memory.trajectory", "anchor_only")),
    Mistake("temperature of no teacher", "distillation_temperature = 2.0 has no effect on inner_loss = 'cross_entropy'", ("--parametric_memory.distillation_temperature", "2")),
    Mistake("end of no progression", "progressive_end = 0.3 has no effect on trajectory = 'anchor_consistent'", ("--parametric_memory.progressive_end", "0.3")),
    Mistake("two granularities", "samples_per_set = 2 contradicts granularity = 'batch'", ("--parametric_memory.samples_per_set", "2", "--parametric_memory.granularity", "batch")),
    Mistake("sets of no sample", "parametric_memory.samples_per_set must be at least 1", ("--parametric_memory.samples_per_set", "0")),
    Mistake("half a group of rows", "training.local_batch_size = 4 does not hold whole groups of parametric_memory.samples_per_set = 3 rows", ("--parametric_memory.samples_per_set", "3")),
    Mistake("half a group of held-out rows", "validation.local_batch_size = 1 does not hold whole groups of parametric_memory.samples_per_set = 2 rows", ("--parametric_memory.samples_per_set", "2", "--validation.enable", "--validation.local_batch_size", "1")),
    Mistake("tasks without validation", "validation.tasks needs validation.enable; set it, or remove the tasks.", ("--validation.tasks", "facts_1")),
    Mistake("unknown task", "validation.tasks names 'maths', which is no task; choose among multi_value, ", ("--validation.enable", "--validation.tasks", "maths")),
    Mistake("length of tasks", "validation.tasks_lengths has 97, which is not from 1 to 96 (training.seq_len less validation.tasks_new_tokens); correct it.", ("--validation.enable", "--validation.tasks", "facts_1", "--validation.tasks_lengths", "64", "97")),
    Mistake("a length of tasks twice", "validation.tasks_lengths has 64 twice; remove one.", ("--validation.enable", "--validation.tasks", "facts_1", "--validation.tasks_lengths", "64", "64")),
    Mistake("answers of tasks that fill the rows", "validation.tasks_new_tokens = 128 leaves no room for questions in training.seq_len = 128; lower it.", ("--validation.enable", "--validation.tasks", "facts_1", "--validation.tasks_new_tokens", "128")),
    Mistake("lengths of no tasks", "validation.tasks_lengths has no effect without validation.tasks; name tasks, or remove it.", ("--validation.tasks_lengths", "64")),
    Mistake("numbers of tasks that are too few", "The sizes of a needle task need 12 different words, names or numbers like ", ("--validation.enable", "--validation.tasks", "multi_value", "--validation.tasks_sizes", "digits=1,values=12")),
    Mistake("huge task", "The task common_words needs 3,000,000 tokens or more", ("--validation.enable", "--validation.tasks", "common_words", "--validation.tasks_sizes", "common=100000")),
    Mistake("task that does not fit", "The task common_words needs ", ("--validation.enable", "--validation.tasks", "common_words")),
    Mistake("size of tasks", "validation.tasks_sizes has 'fakts=2', which is not NAME=NUMBER; the names are ", ("--validation.enable", "--validation.tasks", "facts_1", "--validation.tasks_sizes", "fakts=2")),
    Mistake("inner loss", "error: --parametric_memory.inner_loss must be one of 'cross_entropy', 'kl', 'reverse_kl', 'hidden_mse', 'hidden_cosine', but is 'mse'", ("--parametric_memory.inner_loss", "mse")),
    Mistake("flavour", "choose among 8B, 1B, quickstart, needle, needle_gpu, bench, debug, ", ("--model.flavor", "7B")),
    Mistake("model", "is not a diffusion backbone", ("--model.name", "llama3")),
    Mistake("converters", "model.converters = ['float8'] is not supported", ("--model.converters", "float8")),
    Mistake("adapters' rank", "lora.rank must be at least 1", ("--lora.rank", "0")),
    Mistake("adapters' linears", "lora.target_modules names 'w1', which model llada does not have", ("--lora.target_modules", "w1")),
    Mistake("adapter of a router that is not there", "lora.target_modules names 'router', which model llada does not have; choose among ffn, ", ("--lora.target_modules", "router")),
    Mistake("adapters named twice", "lora.target_modules names a linear twice: all-linear, router expands", (*MOE, "--lora.target_modules", "all-linear,router")),
    Mistake("adapter without adapters", 'checkpoint.initial_adapter needs a run that trains adapters; set model.converters = ["lora"]', ("--checkpoint.initial_adapter", "x")),
    Mistake("adapter without a base", "checkpoint.initial_adapter needs the base that the adapter was trained on", ("--checkpoint.initial_adapter", "x", "--model.converters", "lora", "--checkpoint.enable")),
    Mistake("experts", "expert_parallel_degree = 2 needs a mixture-of-experts", ("--parallelism.expert_parallel_degree", "2"), env={"WORLD_SIZE": "2"}),
    Mistake("an adapter of a part", "lora.export = 'adapter' needs adapters of all or none of q, k, v", (*LLADA2, "--model.converters", "lora", "--lora.export", "adapter", "--lora.target_modules", "q,v")),
    Mistake("experts over ranks", "The 8 experts of model.flavor debug are not divisible by parallelism.expert_parallel_degree (3)", (*MOE, "--parallelism.expert_parallel_degree", "3"), env={"WORLD_SIZE": "3"}),
    Mistake("experts over shards", "The 8 experts of model.flavor debug cannot be sharded evenly over data_parallel_shard_degree 16", MOE, env={"WORLD_SIZE": "16"}),
    Mistake("experts of too few ranks", "expert_parallel_degree (4) must divide data_parallel_shard_degree (2)", (*MOE, "--parallelism.expert_parallel_degree", "4"), env={"WORLD_SIZE": "2"}),
    Mistake("experts and TP", "expert_tensor_parallel_degree (1) must be tensor_parallel_degree (2)", (*MOE, "--parallelism.expert_parallel_degree", "2", "--parallelism.tensor_parallel_degree", "2"), env={"WORLD_SIZE": "4"}),
    Mistake("adapters of experts and TP", "but tensor parallelism cannot shard adapters of experts", (*MOE, "--model.converters", "lora", "--parallelism.tensor_parallel_degree", "2"), env={"WORLD_SIZE": "2"}),
    Mistake("weights without checkpoints", "checkpoint.initial_load_in_hf needs checkpoint.enable", ("--checkpoint.initial_load_in_hf",)),
    Mistake("weights and more", "set checkpoint.initial_load_model_only = true", ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.no-initial_load_model_only")),
    Mistake("quantised weights", "initial_load_in_hf_quantized is not supported", ("--checkpoint.initial_load_in_hf_quantized",)),
    Mistake("missing weights", "There is no folder nowhere with Hugging Face weights", ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", "nowhere")),
    Mistake("weights in another format", "There are no .safetensors files in tests/assets/debug/tokenizer", ("--checkpoint.enable", "--checkpoint.initial_load_in_hf")),
    Mistake("last save without the rest", "set checkpoint.last_save_model_only = true as well", ("--checkpoint.enable", "--checkpoint.last_save_in_hf")),
    Mistake("exports without checkpoints", "checkpoint.save_in_hf needs checkpoint.enable", ("--checkpoint.save_in_hf",)),
    Mistake("exports in a store", "checkpoint.save_in_hf needs a checkpoint.folder on disk, not s3://bucket/run", ("--checkpoint.enable", "--checkpoint.save_in_hf", "--checkpoint.folder", "s3://bucket/run")),
    Mistake("last save in a store", "needs a checkpoint.folder on disk, not s3://bucket/run", ("--checkpoint.enable", "--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", "--checkpoint.folder", "s3://bucket/run")),
    Mistake("pipeline", "pipeline_parallel_degree = 2 is not supported", ("--parallelism.pipeline_parallel_degree", "2")),
    Mistake("replication alone", "needs data_parallel_shard_degree > 1", ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "1"), env={"WORLD_SIZE": "2"}),
    Mistake("sequence over TP", "training.seq_len (127) is not divisible", ("--training.seq_len", "127", "--parallelism.tensor_parallel_degree", "2"), env={"WORLD_SIZE": "2"}),
    Mistake("heads over TP", "key-value heads of model.flavor debug (4)", ("--parallelism.tensor_parallel_degree", "8"), env={"WORLD_SIZE": "8"}),
    Mistake("ranks over CP", "x context_parallel_degree 2 x data_parallel_shard_degree 2 makes 4 ranks, but 2 processes", ("--parallelism.context_parallel_degree", "2", "--parallelism.data_parallel_shard_degree", "2"), env={"WORLD_SIZE": "2"}),
    Mistake("sequence over CP", "training.seq_len (126) is not divisible by parallelism.context_parallel_degree x tensor_parallel_degree (2 x 2)", ("--training.seq_len", "126", "--parallelism.tensor_parallel_degree", "2", "--parallelism.context_parallel_degree", "2"), env={"WORLD_SIZE": "4"}),
    Mistake("heads over CP", "key-value heads of model.flavor debug (4) are not divisible by parallelism.context_parallel_degree", ("--parallelism.context_parallel_degree", "8"), env={"WORLD_SIZE": "8"}),
    Mistake("ring without CUDA", "'ring' needs CUDA devices", ("--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_method", "ring"), env={"WORLD_SIZE": "2"}),
    Mistake("balanced context", "context_parallel_load_balancer = 'headtail' is for causal", ("--parallelism.context_parallel_load_balancer", "headtail")),
    Mistake("experts and CP", "context_parallel_degree = 2 is not supported with expert_parallel_degree = 2", (*MOE, "--parallelism.expert_parallel_degree", "2", "--parallelism.context_parallel_degree", "2"), env={"WORLD_SIZE": "4"}),
    Mistake("experts sharded over CP", "cannot be sharded evenly over data_parallel_shard_degree 8 x context_parallel_degree 2", (*MOE, "--parallelism.context_parallel_degree", "2"), env={"WORLD_SIZE": "16"}),
    Mistake("no biases to balance", "load_balance_coeff = 0.001 needs a router with a bias per expert, which model llada_moe does not have; remove it", (*MOE, "--model.load_balance_coeff", "0.001")),
    Mistake("balancing coefficient", "model.load_balance_coeff must be above 0, but is 0.0; remove it to keep the biases", (*LLADA2, "--model.load_balance_coeff", "0")),
    Mistake("biases in an adapter", "load_balance_coeff = 0.001 is not supported with lora.export = 'adapter', which saves the adapters alone", (*LLADA2, "--model.load_balance_coeff", "0.001", "--model.converters", "lora", "--lora.export", "adapter", "--lora.target_modules", "ffn")),
    Mistake("biases beside a 4-bit base", "is not supported with lora.base = 'nf4', which saves the adapters alone", (*LLADA2, "--model.load_balance_coeff", "0.001", "--model.converters", "lora", "--lora.base", "nf4")),
    Mistake("shorter context", "model.rope_scaling must be at least 1", ("--model.rope_scaling", "0.5")),
    Mistake("proportions", "data.proportions has 2 entries for 1 stream", ("--data.proportions", "1", "2")),
    Mistake("validation steps", "validation.steps must be at least 1, or -1 (all held-out sequences), but is 0", ("--validation.steps", "0")),
    Mistake("missing checkpoint", "There is no complete checkpoint in nowhere", ("--checkpoint.enable", "--checkpoint.initial_load_path", "nowhere")),
    Mistake("seed checkpoint without checkpoints", "needs checkpoint.enable", ("--checkpoint.create_seed_checkpoint",)),
    Mistake("negative interval of kept checkpoints", "checkpoint.keep_every must be at least 1, or 0 (off), but is -1", ("--checkpoint.keep_every", "-1")),
    Mistake("no interval", "checkpoint.interval must be at least 1", ("--checkpoint.interval", "0")),
    Mistake("unknown change", "accept_changes names data.tain; choose among training.global_batch_size,", ("--checkpoint.accept_changes", "data.tain")),
    Mistake("no skips", "max_consecutive_skips must be at least 1", ("--reliability.max_consecutive_skips", "0")),
    Mistake("skipping too late", "unset optimizer.early_step_in_backward", ("--reliability.on_nonfinite", "skip", "--optimizer.early_step_in_backward")),
    Mistake("no download", "data.download_retry must be at least 1", ("--data.download_retry", "0")),
    Mistake("unknown store", "s4://b/run is not a location that can be opened", ("--checkpoint.enable", "--checkpoint.folder", "s4://b/run")),
    Mistake("unknown store of shards", "s4://b/train is not a location", ("--data.train", "s4://b/train")),
    Mistake("state that is not there", "exclude_from_loading names dataloder; choose among train_state, model,", ("--checkpoint.enable", "--checkpoint.exclude_from_loading", "dataloder")),
    Mistake("negative retention", "error: checkpoint.keep_latest_k must be at least 2, or 0 (keep all), but is -1; with 1 the only checkpoint may still be incomplete.", ("--checkpoint.keep_latest_k", "-1")),
    Mistake("learning rate", "error: optimizer.lr must be at least 0, but is -1.0.", ("--optimizer.lr", "-1")),
    Mistake("momentum", "error: optimizer.beta2 must be at least 0 and below 1, but is 1.0.", ("--optimizer.beta2", "1")),
    Mistake("not a number", "error: optimizer.eps must be above 0, but is nan.", ("--optimizer.eps", "nan")),
    Mistake("seed", "error: debug.seed must be at least 0 and at most 9,223,372,036,854,775,807, but is -3.", ("--debug.seed", "-3")),
    Mistake("optimizer", "error: optimizer.name must be Adam or AdamW, but is 'SGD'.", ("--optimizer.name", "SGD")),
    Mistake("types", "training.dtype = 'bfloat16' keeps the weights in bfloat16, but training.mixed_precision_param = 'float32'", ("--training.dtype", "bfloat16")),
    Mistake("torchtitan's data", "--training.dataset has no effect; name folders of shards in data.train.", ("--training.dataset", "c4")),
    Mistake("best without validation", "keep_best = 'validation/loss_memory_off' needs validation.enable; set it.", ("--checkpoint.enable", "--checkpoint.keep_best", "validation/loss_memory_off")),
    Mistake("best of rare validations", "needs a validation at every checkpoint; set checkpoint.interval (5) to a multiple of validation.freq (2)", ("--checkpoint.enable", "--validation.enable", "--validation.freq", "2", "--checkpoint.keep_best", "validation/loss_memory_off")),
    Mistake("layers to checkpoint", "selective_ac_option must be 'op' or a positive integer, but is '0'", ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "0")),
    Mistake("best of a memory", "needs parametric_memory.enable; set it, or choose validation/loss_memory_off", ("--checkpoint.enable", "--validation.enable", "--parametric_memory.no_enable", "--checkpoint.keep_best", "validation/loss_memory_on")),
    Mistake("seed checkpoint on two", "needs a single process", ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint"), env={"WORLD_SIZE": "2"}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)


def fail(capsys, args) -> str:
    """Run the training entry point; return its one error message."""
    assert train.main(args) == EXIT_STATUS
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert "Traceback" not in captured.err + captured.out
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith("."), captured.err
    return errors[0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_configuration(mistake, tmp_path, capsys, monkeypatch):
    for name, value in mistake.env.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "config.toml"
    config.write_text(Path("train_configs/debug.toml").read_text() + mistake.toml)
    args = [f"--job.config_file={config}", f"--job.dump_folder={tmp_path}/out", *mistake.args]
    if mistake.name == "missing config":
        args = list(mistake.args)
    assert mistake.message in fail(capsys, args)


@pytest.mark.parametrize(
    "toml, message",
    [
        ('[parametric_memory]\nrank = "8"', "parametric_memory.rank in {} must be int, but is '8'"),
        ("[parametric_memory]\nrank = true", "parametric_memory.rank in {} must be int, but is True"),
        ('[parametric_memory]\ngranularity = "token"', "must be one of 'sample', 'batch', but is 'token'"),
        (
            "[parametric_memory]\ntarget_modules = [1]",
            "parametric_memory.target_modules in {} must be list[str]",
        ),
        ("[data]\nshufle = true", "Unknown key data.shufle in {}; did you mean data.shuffle."),
        ("[data]\nzzz = true", "Unknown key data.zzz in {}; known keys are data.cache_folder"),
        ("data = 3", "data in {} must be a section, written [data]"),
        (
            '[validation]\ndataset_path = "x"',
            "validation.dataset_path in {} has no effect; name folders of shards in",
        ),
    ],
)
def test_types_and_names_in_the_file(toml, message, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(toml)
    assert message.format(config) in fail(capsys, [f"--job.config_file={config}"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("\ufeff[job]\n".encode(), "begins with a byte order mark; save it as UTF-8 without one."),
        ("[job]\n".encode("utf-16"), "cannot be read ("),
        (b"[job]\nformat = 2\n", "job.format = 2 is newer than the format of this version (1); install the version"),
    ],
)
def test_files_of_other_programs(content, message, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_bytes(content + b"[data]\ntrain = ['x']\n" * message.startswith("job"))
    assert message in fail(capsys, [f"--job.config_file={config}"])


def debug_args(tmp_path, *args):
    return [
        "--job.config_file", "train_configs/debug.toml", "--job.dump_folder", str(tmp_path / "out"),
        "--metrics.no_enable_tensorboard", "--training.steps", "2", *args,
    ]  # fmt: skip


def test_tokenizer_without_mask_token(tmp_path, capsys):
    folder = shutil.copytree(f"{DEBUG}/tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    sentence = fail(capsys, debug_args(tmp_path, "--model.hf_assets_path", str(folder)))
    assert f"The tokenizer in {folder} has no mask_token" in sentence and "--mask-token NAME" in sentence


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 5000}, "use a vocabulary of 5000 tokens, but model.flavor debug has 512"),
        ({"mask_token_id": 9}, "were made with mask token id 9, but the tokenizer"),
        ({"sequences": 0}, "hold no sequence"),
        ({"extra": 1}, "card"),
    ],
)
def test_shards_that_do_not_fit(change, message, tmp_path, capsys):
    folder = shutil.copytree(f"{DEBUG}/train", tmp_path / "train")
    card = json.loads((folder / "memdlm.json").read_text())
    (folder / "memdlm.json").write_text(json.dumps(card | change))
    assert message in fail(capsys, debug_args(tmp_path, "--data.train", str(folder)))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_corrupt_shard(damage, tmp_path, capsys):
    folder = shutil.copytree(f"{DEBUG}/train", tmp_path / "train")
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-100] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    sentence = fail(capsys, debug_args(tmp_path, "--data.train", str(folder)))
    assert str(shard) in sentence and ("is corrupt" if damage != "deleted" else "is missing") in sentence


def test_checkpoint_of_another_model(tmp_path, capsys):
    args = debug_args(tmp_path, "--checkpoint.enable")
    assert train.main(args) == 0
    saved = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/checkpoint").rglob("*") if p.is_file()}
    # The quickstart flavour has other widths and one more layer.
    sentence = fail(capsys, [*args, "--model.flavor", "quickstart"])
    assert "step-2 is of another model: " in sentence and "tok_embeddings.weight" in sentence
    assert saved == {p: p.stat().st_mtime_ns for p in (tmp_path / "out/checkpoint").rglob("*") if p.is_file()}
    # A model with one layer less finds all its tensors in the checkpoint, but is still another model.
    sentence = fail(capsys, [*args, "--model.flavor", "shallow"])
    assert "layers.3." in sentence and "this model's absent" in sentence
    (tmp_path / "out/checkpoint/step-2/.metadata").write_bytes(b"junk")
    # load_step fails on the damaged checkpoint; without it, no earlier checkpoint exists to fall back on.
    assert "step-2 has a .metadata that cannot be read" in fail(capsys, [*args, "--checkpoint.load_step", "2"])
    assert "No checkpoint in" in (sentence := fail(capsys, args)) and "step-2 are damaged); restore one" in sentence
    assert "step-9 does not exist" in fail(capsys, [*args, "--checkpoint.load_step", "9"])
    (tmp_path / "out/checkpoint/step-8").mkdir()
    (tmp_path / "out/checkpoint/step-8/model.safetensors").touch()
    assert "step-8 holds only exported weights, in safetensors" in fail(capsys, [*args, "--checkpoint.load_step", "8"])


def test_weights_that_are_not_finite_are_not_blamed_on_the_data(tmp_path, capsys):
    tiny = ("--model.flavor", "tiny")
    weights = tmp_path / "weights"
    assert random_weights.main(["train_configs/debug.toml", "--output", str(weights), *tiny]) == 0
    (file,) = weights.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.transformer.blocks.1.ff_proj.weight"][3, 5] = torch.nan
    save_file(tensors, file)
    hf = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(weights))
    for skip in ((), ("--reliability.on_nonfinite", "skip")):
        assert fail(capsys, debug_args(tmp_path, *tiny, *hf, *skip)) == (
            "error: Step 1 cannot be taken: the weights themselves are not finite (layers.1.feed_forward.w1.weight); start "
            "from other weights (checkpoint.initial_load_path), or go back to an earlier checkpoint (checkpoint.load_step)."
        )


def test_what_others_say_becomes_one_sentence():
    assert str(UserError("It fails; no such bucket:\n  a  b..")) == "It fails; no such bucket: a  b."
    assert str(UserError("Files (../a, b, ...).")) == "Files (../a, b, ...)."
    assert str(UserError("More ...")) == "More ..."


@pytest.mark.parametrize(
    "rows, args, message",
    [
        ([], (), "The corpus is empty"),
        ([{"text": "tiny"}], (), "makes no training sequence of 64 tokens"),
        ([{"nothing": 1}] * 2, (), "rows.jsonl:1: none of the known formats; the row's fields are 'nothing'); correct"),
        ([{"nothing": 1}], ("--strict",), "rows.jsonl:1: none of the known formats"),
        ([{"text": "x"}], ("--train-tokenizer", "10"), "--train-tokenizer 10 is too small"),
        (None, (), "matches no file"),
    ],
)
def test_preparation(rows, args, message, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["--input", str(path), "--output", str(tmp_path / "out"), "--seq-len", "64", "--held-out", "0"]
    tokenizer = () if "--train-tokenizer" in args else ("--train-tokenizer", "300")
    assert prepare_data.main([*base, *tokenizer, *args]) == EXIT_STATUS
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in captured.err


@pytest.mark.parametrize("source", ["on standard input", "of --prompt", "file.txt"])
def test_prompts_that_are_not_utf8(source, tmp_path, monkeypatch):
    """Python decodes invalid bytes to lone surrogates in the C locale."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    (tmp_path / "file.txt").write_bytes(b"\xff")
    arguments = {"of --prompt": ["--prompt", "\udcff"], "file.txt": ["--file", str(tmp_path / "file.txt")]}
    options = generate.parser().parse_args(["train_configs/debug.toml", *arguments.get(source, [])])
    with pytest.raises(UserError, match=f"{source} cannot be read: .*; write it in UTF-8\\.$"):
        next(generate.prompts(options))


def test_through_the_launcher(root, tmp_path):
    """Two ranks with the same mistake print one error, and torchrun adds no traceback."""
    command = ["bash", "launch/train.sh", "train_configs/debug.toml", "--parametric_memory.rank", "0"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "NGPU": "2"}, capture_output=True, text=True)
    assert done.returncode == EXIT_STATUS
    assert "Traceback" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("error: ") == 1


@pytest.mark.parametrize("ranks", ["2", "x", "0,5", "1,", "18446744073709551616"])
def test_ranks_to_show(root, ranks):
    command = ["bash", "launch/train.sh", "train_configs/debug.toml"]
    environment = {**os.environ, "NGPU": "2", "LOG_RANK": ranks}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    message = f"error: LOG_RANK must be local ranks below NGPU = 2, separated by commas, but is '{ranks}'.\n"
    assert (done.returncode, done.stderr) == (EXIT_STATUS, message)


def test_a_mistake_that_only_another_rank_meets_is_said_too(root):
    command = ["-m", "memdlm_dist.runtime.launcher", "--nproc-per-node=2", "--local-ranks-filter=0", "--tee=3"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.workers.one_rank_fails"]
    done = subprocess.run([sys.executable, *command, *rendezvous], cwd=root, capture_output=True, text=True)
    assert done.returncode == EXIT_STATUS
    assert "error on local rank 1: The configuration file no/such.toml does not exist" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_launcher_without_error_files_shows_it_too(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(train, "time", SimpleNamespace(sleep=lambda seconds: None))
    assert train.main(["--job.config_file", "no/such.toml"]) == EXIT_STATUS
    assert capsys.readouterr().err.startswith("error on local rank 1: The configuration file no/such.toml does not")
