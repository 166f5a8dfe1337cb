"""Keyed random numbers: reproducible, sliceable, uniform and independent across keys."""

import pytest
import torch

from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from tests.oracles import naive


@pytest.mark.parametrize("seed, step, sample_id", [(0, 0, 0), (7, 12, 123_456_789), (2**31, 10**6, 2**40)])
def test_equals_the_generator_on_python_integers(seed, step, sample_id):
    keys = keyed_random.key(seed, Stream.MASK, step, torch.tensor([sample_id]))
    ours = keyed_random.uniform(keys, torch.arange(5))[0].tolist()
    assert ours == [naive.keyed_uniform(seed, 2, step, sample_id, i) for i in range(5)]  # exact: integers


def test_a_slice_is_the_slice_of_the_whole():
    keys = keyed_random.key(1, Stream.FAST_WEIGHTS, 3, torch.arange(4))
    full = keyed_random.uniform(keys, torch.arange(100), torch.float32)
    assert torch.equal(full[1:3, 40:60], keyed_random.uniform(keys[1:3], torch.arange(40, 60), torch.float32))


def test_numbers_are_uniform_and_keys_independent():
    keys = keyed_random.key(5, Stream.MASK, 1, torch.arange(64))
    u = keyed_random.uniform(keys, torch.arange(4096))
    assert u.min() >= 0 and u.max() < 1
    # Standard errors over 262,144 numbers: 0.00056 for the mean, 0.0006 for a decile's share.
    assert abs(u.mean() - 0.5) < 0.003
    assert (torch.histc(u.float(), 10, 0, 1) / u.numel() - 0.1).abs().max() < 0.003
    # Neighbouring keys and neighbouring positions are uncorrelated (standard error 0.002).
    centred = u - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 0.01
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 0.01
    other = keyed_random.uniform(keyed_random.key(5, Stream.LEVEL, 1, torch.arange(64)), torch.arange(4096))
    assert abs((centred * (other - 0.5)).mean() * 12) < 0.01
