"""Backbones by name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from memdlm_dist.errors import UserError
from memdlm_dist.models import flavours
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.models.state_dict_adapters import (
    BackboneStateDictAdapter,
    LLaDA2StateDictAdapter,
    LLaDAMoEStateDictAdapter,
    LLaDAStateDictAdapter,
)


class BackboneSpec(NamedTuple):
    """A backbone: its model class, its flavours and its state-dict adapter."""

    model: type[LLaDA]
    flavours: Mapping[str, LLaDAArgs]
    sd_adapter: type[BackboneStateDictAdapter]


BACKBONES = {
    "llada": BackboneSpec(LLaDA, flavours.LLADA, LLaDAStateDictAdapter),
    "llada2": BackboneSpec(LLaDAMixture, flavours.LLADA2, LLaDA2StateDictAdapter),
    "llada_moe": BackboneSpec(LLaDAMixture, flavours.LLADA_MOE, LLaDAMoEStateDictAdapter),
}


def backbone_args(name: str, flavour: str) -> LLaDAArgs:
    """Return a copy of a backbone's sizes by `model.name` and `model.flavor`; the caller may change it.

    Raises:
        UserError: if the backbone or the flavour does not exist.
    """
    if name not in BACKBONES:
        raise UserError(f"model.name {name!r} is not a diffusion backbone; choose among {', '.join(BACKBONES)}.")
    table = BACKBONES[name].flavours
    if flavour not in table:
        raise UserError(f"model.flavor {flavour!r} does not exist for model {name}; choose among {', '.join(table)}.")
    return replace(table[flavour])
