"""Digests of the initial weights and of a loaded adapter of small backbones, on several layouts."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.checkpoint import peft_folder
from memdlm_dist.config import parse_config
from memdlm_dist.models import BACKBONES as SPECS
from memdlm_dist.models.flavours import LLADA, LLADA2, LLADA_MOE
from memdlm_dist.training.backbone import get_layout, model_on_meta

REPLICATE, SHARD = "--parallelism.data_parallel_replicate_degree", "--parallelism.data_parallel_shard_degree"
TP = "--parallelism.tensor_parallel_degree"
EP, ETP = "--parallelism.expert_parallel_degree", "--parallelism.expert_tensor_parallel_degree"
WRAPPED = ["--activation_checkpoint.mode", "full", "--compile.enable"]
# Half of hidden_dim and of vocab_size is odd: FSDP2 then shards unevenly, and a rank's slice can start in the middle of
# a pair of random numbers.
BACKBONES = {
    "llada": replace(LLADA["tiny"], dim=36, n_heads=2, n_kv_heads=2, hidden_dim=42, vocab_size=62),
    "llada2": replace(
        LLADA2["tiny"],
        dim=36,
        n_heads=2,
        hidden_dim=18,
        vocab_size=62,
        shared_hidden_dim=22,
        dense_hidden_dim=50,
        partial_rotary_factor=1.0,
    ),
    # Fewer experts than ranks, so that FSDP2 shards the experts' rows.
    "two_experts": replace(LLADA_MOE["tiny"], dim=36, n_heads=2, hidden_dim=18, vocab_size=62, n_experts=2),
}
NAMES = {type(spec.flavours["tiny"]): name for name, spec in SPECS.items()}
# name -> (processes, backbone, arguments)
LAYOUTS = {
    "tp2": (2, "llada", [TP, "2"]),
    "fsdp2-tp2": (4, "llada", [SHARD, "2", TP, "2"]),
    "fsdp4-wrapped": (4, "llada", [SHARD, "4", *WRAPPED]),
    "hsdp2x2": (4, "llada", [REPLICATE, "2", SHARD, "2"]),
    "fsdp4-experts": (4, "llada2", [SHARD, "4"]),
    "ep2": (2, "llada2", [SHARD, "2", EP, "2"]),
    "fsdp4-ep2": (4, "llada2", [SHARD, "4", EP, "2"]),
    "fsdp4-ep2-two-experts": (4, "two_experts", [SHARD, "4", EP, "2"]),
    "ep2-tp2": (4, "llada2", [SHARD, "2", EP, "2", TP, "2", ETP, "2"]),
}


def digests(backbone, arguments, seed=7, folder=None):
    """Return a digest of every full parameter; each rank draws its slice only.

    Args:
        folder: PEFT folder of an adapter, which is loaded after the draw, each rank its slice only; the first call
            writes it. The digests of its parameters have names of their own.
    """
    sizes = BACKBONES[backbone]
    # PEFT adapts a fused linear as a whole.
    targets = "ffn,o,router" if sizes.fused_linears else "all-linear"
    config = parse_config.parse([
        "--job.config_file", "train_configs/debug.toml",
        "--model.name", NAMES[type(sizes)], "--model.flavor", "tiny",
        "--model.converters", "lora", "--lora.rank", "2", "--lora.target_modules", targets, *arguments,
    ])  # fmt: skip
    dims = get_layout(config, torch.distributed.get_world_size())
    model = model_on_meta(config, sizes, dims).to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    state = get_model_state_dict(model)
    result = _digests(state)
    if folder is not None:
        sd_adapter = SPECS[config.model.name].sd_adapter(sizes)
        if not Path(folder).exists():
            random = {name: torch.rand(x.shape) for name, x in state.items()}
            peft_folder.write(random, folder, sd_adapter, config.lora, "")
        peft_folder.load(state, sd_adapter, folder, config.lora)
        result |= {f"loaded {name}": x for name, x in _digests(peft_folder.gather(state)).items()}
    return result


def _digests(state):
    full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
    return {name: hashlib.sha256(x.float().numpy().tobytes()).hexdigest() for name, x in full.items()}
