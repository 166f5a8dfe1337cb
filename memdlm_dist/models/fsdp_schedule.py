"""When FSDP2 gathers the parameters of a backbone, and when it frees them.

FSDP2 gathers a group of parameters before each pass through it and frees it behind: right for a step that
passes once. The bi-level step passes several times through some groups. A group of the trunk is gathered
for all states at once; those of the tail, and the output head's, stay from the first inner step until the
outer backward pass is through them. A step then gathers no more than one of plain masked diffusion does,
and reduces gradients once.

`FSDPSchedule` has no effect on a backbone that FSDP2 does not shard.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class FSDPSchedule:
    """FSDP2's groups of a backbone: the embedding is group 0, layer i group i + 1, norm and head the last.

    With expert parallelism a layer is two of FSDP2's: its experts are sharded over fewer ranks than the rest.
    """

    root: FSDPModule | None = None
    groups: Sequence[Sequence[FSDPModule]] = ()
    freed: Sequence[bool] = ()  # whether plain training frees the group after the forward pass

    @classmethod
    def from_model(cls, model: Any, policy: str) -> "FSDPSchedule":
        """The groups that torchtitan's llama3 recipe makes of `model`, and their backward prefetch order.

        Args:
            model: after `fully_shard`.
            policy: `parallelism.fsdp_reshard_after_forward`, by which the recipe frees them.
        """
        layers = [[block, *_experts(block)] for block in model.layers.values()]
        groups = [[model.tok_embeddings], *layers, [model.output]]
        freed = [policy != "never"] * (len(groups) - 1) + [policy == "always"]
        # FSDP2 would prefetch by the order of past forward passes, of which the inner loop makes many. The
        # first group has nothing before it: it names itself, since an empty list asks for that order.
        before_each = [groups[0], *groups]
        if not any(p.requires_grad for p in model.tok_embeddings.parameters()):
            before_each[1] = groups[1]  # a frozen embedding has no backward pass
        for group, before in zip(groups, before_each, strict=False):
            group[0].set_modules_to_backward_prefetch(list(before))
            for experts in group[1:]:
                experts.set_modules_to_backward_prefetch([experts])  # likewise: their block has asked for them
        return cls(model, groups, freed)

    @contextmanager
    def unsharded(self, group: int) -> Iterator[None]:
        """One gathering for all passes through a group in this context."""
        if not self.groups or not self.freed[group]:
            yield
            return
        for module in self.groups[group]:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in self.groups[group]:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    @contextmanager
    def tail(self, first_layer: int) -> Iterator[None]:
        """Groups from a layer on stay gathered, and past the end of this context until the backward pass of what
        was computed in it; freed at the end if there is to be none."""
        groups, freed = self.groups[first_layer + 1 :], self.freed[first_layer + 1 :]
        modules = [(module, frees) for group, frees in zip(groups, freed, strict=True) for module in group]
        for module, _ in modules:
            module.set_reshard_after_forward(False, recurse=False)
        awaits_backward = False
        try:
            yield
            awaits_backward = torch.is_grad_enabled()
        finally:
            for module, frees in modules:
                module.set_reshard_after_forward(frees, recurse=False)
                if not awaits_backward:
                    module.reshard()

    @contextmanager
    def inner_steps(self, first_layer: int) -> Iterator[None]:
        """Backward passes in this context are for fast weights: no group is freed, prefetched or reduced by them."""
        if self.root is None:
            yield
            return
        first, before = self.groups[first_layer + 1], self.groups[first_layer]
        try:
            self._set_outer_backward(False)
            first[0].set_modules_to_backward_prefetch(list(first))
            yield
        finally:
            self._set_outer_backward(True)
            first[0].set_modules_to_backward_prefetch(list(before))

    def _set_outer_backward(self, outer: bool) -> None:
        assert self.root is not None
        self.root.set_reshard_after_backward(outer)
        self.root.set_requires_gradient_sync(outer)
        # Otherwise the end of each backward pass waits for reductions and drops what the outer one needs.
        self.root.set_is_last_backward(outer)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No parameter of the modules requires a gradient in this context.

    The backward pass of a compiled block computes every gradient that one of its inputs may need, whichever
    are asked for.
    """
    trained = [
        (module, name, parameter)
        for root in modules
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    # A group that FSDP2 gathers in this context takes the flags of its sharded parameters: no need to gather it first.
    for _, _, parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, name, parameter in trained:
            parameter.requires_grad_(True)
            module.get_parameter(name).requires_grad_(True)  # another one, where FSDP2 has gathered or freed the group


def _experts(block: Any) -> list[FSDPModule]:
    """The experts of a block, if FSDP2 has them in a group of their own."""
    return [module for module in block.modules() if isinstance(module, FSDPModule) and module is not block]
