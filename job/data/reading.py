"""The texts of a preparation: read into a store that orders them and drops duplicates."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping

from job.data.console import say
from job.data.given import GivenLatents
from job.data.options import Options
from job.data.source_files import left_out
from job.data.sources import read_texts
from job.data.splitting import TRAIN, UNPAIRED, VALIDATION, Division
from job.data.text_store import KeptText, Numbered, TextStore
from job.errors import UserError

# The number of the first text of --unpaired: behind all others, so that of equal texts the one with a latent is kept.
# One of the validation split must not be trained on.
FIRST_UNPAIRED = 2**62


def read_into(store: TextStore, options: Options, given: GivenLatents | None = None) -> None:
    """Read the texts of the sources, through `given` where the latents came with them."""
    for line in left_out([*options.source, *options.unpaired]):
        say(line)

    def texts_of(sources: list[str]) -> Generator[str, None, None]:
        return read_texts(
            sources,
            text_key=options.text_key,
            hf_split=options.hf_split,
            split_sentences=options.split_sentences,
        )

    of_source = given.texts() if given else _numbered(texts_of(options.source), 0)
    store.add(of_source, options.max_samples)
    if options.latents:
        # After --max-samples texts the rest is only counted. A file of latents that has a row more or less than there
        # are texts may be moved by one from its beginning.
        for _ in of_source:
            pass
    of_source.close()  # after --max-samples texts; a file of latents that is being written ends here
    store.add(_numbered(texts_of(options.unpaired), FIRST_UNPAIRED))


def _numbered(texts: Iterable[str], first: int) -> Generator[Numbered, None, None]:
    yield from enumerate(texts, first)


def part_of(text: KeptText, division: Division) -> str:
    """The part of the dataset that a text belongs to; those of --unpaired never get a latent."""
    return UNPAIRED if text.number >= FIRST_UNPAIRED else division.part(text.digest)


def refuse_empty(options: Options, counts: Mapping[str, int], duplicates: int) -> None:
    """UserError when a split is empty, by the number of texts of each part."""
    source = f"--source {' '.join(options.source)}"
    count = sum(counts.values())
    if count == 1 and duplicates:
        raise UserError(
            f"{source}: all {duplicates + 1} texts are the same but for case and white space; give different ones"
        )
    for split in (TRAIN, VALIDATION):
        if not counts[split]:
            remedy = "another --validation-fraction"
            if options.encode_fraction < 1:
                remedy = "a larger --encode-fraction"
            raise UserError(
                f"{source}: no text for the {split} split, of {count} different ones ({duplicates} duplicates); "
                f"give more texts or {remedy}"
            )
    say(f"{count} texts, {duplicates} duplicates dropped")
    if counts[UNPAIRED]:
        say(f"{counts[UNPAIRED]} of them get no latent")
