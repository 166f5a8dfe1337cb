"""Adapters in and out through PEFT itself, and errors that name what does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

from memdlm_dist.checkpoint import peft_folder
from memdlm_dist.config import parse_config
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.models import backbone_args
from memdlm_dist.training.backbone import get_sd_adapter
from tests.oracles.hugging_face import Backbone
from tests.support.published import RECIPES, contents
from tools import convert_checkpoint, random_weights

SMALL = [
    "--model.flavor", "tiny", "--model.hf_assets_path", "tests/assets/debug/tokenizer", "--training.seq_len", "16",
    "--training.mixed_precision_param", "float32", "--checkpoint.initial_load_path", "",
]  # fmt: skip
RANK = 8  # experts need a multiple of 8 on devices with grouped products
TOKENS = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(0))
SUFFIXES = {
    "llada": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj"],  # ff_out would match the head too
    "llada_moe": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate"],
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
            tensor *= 1 if "norm" in key else 4  # so that attention and router are not flat
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


@pytest.fixture(scope="module", params=RECIPES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def test_an_adapter_that_peft_saved_gives_pefts_logits_and_comes_back_unchanged(case, tmp_path):
    # A configuration that trains all weights: rank, alpha and linears come from the adapter.
    with TrainedModel(configuration(case.name, "--model.converters", ""), case.weights, case.adapter) as model:
        ours = logits(model)
        equal(ours, case.logits)
        assert (case.logits - case.base_logits).abs().max() > 0.1 * case.logits.abs().max()
        assert model._lora.rank == RANK and model._lora.alpha == 24
        assert model._lora.target_modules == ["attention", "ffn"] + ["router"] * (case.name == "llada_moe")
        state = peft_folder.gather(model.model.state_dict())
        peft_folder.write(state, str(tmp_path), model._sd_adapter, model._lora, case.weights)
    there, back = (load_file(Path(folder) / peft_folder.TENSORS) for folder in (case.adapter, tmp_path))
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)
    with torch.no_grad():
        theirs = import_peft().PeftModel.from_pretrained(case.base(), str(tmp_path)).eval()(TOKENS).flatten(0, 1)
    assert torch.equal(theirs, case.logits)
    merge = ["--input", case.weights, "--adapter", case.adapter, "--output", str(tmp_path / "merged"), *SMALL]
    assert convert_checkpoint.main(["merge", RECIPES[case.name], *merge]) == 0
    merged = Backbone(contents(tmp_path / "merged"), backbone_args(case.name, "tiny"))
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).flatten(0, 1), case.logits, rtol=0, atol=1e-4)
