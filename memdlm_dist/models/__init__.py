"""Backbones, registered with torchtitan under their names."""

from torchtitan.protocols.train_spec import register_train_spec

from memdlm_dist.models import llada

register_train_spec("llada", llada.train_spec())
