"""Sizes of needle tasks for samples of a few hundred tokens."""

from memdlm_dist.evaluation.needle import Sizes

SMALL = Sizes(
    values=2, distractors=1, digits=4, hops=2, letters=3, common=2, repeats=6, rare_repeats=1, facts=5, words=5
)
