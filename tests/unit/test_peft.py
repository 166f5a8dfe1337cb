"""Adapters in and out through PEFT itself, and errors that name what does not fit."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtitan.components.checkpoint import MODEL, ModelWrapper
from transformers.utils import import_utils

from memdlm_dist.checkpoint import hugging_face_folder, peft_folder
from memdlm_dist.checkpoint.catalogue import Catalogue
from memdlm_dist.checkpoint.manager import Checkpoint, ResumableCheckpoints
from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.models import backbone_args
from memdlm_dist.models.lora import LoRA, add_adapters
from memdlm_dist.training.backbone import get_sd_adapter
from tests.oracles.hugging_face import Backbone
from tests.support.published import RECIPES, contents
from tools import convert_checkpoint, random_weights

SMALL = [
    "--model.flavor", "tiny", "--model.hf_assets_path", "tests/assets/debug/tokenizer", "--training.seq_len", "16",
    "--training.mixed_precision_param", "float32", "--checkpoint.initial_load_path", "",
    "--lora.base", "unquantized",
]  # fmt: skip
RANK = 8  # experts need a multiple of 8 on devices with grouped products
TOKENS = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
SUFFIXES = {
    "llada": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"],  # ff_out would match the head too
    "llada_moe": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate"],
    "llada2": ["query_key_value", "dense", "gate_proj", "up_proj", "down_proj"],
}


def configuration(name, *arguments):
    return parse_config.parse(["--job.config_file", RECIPES[name], *SMALL, *arguments])


def logits(model):
    everywhere = torch.ones_like(TOKENS).bool()
    return model.logits(TOKENS, everywhere, everywhere)


def import_peft():
    """Import PEFT, which takes a second."""
    import_utils._torchvision_available = False  # a CUDA build does not load beside torch for CPUs
    import peft

    return peft


class Case:
    """A backbone's weights, the adapter that PEFT saved, and the logits of PEFT's model."""

    def __init__(self, name, folder):
        self.name, self.weights, self.adapter = name, str(folder / "weights"), str(folder / "adapter")
        assert random_weights.main([RECIPES[name], "--output", self.weights, "--dtype", "float32", *SMALL]) == 0
        torch.manual_seed(0)
        tensors = contents(self.weights)
        for key, tensor in tensors.items():
            if "norm" not in key:
                tensor *= 4  # so that attention and router are not flat
            if key.endswith("expert_bias"):
                tensor.uniform_(-0.2, 0.2)
        save_file(tensors, Path(self.weights) / next(Path(self.weights).glob("*.safetensors")).name, {"format": "pt"})
        peft = import_peft()
        targets = SUFFIXES[name] + ([f"blocks.{i}.ff_out" for i in range(2)] if name == "llada" else [])
        config = peft.LoraConfig(r=RANK, lora_alpha=24, lora_dropout=0.05, target_modules=targets)
        model = peft.get_peft_model(self.base(), config).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(self.adapter)
        with torch.no_grad():
            self.logits, self.base_logits = model(TOKENS).flatten(0, 1), self.base()(TOKENS).flatten(0, 1)

    def base(self):
        return Backbone(contents(self.weights), backbone_args(self.name, "tiny"))

    @property
    def sd_adapter(self):
        return get_sd_adapter(configuration(self.name))


@pytest.fixture(scope="module", params=SUFFIXES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def test_an_adapter_that_peft_saved_gives_pefts_logits_and_comes_back_unchanged(case, tmp_path):
    # A configuration that trains all weights: rank, alpha and linears come from the adapter.
    with TrainedModel(configuration(case.name, "--model.converters", ""), case.weights, case.adapter) as model:
        ours = logits(model)
        equal(ours, case.logits)
        assert (case.logits - case.base_logits).abs().max() > 0.05 * case.logits.abs().max()
        assert model._lora.rank == RANK and model._lora.alpha == 24
        assert model._lora.target_modules == ["attention", "ffn"] + ["router"] * (case.name == "llada_moe")
        state = peft_folder.gather(model.model.state_dict())
        peft_folder.write(state, str(tmp_path), model._sd_adapter, model._lora, case.weights)
    there, back = (load_file(Path(folder) / peft_folder.TENSORS) for folder in (case.adapter, tmp_path))
    assert there.keys() == back.keys()
    for key, tensor in there.items():
        if "query_key_value" not in key:
            assert torch.equal(tensor, back[key]), key
        elif "lora_A" in key:  # the three linears have a copy each
            assert torch.equal(torch.cat([tensor] * 3), back[key])
        else:
            blocks = [back[key][rows] for rows in (slice(0, 32), slice(32, 48), slice(48, 64))]
            assert torch.equal(tensor, torch.cat([x[:, i * RANK : (i + 1) * RANK] for i, x in enumerate(blocks)]))
            assert (back[key] != 0).sum() == (tensor != 0).sum()
    with torch.no_grad():
        theirs = import_peft().PeftModel.from_pretrained(case.base(), str(tmp_path)).eval()(TOKENS).flatten(0, 1)
    (equal if case.name == "llada2" else torch.testing.assert_close)(theirs, case.logits)
    merge = ["--input", case.weights, "--adapter", case.adapter, "--output", str(tmp_path / "merged"), *SMALL]
    assert convert_checkpoint.main(["merge", RECIPES[case.name], *merge]) == 0
    merged = Backbone(contents(tmp_path / "merged"), backbone_args(case.name, "tiny"))
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).flatten(0, 1), case.logits, rtol=0, atol=1e-4)


def test_a_fused_linear_with_other_adapters_is_refused(tmp_path):
    sd_adapter = get_sd_adapter(configuration("llada2"))
    with torch.device("meta"):
        model = sd_adapter.model_cls(sd_adapter.args)
        add_adapters(model, LoRA(rank=2, target_modules=["attention"]), torch.float32, torch.float32)
    state = {name: torch.ones(x.shape) for name, x in model.state_dict().items() if "lora_" in name}
    peft_folder.write(state, str(tmp_path), sd_adapter, LoRA(rank=2, alpha=4.0, target_modules=["attention"]), "")
    assert peft_folder.read(str(tmp_path), sd_adapter).stacked
    file, config = tmp_path / peft_folder.TENSORS, tmp_path / peft_folder.CONFIG
    tensors, settings = load_file(file), json.loads(config.read_text())
    key = "base_model.model.model.layers.1.attention.query_key_value.lora_B.weight"
    tensors[key][0, -1] = 1  # a query that reads the values' A
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"mixes the parts of a fused linear in {re.escape(key)}"):
        peft_folder.read(str(tmp_path), sd_adapter)
    for change in ({"alpha_pattern": {}}, {"use_rslora": True}):  # another scale
        config.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match="sets rank_pattern to"):
            peft_folder.read(str(tmp_path), sd_adapter)


def test_a_run_starts_from_an_initial_adapter_and_resumes_without_it(case, tmp_path):
    targets = "attention,ffn" if case.name == "llada2" else "all-linear"
    section = ["--lora.rank", str(RANK), "--lora.alpha", "24", "--lora.target_modules", targets]
    with TrainedModel(configuration(case.name, *section), case.weights) as model:
        equal(logits(model), case.base_logits)  # B is 0
        manager = object.__new__(ResumableCheckpoints)
        manager.enable, manager.exclude_from_loading = True, []
        manager._config, manager._catalogue = Checkpoint(initial_adapter=case.adapter), Catalogue(str(tmp_path))
        manager.initial_load_path, manager.initial_load_in_hf = case.weights, True
        manager.sd_adapter, manager.lora = model._sd_adapter, model._lora
        manager.states = {MODEL: ModelWrapper(model.model)}
        assert manager.load()
        equal(logits(model), case.logits)
        # With a checkpoint of its own, the run reads neither base nor adapter.
        saved = SimpleNamespace(name="step-3", exported=False, problem="", complete=True)
        storage = manager._catalogue.storage
        manager._catalogue = SimpleNamespace(steps=lambda: [3], inspect=lambda step: saved, storage=storage)
        manager._config = Checkpoint(initial_adapter="missing")
        manager._load_from = lambda location, model_only: ""
        assert manager.load()
        manager.enable = False  # nothing to close


CONFIG_MISTAKES = {
    "dora": ({"use_dora": True}, "sets use_dora to true, which is not supported; use an adapter of plain LoRA"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, 'sets modules_to_save to ["lm_head"], which'),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, 'sets rank_pattern to {"q_proj": 4}, which'),
    "bias": ({"bias": "all"}, 'sets bias to "all", which'),
    "base": ({"init_lora_weights": "pissa"}, 'sets init_lora_weights to "pissa", which'),
    "unknown": ({"use_novelty": 2}, "sets use_novelty to 2, which"),
    "type": ({"peft_type": "IA3"}, 'sets peft_type to "IA3", which'),
    "rank": ({"r": "8"}, 'sets r to "8", not a positive number'),
    "dropout": ({"lora_dropout": "0.1"}, 'sets lora_dropout to "0.1", not a probability'),
}
SECTION_MISTAKES = {
    "rank": ({"rank": 16}, "has rank 8, but lora.rank is 16; set lora.rank = 8."),
    "alpha": ({"alpha": 8.0}, "has alpha 24.0, but lora.alpha is 8.0; set lora.alpha = 24.0."),
    "targets": ({"target_modules": ["attention"]}, "; set lora.target_modules = ["),
}


def test_what_does_not_fit_is_named(case, tmp_path):
    sd_adapter = case.sd_adapter
    section = LoRA(rank=RANK, alpha=24.0, target_modules=["all-linear"])
    folder = shutil.copytree(case.adapter, tmp_path / "adapter")
    config, tensors = (folder / peft_folder.CONFIG).read_text(), load_file(folder / peft_folder.TENSORS)

    def refusal(changed=section):
        with pytest.raises(UserError) as caught:
            peft_folder.check(str(folder), sd_adapter, changed)
        return str(caught.value)

    for change, sentence in CONFIG_MISTAKES.values():
        (folder / peft_folder.CONFIG).write_text(json.dumps(json.loads(config) | change))
        assert sentence in refusal()
    # rsLoRA: alpha / sqrt(rank) is another alpha.
    (folder / peft_folder.CONFIG).write_text(json.dumps(json.loads(config) | {"use_rslora": True}))
    assert peft_folder.read(str(folder), sd_adapter).alpha == pytest.approx(24 * RANK**0.5)
    (folder / peft_folder.CONFIG).write_text(config)
    for change, sentence in SECTION_MISTAKES.values():
        assert sentence in refusal(LoRA(**vars(section) | change))

    def written(changed):
        save_file(changed, folder / peft_folder.TENSORS)
        return refusal()

    first = next(iter(tensors))
    assert f"lacks the tensor {first}, though" in written({key: x for key, x in tensors.items() if key != first})
    extra = {"base_model.model.lm_head.lora_A.weight": torch.zeros(RANK, 4)}
    assert "has no place in this model, base_model.model.lm_head.lora_A.weight" in written(tensors | extra)
    sentence = f"The tensor {first} of the adapter in {folder} has shape (4, 3), but ("
    assert sentence in written(tensors | {first: torch.zeros(4, 3)})
    assert "is of type I8, not one of" in written(tensors | {first: tensors[first].to(torch.int8)})
    with pytest.raises(UserError, match=r"holds an adapter without its base; name it in checkpoint\.initial_adapter"):
        hugging_face_folder.check(str(folder), sd_adapter)
    (folder / peft_folder.TENSORS).rename(folder / "adapter_model.bin")
    assert "is a pickle (adapter_model.bin), which is not read" in refusal()
    with pytest.raises(UserError, match="There is no folder missing with an adapter"):
        peft_folder.read("missing", sd_adapter)
