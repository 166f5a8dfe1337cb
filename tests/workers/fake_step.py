"""Training steps and decoding on a fake accelerator: host reads, copies and operators that they use."""

import json
import logging
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.compat import fake_device
from memdlm_dist.compat import torch as compat
from memdlm_dist.config import parse_config
from memdlm_dist.inference import setup
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.predictor import Predictor
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED
from memdlm_dist.inference.sampler import Step
from memdlm_dist.models import llada
from memdlm_dist.runtime import device
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer
from tests.support.fake_device import FakeDevice, without_cuda_kernel

COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--model.flavor", "tiny", "--training.seq_len", "32",
    "--training.local_batch_size", "2", "--metrics.log_freq", "2", "--metrics.no_enable_tensorboard",
    "--optimizer.implementation", "fused",
]  # fmt: skip
MEMORY = "--parametric_memory."
EXPERTS = ["--model.name", "llada2", "--model.load_balance_coeff", "0.001"]
DISTILLED = [
    MEMORY + "inner_loss", "kl", MEMORY + "inner_steps", "3", MEMORY + "supervision", "newly_revealed",
    MEMORY + "inner_epochs", "2", MEMORY + "distillation_temperature", "2.0", "--diffusion.loss_norm", "answer",
]  # fmt: skip
# With this seed the inner loop reads two of four rows in step 2; packed rows have sets for two documents and for one.
SOME = [
    "--training.local_batch_size", "4", MEMORY + "samples_per_set", "2", MEMORY + "probability", "0.5",
    MEMORY + "dropout", "0.2", "--debug.seed", "22",
]  # fmt: skip
CASES = {  # name -> arguments; names with "packed" use packed rows
    "dense": ["--activation_checkpoint.mode", "full", "--training.mixed_precision_param", "bfloat16"],
    "dense, plain": [MEMORY + "no_enable", "--optimizer.implementation", "foreach"],
    "dense, distilled": [*DISTILLED, MEMORY + "target_modules", "ffn,attention", MEMORY + "probability", "0.5"],
    "packed": [
        MEMORY + "inner_loss", "hidden_mse", MEMORY + "adapter", "full", MEMORY + "gradient_norm", "global",
        MEMORY + "target_modules", "ffn,attention", "--training.mixed_precision_param", "bfloat16",
    ],
    "pairs": [*SOME, MEMORY + "target_modules", "ffn,attention"],
    "packed, pairs": [*SOME, "--training.mixed_precision_param", "bfloat16"],
    "experts": [*EXPERTS, MEMORY + "inner_loss", "hidden_cosine", MEMORY + "granularity", "batch"],
    "experts, packed": [
        *EXPERTS, "--model.converters", "lora", MEMORY + "inner_loss", "reverse_kl",
        MEMORY + "target_modules", "ffn,attention",
    ],
}  # fmt: skip
# Cases that draw their weights, that also take steps without logging, and that validate. The other cases would behave
# the same.
DRAWN, SILENT, VALIDATED = ("dense", "experts"), ("dense", "dense, plain", "packed"), ("dense, distilled",)
UNFUSED = ("dense, plain",)
VARLEN = ("packed", "packed, pairs")  # variable-length attention, as on CUDA in bfloat16; other cases use blocks

# Intended waits of a step for the device: without a fused optimizer, and when logging.
CONSENSUS = {"training.consensus:finish"}
LOG_READS = {
    f"training.metrics:{name}"
    for name in ("log_step", "_reduce", "_memory_effect", "_largest_rank_loss", "_load_balance")
}
# Intended copies: with a wait in steps that log; without a wait in every step.
LOG_COPIES = {"training.trainer:_record_metrics"}
TO_DEVICE, TO_HOST = "runtime.transfer:to_device", "runtime.transfer:__init__"
VALIDATION = {"training.validator:validate"}
# Intended reads and copies around decoding, which itself has none.
ADAPT, SCORE = "inference.prompt_memory:write", "inference.predictor:nll"
SCORE_COPIES = {SCORE, "inference.predictor:_forward"}
# name -> settings of decoding; copies to the host before the final one, and copies to the device. Two rows take 2 and 4
# steps. The device has no values, so a threshold keeps nothing here.
DECODINGS = {
    # The host reads the number of kept tokens in every step.
    "threshold, warm, dual cache": (Decoding(2, temperature=0.7, threshold=0.5, cache="dual"), 4, 2 + 2 * 2),
    "quota, editing": (Decoding(2, 2, threshold=0.5, edit_threshold=0.5, attention="block_causal"), 4, 2 + 2),
    # Blocks of two absolute positions: a row of three blocks and one of one; the host reads at their ends.
    "guided, prefix cache, block-causal": (
        Decoding(
            2, 2, 0.7, "random", cfg_scale=1.5, suppress_tokens=(3,), cache="prefix", cache_refresh=3,
            attention="block_causal",
        ),
        4, 2 + 2 * 4,
    ),
}  # fmt: skip
STATE = len(Step._fields)  # copies to the host of a finished canvas


def sizes(config):
    """Return the backbone's sizes with grouped products and heads wide enough for flex attention."""
    return replace(get_model_args(config), n_heads=2, n_kv_heads=2, grouped=True)


def step(name):
    """Take a logging step, and further steps in some cases; return the operators that ran on the device."""
    method = "varlen" if name in VARLEN else "blocks"
    with patch.object(llada, "attention_method", lambda *_: method):
        return _step(name)


def _step(name):
    config = parse_config.parse([*COMMON, *CASES[name]])
    args, packed = sizes(config), "packed" in name
    consensus_reads = CONSENSUS if name in UNFUSED else set()
    first = trainer.batch(config, args, packed=packed)
    with FakeDevice(LOG_READS | consensus_reads, LOG_COPIES) as fake:
        trained = trainer.build(config, args, get_layout(config, 1), fake_device.DEVICE, name in DRAWN)
        trainer.step(trained, 2, [first])
    operators = fake.operators
    if "pairs" in name:
        read_C = trained.objective.micro_batch(*first[:3], 2, documents_BL=first.documents_BL).inner_rows_C
        assert len(read_C) == 2, "the inner loop reads two of four rows"
    batch = trainer.batch(config, args, 1, packed=packed)
    if name in SILENT:
        steps = (3, 5) if name == "dense" else (3,)
        with FakeDevice(consensus_reads) as fake:
            for number in steps:  # the second step reads the first step's flags
                trainer.step(trained, number, [batch])
        sent = {TO_DEVICE: len(steps)} | ({} if consensus_reads else {TO_HOST: len(steps)})
        assert fake.transfers == sent, "one copy of the micro-batch to the device, one of the consensus flags back"
        assert fake.reads == dict.fromkeys(consensus_reads, 2), "one wait for two flags"
        operators |= fake.operators
    if name in VALIDATED:
        with FakeDevice(VALIDATION, VALIDATION) as fake:
            trainer.validate(trained, [batch])
        assert fake.reads == dict.fromkeys(VALIDATION, 3), "two losses and the token count, read at the end"
        operators |= fake.operators
    if packed:  # fast weights of attention's linears; "experts, packed" also has the experts', in float32
        assert torch.ops.aten._grouped_mm.default in operators
    assert (torch.ops.torch_attn._varlen_attn.default in operators) == (name in VARLEN)
    return operators


def read():
    """Decode with memory on and score a text; return the operators that ran on the device.

    The texts exceed the context length of training.
    """
    config = setup.inference_config(parse_config.parse([*COMMON, "--training.seq_len", "8"]))
    args, dims = sizes(config), get_layout(config, 1)
    prompts, new_tokens = [[1, 2, 3, 4, 5], [6, 7]], [4, 2]
    with FakeDevice({ADAPT}) as fake:
        trained = trainer.build(config, args, dims, fake_device.DEVICE, draws=False)
        tokenizer = SimpleNamespace(mask_id=args.vocab_size - 1, eos_id=0)
        model = Predictor(trained.model.eval(), args, tokenizer, trained.objective, dims, trained.device, nullcontext())
        generated = model.generate(prompts, new_tokens, Decoding(block_size=2, stop_at_eos=False), AS_PUBLISHED)
        assert [len(response) for response in generated.responses] == [0, 0], "all tokens are 0, end-of-text here"
    assert generated.passes == 4 and fake.reads == {ADAPT: 1}, "one wait for the fast weights, for the time of adapting"
    assert fake.transfers[TO_HOST] == STATE and not fake.copies
    operators, start = fake.operators, model.canvas(prompts, new_tokens)
    for name, (decoding, to_host, to_device) in DECODINGS.items():
        with FakeDevice() as fake:
            decoder = model.decoder(start, decoding, generated.fast)
            for _ in range(4):
                assert decoder.step()
            decoder.state(start.tokens_BL.shape[1]).to_host()
        assert decoder.passes == (8 if decoding.cfg_scale else 4), name
        # Settings, canvas, and two copies for each change of rows or blocks. The rows' quotas are equal in every step.
        assert fake.transfers == {TO_HOST: to_host + STATE, TO_DEVICE: to_device}, f"{name}: {fake.transfers}"
        operators |= fake.operators
    with FakeDevice({SCORE}, SCORE_COPIES) as fake:
        nll = model.nll(start.tokens_BL, start.response_BL, start.tokens_BL, start.attended_BL, generated.fast)
        assert nll.shape == (2,) and fake.reads == {SCORE: 1}
    return operators | fake.operators


def pinned_like(y):
    return device.pinned(y.nbytes).view(y.dtype)


# name -> an operation that the device refuses or waits for; x is a tensor on the device, y one on the host
MISTAKES = {
    "item": lambda x, y: x.sum().item(),
    "if": lambda x, y: bool(x.any()),
    "tolist": lambda x, y: x.tolist(),
    "cpu": lambda x, y: x.cpu(),
    "copy into a host tensor": lambda x, y: y.copy_(x),
    "boolean indexing": lambda x, y: x[x > 0],
    "mask of the host": lambda x, y: torch.where(y > 0, x, 0.0),
    "indices of the host": lambda x, y: x[torch.arange(2)],
    "copy of a mask": lambda x, y: x * y.to(x.device),
    "memory that is not pinned": lambda x, y: y.to(x.device, non_blocking=True),
    "a wait for pinned memory": lambda x, y: pinned_like(y).to(x.device),
    "a wait for a copy to pinned memory": lambda x, y: pinned_like(y).copy_(x),
    "assignment to the places of a mask": lambda x, y: x.index_put_((x > 0,), x),
    "scalar of the host in a stack": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "collective of the host": lambda x, y: dist.all_reduce(y),
    "constant": lambda x, y: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
}


def mistakes():
    """Return the type of error that refuses each mistake; None if nothing does."""
    errors = dict.fromkeys(MISTAKES)
    with FakeDevice():
        x, y = torch.ones(3, device=fake_device.DEVICE), torch.ones(3)
        assert (x * torch.ones(()) + 1.0).device == x.device, "host scalars are kernel arguments"
        assert y.copy_(torch.zeros(3)) is y and not y.any(), "host-only copies are allowed"
        assert pinned_like(y).to(x.device, non_blocking=True).device == x.device
        assert not pinned_like(y).copy_(x, non_blocking=True).any()
        for name, mistake in MISTAKES.items():
            try:
                mistake(x, y)
            except Exception as refusal:
                errors[name] = type(refusal).__name__
    return errors


def write(_, path):
    """Write as JSON the number of operators per case, those without a CUDA kernel, and the refused mistakes."""
    logging.disable()
    warnings.filterwarnings("ignore")  # flex attention warns when it runs uncompiled
    fake_device.register()
    init_fake_process_group(1)
    compat.MAX_GROUPS = 7  # forces grouped products to be split
    with torch.compiler.set_stance("force_eager"):
        ran = {name: step(name) for name in CASES} | {"decoding": read()}
    of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    result = {
        "operators": {name: [len(operators), without_cuda_kernel(operators)] for name, operators in ran.items()},
        "of a CPU alone": without_cuda_kernel([of_cpu]),
        "mistakes": mistakes(),
    }
    Path(path).write_text(json.dumps(result))
    return 0
