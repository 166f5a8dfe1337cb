"""Haystack of the needle tasks: sentences of real text, and words for the needles."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from memdlm_dist.data import corpus
from memdlm_dist.errors import UserError

Part = Literal["train", "heldout"]

# Fraction of passages, words and names that only the held-out part uses.
HELD_OUT = 0.2

# Minimum and maximum length of a sentence, in characters.
_SENTENCE_CHARACTERS = (20, 240)
_WORD = re.compile(r"\b[a-z]{4,9}\b")
_MIN_WORDS = 40


def belongs(name: str, part: Part) -> bool:
    """Return whether a passage, word or name belongs to `part`; a hash of the text decides."""
    return corpus.is_held_out(name, HELD_OUT) == (part == "heldout")


@dataclass(frozen=True)
class Haystack:
    """Sentences and words of one part, "train" or "heldout"; the sentences are in the order of the text."""

    sentences: Sequence[str]
    words: Sequence[str]

    @classmethod
    def read(cls, part: Part, files: Sequence[str] = ()) -> "Haystack":
        """Split text into sentences and words, and keep those of `part`.

        Args:
            part: "heldout" shares no passage and no word with "train".
            files: UTF-8 text files. If empty, the reference topics of the Python documentation, which are part of every
                Python installation.

        Raises:
            UserError: if a file cannot be read, or the text is too short for two parts.
        """
        texts = [_read(path) for path in files] if files else list(topics.values())
        passages = [passage for text in texts for passage in _passages(text)]
        held_out = [(sentence, belongs(passage, "heldout")) for passage in passages for sentence in _sentences(passage)]
        # A sentence that occurs in several passages belongs to the part of the first one only.
        first: dict[str, bool] = {}
        for sentence, is_held_out in held_out:
            first.setdefault(sentence, is_held_out)
        sentences = [
            sentence for sentence, is_held_out in held_out if is_held_out == first[sentence] == (part == "heldout")
        ]
        words = sorted({word for text in texts for word in _WORD.findall(text)})
        words = [word for word in words if belongs(word, part)]
        if not sentences or len(words) < _MIN_WORDS:
            raise UserError(
                f"The haystack has {len(sentences)} sentences and {len(words)} different words for the {part} part, "
                f"which needs at least 1 sentence and {_MIN_WORDS} words; give --haystack more text."
            )
        return cls(sentences, words)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The haystack {path} cannot be read as UTF-8 text ({error}); correct --haystack.") from None


def _passages(text: str) -> list[str]:
    """Split text into passages: paragraphs of at least 2,000 characters together; the last may be shorter."""
    passages, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= 2000:
            passages.append(current)
            current = ""
    return [*passages, current] if current.strip() else passages


def _sentences(passage: str) -> list[str]:
    """Split a passage into sentences without line breaks; pieces that do not look like a sentence are dropped."""
    least, most = _SENTENCE_CHARACTERS
    pieces = re.split(r"(?<=[.!?])\s+", " ".join(passage.split()))
    return [piece for piece in pieces if least <= len(piece) <= most and piece[0].isupper() and piece[-1] in ".!?"]
