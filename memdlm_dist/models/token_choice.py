"""Choice of tokens in the output head: the predicted token of each position and its confidence, and never logits.

Works on one chunk of positions at a time, as the losses do, and on a sharded vocabulary.

Shapes: n chosen positions, C positions of a chunk, N rows of the head's input, D model dim, V local vocabulary of a
tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_rank, get_world_size

from memdlm_dist.method import keyed_random
from memdlm_dist.method.logit_loss import Vocabulary, chunk_length

# Smallest number whose double logarithm is taken; `keyed_random.uniform` has 53 bits.
_TINY = 2.0**-53
# Memory of a chunk with noise, over that of its logits.
_NOISE_FACTOR = 6


class TokenChoice:
    """Readout that makes the output head choose tokens instead of returning logits.

    Neither a tuple nor a dataclass: FSDP2's mixed precision casts the tensors inside those.

    Args:
        index_n: rows of the head's input to choose tokens for, int64.
        suppressed: ids that are never chosen, int64.
        temperature: factor of the Gumbel noise that is added to the logits; 0 chooses the most probable token.
        key_n: keys of the random numbers, int64; None without any.
        random_confidence: the confidence is a random number instead of the chosen token's probability.
        guidance: scale s and the rows h `[n, D]` of a second pass: the logits are u + (s + 1) (c - u), with c of this
            pass and u of h; None without.
        mask_id: id of [MASK] if it is among `suppressed` and its probability still counts: the confidences are then
            those of a softmax with [MASK] in it, as in the published samplers. None: suppressed ids have probability 0.
    """

    def __init__(
        self,
        index_n: Tensor,
        suppressed: Tensor,
        temperature: float = 0.0,
        key_n: Tensor | None = None,
        random_confidence: bool = False,
        guidance: tuple[float, Tensor] | None = None,
        mask_id: int | None = None,
    ):
        self.index_n, self.suppressed, self.temperature = index_n, suppressed, temperature
        self.key_n, self.random_confidence, self.guidance, self.mask_id = key_n, random_confidence, guidance, mask_id


def choose_tokens(
    hidden_ND: Tensor, weight_VD: Tensor, choice: TokenChoice, group: ProcessGroup | None = None
) -> Tensor:
    """Return the chosen token ids and their confidences, float64 `[2, n]`, equal on all ranks of `group`.

    Among equal logits the lowest id is chosen. float64 holds ids exactly; one tensor suits the head's sharding plan.

    Args:
        hidden_ND: input of the output head.
        weight_VD: local rows of the head's weight.
        choice: positions and settings.
        group: tensor-parallel group over which the vocabulary is sharded evenly; None if it is not sharded.
    """
    n = len(choice.index_n)
    # Noise and noisy logits are float64, and so are the generator's temporary tensors.
    width = len(weight_VD) * (_NOISE_FACTOR if choice.temperature > 0 else 1)
    rows = chunk_length(max(n, 1), width, hidden_ND.dtype)
    chunks = []
    for start in range(0, n, rows):
        chunk = slice(start, start + rows)
        logits_CV = F.linear(hidden_ND[choice.index_n[chunk]], weight_VD).float()
        if choice.guidance is not None:
            scale, h_nD = choice.guidance
            unguided_CV = F.linear(h_nD[chunk].type_as(hidden_ND), weight_VD).float()
            logits_CV = unguided_CV + (scale + 1) * (logits_CV - unguided_CV)
        chunks.append(choose(logits_CV, choice, chunk, group))
    return torch.cat(chunks, 1) if chunks else hidden_ND.new_zeros(2, 0, dtype=torch.float64)


def choose(
    logits_CV: Tensor, choice: TokenChoice, chunk: slice = slice(None), group: ProcessGroup | None = None
) -> Tensor:
    """Choose tokens from logits in float32 or wider, which are overwritten; see `choose_tokens`.

    Args:
        logits_CV: this rank's logits of the chunk.
        choice: settings of all positions.
        chunk: the chunk's positions among `choice.index_n`.
        group: see `choose_tokens`.
    """
    size = logits_CV.shape[1]
    vocabulary = Vocabulary(size, group)
    first = size * get_rank(group) if group is not None else 0
    mask_logit_C = None
    if choice.mask_id is not None and 0 <= choice.mask_id - first < size:
        mask_logit_C = logits_CV[:, choice.mask_id - first].clone()

    def total(top_C: Tensor) -> Tensor:
        """Return the local sum of exp(logit - top); overwrites the logits."""
        total_C = logits_CV.sub_(top_C.unsqueeze(1)).exp_().sum(-1)
        return total_C if mask_logit_C is None else total_C + (mask_logit_C - top_C).exp()

    index_s, is_local_s = vocabulary.local_index(choice.suppressed)
    never_s = torch.where(is_local_s, -torch.inf, 0.0).type_as(logits_CV)
    logits_CV.index_add_(1, index_s, never_s.expand(len(logits_CV), -1))
    noisy_CV = logits_CV
    if choice.temperature > 0:
        assert choice.key_n is not None
        number_V = torch.arange(first + 1, first + 1 + size, device=logits_CV.device)
        u_CV = keyed_random.uniform(choice.key_n[chunk], number_V)
        noisy_CV = logits_CV.double() - choice.temperature * (-u_CV.clamp(min=_TINY).log()).log()
    best_C, id_C = noisy_CV.max(-1)
    id_C = id_C + first
    top_C = vocabulary.max(best_C.clone())
    if group is not None:
        id_C = torch.where(best_C == top_C, id_C, torch.iinfo(torch.int64).max)
        all_reduce(id_C, ReduceOp.MIN, group)
        id_C = id_C.clamp(max=size * get_world_size(group) - 1)  # NaN equals no maximum
    if choice.random_confidence:
        assert choice.key_n is not None
        confidence_C = keyed_random.uniform(choice.key_n[chunk], id_C.new_zeros(1)).squeeze(-1)
    elif choice.temperature == 0:
        # The chosen logit is the largest one that is left: its share of the total is 1.
        confidence_C = 1 / vocabulary.sum(total(top_C))
    else:
        index_C, is_local_C = vocabulary.local_index(id_C)
        logit_C = torch.where(is_local_C, logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1), 0.0)
        top_C = vocabulary.max(logits_CV.amax(-1))
        logit_C, total_C = vocabulary.sum(torch.stack([logit_C, total(top_C)]))
        confidence_C = (logit_C - top_C).exp() / total_C
    return torch.stack([id_C.double(), confidence_C.double()])
