"""Plan of a preparation: everything that its shards depend on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memdlm_dist.data.corpus import Source
from memdlm_dist.data.preparation.request import PrepareConfig

FORMAT = 1
# Settings on which no byte of the output depends.
_FREE = {
    "output",
    "tokenizer",
    "strict",
    "overwrite",
    "hash_only",
    "workers",
    "cluster",
    "partition",
    "scratch",
    "scratch_limit",
}


@dataclass(frozen=True)
class Plan:
    """Everything that the shards depend on; equal plans make equal shards.

    Attributes:
        options: name of a setting -> value.
        sources: (URL, size, version) of each file of the corpus.
        tokenizer: fingerprint of the tokenizer that was given; empty for one that is trained.
        units: number of units.
        repositories: datasets and tokenizer of the hub.
    """

    options: dict[str, Any]
    sources: list[list[Any]]
    tokenizer: str
    units: int
    repositories: list[str]
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Name of the plan's folder of records."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def difference(self, other: "Plan") -> str:
        """Return how another plan differs from this one, such as "--seq-len was 256, and is now 512"."""
        if other.format != self.format:
            return "its plan is damaged, or of another version of memdlm_dist"
        for name, value in self.options.items():
            if other.options.get(name) != value:
                return f"--{name.replace('_', '-')} was {other.options.get(name)}, and is now {value}"
        if other.tokenizer != self.tokenizer:
            return "its tokenizer was another one"
        before, now = ({url: rest for url, *rest in plan.sources} for plan in (other, self))
        for url in sorted(before.keys() | now.keys()):
            if before.get(url) != now.get(url):
                change = "is new" if url not in before else "is gone" if url not in now else "has changed"
                return f"the input {url} {change}"
        if [url for url, *_ in other.sources] != [url for url, *_ in self.sources]:
            return "the inputs were in another order"
        return "it was begun by another version of memdlm_dist"


def new_plan(
    config: PrepareConfig, sources: Sequence[Source], tokenizer: str, units: int, repositories: list[str]
) -> Plan:
    """Return the plan of a preparation."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE | {"inputs", "fields"}}
    values |= {f"{name}_field": value for name, value in asdict(config.fields).items()}
    values["format"] = values.pop("row_format")
    if config.chat_template is not None and Path(config.chat_template).is_file():
        values["chat_template"] = hashlib.sha256(Path(config.chat_template).read_bytes()).hexdigest()[:12]
    files = [[source.url, source.size, source.version] for source in sources]
    return Plan(json.loads(json.dumps(values)), files, tokenizer, units, repositories)
