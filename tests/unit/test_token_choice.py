"""Tokens chosen in the output head against a softmax of whole logits in float64."""

import pytest
import torch
import torch.distributed as dist

from memdlm_dist.method import keyed_random, logit_loss
from memdlm_dist.models.token_choice import TokenChoice, choose_tokens
from tests.support import ranks

N, D, V = 37, 16, 102  # V for two tensor-parallel ranks
INDEX = torch.tensor([5, 0, 36, 5, 17, 20, 21, 22, 9])  # rows of the input, in any order and repeated
KEY = 1000 + torch.arange(len(INDEX))
SUPPRESSED = torch.tensor([101, 3, 50, 51, 3])
# name -> options of TokenChoice; guidance as its scale
CASES = {
    "greedy": {},
    "warm": {"temperature": 0.7, "key_n": KEY},
    "random confidence": {"random_confidence": True, "key_n": KEY},
    "warm, random confidence": {"temperature": 2.0, "random_confidence": True, "key_n": KEY},
    "guided": {"guidance": 1.5},
    "guided, warm": {"guidance": 0.5, "temperature": 0.7, "key_n": KEY},
    "mask counts": {"mask_id": 50},  # the last id of the first tensor-parallel rank
    "mask counts, warm": {"mask_id": 101, "temperature": 0.7, "key_n": KEY},
}


def problem(dtype=torch.float32):
    """Return hidden states, the head's weight and hidden states without guidance, as multiples of 1/4.

    Their products are exact, so that equal logits are equal in any order of summation. The vocabulary's halves have
    the same rows, so ties are across shards too.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = ((N, D), (V // 2, D), (N, D))
    hidden, half, unguided = ((torch.randint(-6, 7, size, generator=generator) / 4).to(dtype) for size in sizes)
    return hidden, half.repeat(2, 1), unguided


def ours(case, hidden, weight, unguided, group=None):
    options = dict(CASES[case])
    if "guidance" in options:
        options["guidance"] = options["guidance"], unguided[INDEX]
    return choose_tokens(hidden, weight, TokenChoice(INDEX, SUPPRESSED, **options), group)


def naive(case, hidden, weight, unguided):
    """Return the ids and confidences, one position at a time, from all logits in float64."""
    options = CASES[case]
    temperature = options.get("temperature", 0.0)
    result = []
    for row, key in zip(INDEX.tolist(), KEY, strict=True):
        logits = weight.double() @ hidden[row].double()
        if "guidance" in options:
            blank = weight.double() @ unguided[row].double()
            logits = blank + (options["guidance"] + 1) * (logits - blank)
        whole = logits.clone()
        logits[SUPPRESSED] = -torch.inf
        u = keyed_random.uniform(key.unsqueeze(0), torch.arange(V + 1)).squeeze(0)
        noisy = logits - temperature * (-u[1:].clamp(min=2.0**-53).log()).log()
        token = min(v for v in range(V) if noisy[v] == noisy.max())
        if "mask_id" in options:
            logits[options["mask_id"]] = whole[options["mask_id"]]
        confidence = u[0] if options.get("random_confidence") else logits.softmax(0)[token]
        result.append((token, float(confidence)))
    return torch.tensor(result, dtype=torch.float64).T


def check(chosen, case, *tensors):
    """Compare with the naive choice; the softmax is in float32."""
    expected = naive(case, *tensors)
    assert chosen.dtype == torch.float64 and chosen.shape == (2, len(INDEX))
    assert torch.equal(chosen[0], expected[0])
    torch.testing.assert_close(chosen[1], expected[1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_confidences_are_those_of_whole_logits(monkeypatch, case, rows):
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", rows * V * 4)
    check(ours(case, *problem()), case, *problem())


@pytest.mark.parametrize("case", ["greedy", "warm", "guided"])
def test_bfloat16_loses_no_more_than_its_products_do(case):
    """Logits of bfloat16 products have 8 bits; all else is in float32 or wider."""
    hidden, weight, unguided = problem(torch.bfloat16)
    logits, unguided_logits = (x @ weight.T for x in (hidden, unguided))
    check(ours(case, hidden, weight, unguided), case, logits, torch.eye(V), unguided_logits)


def test_the_lowest_of_equal_logits_is_chosen():
    hidden, weight = torch.ones(1, D), torch.ones(V, D)
    choice = TokenChoice(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1, 4]))
    assert choose_tokens(hidden, weight, choice).tolist() == [[2], [pytest.approx(1 / (V - 3), rel=1e-6)]]


def test_no_position_gives_no_token():
    hidden, weight, _ = problem()
    none = TokenChoice(torch.zeros(0, dtype=torch.int64), SUPPRESSED)
    assert choose_tokens(hidden, weight, none).shape == (2, 0)


def test_a_sharded_vocabulary_gives_the_same_tokens(monkeypatch):
    """Two tensor-parallel ranks: equal ids; confidences may differ by the order of a float32 sum."""
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", 4 * V * 4)

    def body():
        rank, group = dist.get_rank(), dist.group.WORLD
        for case in CASES:
            hidden, weight, unguided = problem()
            chosen = ours(case, hidden, weight.chunk(2)[rank], unguided, group)
            whole = ours(case, hidden, weight, unguided)
            assert torch.equal(chosen[0], whole[0]), case
            torch.testing.assert_close(chosen[1], whole[1], rtol=1e-6, atol=0.0)
            of_all = [torch.empty_like(chosen) for _ in range(2)]
            dist.all_gather(of_all, chosen)
            assert torch.equal(*of_all), case
        broken = ours("greedy", hidden * torch.nan, weight.chunk(2)[rank], None, group)
        assert ((broken[0] >= 0) & (broken[0] < V)).all(), "NaN gives ids that the embedding has"

    assert ranks.fork_group(2, body) == 0
