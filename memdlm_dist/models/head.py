"""The output head, which returns logits, the losses of its logits, or the hidden states that it gets.

Shapes: N scored tokens of all tensor-parallel ranks, D model, V vocabulary, G sets of fast weights.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memdlm_dist.method.inner_loss import Hidden
from memdlm_dist.method.logit_loss import HeadLoss, set_losses

# What is read off the model: the output head's logits, or a hidden state that it gets.
Readout = Literal["logits"] | Hidden


class OutputHead(nn.Linear):
    """The output head, which can return the losses of its logits, or hand on the hidden states that it gets.

    All pass through its `forward` because FSDP2 gathers it in one group with the final norm, which has to
    run whole, and because tensor parallelism gathers the tokens of the sequence shards at its input. What
    it returns is then laid out by torchtitan's plan as logits are, on the last dimension.
    """

    placement: Placement = Shard(-1)  # of the logits under tensor parallelism
    backend: str | Callable[..., Any] | None = None  # torch.compile's for the losses; None leaves them eager

    def follow_plan(self, loss_parallel: bool) -> None:
        """Lay out the losses as torchtitan's tensor-parallel plan lays out what leaves the head."""
        self.placement = Shard(-1) if loss_parallel else Replicate()

    def forward(self, x_1ND: Tensor, readout: Readout | HeadLoss = "logits") -> Tensor:
        """Logits `[1, N, V]`, the input itself, or losses `[G]`."""
        if isinstance(readout, HeadLoss):
            return self._losses(x_1ND, readout)
        return super().forward(x_1ND) if readout == "logits" else x_1ND

    def _losses(self, x_1ND: Tensor, head: HeadLoss) -> Tensor:
        x_1ND, weight = self._autocast(x_1ND, self.weight)
        if not isinstance(weight, DTensor):
            return set_losses(x_1ND.squeeze(0), weight, head, backend=self.backend)
        # Every rank computes all sets' losses, so that "as logits are" each holds its own copy of them.
        mesh = weight.device_mesh
        h_ND = cast(DTensor, x_1ND).to_local(grad_placements=[Partial()]).squeeze(0)
        loss_G = set_losses(h_ND, weight.to_local(), head, mesh.get_group())
        return DTensor.from_local(loss_G, mesh, [self.placement], run_check=False)

    @staticmethod
    def _autocast(*tensors: Tensor) -> list[Tensor]:
        """What autocast would do to a matrix product's arguments; it does not look into `set_losses`."""
        device = tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return list(tensors)
        dtype = torch.get_autocast_dtype(device)
        return [x.to(dtype) for x in tensors]
