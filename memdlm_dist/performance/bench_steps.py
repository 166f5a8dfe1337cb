"""Benchmark steps: plain, straightforward and ours, on a sharded backbone with random tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import utils as dist_utils

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.method import bilevel, fast_weight_tree
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.models import backbone_args
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.performance import straightforward
from memdlm_dist.performance.collectives import Collectives
from memdlm_dist.runtime.device import device_type
from memdlm_dist.runtime.process_group import autocast
from memdlm_dist.training.backbone import get_layout, model_on_meta
from memdlm_dist.training.objective import Objective, build_objective

KINDS = ("plain", "straightforward", "ours")
DATA_PARALLEL = ("dp_replicate", "fsdp")  # mesh dimensions over which FSDP2 communicates
_SEED = 0


@dataclass
class Bench:
    """A sharded backbone with everything that the three `KINDS` of step need."""

    config: JobConfig
    args: LLaDAArgs
    dims: Layout
    model: LLaDA
    objective: Objective
    flops_per_token: float  # plain training, as torchtitan counts it
    autocast: Any  # autocast context, as in torchtitan's trainer

    @classmethod
    def build(cls, config: JobConfig, layers: int | None = None, args: LLaDAArgs | None = None) -> "Bench":
        """Build the model and the objective; all ranks of torch.distributed must call this.

        Args:
            config: a resolved configuration.
            layers: number of layers; None for the flavour's.
            args: sizes of the backbone; None for the flavour's.
        """
        dims = get_layout(config, dist.get_world_size())
        args = args or backbone_args(config.model.name, config.model.flavor)
        args = replace(args, n_layers=layers or args.n_layers)
        args.update_from_config(config)
        torch.manual_seed(_SEED)
        model = model_on_meta(config, args, dims)
        _, flops = args.get_nparams_and_flops(model, config.training.seq_len)
        model.to_empty(device=device_type())
        with torch.no_grad():
            model.init_weights()
        objective = build_objective(config, args, args.vocab_size - 1, dims)
        autocast_context = autocast(dims, config.training.mixed_precision_param, device_type())
        return cls(config, args, dims, model, objective, flops, autocast_context)

    def batch(self, number: int, adapted_groups: int | None = None) -> MicroBatch:
        """Draw a micro-batch of random tokens with noise; it is the same on all ranks of a tensor-parallel group.

        Args:
            number: key of tokens and noise.
            adapted_groups: number of groups of rows that train with the memory, see `Objective.micro_batch`; None: all.
        """
        training = self.config.training
        mesh = self.dims.get_optional_mesh("batch")
        ids = torch.arange(training.local_batch_size) + training.local_batch_size * (
            mesh.get_local_rank() if mesh is not None else 0
        )
        generator = torch.Generator().manual_seed(int(ids[0]) + 1_000_003 * number)
        shape = (training.local_batch_size, training.seq_len)
        tokens = torch.randint(0, self.args.vocab_size - 1, shape, generator=generator)
        batch = self.objective.micro_batch(tokens, tokens, ids, step=number, adapted_groups=adapted_groups)
        return batch.to(device_type())

    def loss_sum(self, kind: str, batch: MicroBatch, step: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Any]:
        """Compute the outer loss sum by one of the three `KINDS` of step, and the inner loop's statistics.

        Args:
            kind: kind of step.
            batch: a batch of this bench.
            step: step number, part of the key of the fast weights' draw.
            dtype: dtype of the fast weights; None keeps the dtype in which they are drawn.
        """
        memory = self.objective.memory
        assert memory is not None
        function = straightforward.outer_loss if kind == "straightforward" else bilevel.outer_loss
        run = partial(function, label_smoothing=self.objective.label_smoothing)
        tp_rank = self.objective.tp_rank
        with self.autocast:
            if kind == "plain":
                return run(self.model, batch, None, None, tp_rank)
            if not batch.inner:  # as in `Objective.loss_sum`
                return run(self.model, batch, memory, None, tp_rank)
            fast = memory.draw(_SEED, step, batch.sample_ids_U, batch.slots)
            if dtype is not None:
                fast = fast_weight_tree.map_leaves(lambda x: x.to(dtype), fast)
            return run(self.model, batch, memory, fast, tp_rank)

    def optimizer_step(self) -> Callable[[str, int, MicroBatch], None]:
        """Build the optimizer; return a function of kind, step number and batch that takes one whole step."""
        optimizer = build_optimizers([self.model], self.config.optimizer, self.dims)
        parameters = list(self.model.parameters())

        def step(kind: str, number: int, batch: MicroBatch) -> None:
            loss, _ = self.loss_sum(kind, batch, number)
            (loss / batch.maskable).backward()
            dist_utils.clip_grad_norm_(parameters, self.config.training.max_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def groups(self, *names: str) -> list[dist.ProcessGroup]:
        """Return the process groups of the named mesh dimensions; dimensions of degree 1 have none."""
        meshes = (self.dims.get_optional_mesh(name) for name in names)
        return [mesh.get_group() for mesh in meshes if mesh is not None]

    def collectives(self, kind: str, number: int = 0, adapted_groups: int | None = None) -> Collectives:
        """Record the collectives of one forward and backward pass; for `adapted_groups` see `batch`."""
        batch = self.batch(number, adapted_groups)
        # Collectives inside compiled blocks would not be recorded.
        with torch.compiler.set_stance("force_eager"), Collectives() as recorded:
            self.loss_sum(kind, batch, number)[0].backward()
        self.model.zero_grad()
        return recorded
