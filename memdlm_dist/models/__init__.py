"""Backbones by name."""

from typing import NamedTuple

from memdlm_dist.errors import UserError
from memdlm_dist.models import llada, llada_moe
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.state_dict_adapters import Adapter, LLaDAMoEStateDictAdapter, LLaDAStateDictAdapter


class Backbone(NamedTuple):
    """A kind of model, its sizes by name, and its names on Hugging Face."""

    model: type[LLaDA]
    flavours: dict[str, LLaDAArgs]
    adapter: type[Adapter]


BACKBONES = {
    "llada": Backbone(LLaDA, llada.FLAVOURS, LLaDAStateDictAdapter),
    "llada_moe": Backbone(llada_moe.LLaDAMoE, llada_moe.FLAVOURS, LLaDAMoEStateDictAdapter),
}


def backbone_args(name: str, flavour: str) -> LLaDAArgs:
    """The sizes of a backbone, by `model.name` and `model.flavor`.

    Raises:
        UserError: if one of them does not exist.
    """
    if name not in BACKBONES:
        raise UserError(f"model.name {name!r} is not a diffusion backbone; choose among {', '.join(BACKBONES)}.")
    flavours = BACKBONES[name].flavours
    if flavour not in flavours:
        raise UserError(
            f"model.flavor {flavour!r} does not exist for model {name}; choose among {', '.join(flavours)}."
        )
    return flavours[flavour]
