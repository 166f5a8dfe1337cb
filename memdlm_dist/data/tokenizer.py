"""Tokenizers with a mask token and an end-of-text token, which are configured or given by name, never guessed."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from memdlm_dist.compat.torchtitan import special_token
from memdlm_dist.data.word_cache import TextEncoder
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import one_line

NEW_EOS_TOKEN = "<|endoftext|>"
NEW_MASK_TOKEN = "<|mask|>"
_SAME_TOKEN = "The tokenizer in {} has {} as mask and as end-of-text token; choose another --mask-token."


class DiffusionTokenizer(HuggingFaceTokenizer):
    """torchtitan's Hugging Face tokenizer with the ids of the mask token and the end-of-text token.

    Args:
        folder: contains tokenizer.json, and tokenizer_config.json with the keys `mask_token` and `eos_token`.

    Raises:
        UserError: if tokenizer.json or one of the two tokens is missing, or both tokens are the same.
    """

    mask_id: int
    eos_id: int

    def __init__(self, folder: str):
        if not (Path(folder) / "tokenizer.json").is_file():
            raise UserError(
                f"There is no tokenizer.json in {folder}; point model.hf_assets_path, or --tokenizer, at a tokenizer "
                "folder."
            )
        try:
            super().__init__(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise UserError(
                f"The tokenizer in {folder} cannot be loaded ({one_line(error)}); restore its files."
            ) from None
        self.mask_id = self._special_token_id("mask_token")
        self.eos_id = self._special_token_id("eos_token")
        if self.mask_id == self.eos_id:
            raise UserError(_SAME_TOKEN.format(folder, self.mask_token))
        # Ignore the sections of tokenizer.json that truncate or pad encoded text.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def _special_token_id(self, name: str) -> int:
        token = special_token(self, name)
        token_id = self.tokenizer.token_to_id(token) if token is not None else None
        if token_id is None:
            _check_copy(self.tokenizer_path)
            raise UserError(
                f"The tokenizer in {self.tokenizer_path} has no {name} in tokenizer_config.json; use the tokenizer "
                f"folder that tools/prepare_data.py wrote, or pass --{name.replace('_', '-')} NAME to that command."
            )
        return token_id

    @property
    def mask_token(self) -> str:
        """Text of the mask token."""
        return str(self.tokenizer.id_to_token(self.mask_id))

    def fingerprint(self) -> str:
        """Return a hash of tokenizer.json's vocabulary and rules, independent of its location and formatting."""
        content = json.loads((Path(self.tokenizer_path) / "tokenizer.json").read_bytes())
        relevant = {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which decoded text lacks."""
        return frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    def get_vocab_size(self) -> int:
        """Return the largest token id + 1; the ids may have gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; special tokens in it are parsed, and none is added."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text as ordinary text: a special token in it is not parsed.

        Raises:
            ValueError: if a text cannot be encoded without a special token.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str], parse_special_tokens: bool = False) -> list[NDArray[np.uint32]]:
        """Return the same ids as `encode_text`, or with `parse_special_tokens` as `encode_plain`; made for corpora.

        The arrays may be read-only.

        Raises:
            ValueError: if a text cannot be encoded without a special token that it must not contain.
        """
        if parse_special_tokens:
            return self._plain_encoder.encode(texts)
        return [
            np.array(self._encode_in_pieces(text), dtype=np.uint32) if self._is_reserved[ids].any() else ids
            for text, ids in zip(texts, self._text_encoder.encode(texts), strict=True)
        ]

    def count_special_tokens(self, text: str) -> Counter[str]:
        """Count the special and added tokens in a text."""
        return Counter(self._special_token_pattern.findall(text))

    def find_special_token(self, text: str) -> str | None:
        """Return a special token in a text, before or after normalisation; None if there is none."""
        if match := self._special_token_pattern.search(text):
            return match.group()
        (ids,) = self.encode_arrays([text], parse_special_tokens=True)
        reserved = ids[self._is_reserved[ids]]
        return str(self.tokenizer.id_to_token(int(reserved.min()))) if len(reserved) else None

    def _encode_in_pieces(self, text: str) -> list[int]:
        """Encode a text cut inside each special token, for models that have the token's text in their vocabulary."""
        pieces = self._cut_positions.split(text)
        ids = [i for e in self._text_tokenizer.encode_batch(pieces, add_special_tokens=False) for i in e.ids]
        if not self._reserved_ids.isdisjoint(ids):
            raise ValueError("every encoding of its text contains a special token")
        return ids

    @cached_property
    def _special_tokens(self) -> list[str]:
        # Some tokenizers have runs of blanks as added tokens; these are ordinary text.
        added = self.tokenizer.get_added_tokens_decoder().values()
        texts = {token.content for token in added if token.special or not token.content.isspace()}
        special = texts | {str(self.tokenizer.id_to_token(i)) for i in (self.mask_id, self.eos_id)}
        return sorted(special, key=lambda token: (-len(token), token))  # the longest token matches first

    @cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special_tokens)))

    @cached_property
    def _cut_positions(self) -> re.Pattern[str]:
        """Pattern of the positions after the first character of each special token."""
        tokens = [(re.escape(token[0]), re.escape(token[1:])) for token in self._special_tokens if token[1:]]
        return re.compile("|".join(f"(?<={first})(?={rest})" for first, rest in tokens) or "(?!)")

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        """Copy of the tokenizer that marks all of `_special_tokens` as special and does not parse them."""
        description = json.loads(self.tokenizer.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["content"] in self._special_tokens
        tokenizer = Tokenizer.from_str(json.dumps(description))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _plain_encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self._description)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        special = [{**x, "special": x["content"] in self._special_tokens} for x in self._description["added_tokens"]]
        return TextEncoder(self._text_tokenizer, {**self._description, "added_tokens": special})

    @cached_property
    def _description(self) -> dict[str, Any]:
        """Content of tokenizer.json without vocabulary and merges, which are large."""
        description: dict[str, Any] = json.loads(self.tokenizer.to_str())
        description["model"] = {k: v for k, v in description["model"].items() if k not in ("vocab", "merges")}
        return description

    @cached_property
    def _reserved_ids(self) -> set[int]:
        """Ids that ordinary text must not contain. The unknown token, although often special, is not one of them."""
        added = self.tokenizer.get_added_tokens_decoder().items()
        model = self._description["model"]
        unknown = model.get("unk_id"), self.tokenizer.token_to_id(model.get("unk_token") or "")
        return {i for i, token in added if token.special and i not in unknown} | {self.mask_id, self.eos_id}

    @cached_property
    def _is_reserved(self) -> NDArray[np.bool_]:
        """Flag of each token id: it is one of `_reserved_ids`."""
        flags = np.zeros(self.get_vocab_size(), dtype=np.bool_)
        flags[list(self._reserved_ids)] = True
        return flags


def train(texts: Iterable[str], size: int, folder: Path) -> DiffusionTokenizer:
    """Train a byte-level BPE tokenizer of `size` tokens, including end-of-text and mask, and save it to `folder`.

    Raises:
        UserError: if `size` is less than the 256 bytes and the two special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + 2:
        raise UserError(f"--train-tokenizer {size} is too small; give at least {len(alphabet) + 2}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[NEW_EOS_TOKEN, NEW_MASK_TOKEN],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, {"eos_token": NEW_EOS_TOKEN, "mask_token": NEW_MASK_TOKEN}, folder)


def has_special_tokens(source: str, mask_token: str | None, eos_token: str | None) -> bool:
    """Return whether `adopt` would leave the tokenizer unchanged.

    Raises:
        UserError: for the same reasons as `adopt`.
    """
    return not _set_special_tokens(source, *_read(source), mask_token, eos_token)


def adopt(source: str, folder: Path, mask_token: str | None, eos_token: str | None) -> DiffusionTokenizer:
    """Copy the tokenizer in `source` to `folder`, and set its mask and end-of-text tokens.

    A token that is given here is added to the vocabulary if it lacks the token. A token that is not given must be in
    tokenizer_config.json.

    Raises:
        UserError: if a token is neither given nor configured, if `source` is not a tokenizer, or if the mask token is
            the end-of-text token or an ordinary word.
    """
    tokenizer, config = _read(source)
    _set_special_tokens(source, tokenizer, config, mask_token, eos_token)
    folder.mkdir(parents=True, exist_ok=True)
    for extra in ("special_tokens_map.json", "chat_template.jinja"):
        if (Path(source) / extra).is_file():
            shutil.copy(Path(source) / extra, folder / extra)
    return _save(tokenizer, config, folder)


def _read(source: str) -> tuple[Tokenizer, dict[str, Any]]:
    path = Path(source)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"There is no tokenizer.json in {source}; give --tokenizer a folder that has one.")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        config_path = path / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"The tokenizer in {source} cannot be loaded ({one_line(error)}); restore its files.") from None
    if not isinstance(config, dict):
        raise UserError(
            f"The tokenizer in {source} cannot be loaded (tokenizer_config.json is not a JSON object); restore its "
            "files."
        )
    return tokenizer, config


def _check_copy(folder: str) -> None:
    """Check that a copy of a repository of the hub has a tokenizer_config.json.

    Raises:
        UserError: if it has none; the copy may be incomplete.
    """
    repository = hub.origin(folder)
    require(
        repository is None or (Path(folder) / "tokenizer_config.json").is_file(),
        f"The cached copy of the repository {repository} in {folder} has no tokenizer_config.json, and may be "
        "incomplete; name the repository again with access to the hub, or make a tokenizer folder with "
        "tools/prepare_data.py, --mask-token and --eos-token.",
    )


def _set_special_tokens(
    source: str, tokenizer: Tokenizer, config: dict[str, Any], mask_token: str | None, eos_token: str | None
) -> bool:
    """Set the two tokens in `config`, add them to `tokenizer` if missing, and return whether anything changed."""
    changed, contents = False, []
    for name, value in (("mask_token", mask_token), ("eos_token", eos_token)):
        configured = config.get(name)
        content = configured.get("content") if isinstance(configured, dict) else configured
        if value is not None and value != content:
            config[name], content, changed = value, value, True
        if not isinstance(content, str) or not content:
            _check_copy(source)
            raise UserError(
                f"The tokenizer in {source} names no {name}; give --{name.replace('_', '-')} NAME "
                "(it is added to the vocabulary if missing)."
            )
        contents.append(content)
    if contents[0] == contents[1]:
        raise UserError(_SAME_TOKEN.format(source, contents[0]))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if contents[0] not in added and tokenizer.token_to_id(contents[0]) is not None:
        raise UserError(
            f"The mask token {contents[0]} is an ordinary word of the tokenizer in {source}; choose a --mask-token "
            "that is not in its vocabulary, or one of its special tokens."
        )
    for content in contents:
        if tokenizer.token_to_id(content) is None:
            tokenizer.add_special_tokens([AddedToken(content, special=True)])
            changed = True
    return changed


def _save(tokenizer: Tokenizer, config: dict, folder: Path) -> DiffusionTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return DiffusionTokenizer(str(folder))
