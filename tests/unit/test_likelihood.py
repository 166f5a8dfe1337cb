"""Likelihoods and the lm-evaluation-harness model, checked against a known joint distribution."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from memdlm_dist.errors import UserError
from memdlm_dist.inference import canvas, sampler
from memdlm_dist.inference.data_parallel import DataParallel
from memdlm_dist.inference.likelihood import passes
from tests.support.toy_reader import ToyReader

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from memdlm_dist.evaluation.harness_model import HarnessModel

LETTERS = "abc"
LENGTH = 5
EOS, MASK = 3, 4


class Joint:
    """Distribution over all texts of five letters, with the conditionals that a perfect model predicts."""

    def __init__(self):
        self.texts = torch.tensor(list(itertools.product(range(len(LETTERS)), repeat=LENGTH)))
        generator = torch.Generator().manual_seed(5)
        weight = torch.rand(len(self.texts), generator=generator).double() ** 4
        self.probability = weight / weight.sum()

    def log_probability(self, context, text):
        """Return log p(text | context); context and text together have LENGTH letters."""
        full_text = torch.tensor([*context, *text])
        given = (self.texts[:, : len(context)] == full_text[: len(context)]).all(1)
        is_text = (self.texts == full_text).all(1)
        return float((self.probability[is_text].sum() / self.probability[given].sum()).log())

    def conditionals(self, visible):
        """Return each hidden position's letter distribution, given the letters at visible positions."""
        fits = torch.ones(len(self.texts), dtype=torch.bool)
        for position, letter in visible.items():
            fits &= self.texts[:, position] == letter
        weight = self.probability * fits
        return {
            position: torch.stack([weight[self.texts[:, position] == letter].sum() for letter in range(len(LETTERS))])
            / weight.sum()
            for position in range(LENGTH)
            if position not in visible
        }


class ToyModel:
    """TrainedModel stand-in that answers the harness from the joint distribution."""

    trained_length, eos_id, mask_id, length_multiple = 8, EOS, MASK, 1

    def __init__(self):
        self.joint = Joint()
        self.data_parallel = DataParallel()
        self.calls = 0
        self.adapted = []
        self.tokenizer = SimpleNamespace(
            special_ids={EOS},
            token_to_id=lambda token: None,
            encode_plain=lambda texts: [[LETTERS.index(c) for c in text] for text in texts],
            decode=lambda ids: "".join(LETTERS[i] for i in ids),
        )

    def canvas(self, prompts, new_tokens, ids=None):
        return canvas.canvas(prompts, new_tokens, MASK, EOS, ids)

    def nll(self, tokens_BL, target_BL, clean_BL, attended_BL, fast=None):
        self.calls += 1
        losses = []
        for tokens, target, clean in zip(tokens_BL.tolist(), target_BL.tolist(), clean_BL.tolist(), strict=True):
            assert all((token == MASK) == masked for token, masked in zip(tokens, target, strict=True))
            seen = {position: token for position, token in enumerate(tokens[:LENGTH]) if token != MASK}
            table = self.joint.conditionals(seen)
            losses.append(sum(-math.log(table[p][clean[p]]) for p, masked in enumerate(target) if masked))
        return torch.tensor(losses, dtype=torch.float64)

    def reader(self):
        def predict(rows, targets):
            logits = []
            for row, position in targets:
                table = self.joint.conditionals({p: token for p, token in enumerate(rows[row]) if token != MASK})
                # A row with fewer open positions than another is also asked for some that it has decided.
                logits.append(torch.cat([table.get(position, torch.ones(3)).log(), torch.full((2,), -torch.inf)]))
            return torch.stack(logits)

        return ToyReader(predict)

    def check_first(self, target_BL):
        pass

    def slots(self, decoding, slots, length, memory=None):
        assert memory is None
        return sampler.Decoder(self.reader(), decoding, slots, length, MASK, EOS), None

    def decoder(self, start, decoding, fast=None):
        decoder, _ = self.slots(decoding, *start.tokens_BL.shape)
        decoder.load(range(len(start.tokens_BL)), start)
        return decoder

    def denoise(self, start, decoding, fast=None):
        return sampler.steps(self.decoder(start, decoding, fast), start.tokens_BL.shape[1])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(
        "memdlm_dist.evaluation.harness_model.TrainedModel", lambda *_, memory_weights, memory: ToyModel()
    )
    monkeypatch.setattr("memdlm_dist.config.parse_config.parse", lambda argv: None)
    return lambda **arguments: HarnessModel(config="toy.toml", batch_size=7, **arguments)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, 0) for args in arguments]


def test_short_texts_are_scored_exactly(model):
    """Averaging the chain rule over all orders is exact up to float64 rounding, 1e-9."""
    scorer = model()
    pairs = [(text[:n], text[n:]) for text in ("abcab", "ccaba", "bbbbb") for n in (1, 2, 4)]
    answers = scorer.loglikelihood(requests("loglikelihood", *pairs))
    for (context, text), (bound, _) in zip(pairs, answers, strict=True):
        ids = [[LETTERS.index(c) for c in piece] for piece in (context, text)]
        assert bound == pytest.approx(scorer._model.joint.log_probability(*ids), abs=1e-9)
    # 4, 3 and 1 unknown letters have 15, 7 and 1 non-empty mask sets.
    assert scorer._model.calls == -(-3 * (15 + 7 + 1) // 7)


def test_monte_carlo_is_unbiased(model):
    """Over 80 seeds of 14 passes from 15 mask sets, the mean is within 4 standard errors of the exact value."""
    exact = ToyModel().joint.log_probability([0], [1, 2, 0, 1])
    estimates = [
        model(mc_samples=14, seed=seed, check_greedy=False).loglikelihood(requests("loglikelihood", ("a", "bcab")))[0][
            0
        ]
        for seed in range(80)
    ]
    values = torch.tensor(estimates, dtype=torch.float64)
    assert values.unique().numel() > 60
    assert abs(values.mean() - exact) < 4 * values.std() / 80**0.5


def test_greedy_is_what_decoding_gives(model):
    single = model(block_size=1, steps=1)
    (text,) = single.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 3, "until": []})))
    assert len(text) == 3
    other = "".join(LETTERS[(LETTERS.index(c) + 1) % 3] for c in text)
    # Greedy decoding and the check both take the most confident position first; blocks of one go left to right.
    one_block = model(block_size=3)
    (text,) = one_block.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 3, "until": []})))
    answers = one_block.loglikelihood(requests("loglikelihood", ("ab", text), ("ab", other)))
    assert [greedy for _, greedy in answers] == [True, False]


def test_responses_end_at_the_stop_strings_and_keep_their_order(model):
    harness = model(block_size=1)
    contexts = ["a", "abca", "ab", "c"]
    plain = harness.generate_until(requests("generate_until", *((c, {"max_gen_toks": 5 - len(c)}) for c in contexts)))
    assert [len(text) for text in plain] == [4, 1, 3, 4]
    stop_string = plain[0][1]
    again = harness.generate_until(
        requests("generate_until", *((c, {"max_gen_toks": 5 - len(c), "until": [stop_string]}) for c in contexts))
    )
    assert again == [text.split(stop_string)[0] for text in plain]


def test_decoding_options_are_refused_for_likelihoods(model):
    harness = model(suppress_tokens="0:1", cache=None)  # the harness parses "none" as None
    assert harness.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 3}))) == ["ccc"]
    for arguments in ({"suppress_tokens": 1}, {"cfg_scale": 0.5}, {"attention": "block-causal"}):
        with pytest.raises(UserError, match=r"likelihoods, which are the model's own .*; run the task without"):
            model(**arguments).loglikelihood(requests("loglikelihood", ("ab", "c")))
        with pytest.raises(UserError, match="likelihoods, which are the model's own"):
            model(**arguments).loglikelihood_rolling(requests("loglikelihood_rolling", ("abc",)))


def test_long_texts_spread_their_masks_evenly():
    """200 passes over 50 tokens: mask sizes 1 to 50, four each; equal shares per token; weights l / (k S)."""
    drawn = passes(3, 50, 200, seed=1)
    sizes = [len(each.masked) for each in drawn]
    assert sorted(sizes) == [1 + i // 4 for i in range(200)]
    assert all(each.weight == pytest.approx(50 / (len(each.masked) * 200)) for each in drawn)
    assert all(len(set(each.masked)) == len(each.masked) for each in drawn)
    counts = torch.bincount(torch.tensor([position for each in drawn for position in each.masked]), minlength=50)
    # Expected sum(sizes) / 50 = 102, standard deviation below sqrt(200 / 4) = 7.1.
    assert (counts - 102).abs().max() < 5 * 7.1
    assert passes(3, 50, 200, seed=1) == drawn != passes(3, 50, 200, seed=2)
    assert [each.masked for each in drawn] != [each.masked for each in passes(4, 50, 200, seed=1)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"memory": "maybe"}, "memory must be off or on"),
        ({"checkpint": "x"}, "no model argument checkpint"),
        ({"cfg_scale": "much"}, "cfg_scale must be a number, not 'much'"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number of at least 0, but is nan"),
        ({"suppress_tokens": "5;6"}, "joined by colons, such as 5:6, but one is '5;6'"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
