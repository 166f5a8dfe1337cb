"""The word cache gives the ids of the tokenizers library, whatever the text."""

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from memdlm_dist.data import word_cache
from memdlm_dist.data.word_cache import TextEncoder, word_pattern

WORDS = [
    "It's", "we'LL", "don't", "x'S", "'d", "12", "3456", "7", "a1b2", "foo.bar(baz)", "->", "__init__", "/*", "[]",
    "\t\t", "\n\n", "\r\n", " \n ", "\x0b", "\x1c", "\x85", "\u00a0", "\u3000", "\u212a", "\u0301", "é", "e\u0301",
    "naïve", "日本語", "٣٤", "ſ", "😀", "<|mask|>", "<tool>", "x" * 70,
]  # fmt: skip
SEPARATORS = ["", "", " ", " ", "  ", "\n", "    ", "\t", " \n "]


def random_texts(seed, count=150):
    rng = random.Random(seed)
    return ["".join(rng.choice(WORDS) + rng.choice(SEPARATORS) for _ in range(rng.randrange(30))) for _ in range(count)]


def train(regex=None, normalizer=None, prefix=False):
    """Train a byte-level BPE tokenizer, with GPT-2's regular expression by default."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(random_texts(1), trainer)
    return tokenizer


def encoder(tokenizer):
    return TextEncoder(tokenizer, json.loads(tokenizer.to_str()))


def assert_same_ids(tokenizer, texts, expect_cache=True):
    fast = encoder(tokenizer)
    assert (fast._pattern is not None) == expect_cache
    expected = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for _ in range(2):  # the second time, all words are in the cache
        assert [ids.tolist() for ids in fast.encode(texts)] == expected
    assert [fast.encode([text])[0].tolist() for text in texts] == expected


@pytest.mark.parametrize("regex", [None, *word_cache._REGEXES])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_words_have_the_ids_that_they_have_in_their_text(regex, normalizer):
    ascii_characters = random.Random(0)
    texts = ["".join(chr(ascii_characters.randrange(128)) for _ in range(200)) for _ in range(20)]
    assert_same_ids(train(regex, normalizer), [*random_texts(0), *texts, "", " ", "a " * 3])


def test_a_full_cache_is_emptied(monkeypatch):
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 40)
    monkeypatch.setattr(word_cache, "_MAX_LENGTH", 4)
    tokenizer = train()
    fast = encoder(tokenizer)
    for text in random_texts(2):
        assert fast.encode([text])[0].tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(fast._ids) <= 40 and max(map(len, fast._ids), default=0) <= 4
    assert fast._ids


@pytest.mark.parametrize("parse", [True, False])
@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|mask|>", special=True, normalized=False),
        AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),
        AddedToken("bar", single_word=True, normalized=False),
        AddedToken("    ", normalized=True),
        AddedToken("7 a", normalized=False),
    ],
    ids=repr,
)
def test_added_tokens_cut_the_text_first(token, parse):
    tokenizer = train()
    (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.encode_special_tokens = not parse
    texts = [*random_texts(3), f"x {token.content} y", f"x{token.content}y"]
    assert_same_ids(tokenizer, texts)
    token_id = tokenizer.token_to_id(token.content)
    assert any(token_id in ids for ids in encoder(tokenizer).encode(texts)) == (parse or not token.special)


def test_tokens_of_normalised_text():
    tokenizer = train(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("K y", normalized=True)])
    assert_same_ids(tokenizer, ["x K y", "x \u212a y"], expect_cache=False)


def test_other_tokenizers_encode_whole_texts():
    with_dropout, with_unigram, without, merging = train(), train(), train(), train(word_cache._GPT_2)
    with_dropout.model.dropout = 0.1
    with_unigram.model = models.Unigram([("<unk>", 0.0)], 0, False)
    without.pre_tokenizer = pre_tokenizers.Sequence([])
    split = pre_tokenizers.Split(Regex(word_cache._GPT_2), "merged_with_next")
    merging.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizers = [
        with_unigram, train(r"\w+|\W+"), train(prefix=True), train(normalizer=normalizers.Lowercase()),
        train(normalizer=normalizers.Sequence([normalizers.NFC()])), Tokenizer(models.BPE()), without, merging,
    ]  # fmt: skip
    for tokenizer in [with_dropout, *tokenizers]:
        assert word_pattern(json.loads(tokenizer.to_str())) is None
    for tokenizer in tokenizers:
        assert_same_ids(tokenizer, random_texts(4, 20), expect_cache=False)
