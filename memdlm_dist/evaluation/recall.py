"""Recall: predictions of a passage's hidden tokens without memory, with another passage's memory and with its own.

The inner loop adapts fast weights to whole passages. Then half of each passage's tokens are hidden, and the model
predicts them. Passages come in pairs: each is also predicted with the memory of the other one, which shows how much of
the effect belongs to what was read. The hidden tokens were read, so this measures recall, not generalisation.

Shapes: B passages of a batch, L tokens, N hidden tokens of the batch, V vocabulary, T tokens that are
words or pieces of words, W different texts of these tokens.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError, require
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.exposure_report import open_samples
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import trajectory
from memdlm_dist.method.fast_weights import FastWeights

OFF, OTHER, OWN = "off", "of another passage", "of the passage"
# Share of a passage's tokens that are hidden.
HIDDEN = 0.5
# Number of words to list: those that a memory makes likelier by most.
WORDS = 8
# Step that keys the hidden tokens. The inner loop on prompts takes its masks from step 0, so these are independent.
_MASK_STEP = 1
# Words and pieces of words, maybe after a blank, which byte-level BPE writes as Ġ and SentencePiece as ▁.
_LETTERS = re.compile(r"[Ġ▁]?([A-Za-z]{3,})")
_TEXT_WIDTH = 100


@dataclass(frozen=True)
class Recall:
    """Recall of one passage; dicts are by memory: OFF, OTHER and OWN, or the last two.

    Attributes:
        text: the passage.
        hidden: number of hidden tokens.
        nll: NLL of the hidden tokens, summed, in nats.
        words: words and pieces of words, from the vocabulary, whose probability the memory raises most, averaged over
            the hidden tokens; at most `WORDS`.
        found: number of these words that the passage contains.
    """

    text: str
    hidden: int
    nll: dict[str, float]
    words: dict[str, list[str]]
    found: dict[str, int]


def load_pairs(
    config: JobConfig, model: TrainedModel, data: Sequence[str] | None, pairs: int
) -> list[tuple[list[int], list[int]]]:
    """Read pairs of passages at even distances in the samples, as token ids without padding.

    Args:
        config: the run's configuration.
        model: the model that reads the passages.
        data: folders of shards; data.validation if None.
        pairs: number of pairs.

    Raises:
        UserError: if no data is configured or there are fewer passages.
    """
    dataset = open_samples(config, model, data)
    count = 2 * pairs
    if dataset.size < count:
        raise UserError(f"--pairs {pairs} needs {count} samples, but there are {dataset.size}; lower --pairs.")
    passages = []
    for i in range(count):
        tokens = dataset[i * dataset.size // count]["tokens"].tolist()
        while tokens and tokens[-1] == model.eos_id:
            tokens.pop()
        passages.append(tokens)
    return list(zip(passages[::2], passages[1::2], strict=True))


def measure(
    model: TrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    memory: MemorySettings = AS_PUBLISHED,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Recall]:
    """Measure the recall of every passage, in order; a collective call.

    Args:
        model: the model to measure.
        pairs: pairs of passages, as token ids.
        batch_size: pairs per forward pass.
        memory: settings of the memory.
        seed: seed of the hidden tokens.
        progress: callback, called with the number of pairs completed since its last call.
    """
    text_of = _letter_tokens(model)

    def work(batch: list[tuple[list[int], list[int]]], ids: list[int]) -> list[list[Recall]]:
        passages = [passage for pair in batch for passage in pair]
        passage_ids = [2 * i + k for i in ids for k in range(2)]
        recalls = _recall(model, passages, passage_ids, memory, seed, text_of)
        return [recalls[i : i + 2] for i in range(0, len(recalls), 2)]

    return [recall for pair in model.data_parallel.map_batches(pairs, batch_size, work, progress) for recall in pair]


def describe(config: JobConfig, settings: MemorySettings, count: int) -> str:
    """Return a sentence about the inner loop that has read `count` passages."""
    memory = config.parametric_memory
    steps = memory.inner_epochs * (1 if memory.trajectory in trajectory.SINGLE_STATE else memory.inner_steps)
    return (
        f"{count} passages were read with {steps} inner steps each (learning rate {memory.learning_rate:g}, anchor "
        f"ratio {settings.anchor_ratio:g}); then half of their tokens were hidden."
    )


def lines(recalls: Sequence[Recall], shown: int) -> list[str]:
    """Return the table of means over all passages, and the words of the first passages, as lines of text."""
    hidden = sum(recall.hidden for recall in recalls)
    require(hidden > 0, "No passage has enough tokens to hide some; choose longer ones with --data.")
    rows = []
    for memory in (OFF, OTHER, OWN):
        nll = sum(recall.nll[memory] for recall in recalls) / hidden
        found = "-"
        if memory != OFF:
            mean = sum(recall.found[memory] for recall in recalls) / len(recalls)
            found = f"{mean:.1f} of {max(len(recall.words[memory]) for recall in recalls)}"
        rows.append([memory, f"{nll:.3f}", found])
    text = report.table(["memory", "nats per hidden token", "likelier words in the passage"], rows).splitlines()
    for recall in recalls[:shown]:
        found = f"{recall.found[OWN]} of {len(recall.words[OWN])}"
        text += [
            "",
            *_shorten(recall.text),
            f"-> likelier after reading ({found} are in it): {', '.join(recall.words[OWN])}",
        ]
    return text


def _letter_tokens(model: TrainedModel) -> dict[int, str]:
    """Return the text, by token id, of the tokens that consist of at least three letters."""
    vocabulary = model.tokenizer.tokenizer.get_vocab(with_added_tokens=False)
    matches = {i: _LETTERS.fullmatch(token) for token, i in vocabulary.items()}
    return {i: match[1] for i, match in matches.items() if match}


@torch.no_grad()
def _recall(
    model: TrainedModel,
    passages: Sequence[list[int]],
    ids: Sequence[int],
    memory: MemorySettings,
    seed: int,
    text_of: dict[int, str],
) -> list[Recall]:
    """Measure the recall of an even number of passages, of which each two neighbours are a pair."""
    fast = model.adapt(passages, memory, ids).fast
    start = model.canvas(passages, 0, ids)
    maskable_BL = start.attended_BL & (start.tokens_BL != model.eos_id) & (start.tokens_BL != model.mask_id)
    maskable_BL[:, 0] = False  # a backbone that predicts the next token cannot predict the first one
    draw = trajectory.draw(seed, _MASK_STEP, start.ids_B, maskable_BL)
    count_B = (maskable_BL.sum(1) * HIDDEN).long()
    hidden_BL = draw.smallest(draw.u_BL, count_B)
    swapped_B = torch.arange(len(passages)) ^ 1  # each passage's partner
    words = sorted(set(text_of.values()))
    number_of = {word: number for number, word in enumerate(words)}
    tokens = [(i, number_of[text]) for i, text in text_of.items()]
    token_T, word_T = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 2).T

    def predict(fast: FastWeights | None, order_B: Tensor) -> tuple[list[float], Tensor]:
        """Predict the hidden tokens, where row b of the batch, and its set of fast weights, reads passage order_B[b].

        Returns:
            The summed NLL of each row, and the mean probabilities of the words, `[B, W]`.
        """
        tokens_BL, target_BL = start.tokens_BL[order_B], hidden_BL[order_B]
        shown_BL = torch.where(target_BL, model.mask_id, tokens_BL)
        logits_NV = model.logits(shown_BL, target_BL, start.attended_BL[order_B], fast)
        sizes = target_BL.sum(1).tolist()
        nll = cross_entropy(logits_NV, tokens_BL[target_BL], reduction="none").split(sizes)
        tokens_BT = torch.stack([x.sum(0) / max(1, len(x)) for x in logits_NV.softmax(1)[:, token_T].split(sizes)])
        words_BW = torch.zeros(len(sizes), len(words)).index_add(1, word_T, tokens_BT)
        return [float(x.sum()) for x in nll], words_BW

    order_B = torch.arange(len(passages))
    results = {OFF: predict(None, order_B), OTHER: predict(fast, swapped_B), OWN: predict(fast, order_B)}
    # Row b had the memory of passage b and read its partner.
    nll, words_BW = results[OTHER]
    results[OTHER] = [nll[i] for i in swapped_B.tolist()], words_BW[swapped_B]
    likelier = {
        memory: [
            [words[w] for w in rise_W.topk(min(WORDS, len(words))).indices] for rise_W in words_BW - results[OFF][1]
        ]
        for memory, (_, words_BW) in results.items()
        if memory != OFF
    }
    contained = [{text_of.get(token) for token in passage} for passage in passages]
    return [
        Recall(
            model.tokenizer.decode(passage),
            int(count_B[b]),
            {memory: nll[b] for memory, (nll, _) in results.items()},
            {memory: likelier[memory][b] for memory in likelier},
            {memory: len(contained[b].intersection(likelier[memory][b])) for memory in likelier},
        )
        for b, passage in enumerate(passages)
    ]


def _shorten(text: str) -> list[str]:
    """Return the beginning of a text as two lines without its line breaks and indentation."""
    return textwrap.wrap(" ".join(text.split()), _TEXT_WIDTH, max_lines=2, placeholder=" ...")
