"""What `--like` takes over: the tokenizer and the encoder of prepared data, a run or an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data import tokenizer as tokenizers
from job.data.description import ModelDescription, description_of, read_description
from job.data.encoders import GIVEN
from job.data.shards import INFO_FILE, DatasetInfo, read_info
from job.errors import UserError
from job.files import file_entry


@dataclass(frozen=True)
class Pattern:
    """A tokenizer and an encoder, and where their files are."""

    source: str  # as the user named it
    directory: Path  # of tokenizer and fitted encoder
    tokenizer: str  # file name
    mask_token_id: int
    pad_token_id: int
    vocab_size: int
    max_length: int  # tokens of a row
    encoder: dict[str, Any]  # description

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json."""
        return self.directory / self.tokenizer

    def read_tokenizer(self) -> tokenizers.TextTokenizer:
        """Its tokenizer."""
        return tokenizers.saved(self.tokenizer_file, self.mask_token_id, self.pad_token_id)

    def options(self) -> dict[str, Any]:
        """The options of prepare that it settles, where they have a value."""
        encoder = self.encoder
        return {
            "encoder": encoder["name"],
            "encoder_model": encoder.get("model"),
            "truncate_dim": encoder.get("truncate_dim"),
            "encoder_dtype": encoder.get("dtype"),
            "encoder_prompt": encoder.get("prompt"),
            "normalize": encoder.get("normalize"),
        }

    def refuse_other(self, out: Path, tokenizer_sha256: str, encoder: dict[str, Any]) -> None:
        """UserError where a directory was prepared with another tokenizer or encoder."""
        same_encoder = encoder.get("sha256") == self.encoder.get("sha256")
        for what, same in (
            ("tokenizer", tokenizer_sha256 == file_entry(self.tokenizer_file)["sha256"]),
            ("encoder", same_encoder),
        ):
            if not same:
                raise UserError(
                    f"{out}: was prepared with another {what} than that of --like {self.source}; "
                    "give another --out, or delete the directory"
                )


def read_pattern(source: str) -> Pattern:
    """The tokenizer and encoder of what `source` names. UserError if it has none, or is neither data nor a model."""
    directory = description_of(Path(source))
    known: DatasetInfo | ModelDescription
    if (directory / INFO_FILE).is_file():
        known = read_info(directory)
        max_length = known.options.get("max_length") or known.max_length
    else:
        known = read_description(directory)
        max_length = known.max_length
    if known.tokenizer is None:
        raise UserError(f"--like {source}: this data came without a tokenizer, so new texts cannot become its tokens")
    if known.encoder.get("name") == GIVEN:
        raise UserError(
            f"--like {source}: its latents were given with the texts, so there is no encoder for new texts; "
            "give theirs with --latents or --latents-key, and its tokenizer with --tokenizer"
        )
    return Pattern(
        source=source,
        directory=directory,
        tokenizer=known.tokenizer,
        mask_token_id=known.mask_token_id,
        pad_token_id=known.pad_token_id,
        vocab_size=known.vocab_size,
        max_length=max_length,
        encoder=known.encoder,
    )
