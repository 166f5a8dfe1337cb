"""Backbones by name."""

from memdlm_dist.errors import UserError
from memdlm_dist.models.llada import FLAVOURS, LLaDA, LLaDAArgs

BACKBONES: dict[str, tuple[type[LLaDA], dict[str, LLaDAArgs]]] = {"llada": (LLaDA, FLAVOURS)}


def backbone_args(name: str, flavour: str) -> LLaDAArgs:
    """The sizes of a backbone, by `model.name` and `model.flavor`.

    Raises:
        UserError: if one of them does not exist.
    """
    if name not in BACKBONES:
        raise UserError(f"model.name {name!r} is not a diffusion backbone; choose among {', '.join(BACKBONES)}.")
    flavours = BACKBONES[name][1]
    if flavour not in flavours:
        raise UserError(
            f"model.flavor {flavour!r} does not exist for model {name}; choose among {', '.join(flavours)}."
        )
    return flavours[flavour]
