"""Tokenizers with a mask and an end-of-text token, looked up or added, never guessed."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from memdlm_dist.compat.torchtitan import special_token
from memdlm_dist.errors import UserError

NEW_EOS_TOKEN = "<|endoftext|>"
NEW_MASK_TOKEN = "<|mask|>"


class DiffusionTokenizer(HuggingFaceTokenizer):
    """torchtitan's Hugging Face tokenizer, with the ids that masked diffusion needs.

    Args:
        folder: holds tokenizer.json and tokenizer_config.json; the latter names `mask_token` and
            `eos_token`.

    Raises:
        UserError: if the folder or the file is missing, or one of the two tokens is.
    """

    mask_id: int
    eos_id: int

    def __init__(self, folder: str):
        if not (Path(folder) / "tokenizer.json").is_file():
            raise UserError(
                f"There is no tokenizer.json in {folder}; point model.hf_assets_path at a tokenizer folder."
            )
        try:
            super().__init__(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise UserError(f"The tokenizer in {folder} cannot be loaded: {error}.") from None
        self.mask_id = self._special("mask_token")
        self.eos_id = self._special("eos_token")

    def _special(self, name: str) -> int:
        token = special_token(self, name)
        token_id = self.tokenizer.token_to_id(token) if token is not None else None
        if token_id is None:
            raise UserError(
                f"The tokenizer in {self.tokenizer_path} has no {name} (tokenizer_config.json); use the tokenizer "
                f"folder that tools/prepare_data.py wrote, or give it one with --{name.replace('_', '-')} NAME there."
            )
        return token_id

    @property
    def mask_token(self) -> str:
        """As it is written in text."""
        return str(self.tokenizer.id_to_token(self.mask_id))

    def fingerprint(self) -> str:
        """Return a hash of what tokenizer.json says of texts and ids, the same wherever and however it is written."""
        content = json.loads((Path(self.tokenizer_path) / "tokenizer.json").read_bytes())
        ours = {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}
        return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()[:16]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with nothing added around it."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def train(texts: Iterable[str], size: int, folder: Path) -> DiffusionTokenizer:
    """Train a byte-level BPE of `size` tokens, end-of-text and mask included, and save it to `folder`.

    Raises:
        UserError: if `size` cannot hold the 256 bytes and the two special tokens.
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


def adopt(source: str, folder: Path, mask_token: str | None, eos_token: str | None) -> DiffusionTokenizer:
    """Copy the tokenizer in `source` to `folder`, with its mask and end-of-text tokens settled.

    A token named here is looked up in the vocabulary and added to it if it is not there; one that is
    not named must be in tokenizer_config.json.

    Raises:
        UserError: if a token is neither named nor configured, or the source is no tokenizer.
    """
    path = Path(source)
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"There is no tokenizer.json in {source}; give --tokenizer a folder that has one.")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        config_path = path / "tokenizer_config.json"
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"The tokenizer in {source} cannot be loaded: {error}.") from None
    for name, value in (("mask_token", mask_token), ("eos_token", eos_token)):
        if value is not None:
            config[name] = value
        configured = config.get(name)
        content = configured.get("content") if isinstance(configured, dict) else configured
        if content is None:
            raise UserError(
                f"The tokenizer in {source} names no {name}; give --{name.replace('_', '-')} NAME "
                "(it is added to the vocabulary if it is not there)."
            )
        if tokenizer.token_to_id(content) is None:
            tokenizer.add_special_tokens([AddedToken(content, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    for extra in ("special_tokens_map.json", "chat_template.jinja"):
        if (path / extra).is_file():
            shutil.copy(path / extra, folder / extra)
    return _save(tokenizer, config, folder)


def _save(tokenizer: Tokenizer, config: dict, folder: Path) -> DiffusionTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return DiffusionTokenizer(str(folder))
