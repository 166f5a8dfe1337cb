"""Output head: returns logits, losses of its logits, tokens chosen from them, or its input hidden states.

Shapes: N scored tokens of all tensor-parallel ranks, D model dim, V vocabulary, G sets of fast weights, n tokens to
choose.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memdlm_dist.method.inner_loss import Hidden
from memdlm_dist.method.logit_loss import HeadLoss, set_losses
from memdlm_dist.models.token_choice import TokenChoice, choose_tokens

# Output of the model: logits, their losses, tokens, or the hidden states before or after the final norm.
Readout = Literal["logits"] | Hidden | HeadLoss | TokenChoice


class OutputHead(nn.Linear):
    """Output head that returns logits, losses of its logits, chosen tokens, or its unchanged input.

    All outputs go through `forward`, for two reasons. FSDP2 gathers the head in one group with the final norm,
    and the group must run as a unit. Tensor parallelism all-gathers the sequence shards at the head's input.
    torchtitan's plan treats every output as logits and redistributes it to their placement.
    """

    placement: Placement = Shard(-1)  # placement of the logits under tensor parallelism
    backend: str | Callable[..., Any] | None = None  # torch.compile backend of the losses; None: eager

    def follow_plan(self, loss_parallel: bool) -> None:
        """Set the placement that torchtitan's tensor-parallel plan expects of the head's output."""
        self.placement = Shard(-1) if loss_parallel else Replicate()

    def forward(self, x_1ND: Tensor, readout: Readout = "logits") -> Tensor:
        """Return logits `[1, N, V]` or, as `readout` asks, the input `[1, N, D]`, losses `[G]` or tokens `[2, n]`."""
        if isinstance(readout, HeadLoss):
            return self._losses(x_1ND, readout)
        if isinstance(readout, TokenChoice):
            return self._tokens(x_1ND, readout)
        return super().forward(x_1ND) if readout == "logits" else x_1ND

    def _losses(self, x_1ND: Tensor, head: HeadLoss) -> Tensor:
        x_1ND, weight = self._autocast(x_1ND, self.weight)
        if not isinstance(weight, DTensor):
            return set_losses(x_1ND.squeeze(0), weight, head, backend=self.backend)
        # Every rank computes the losses of all sets. The plan expects the placement of logits.
        mesh = weight.device_mesh
        h_ND = cast(DTensor, x_1ND).to_local(grad_placements=[Partial()]).squeeze(0)
        loss_G = set_losses(h_ND, weight.to_local(), head, mesh.get_group())
        return DTensor.from_local(loss_G, mesh, [self.placement], run_check=False)

    def _tokens(self, x_1ND: Tensor, choice: TokenChoice) -> Tensor:
        x_1ND, weight = self._autocast(x_1ND, self.weight)
        if not isinstance(weight, DTensor):
            return choose_tokens(x_1ND.squeeze(0), weight, choice)
        mesh = weight.device_mesh
        h_ND = cast(DTensor, x_1ND).to_local().squeeze(0)
        out_2n = choose_tokens(h_ND, weight.to_local(), choice, mesh.get_group())
        return DTensor.from_local(out_2n, mesh, [self.placement], run_check=False)

    @staticmethod
    def _autocast(*tensors: Tensor) -> list[Tensor]:
        """Cast a matrix product's arguments as autocast would; autocast does not apply inside `set_losses`."""
        device = tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return list(tensors)
        dtype = torch.get_autocast_dtype(device)
        return [x.to(dtype) for x in tensors]
