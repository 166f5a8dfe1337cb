"""Generation and losses of one checkpoint on several layouts, with memory off and on.

    python -m tests.workers.reading FOLDER

Trains two steps with memory in FOLDER/run, then writes FOLDER/LAYOUT.json for every layout.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.exposure import Row, measure
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings
from memdlm_dist.inference.serving import Request, serve
from memdlm_dist.inference.trained_model import TrainedModel
from tests.support.launching import debug
from tests.support.ranks import fork
from tests.workers.run_many import train_rank

SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
CP = "--parallelism.context_parallel_degree"
LAYOUTS = {
    "one": (1, []),
    "fsdp2": (2, [SHARD, "2"]),
    "tp2": (2, [TP, "2"]),
    "cp2": (2, [CP, "2"]),
    "fsdp2-tp2": (4, [SHARD, "2", TP, "2", "--parallelism.disable_loss_parallel"]),
}
# After two training steps inner gradients are small; this rate makes adaptation change the output. A larger one would
# amplify rounding until it changes tokens, on some processors.
BOLD = ["--parametric_memory.learning_rate", "5", "--parametric_memory.gradient_clip", "0"]
SUPPRESSED = (110, 300)  # frequent without suppression
# Exact caches; context-parallel ranks refuse them.
_CACHED = Decoding(4, 2, stop_at_eos=False, cache="prefix", cache_refresh=1)
DECODINGS = {
    "refreshed": _CACHED,
    "guided, refreshed": replace(_CACHED, cfg_scale=1.5, suppress_tokens=SUPPRESSED, temperature=1.0),
    "block-causal": Decoding(4, 2, 1.0, stop_at_eos=False, attention="block_causal"),
    "block-causal, cached": Decoding(4, 2, 1.0, stop_at_eos=False, attention="block_causal", cache="dual"),
    "threshold": Decoding(4, temperature=1.0, stop_at_eos=False, threshold=0.004),  # between these confidences
}
# One position a block: some positions have equal confidences, between which rounding would choose. Few tokens, since
# rounding grows with every refresh at the rate of BOLD.
PLAIN, FEW = Decoding(1, temperature=1.0, stop_at_eos=False), 3
MEMORIES = {
    "in pieces": MemorySettings(0.5, chunk=4),
    "refreshed from fresh": MemorySettings(0.5, refresh="block"),
    "refreshed from present, in pieces": MemorySettings(0.5, 5, "block", "present"),
}
PROMPTS = ["def read(self, size):", "import", "class Reader:\n    def close(self):\n        return", "x = [", "", "for"]


def read(model: TrainedModel, new_tokens: int = 6) -> dict:
    """Return results that must not depend on the layout or the batching."""
    results: dict = {}
    prompts = model.tokenizer.encode_plain(PROMPTS)
    for memory in (None, AS_PUBLISHED):
        on = memory is not None
        for temperature in (0.0, 1.0) if memory else (0.0,):
            decoding = Decoding(block_size=4, steps=2, temperature=temperature, stop_at_eos=False)

            def work(batch, ids, memory=memory, decoding=decoding):
                return model.generate(batch, new_tokens, decoding, memory, ids=ids).responses

            results[f"memory {on}, temperature {temperature}"] = model.data_parallel.map_batches(prompts, 2, work)
        if memory:

            def guided(batch, ids):
                decoding = Decoding(4, 2, 1.0, stop_at_eos=False, cfg_scale=1.5, suppress_tokens=SUPPRESSED)
                return model.generate(batch, new_tokens, decoding, AS_PUBLISHED, ids=ids).responses

            results["guided"] = model.data_parallel.map_batches(prompts, 2, guided)
            for name, decoding in DECODINGS.items():
                if model._shards.cp_size > 1 and decoding.cache != "none":
                    with pytest.raises(UserError, match=r"parallelism\.context_parallel_degree = 2"):
                        model.generate(prompts, new_tokens, decoding)
                    continue

                def work(batch, ids, decoding=decoding):
                    return model.generate(batch, new_tokens, decoding, AS_PUBLISHED, ids=ids).responses

                results[name] = model.data_parallel.map_batches(prompts, 3, work)
            decoding = DECODINGS["block-causal, cached" if "block-causal, cached" in results else "block-causal"]
            for name, settings in MEMORIES.items():

                def remembered(batch, ids, settings=settings):
                    return model.generate(batch, FEW, PLAIN, settings, ids=ids).responses

                results[name] = model.data_parallel.map_batches(prompts, 3, remembered)
            # On two data-parallel ranks, the second queue leaves one without requests.
            for key, count, asked, settings in (
                ("served", new_tokens, decoding, AS_PUBLISHED),
                ("served, refreshed", FEW, PLAIN, MEMORIES["refreshed from present, in pieces"]),
            ):
                requests = [Request(prompt, count, number) for number, prompt in enumerate(prompts)]
                served = [serve(model, queue, asked, 2, settings) for queue in (requests, requests[:1])]
                results[key] = [response.response for queue in served for response in queue.responses]
        # No empty prompts: with only [MASK]s, all positions have equal confidence, and rounding chooses among them.
        rows = [Row(prompt, [5, 6, 7, 8]) for prompt in prompts if prompt]
        points = measure(model, rows, memory, ratios=(0.5, 1.0), batch_size=2)
        # Only static losses: confidences here differ by rounding, which would decide the order of decoding.
        results[f"losses, memory {on}"] = [point.static for point in points]
    return results


def arguments_of(folder: Path) -> list[str]:
    """Return the configuration of the run that trained the model."""
    return debug(folder / "run", "--model.flavor", "tiny", "--parametric_memory.layer_fraction", "0.5")


def training(folder: Path) -> list[str]:
    """Return the arguments of the run that trains the model."""
    saving = ["--training.steps", "2", "--checkpoint.enable", "--checkpoint.interval", "2"]
    return [*arguments_of(folder), *saving]


def read_rank(rank: int, folder: Path, name: str) -> int:
    """Read the checkpoint on a layout; rank 0 writes the results."""
    torch.set_num_threads(1)
    model = TrainedModel(parse_config.parse([*arguments_of(folder), *LAYOUTS[name][1], *BOLD]))
    results = read(model)
    (document,) = model.tokenizer.encode_plain(PROMPTS[:1])
    written = model.adapt([document], MEMORIES["in pieces"])
    model.save_memory(folder / f"{name}.safetensors", written)
    # The file that the first layout wrote: read by all others.
    loaded = model.load_memory(folder / "one.safetensors")
    for key, memory in (("written", written), ("loaded", loaded)):
        results[key] = [model.generate([prompt], 6, PLAIN, memory).responses[0] for prompt in ([], document, [5, 6])]
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(results))
    model.close()
    return 0


def main(folder: Path) -> int:
    if status := fork(1, lambda rank: train_rank(rank, training(folder), {})):
        return status
    for name, (processes, _) in LAYOUTS.items():
        if status := fork(processes, lambda rank, name=name: read_rank(rank, folder, name)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
