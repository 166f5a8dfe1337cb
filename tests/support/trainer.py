"""Trainer without data, checkpoints and watchdog, for tests of `train_step` on any device and layout."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing

from memdlm_dist.data.loader import Batch
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.models.flops import Recomputation
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.runtime.process_group import autocast
from memdlm_dist.training.backbone import get_lora, model_on_meta
from memdlm_dist.training.consensus import StepConsensus
from memdlm_dist.training.memory_dependence import MemoryDependence
from memdlm_dist.training.metrics import MemDLMMetrics
from memdlm_dist.training.objective import build_objective
from memdlm_dist.training.trainer import MemDLMTrainer
from memdlm_dist.training.validator import HeldOutValidator


def build(config, sizes, dims, device, draws=True):
    """Return a trainer that is set up as torchtitan sets up its trainer.

    Args:
        config: the configuration.
        sizes: sizes of the backbone.
        dims: torchtitan's ParallelDims.
        device: device type.
        draws: initialise the weights; False leaves them uninitialised.
    """
    model = model_on_meta(config, sizes, dims).to_empty(device=device)
    if draws:
        with torch.no_grad():
            model.init_weights(torch.device(device))
    trainer = MemDLMTrainer.__new__(MemDLMTrainer)
    checkpointing, device = config.activation_checkpoint, torch.device(device, 0)
    vars(trainer).update(
        job_config=config, device=device, model_args=sizes, parallel_dims=dims, step=0, ntokens_seen=0,
        model=model, model_parts=[model], objective=build_objective(config, sizes, sizes.vocab_size - 1, dims),
        recomputation=Recomputation(checkpointing.mode, checkpointing.selective_ac_option),
        metrics_processor=MemDLMMetrics(config, dims), gradient_accumulation_steps=1, dataloader=SimpleNamespace(),
        checkpointer=SimpleNamespace(maybe_wait_for_staging=lambda: None, lora=get_lora(config)),
        watchdog=SimpleNamespace(at=lambda *_, **__: None), stop=SimpleNamespace(requested=False),
        train_context=nullcontext, maybe_enable_amp=autocast(dims, config.training.mixed_precision_param, device.type),
    )  # fmt: skip
    trainer.optimizers = build_optimizers_with_moe_load_balancing([model], config.optimizer, dims)
    biases = model.expert_biases() if isinstance(model, LLaDAMixture) else []
    trainer.consensus = StepConsensus([model], trainer.optimizers, config.reliability, device, biases)
    trainer.lr_schedulers = build_lr_schedulers(trainer.optimizers, config.lr_scheduler, config.training.steps)
    trainer.metrics_processor.num_flops_per_token = 1
    return trainer


def batch(config, sizes, number=0, empty_rows=(), packed=False):
    """Return a batch in the loader's format, of random tokens; the first eighth of each row is the prompt.

    Args:
        config: the configuration.
        sizes: sizes of the backbone.
        number: index of the batch, the seed of its tokens.
        empty_rows: rows without maskable tokens.
        packed: three documents per row; row 0 ends with padding.
    """
    rows, length = config.training.local_batch_size, config.training.seq_len
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, sizes.vocab_size - 1, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[:, : length // 8] = IGNORE_INDEX
    labels[list(empty_rows)] = IGNORE_INDEX
    documents = None
    if packed:
        documents = (torch.arange(length) * 3 // length).expand(rows, -1).clone()
        documents[0, -4:] = -1
        labels[0, -4:] = IGNORE_INDEX
    return Batch(tokens, labels, torch.arange(rows) + rows * number, documents, {})


def step(trainer, number, batches):
    """Take training step `number` on `batches`."""
    trainer.step = number
    with trainer.build_prefetcher(batches) as ahead:
        trainer.train_step(ahead)


def held_out(trainer, batches):
    """Return a validator of `batches` that reads no data and writes no files."""
    validator = HeldOutValidator.__new__(HeldOutValidator)
    rows = [batch[:4] for batch in batches]
    vars(validator).update(
        job_config=trainer.job_config, _objective=trainer.objective, _parallel_dims=trainer.parallel_dims,
        _metrics=trainer.metrics_processor, _context=trainer.train_context, _amp=trainer.maybe_enable_amp,
        _dependence=MemoryDependence(), _batches=lambda: rows, _report=lambda losses, step: None,
        progress=lambda doing: None, batch_size=trainer.job_config.training.local_batch_size,
        slots=trainer.objective.slots,
    )  # fmt: skip
    return validator


def validate(trainer, batches):
    """Validate on `batches`."""
    return held_out(trainer, batches).validate(trainer.model_parts, trainer.step)
