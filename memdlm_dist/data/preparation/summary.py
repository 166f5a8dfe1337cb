"""Counts of a preparation, of one unit or of all."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from memdlm_dist.data.row_lengths import TokenShares

SHOWN_PROBLEMS = 10
_PROBLEM_LENGTH = 300


@dataclass(frozen=True)
class Packing:
    """Result of packing documents."""

    efficiency: float  # fraction of tokens that are not padding
    documents: int
    most_documents: int  # largest number in one row
    tokens: int  # of documents


@dataclass
class Summary:
    """Counts of a preparation; those of all units are the content of summary.json."""

    rows: int = 0
    bad_rows: int = 0
    duplicates: int = 0  # rows dropped because an earlier row has the same text
    tokens: int = 0
    overlong_dropped: int = 0
    overlong_truncated: int = 0
    tail_tokens_dropped: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)  # token -> occurrences in the text
    packing: dict[str, Packing] = field(default_factory=dict)  # split -> result, with --pack-documents
    padding: dict[str, TokenShares] = field(default_factory=dict)  # split -> result, of fine-tuning rows
    sequences: dict[str, int] = field(default_factory=dict)  # split -> number of training sequences
    repositories: list[str] = field(default_factory=list)  # datasets and tokenizer of the hub: org/name@commit
    problems: list[str] = field(default_factory=list)  # of the first bad rows, in the order of the corpus

    def add_bad_row(self, location: str, problem: str) -> str:
        """Count a bad row and return its problem, shortened and printable."""
        problem = problem[:_PROBLEM_LENGTH].encode(errors="backslashreplace").decode()  # may hold half a surrogate pair
        self.bad_rows += 1
        if len(self.problems) < SHOWN_PROBLEMS:
            self.problems.append(f"{location}: {problem}")
        return problem


_COUNTS = (
    "rows", "bad_rows", "duplicates", "tokens", "overlong_dropped", "overlong_truncated", "tail_tokens_dropped",
)  # fmt: skip


def total(parts: Iterable[Summary], seq_len: int) -> Summary:
    """Add up the counts of the units, in the order of the corpus."""
    result, special_tokens = Summary(), Counter[str]()
    for part in parts:
        for name in _COUNTS:
            setattr(result, name, getattr(result, name) + getattr(part, name))
        special_tokens.update(part.special_tokens)
        for split, sequences in part.sequences.items():
            result.sequences[split] = result.sequences.get(split, 0) + sequences
        for split, shares in part.padding.items():
            before = result.padding.get(split, TokenShares(0, 0, 0))
            result.padding[split] = TokenShares(before.content + shares.content, before.padding + shares.padding, 0)
        for split, packing in part.packing.items():
            result.packing[split] = _together(result.packing.get(split), packing, result.sequences[split] * seq_len)
        result.problems = (result.problems + part.problems)[:SHOWN_PROBLEMS]
    result.special_tokens = dict(special_tokens)
    return result


def _together(before: Packing | None, packing: Packing, tokens_in_rows: int) -> Packing:
    if before is None:
        return packing
    tokens = before.tokens + packing.tokens
    return Packing(
        tokens / tokens_in_rows,
        before.documents + packing.documents,
        max(before.most_documents, packing.most_documents),
        tokens,
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """Return the counts as JSON values."""
    return asdict(summary)


def from_json(values: dict[str, Any]) -> Summary:
    """Return the counts that `to_json` made."""
    nested = {
        "packing": {split: Packing(**packing) for split, packing in values["packing"].items()},
        "padding": {split: TokenShares(**shares) for split, shares in values["padding"].items()},
    }
    return Summary(**{**values, **nested})
