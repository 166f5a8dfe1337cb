"""Real text to hide needles in, and the words that the needles are made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

from memdlm_dist.data import corpus
from memdlm_dist.errors import UserError

Part = Literal["train", "heldout"]

# Share of passages, words and names that only the held-out part uses.
HELD_OUT = 0.2

_SENTENCE_CHARACTERS = (20, 240)
_WORD = re.compile(r"\b[a-z]{4,9}\b")
_LEAST_WORDS = 40


def belongs(name: str, part: Part) -> bool:
    """Whether a passage, word or name is one of `part`'s; a function of its text alone."""
    return corpus.is_held_out(name, HELD_OUT) == (part == "heldout")


@dataclass(frozen=True)
class Haystack:
    """The sentences of one part, passage after passage, and its words."""

    sentences: Sequence[str]
    words: Sequence[str]

    @classmethod
    def read(cls, part: Part, files: Sequence[str] = ()) -> "Haystack":
        """Cut text into sentences and words, and keep those of `part`.

        Args:
            part: "heldout" shares no passage and no word with "train".
            files: UTF-8 text; the reference topics of the Python documentation, which every machine has, if empty.

        Raises:
            UserError: if a file cannot be read, or the text is too short to be split into two parts.
        """
        texts = [_read(path) for path in files] if files else list(topics.values())
        passages = [passage for text in texts for passage in _passages(text)]
        held_out = [(sentence, belongs(passage, "heldout")) for passage in passages for sentence in _sentences(passage)]
        # A sentence that stands in several passages is of the part of the first of them alone.
        owner: dict[str, bool] = {}
        for sentence, is_held_out in held_out:
            owner.setdefault(sentence, is_held_out)
        sentences = [sentence for sentence, of in held_out if of == owner[sentence] == (part == "heldout")]
        words = sorted({word for text in texts for word in _WORD.findall(text)})
        words = [word for word in words if belongs(word, part)]
        if not sentences or len(words) < _LEAST_WORDS:
            raise UserError(
                f"The haystack makes {len(sentences)} sentences and {len(words)} different words for the {part} part, "
                f"which needs at least 1 and {_LEAST_WORDS}; give --haystack more text."
            )
        return cls(sentences, words)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The haystack {path} cannot be read as UTF-8 text: {error}.") from None


def _passages(text: str) -> list[str]:
    """Groups of paragraphs of about 2,000 characters."""
    passages, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= 2000:
            passages.append(current)
            current = ""
    return [*passages, current] if current.strip() else passages


def _sentences(passage: str) -> list[str]:
    """The running text of a passage: what looks like a sentence, on one line each."""
    least, most = _SENTENCE_CHARACTERS
    pieces = re.split(r"(?<=[.!?])\s+", " ".join(passage.split()))
    return [piece for piece in pieces if least <= len(piece) <= most and piece[0].isupper() and piece[-1] in ".!?"]
