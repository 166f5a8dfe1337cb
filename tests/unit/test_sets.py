"""Assignment of samples to sets of fast weights, against lists."""

import pytest
import torch

from memdlm_dist.method.sets import Sets

CPU = torch.device("cpu")


CASES = [(6, 1, 1), (6, 1, 2), (6, 1, 3), (4, 1, None), (3, 4, 1), (2, 4, 3), (2, 4, 8), (3, 4, None)]


@pytest.mark.parametrize("rows, slots, n", CASES)
def test_consecutive_samples_share_a_set(rows, slots, n):
    sets = Sets(rows, slots, n)
    if n is None:
        expected = [[*range(rows * slots)]]
    elif slots == 1:
        expected = [[*range(first, first + n)] for first in range(0, rows, n)]
    else:
        expected = [
            [row * slots + slot for slot in range(first, min(first + n, slots))]
            for row in range(rows)
            for first in range(0, slots, n)
        ]
    of_sample = sets.of_samples(CPU).tolist()
    assert sets.count == len(expected) and len(of_sample) == rows * slots
    assert [[u for u, g in enumerate(of_sample) if g == number] for number in range(len(expected))] == expected
    assert sets.first_samples(CPU).tolist() == [samples[0] for samples in expected]
    groups = torch.arange(rows).view(-1, sets.rows_per_set)
    chosen = groups[[len(groups) - 1, 0]] if len(groups) > 1 else groups
    numbers = sets.of_rows(chosen.flatten()).tolist()
    by_row = {
        row: [g for g, samples in enumerate(expected) if samples[0] // slots == row] for row in chosen[:, 0].tolist()
    }
    assert numbers == [g for row in chosen[:, 0].tolist() for g in by_row[row]]
