"""Which texts are kept, in which order, and on which side of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from job.data import text_store
from job.data.reading import FIRST_UNPAIRED
from job.data.splitting import TRAIN, UNPAIRED, VALIDATION, Division, text_hash
from job.data.text_shards import TextShards
from job.data.text_store import TextStore
from job.data.work import TextShard, read_json
from job.errors import UserError

Parts = dict[str, list[str]]


def shards_of(directory: Path, store: TextStore, division: Division, size: int = 1000) -> TextShards:
    return TextShards(store, division, directory / "work", size, None)


def divided(directory: Path, texts: Iterable[str], *fractions: float, unpaired: Iterable[str] = ()) -> Parts:
    with TextStore(directory) as store:
        store.add(enumerate(texts))
        store.add(enumerate(unpaired, FIRST_UNPAIRED))
        shards_of(directory, store, Division(*fractions))
    parts: Parts = {TRAIN: [], VALIDATION: [], UNPAIRED: []}
    for file in sorted((directory / "work").glob("*.texts.json")):
        parts[file.name.split("-")[0]] += read_json(file)
    return parts


def divided_in_memory(
    texts: Iterable[str], validation_fraction: float, encode_fraction: float, unpaired: Iterable[str]
) -> Parts:
    """The plain way, of before there was a store: what every dataset until then was made by."""
    chosen: dict[bytes, tuple[str, bool]] = {}
    for text in texts:
        chosen.setdefault(text_hash(text), (text, False))
    for text in unpaired:
        chosen.setdefault(text_hash(text), (text, True))
    parts: Parts = {TRAIN: [], VALIDATION: [], UNPAIRED: []}
    for digest in sorted(chosen, key=lambda digest: digest[8:]):
        text, is_unpaired = chosen[digest]
        share = int.from_bytes(digest[:8], "big") / 2**64
        latent = int.from_bytes(hashlib.sha256(b"latent" + digest).digest()[:8], "big") / 2**64
        if is_unpaired:
            parts[UNPAIRED].append(text)
        elif share < validation_fraction:
            parts[VALIDATION].append(text)
        else:
            parts[TRAIN if latent < encode_fraction else UNPAIRED].append(text)
    return parts


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_more_texts_than_memory_holds_come_in_the_same_order(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 MB of texts, of which the database cannot hold all beside the blocks that it works with.
    monkeypatch.setattr(text_store, "MEMORY", "30MB")
    monkeypatch.setattr(text_store, "THREADS", threads)
    texts = [f"text {number % 16_000} {'and so on ' * 40}" for number in range(20_000)]
    more = [f"Text  {number} {'and so on ' * 40}" for number in range(15_000, 18_000)]
    assert divided(tmp_path, texts, 0.2, 0.4, unpaired=more) == divided_in_memory(texts, 0.2, 0.4, more)


def test_texts_to_fit_on_are_those_with_and_without_latents_in_one_order(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)]
    found = []
    for fraction in (1.0, 0.3):
        directory = tmp_path / str(fraction)
        with TextStore(directory) as store:
            store.add(enumerate(texts))
            shards = shards_of(directory, store, Division(0.1, fraction), 100)
        found.append({split: list(in_order) for split, in_order in shards.to_fit_on().items()})
    assert found[0] == found[1]
    assert shards.number() == {TRAIN: 10, VALIDATION: 1}
    rest = [text for number in range(3, 10) for text in read_json(_file(directory, number))]
    assert len(rest) == shards.counts[UNPAIRED] > 600
    assert set(rest) < set(found[0][TRAIN])


def _file(directory: Path, number: int) -> Path:
    return TextShard(directory / "work", TRAIN, number).texts_file


def test_the_split_depends_on_the_words_alone(tmp_path: Path) -> None:
    sentences = [f"Sentence number {number} of many." for number in range(400)]
    few = divided(tmp_path / "few", sentences[:200], 0.3)
    many = divided(tmp_path / "many", [text.upper() + " " for text in reversed(sentences)] + sentences, 0.3)
    assert sum(map(len, many.values())) == 400
    assert {text.upper() for text in few[VALIDATION]} <= {text.strip() for text in many[VALIDATION]}


def test_any_prefix_of_a_split_is_a_random_sample(tmp_path: Path) -> None:
    """Texts sorted at their source come out mixed."""
    texts = [f"{half} half, text {number}" for half in ("first", "second") for number in range(500)]
    first = divided(tmp_path, texts, 0.1)[TRAIN][:200]
    assert 70 < sum(text.startswith("first") for text in first) < 130


def test_no_more_texts_are_read_than_wanted(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from ("one", "ONE ", "One", "two", "TWO", "three")
        raise AssertionError("read on")

    with TextStore(tmp_path) as store:
        store.add(enumerate(texts()), wanted=3)
        assert sorted((kept.number, kept.text) for kept in store.in_order()) == [(0, "one"), (3, "two"), (5, "three")]
        assert store.duplicates == 3


def test_a_larger_share_with_latents_contains_the_smaller_one(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(1000)]
    few, many = (divided(tmp_path / str(fraction), texts, 0.1, fraction) for fraction in (0.1, 0.4))
    assert few[VALIDATION] == many[VALIDATION]
    assert set(few[TRAIN]) < set(many[TRAIN])
    for parts, fraction in ((few, 0.1), (many, 0.4)):
        assert abs(len(parts[TRAIN]) / 900 - fraction) < 0.05


def test_unpaired_texts_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(100)]
    more = [f"Text {number}" for number in range(50, 150)]
    parts = divided(tmp_path, texts, 0.3, 1.0, unpaired=[*more, "text 120"])
    assert sorted(parts[UNPAIRED]) == sorted(f"Text {number}" for number in range(100, 150))


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "MEMORY", "1MB")
    with pytest.raises(UserError, match=r"the texts cannot be sorted here \(Out of Memory Error") as error:
        divided(tmp_path, [f"text {number}" for number in range(50_000)], 0.1)
    assert "\n" not in str(error.value)


def test_texts_out_of_order_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "IN_ORDER", text_store.IN_ORDER.replace("ORDER BY place, side, ", "ORDER BY "))
    with pytest.raises(RuntimeError, match="out of order"):
        divided(tmp_path, ["one", "two", "three", "four"], 0.1)
