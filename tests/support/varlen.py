"""Variable-length attention on the CPU: torch has CUDA kernels only."""

from itertools import pairwise

import torch


def naive_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa=False):
    """Compute torch's variable-length attention one sequence at a time; shapes as for `varlen_attn`."""
    assert (
        torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32 and enable_gqa == (q.shape[1] != k.shape[1])
    )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    ends = cu_seq_q.tolist()
    for start, end in pairwise(ends):
        assert end - start <= min(max_q, max_k)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(outputs)
