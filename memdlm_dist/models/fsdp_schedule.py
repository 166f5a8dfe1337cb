"""Schedule of FSDP2's all-gathers and reshards in the bi-level step.

FSDP2 gathers a group of parameters before each pass through it and reshards the group after the pass. That suits a step
with one pass per group, but the bi-level step passes through some groups several times. The schedule gathers a group of
the trunk once for all states. It keeps the groups of the tail and of the output head gathered from the first inner step
until the outer backward pass has used them. A step then needs no more all-gathers than plain masked diffusion, and
reduces gradients once.

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
    """FSDP2's groups of a backbone: embedding (0), layer i (i + 1), final norm with output head (last).

    With expert parallelism a layer has two FSDP2 modules: its experts are sharded over fewer ranks than the rest.
    """

    root: FSDPModule | None = None
    groups: Sequence[Sequence[FSDPModule]] = ()
    reshard_after_forward: Sequence[bool] = ()  # for each group: resharded after the forward pass in plain training

    @classmethod
    def from_model(cls, model: Any, policy: str) -> "FSDPSchedule":
        """Collect the groups that torchtitan's llama3 recipe made, and set their backward prefetch order.

        Args:
            model: the backbone after `fully_shard`.
            policy: `parallelism.fsdp_reshard_after_forward`.
        """
        layers = [[block, *_expert_modules(block)] for block in model.layers.values()]
        groups = [[model.tok_embeddings], *layers, [model.output]]
        reshard = [policy != "never"] * (len(groups) - 1) + [policy == "always"]
        # By default FSDP2 prefetches in the order of past forward passes, and the inner loop runs many of these. The
        # first group has no predecessor and names itself, because an empty list restores the default.
        previous_groups = [groups[0], *groups]
        if not any(p.requires_grad for p in model.tok_embeddings.parameters()):
            previous_groups[1] = groups[1]  # a frozen embedding has no backward pass
        for group, previous in zip(groups, previous_groups, strict=False):
            group[0].set_modules_to_backward_prefetch(list(previous))
            for experts in group[1:]:
                # Experts name themselves: their block has already prefetched the previous group.
                experts.set_modules_to_backward_prefetch([experts])
        return cls(model, groups, reshard)

    @contextmanager
    def unsharded(self, group: int) -> Iterator[None]:
        """Keep a group gathered for all passes through it in this context, and reshard it at the end."""
        if not self.groups or not self.reshard_after_forward[group]:
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
        """Keep the groups from layer `first_layer` on gathered until their backward pass has used them.

        If gradients are enabled, the groups stay gathered after the context, and the outer backward pass reshards them.
        Otherwise they are resharded at the end of the context.
        """
        groups, policies = self.groups[first_layer + 1 :], self.reshard_after_forward[first_layer + 1 :]
        modules = [(module, reshard) for group, reshard in zip(groups, policies, strict=True) for module in group]
        for module, _ in modules:
            module.set_reshard_after_forward(False, recurse=False)
        awaits_backward = False
        try:
            yield
            awaits_backward = torch.is_grad_enabled()
        finally:
            for module, reshard in modules:
                module.set_reshard_after_forward(reshard, recurse=False)
                if not awaits_backward:
                    module.reshard()

    @contextmanager
    def inner_steps(self, first_layer: int) -> Iterator[None]:
        """Run backward passes for fast weights in this context: no group is resharded, prefetched or reduced."""
        if self.root is None:
            yield
            return
        first, previous = self.groups[first_layer + 1], self.groups[first_layer]
        try:
            self._set_outer_backward(False)
            first[0].set_modules_to_backward_prefetch(list(first))
            yield
        finally:
            self._set_outer_backward(True)
            first[0].set_modules_to_backward_prefetch(list(previous))

    def _set_outer_backward(self, outer: bool) -> None:
        assert self.root is not None
        self.root.set_reshard_after_backward(outer)
        self.root.set_requires_gradient_sync(outer)
        # Otherwise each inner backward pass waits for reductions at its end, and drops the outer pass's state.
        self.root.set_is_last_backward(outer)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Disable the gradients of the modules' parameters in this context.

    Without it, the backward pass of a compiled block computes the gradients of all inputs that require one, even if the
    caller requests only some of them.
    """
    trained = [
        (module, name, parameter)
        for root in modules
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    # Sharded parameters suffice: when FSDP2 gathers a group in this context, it copies their requires_grad flags.
    for _, _, parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, name, parameter in trained:
            parameter.requires_grad_(True)
            # FSDP2 has replaced the parameter if it gathered or resharded the group in this context.
            module.get_parameter(name).requires_grad_(True)


def _expert_modules(block: Any) -> list[FSDPModule]:
    """Return the experts of a block if they are an FSDP2 module separate from the block's."""
    return [module for module in block.modules() if isinstance(module, FSDPModule) and module is not block]
