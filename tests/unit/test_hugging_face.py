"""Hugging Face weights: import and export bit for bit, and errors that name what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.checkpoint.catalogue import Catalogue
from memdlm_dist.checkpoint.exports import Exporter
from memdlm_dist.config import launch, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.models import state_dict_adapters as names
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args, get_sd_adapter, model_on_meta
from tests.support import ranks
from tests.support.published import RECIPES, contents, draw_expert_biases
from tools import convert_checkpoint, random_weights

PLAIN = [
    "--model.flavor", "debug", "--model.hf_assets_path", "tests/assets/debug/tokenizer",
    "--training.mixed_precision_param", "float32", "--checkpoint.initial_load_path", "",
]  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def weights(recipe, tmp_path_factory):
    """Return a folder like published weights: bfloat16, several files with an index, config.json, tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "weights"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "FILE_BYTES", 2**17)
        patch.setattr(
            hugging_face_folder,
            "fqn_to_index_mapping",
            lambda tensors: names.fqn_to_index_mapping(tensors, limit=2**17),
        )
        assert random_weights.main([recipe, "--output", str(folder), *PLAIN]) == 0
    draw_expert_biases(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def sd_adapter(recipe):
    return get_sd_adapter(parse_config.parse(["--job.config_file", recipe, *PLAIN]))


def test_there_and_back_again_is_the_same_bit_for_bit(recipe, weights, tmp_path, capsys):
    plain = [*PLAIN, "--lora.target_modules", "attention"]
    config = tmp_path / "full.toml"
    config.write_text(Path(recipe).read_text().replace('converters = ["lora"]', ""))
    there, back = str(tmp_path / "checkpoint"), tmp_path / "back"
    assert convert_checkpoint.main(["from-hf", str(config), "--input", str(weights), "--output", there, *plain]) == 0
    assert convert_checkpoint.main(["to-hf", str(config), "--checkpoint", there, "--output", str(back), *plain]) == 0
    theirs, ours = contents(weights), contents(back)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        dtype = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        assert tensor.dtype == ours[name].dtype == dtype and torch.equal(tensor, ours[name]), name
    index = json.loads((back / hugging_face_folder.INDEX).read_text())["weight_map"]
    assert index.keys() == ours.keys()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (weights / name).read_bytes()
    # A float32 checkpoint holds the same numbers and exports them unchanged.
    wide, narrow = str(tmp_path / "float32"), tmp_path / "narrow"
    more = ["--dtype", "float32", *plain]
    assert convert_checkpoint.main(["from-hf", str(config), "--input", str(weights), "--output", wide, *more]) == 0
    more = ["--dtype", "bfloat16", *plain]
    assert convert_checkpoint.main(["to-hf", str(config), "--checkpoint", wide, "--output", str(narrow), *more]) == 0
    for name, tensor in contents(narrow).items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    # An existing folder is not overwritten.
    assert convert_checkpoint.main(["to-hf", str(config), "--checkpoint", there, "--output", str(back), *plain]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_published_names(sd_adapter):
    expected = set(sd_adapter.expected())
    architecture = sd_adapter.config()["architectures"][0]
    count, some = {
        "LLaDAModelLM": (3 + 4 * 9, {
            "model.transformer.wte.weight", "model.transformer.blocks.3.ff_proj.weight",
            "model.transformer.blocks.0.attn_out.weight", "model.transformer.ff_out.weight",
        }),
        "LLaDAMoEModelLM": (3 + 4 * (9 + 3 * 8), {
            "model.embed_tokens.weight", "model.layers.3.mlp.experts.7.down_proj.weight", "lm_head.weight",
            "model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.q_norm.weight",
        }),
        "LLaDA2MoeModelLM": (3 + 4 * 6 + 3 + 3 * (5 + 3 * 16), {
            "model.word_embeddings.weight", "model.layers.0.attention.query_key_value.weight",
            "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.expert_bias",
            "model.layers.3.mlp.experts.15.down_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight",
            "model.layers.1.attention.dense.weight", "model.layers.1.attention.key_layernorm.weight",
        }),
    }[architecture]  # fmt: skip
    assert len(expected) == count and some <= expected


def damaged(weights, folder, change):
    """Copy the weights with one file's tensors changed; return the name of that file's first tensor."""
    shutil.copytree(weights, folder)
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(iter(tensors))
    change(tensors, name)
    save_file(tensors, file)
    return name


def refusal(folder, sd_adapter):
    with pytest.raises(UserError) as caught:
        hugging_face_folder.check(str(folder), sd_adapter)
    return str(caught.value)


def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_named(weights, sd_adapter, tmp_path):
    name = damaged(weights, tmp_path / "a", lambda tensors, name: tensors.pop(name))
    assert f"lack the tensor {name}" in refusal(tmp_path / "a", sd_adapter)

    def other(tensors, name):
        tensors["model.vision.weight"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)  # present in some exports

    damaged(weights, tmp_path / "b", other)
    assert "a tensor that this model does not have, model.vision.weight; choose" in refusal(tmp_path / "b", sd_adapter)

    def reshape(tensors, name):
        tensors[name] = torch.zeros(3, 5)

    name = damaged(weights, tmp_path / "c", reshape)
    assert f"The tensor {name} in {tmp_path / 'c'} has shape (3, 5), but (" in refusal(tmp_path / "c", sd_adapter)


def test_weights_of_integers_are_refused(weights, sd_adapter, tmp_path):
    name = damaged(weights, tmp_path / "a", lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}))
    error = refusal(tmp_path / "a", sd_adapter)
    assert error.startswith(f"The tensor {name} in ") and "is of type I8, not one of F64, F32, F16, BF16; use" in error


def test_files_that_are_missing_or_broken_are_named(weights, sd_adapter, tmp_path):
    def copy(name):
        shutil.copytree(weights, tmp_path / name)
        return tmp_path / name

    first = copy("file")
    gone = sorted(first.glob("*.safetensors"))[-1]
    gone.unlink()
    assert f"lacks the file {gone.name}, which model.safetensors.index.json lists" in refusal(first, sd_adapter)
    second = copy("cut short")
    file = sorted(second.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read (" in refusal(second, sd_adapter)
    third = copy("rotary")
    config = json.loads((third / "config.json").read_text())
    (third / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4, "max_position_embeddings": 1}))
    assert "config.json describes another model than this run's: rope_theta is 10000.0 there" in refusal(
        third, sd_adapter
    )
    (third / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu", "activation_type": "gelu"}))
    assert "is 'gelu' there and 'silu' here" in refusal(third, sd_adapter)
    (third / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(third, sd_adapter)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/pytorch_model.bin").write_bytes(b"")
    assert "no .safetensors files" in refusal(tmp_path / "pickles", sd_adapter)
    assert "There is no folder" in refusal(tmp_path / "absent", sd_adapter)
    assert "read from disk, not from s3://" in refusal("s3://bucket/weights", sd_adapter)


def test_files_of_an_export():
    tensors = {name: torch.empty(size, device="meta") for name, size in (("a", 10), ("b", 20), ("c", 90), ("d", 5))}
    assert names.fqn_to_index_mapping(tensors, torch.bfloat16, limit=60) == {"a": 1, "b": 1, "c": 2, "d": 3}
    assert names.fqn_to_index_mapping(tensors) == dict.fromkeys("abcd", 1)


def test_conversion_refuses_what_it_cannot_convert(recipe, weights, tmp_path, capsys):
    def error(*arguments):
        assert convert_checkpoint.main([*arguments, *PLAIN]) == 2
        return capsys.readouterr().err

    out = ["--output", str(tmp_path / "out")]
    assert "There is no checkpoint" in error("to-hf", recipe, "--checkpoint", str(tmp_path), *out)
    assert "holds Hugging Face weights already" in error("to-hf", recipe, "--checkpoint", str(weights), *out)
    other = next(path for path in RECIPES.values() if path != recipe)
    assert "describes another model" in error("from-hf", other, "--input", str(weights), *out)
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"norm.weight": torch.zeros(3)}, checkpoint_id=str(tmp_path / "alien"), no_dist=True)
    assert "is of another model" in error("to-hf", recipe, "--checkpoint", str(tmp_path / "alien"), *out)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part*"))


CODE = Path("tests/assets/original")
AUTO_MAP = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
OTHERS = {
    "generation_config.json": b'{"eos_token_id": 0}\n', "special_tokens_map.json": b"{ }", "merges.txt": b"a b\r\n",
    "tokenization_llada.py": b"TOKENIZER = 1\n", "chat_template.jinja": b"{{ messages }}", "LICENSE.md": b"Free.",
}  # fmt: skip
LEFT = {"README.md": b"# LLaDA", "pytorch_model.bin": b"pickle", "notes.json": b"{}", "sub/deep.py": b""}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return a snapshot in the hub's cache: weights of the dense model, modelling code, tokenizer, links to blobs."""
    cache = tmp_path_factory.mktemp("hub") / "models--org--tiny"
    snapshot, plain = cache / "snapshots/1234", cache / "plain"
    assert random_weights.main([RECIPES["llada"], "--output", str(plain), "--dtype", "float32", *PLAIN]) == 0
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP, "torch_dtype": "float32", "x": 1}))
    for file in CODE.glob("*.py"):
        shutil.copy(file, plain)
    (plain / "sub").mkdir()
    for name, content in (OTHERS | LEFT).items():
        (plain / name).write_bytes(content)
    (snapshot / "sub").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        file.rename(cache / f"blobs/{number}")
        link = snapshot / file.relative_to(plain)
        link.symlink_to(os.path.relpath(cache / f"blobs/{number}", link.parent))
    return snapshot


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    """Return an export of the snapshot's weights, by way of a checkpoint."""
    root = tmp_path_factory.mktemp("exported")
    config = root / "full.toml"
    config.write_text(Path(RECIPES["llada"]).read_text().replace('converters = ["lora"]', ""))
    there, back = ["--output", str(root / "checkpoint")], ["--output", str(root / "export")]
    assert convert_checkpoint.main(["from-hf", str(config), "--input", str(original), *there, *PLAIN]) == 0
    # The snapshot is also named as the run's initial weights; the tokenizer of the run comes from another folder.
    run = [*PLAIN, "--checkpoint.initial_load_path", str(original)]
    (root / "step-1").mkdir()
    for file in (root / "checkpoint").glob("*.*tc*"):
        file.rename(root / "step-1" / file.name)
    (root / "checkpoint/.metadata").rename(root / "step-1/.metadata")
    assert convert_checkpoint.main(["to-hf", str(config), "--checkpoint", str(root / "step-1"), *back, *run]) == 0
    return root


def test_an_export_has_the_originals_code_and_the_runs_tokenizer(original, exported):
    names_of = {path.name for path in (exported / "export").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    model = {"config.json", "generation_config.json", "LICENSE.md", "tokenization_llada.py"}
    code = {path.name for path in CODE.glob("*.py")}
    assert names_of - {name for name in names_of if name.startswith("model")} | {*code} == tokenizer | model | code
    for name in model | code:
        copy = exported / "export" / name
        assert copy.read_bytes() == (original / name).read_bytes() and not copy.is_symlink(), name
    for name in tokenizer:
        assert (exported / "export" / name).read_bytes() == Path("tests/assets/debug/tokenizer", name).read_bytes()
    # A checkpoint that was converted has all files of its source, so that the way back has them too.
    kept = {path.name for path in (exported / "checkpoint").iterdir()}
    assert kept == tokenizer | model | code | OTHERS.keys()
    assert all((exported / "checkpoint" / name).read_bytes() == content for name, content in OTHERS.items())


def test_files_that_an_export_leaves_out(original, tmp_path, monkeypatch):
    """Links out of the folder, files that are too large, and files that exist in the export are not copied."""
    sd_adapter = get_sd_adapter(parse_config.parse(["--job.config_file", RECIPES["llada"], *PLAIN]))
    source, private = tmp_path / "source", tmp_path / "private"
    source.mkdir()
    private.write_text("key")
    (source / "modeling_a.py").symlink_to(private)
    (source / "modeling_c.py").symlink_to((original / "modeling_llada.py").resolve())  # another repository's blob
    (source / "helper.py").write_text("x")
    (source / "modeling_b.py").symlink_to("helper.py")
    (source / "large.py").write_text("x" * 101)
    (source / "broken.py").symlink_to("nowhere")
    os.mkfifo(source / "pipe.py")
    (tmp_path / "linked").symlink_to(source)
    monkeypatch.setattr(hugging_face_folder, "_COPY_LIMIT", 100)
    logs = []
    monkeypatch.setattr(hugging_face_folder.logger, "error", logs.append)
    out = tmp_path / "out"
    out.mkdir()
    (out / "helper.py").write_text("the user's")
    # No source has config.json or a tokenizer.
    written = hugging_face_folder.describe(str(out), sd_adapter, [str(tmp_path / "linked"), str(tmp_path / "absent")])
    assert written == ["config.json", "helper.py", "modeling_b.py"]
    assert {path.name: path.read_text() for path in out.glob("*.py")} == {
        "helper.py": "the user's",
        "modeling_b.py": "x",
    }
    assert json.loads((out / "config.json").read_text()) == sd_adapter.config()
    assert len(logs) == 3 and "large.py is not copied to the export (it has 101 bytes, more than 100)" in logs[0]
    assert f"modeling_a.py is not copied to the export (it links to {private}, outside of its folder)" in logs[1]
    assert "modeling_c.py is not copied to the export (it links to " in logs[2]
    # Another tokenizer replaces all files of the original's, and its code; other code comes from the weights.
    monkeypatch.undo()
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenization_llada.py", "modeling_llada.py"):
        (other / name).write_text("other")
    both = [str(original), str(other)]
    hugging_face_folder.describe(str(tmp_path), sd_adapter, both, tokenizers=both[::-1])
    assert not (tmp_path / "merges.txt").exists() and (tmp_path / "generation_config.json").exists()
    assert (tmp_path / "tokenization_llada.py").read_text() == (tmp_path / "tokenizer.json").read_text() == "other"
    assert (tmp_path / "modeling_llada.py").read_bytes() == (CODE / "modeling_llada.py").read_bytes()
    # The tokenizer's repository holds another model, and the weights have no config.json.
    (other / "config.json").write_text(json.dumps({**sd_adapter.config(), "d_model": 1}))
    monkeypatch.setattr(hugging_face_folder.logger, "warning", logs.append)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    hugging_face_folder.describe(str(foreign), sd_adapter, [str(other)])
    assert {path.name for path in foreign.iterdir()} == {"config.json", "tokenizer.json", "tokenization_llada.py"}
    assert json.loads((foreign / "config.json").read_text()) == sd_adapter.config()
    assert len(logs) == 4 and f"{other}/config.json does not describe this run's model (d_model is 1 there" in logs[3]


# A user's program, who trusts the code in both folders.
_LOAD = """
import sys
sys.modules["torchvision"] = None  # a CUDA build does not load beside torch for CPUs
import torch
from transformers import AutoModel
tokens = torch.arange(12).reshape(2, 6) * 7
for folder in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == "LLaDAModelLM" and model.config.x == 1
    torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
"""


@pytest.mark.slow  # transformers takes 6 s to import
def test_transformers_loads_an_export_with_the_originals_code(original, exported, tmp_path):
    """`from_pretrained` of the original works on the export, and all three models have the same logits."""
    shutil.copytree(original, tmp_path / "original")
    shutil.copytree(exported / "export", tmp_path / "export")
    folders = [str(tmp_path / name) for name in ("original", "export")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _LOAD, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = (torch.load(f"{folder}/logits.pt", weights_only=True) for folder in folders)
    assert torch.equal(theirs, ours)
    sd_adapter = get_sd_adapter(parse_config.parse(["--job.config_file", RECIPES["llada"], *PLAIN]))
    model = sd_adapter.model_cls(sd_adapter.args)
    model.load_state_dict(sd_adapter.from_hf(contents(exported / "export")))
    tokens = torch.arange(12).reshape(2, 6) * 7
    with torch.no_grad():
        logits = model(tokens, torch.arange(12)).unflatten(0, (2, 6))
    assert theirs.std() > 0.1
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_experts_of_replicas_have_names(ep_size):
    """Two nodes of two fake ranks, one replica per node: a rank's state dict names half of the experts."""
    config = parse_config.parse([
        "--job.config_file", "train_configs/llada_moe_7b_longalpaca.toml", "--model.flavor", "debug",
        "--model.converters", "", "--parallelism.expert_parallel_degree", str(ep_size),
    ])  # fmt: skip
    config, args = launch.resolve(config, 4, 2), get_model_args(config)
    if dist.is_initialized():
        dist.destroy_process_group()
    init_fake_process_group(4)
    try:
        dims = get_layout(config, 4)
        assert (dims.dp_replicate, dims.dp_shard) == (2, 2)
        state = model_on_meta(config, args, dims).state_dict()
        sd_adapter = get_sd_adapter(config)
        theirs = sd_adapter.to_hf(dict(state))
        numbers = {int(number) for key in theirs for number in re.findall(r"layers\.0\.mlp\.experts\.(\d+)\.", key)}
        assert numbers == set(range(args.n_experts // 2))
        back = sd_adapter.from_hf(theirs)
        assert {key: (x.shape, x.placements) for key, x in back.items()} == {
            key: (x.shape, x.placements) for key, x in state.items()
        }
    finally:
        dist.destroy_process_group()


def test_an_export_of_several_files(tmp_path):
    """Two ranks write sharded weights of llada2, whose fused projections are joined, as one process writes them."""
    sd_adapter = get_sd_adapter(parse_config.parse(["--job.config_file", RECIPES["llada2"], *PLAIN]))
    torch.manual_seed(0)
    model = sd_adapter.model_cls(sd_adapter.args)
    with torch.no_grad():
        model.init_weights()
    state = names.in_dtype(model.state_dict(), torch.bfloat16)
    small = partial(names.fqn_to_index_mapping, limit=2**17)

    def body():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        sharded = {
            name: x if name.endswith("expert_bias") else distribute_tensor(x, mesh, [Shard(0)])
            for name, x in state.items()
        }
        with mock.patch.object(hugging_face_folder, "fqn_to_index_mapping", small):
            hugging_face_folder.export(lambda: sharded, str(tmp_path / "two"), sd_adapter, [], [])

    assert ranks.fork_group(2, body) == 0
    hugging_face_folder.write(sd_adapter.to_hf(dict(state)), str(tmp_path / "one"))
    ours, theirs = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    assert all(x.dtype == ours[key].dtype and torch.equal(x, ours[key]) for key, x in theirs.items())
    index = json.loads((tmp_path / "two" / hugging_face_folder.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ours.values())
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "two").glob("*.safetensors"))) > 4


def test_ranks_wait_longer_for_an_export_than_for_a_step(tmp_path):
    """Rank 1 writes for longer than the timeout of collectives, with save_in_hf and with last_save_in_hf."""

    def body():
        dist.barrier()
        group = dist.group.WORLD
        group.set_timeout(timedelta(seconds=0.3))
        exporter = Exporter(torch.nn.Linear(2, 2), None, None, "", None, Catalogue(str(tmp_path)), timeout=0.3)

        def write(*_):
            time.sleep(0.6 * dist.get_rank())
            dist.barrier()
            return ""

        with (
            mock.patch.object(Exporter, "_write", write),
            mock.patch.object(Exporter, "_try_to_write_beside", write),
        ):
            exporter.write({}, "")
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=0.3)
            assert exporter.write_beside(1, {}, lambda: 0) == ""

    assert ranks.fork_group(2, body) == 0
