"""Tokenizers: loaded from a file, a directory or the hub, or trained; with a mask and a padding token in any case."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from job.data.optional import import_optional
from job.data.shards import DatasetInfo
from job.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
NAMING_FILES = ("special_tokens_map.json", "tokenizer_config.json")  # beside it, optional: its special tokens' names
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|endoftext|>")
MIN_VOCAB_SIZE = 260  # every byte, mask, padding and something to learn


def refuse_half_of_pair(text: str, where: str) -> None:
    """UserError that says `where` a text has half of a surrogate pair, which no tokenizer and no file of text takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{where}: half of a surrogate pair ({found}), which is no character; mend or remove it"
        ) from error


class TextTokenizer:
    """A tokenizer whose rows are neither padded nor cut, and whose special tokens cannot be written in a text.

    Padding and truncation that a tokenizer.json asks for are switched off: batches pad by themselves, and a cut row
    would no longer be the text that its latent was made of.
    """

    def __init__(self, tokenizer: Tokenizer, mask_token_id: int, pad_token_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Otherwise a text that mentions "[MASK]" gets the mask token itself, and the model takes a word of the text for
        # a position to fill in.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps, so not the number of tokens

    @property
    def unknown_token_id(self) -> int | None:
        """Id of the token that stands for whatever the tokenizer cannot write; None if it has none."""
        model = json.loads(self.tokenizer.to_str())["model"]
        if "unk_id" in model:  # Unigram
            return model["unk_id"]
        token = model.get("unk_token")
        return None if token is None else self.tokenizer.token_to_id(token)

    @property
    def special_token_ids(self) -> list[int]:
        """Ids of the tokens that frame a text or stand for none of its words, such as BERT's [CLS] and [SEP]."""
        added = self.tokenizer.get_added_tokens_decoder()
        return sorted(number for number, token in added.items() if token.special and number != self.unknown_token_id)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [L].

        UserError for half of a surrogate pair, and for a character that the tokenizer has no token for at all.
        """
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts))
        except Exception as error:  # tokenizers raises bare Exception
            for number, text in enumerate(texts, 1):
                refuse_half_of_pair(text, f"text {number}")
            raise UserError(
                f"the tokenizer cannot encode these texts ({str(error).splitlines()[0]}); use another one"
            ) from error
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True).strip()

    def to_json(self) -> str:
        """Content for tokenizer.json."""
        return self.tokenizer.to_str(pretty=True)


def _named_tokens(directory: Path) -> dict[str, str]:
    """`mask_token` and `pad_token` as the files beside a tokenizer.json name them."""
    names: dict[str, str] = {}
    for file in NAMING_FILES:
        path = directory / file
        values = json.loads(path.read_text()) if path.is_file() else {}
        for name in ("mask_token", "pad_token"):
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.setdefault(name, token)
    return names


def _special_id(tokenizer: Tokenizer, source: str, what: str, candidates: Sequence[str | None]) -> int:
    """Id of the first candidate in the vocabulary. UserError when it has none of them."""
    for candidate in candidates:
        if candidate is not None and (number := tokenizer.token_to_id(candidate)) is not None:
            return int(number)
    raise UserError(
        f"tokenizer {source}: no {what} token (looked for {', '.join(filter(None, candidates))}); "
        f"name one of its tokens with --{what}-token, or use another tokenizer or --tokenizer train"
    )


def _find(source: str, local_files_only: bool) -> Path:
    """Path of the tokenizer.json that `source` (file, directory or hub name) means."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / TOKENIZER_FILE).is_file():
            raise UserError(f"{path}: no {TOKENIZER_FILE} in this directory")
        return path / TOKENIZER_FILE
    download = import_optional("huggingface_hub", "huggingface_hub").hf_hub_download
    try:
        for extra in NAMING_FILES:
            try:
                download(source, extra, local_files_only=local_files_only)
            except Exception:  # the library's own kinds, and those of its transport
                continue
        return Path(download(source, TOKENIZER_FILE, local_files_only=local_files_only))
    except Exception as error:
        where = "the local cache" if local_files_only else "the hub"
        raise UserError(
            f"tokenizer {source}: no such file or directory, "
            f"and {where} does not have it ({str(error).splitlines()[0]})"
        ) from error


def load(
    source: str, *, local_files_only: bool = False, mask_token: str | None = None, pad_token: str | None = None
) -> TextTokenizer:
    """Tokenizer from a file, a directory with tokenizer.json, or a hub name.

    UserError if it is damaged, or if its vocabulary has no mask or padding token of the name given, found beside it, or
    known.
    """
    path = _find(source, local_files_only)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path}: not a tokenizer of the `tokenizers` library ({str(error).splitlines()[0]})"
        ) from error
    named = _named_tokens(path.parent)
    masks = [mask_token] if mask_token else [named.get("mask_token"), *MASK_NAMES]
    pads = [pad_token] if pad_token else [named.get("pad_token"), *PAD_NAMES]
    mask_token_id = _special_id(tokenizer, source, "mask", masks)
    pad_token_id = _special_id(tokenizer, source, "pad", pads)
    if mask_token_id == pad_token_id:
        # The model would fill in the padding, and take masked positions for the end of the text.
        raise UserError(
            f"tokenizer {source}: {tokenizer.id_to_token(mask_token_id)} is both mask and padding token; "
            "name two different tokens with --mask-token and --pad-token"
        )
    return TextTokenizer(tokenizer, mask_token_id, pad_token_id)


def train(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE: any text comes back from its tokens as it was, since every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_NAMES[0], MASK_NAMES[0]],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    mask_token_id = _special_id(tokenizer, "train", "mask", MASK_NAMES)
    return TextTokenizer(tokenizer, mask_token_id, _special_id(tokenizer, "train", "pad", PAD_NAMES))


def saved(path: Path, mask_token_id: int, pad_token_id: int) -> TextTokenizer:
    """A tokenizer.json whose mask and padding tokens are known."""
    return TextTokenizer(Tokenizer.from_file(str(path)), mask_token_id, pad_token_id)


def of_dataset(directory: Path, info: DatasetInfo) -> TextTokenizer | None:
    """The tokenizer of a prepared directory; None if its tokens came without one."""
    if info.tokenizer is None:
        return None
    return saved(directory / info.tokenizer, info.mask_token_id, info.pad_token_id)
