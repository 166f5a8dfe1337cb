"""Decoding of a `llada2` backbone with random weights on several layouts, as LLaDA2.1 is decoded.

    python -m tests.workers.decoding_experts FOLDER

FOLDER/weights are Hugging Face weights of the flavour tiny; writes FOLDER/LAYOUT.json for every layout.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from safetensors.torch import load_file, save_file

from memdlm_dist.config import parse_config
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED
from memdlm_dist.inference.serving import Request, serve
from memdlm_dist.inference.trained_model import TrainedModel
from tests.support.ranks import fork
from tools import random_weights

SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
EP, ETP = "--parallelism.expert_parallel_degree", "--parallelism.expert_tensor_parallel_degree"
LAYOUTS = {
    "one": (1, []),
    "fsdp2-tp2": (4, [SHARD, "2", TP, "2"]),
    "ep2-tp2": (4, [SHARD, "2", EP, "2", TP, "2", ETP, "2"]),
}
ARGUMENTS = [
    "--job.config_file", "train_configs/debug.toml", "--model.name", "llada2", "--model.flavor", "tiny",
    "--training.seq_len", "64", "--parametric_memory.learning_rate", "0.1", "--parametric_memory.layer_fraction", "0.5",
]  # fmt: skip
# The two algorithms of LLaDA2.1; the thresholds are between the confidences of these weights.
SCHEDULE = Decoding(8, 4, attention="block_causal", threshold=0.3, stop_at_eos=False)
EDIT = replace(SCHEDULE, steps=None, min_tokens=2, edit_threshold=0.2, post_steps=3)
# name -> (settings, memory)
CASES = {"schedule": (SCHEDULE, False), "edit": (EDIT, False), "edit, memory": (EDIT, True)}
LENGTHS = (9, 16, 3)


def write_weights(folder: Path) -> None:
    """Write random weights whose attention and routers are not flat."""
    weights = folder / "weights"
    assert random_weights.main([*ARGUMENTS[1:2], "--output", str(weights), "--dtype", "float32", *ARGUMENTS[2:]]) == 0
    (file,) = weights.glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("expert_bias"):
            tensor.uniform_(-0.2, 0.2, generator=generator)
        elif "layers." in name and "norm" not in name:
            tensor.mul_(15)
        elif name == "lm_head.weight":
            tensor.mul_(4)
    save_file(tensors, file, {"format": "pt"})


def decode_rank(rank: int, folder: Path, name: str) -> int:
    """Decode on a layout; rank 0 writes the responses."""
    torch.set_num_threads(1)
    arguments = LAYOUTS[name][1]
    has_memory = EP not in arguments
    model = TrainedModel(parse_config.parse([*ARGUMENTS, *arguments]), str(folder / "weights"), memory=has_memory)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    requests = [Request(prompt, 13, number) for number, prompt in enumerate(prompts)]
    results = {}
    for kind, (decoding, memory) in CASES.items():
        if memory and not has_memory:
            continue
        for cache in ("none", "prefix") if name == "one" else ("prefix",):
            served = serve(model, requests, replace(decoding, cache=cache), 2, AS_PUBLISHED if memory else None)
            results[f"{kind}, cache {cache}"] = [response.response for response in served.responses]
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(results))
    model.close()
    return 0


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder)
    for name, (processes, _) in LAYOUTS.items():
        if status := fork(processes, lambda rank, name=name: decode_rank(rank, folder, name)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
