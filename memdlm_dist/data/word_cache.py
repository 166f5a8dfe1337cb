"""Encoding of text with byte-level BPE tokenizers, several times as fast as with the tokenizers library alone.

Such a tokenizer cuts text into words by a regular expression and encodes each word on its own. A corpus repeats its
words, so `TextEncoder` lets the library encode each word once and then looks it up. It cuts ASCII text into words
itself. Other text is cut only where the result does not depend on a Unicode version, and the library does the rest.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count, groupby
from operator import not_
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Regular expressions of pre-tokenizers that cut ASCII text as Python's `re` does, and that match every character. None
# of them looks behind, and none matches a space after anything but whitespace; `_CUTS` depends on both.
_REGEXES = (
    _GPT_2,
    # Llama 3, and Qwen 2 with one digit at a time.
    *(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
    # GPT-4, and Ling with one digit at a time.
    *(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        for digits in (r"\p{N}{1,3}", r"\p{N}")
    ),
)
# Cuts that every one of `_REGEXES` makes, whatever the text on either side.
_CUTS = re.compile(r"(?<=[!-~])(?= [!-~])")
_MAX_WORDS = 1 << 18  # about 60 MB
_MAX_LENGTH = 64  # characters of a word that is kept


def _to_python(regex: str) -> re.Pattern[str]:
    """Convert one of `_REGEXES` to a pattern for ASCII text; `re` has no classes of letters and of numbers."""
    for name, characters in ((r"\p{L}", "A-Za-z"), (r"\p{N}", "0-9")):
        alone = re.escape(name) + r"(?=[+{|])"  # not within brackets
        regex = re.sub(alone, f"[{characters}]", regex).replace(name, characters)
    return re.compile(regex, re.ASCII)


def word_pattern(description: dict[str, Any]) -> re.Pattern[str] | None:
    """Return the pattern of an ASCII text's words; None if a tokenizer may not encode its words independently.

    Args:
        description: content of tokenizer.json; vocabulary and merges are not needed.
    """
    model, normalizer = description["model"], description["normalizer"]
    if model["type"] != "BPE" or model["dropout"] or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    first = description["pre_tokenizer"]
    match first["pretokenizers"] if first and first["type"] == "Sequence" else [first]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _to_python(_GPT_2)
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex in _REGEXES:
            return _to_python(regex)
    return None


class TextEncoder:
    """Encoder of texts that gives the same ids as `tokenizer.encode_batch` without added special tokens.

    Args:
        tokenizer: neither truncates nor pads.
        description: content of its tokenizer.json; vocabulary and merges are not needed.
    """

    def __init__(self, tokenizer: Tokenizer, description: dict[str, Any]):
        self._tokenizer = tokenizer
        # Words by `_pattern`; without one, every text is left to the library.
        self._pattern = word_pattern(description)
        self._ids: dict[str, bytes] = {}  # word -> its ids, 4 bytes each
        parsed = [x for x in description["added_tokens"] if not (x["special"] and tokenizer.encode_special_tokens)]
        if description["normalizer"] is not None and any(token["normalized"] for token in parsed):
            self._pattern = None  # such a token may appear only when the text is normalised
        # Added tokens, which cut the text before the pattern does.
        self._parsed = re.compile("|".join(re.escape(token["content"]) for token in parsed)) if parsed else None

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the token ids of each text; the arrays may be read-only."""
        whole = [self._pattern is None or bool(self._parsed and self._parsed.search(text)) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(compress(texts, whole)), add_special_tokens=False)
        ids_of_whole = (np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)
        looked_up = self._look_up([self._words(text) for text, x in zip(texts, whole, strict=True) if not x])
        return [next(ids_of_whole) if x else next(looked_up) for x in whole]

    def _words(self, text: str) -> list[str]:
        """Cut a text into parts that the tokenizer encodes independently."""
        assert self._pattern is not None
        if text.isascii():
            return self._pattern.findall(text)
        words: list[str] = []
        for is_ascii, group in groupby(_CUTS.split(text), str.isascii):
            parts = list(group)
            words += self._pattern.findall("".join(parts)) if is_ascii else parts
        return words

    def _look_up(self, texts: list[list[str]]) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of texts that were cut into words."""
        found = [list(map(self._ids.get, words)) for words in texts]
        # The ids of a word are None if it is new.
        gaps = [[] if all(ids) else list(compress(count(), map(not_, ids))) for ids in found]
        new = self._learn({words[i] for words, missing in zip(texts, gaps, strict=True) for i in missing})
        for words, ids, missing in zip(texts, found, gaps, strict=True):
            for i in missing:
                ids[i] = new[words[i]]
            yield np.frombuffer(b"".join(cast(list[bytes], ids)), dtype=np.uint32)

    def _learn(self, words: Iterable[str]) -> dict[str, bytes]:
        """Encode words and add them to the cache, which is emptied when it is full."""
        words = list(words)
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        new = {word: array("I", encoding.ids).tobytes() for word, encoding in zip(words, encodings, strict=True)}
        if len(self._ids) + len(new) > _MAX_WORDS:
            self._ids.clear()
        self._ids.update((word, ids) for word, ids in new.items() if len(word) <= _MAX_LENGTH)
        return new
