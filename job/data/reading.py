"""The texts of a preparation: read, rid of duplicates, divided into splits."""

from __future__ import annotations

from collections.abc import Generator

from job.data.console import say
from job.data.given import GivenLatents
from job.data.options import Options
from job.data.sources import read_texts
from job.data.splitting import Splits, split_texts
from job.errors import UserError


def read_splits(options: Options, given: GivenLatents | None = None) -> Splits:
    """Texts of each split, through `given` where the latents came with them. UserError when a split is empty."""

    def texts_of(sources: list[str]) -> Generator[str, None, None]:
        return read_texts(
            sources,
            text_key=options.text_key,
            hf_split=options.hf_split,
            split_sentences=options.split_sentences,
        )

    of_source = given.texts() if given else texts_of(options.source)
    splits = split_texts(
        of_source,
        options.max_samples,
        options.validation_fraction,
        options.encode_fraction,
        texts_of(options.unpaired),
    )
    if options.latents:
        # After --max-samples texts the rest is only counted. A file of latents that has a row more or less than there
        # are texts may be moved by one from its beginning.
        for _ in of_source:
            pass
    of_source.close()  # after --max-samples texts; a file of latents that is being written ends here
    _refuse_empty(options, splits)
    return splits


def _refuse_empty(options: Options, splits: Splits) -> None:
    duplicates = splits.duplicates
    source = f"--source {' '.join(options.source)}"
    if splits.count == 1 and duplicates:
        raise UserError(
            f"{source}: all {duplicates + 1} texts are the same but for case and white space; give different ones"
        )
    for split, of_split in splits.of_split.items():
        if not of_split:
            remedy = "another --validation-fraction"
            if options.encode_fraction < 1:
                remedy = "a larger --encode-fraction"
            raise UserError(
                f"{source}: no text for the {split} split, of {splits.count} different ones ({duplicates} duplicates); "
                f"give more texts or {remedy}"
            )
    say(f"{splits.count} texts, {duplicates} duplicates dropped")
    if splits.unpaired:
        say(f"{len(splits.unpaired)} of them get no latent")
