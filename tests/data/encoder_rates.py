"""How many texts a second each encoder takes, on one thread, in turns; how long it loads.

OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python tests/data/encoder_rates.py --static DIR --transformer DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import islice
from statistics import median

from job.data.encoders import Encoder, LsaEncoder, Resources, SentenceTransformersEncoder
from job.data.static_encoder import Model2VecEncoder
from job.data.stdlib_text import stdlib_sentences
from job.data.unicode_names import character_names

FIRST = "lsa"
SOURCES: dict[str, Callable[[], Iterable[str]]] = {"stdlib": stdlib_sentences, "unicode": character_names}


def main() -> None:
    """Print medians over the rounds, and of each round's ratio to LSA."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--static", required=True, help="model2vec model, name or directory")
    p.add_argument("--transformer", required=True, help="sentence-transformers model, name or directory")
    p.add_argument("--source", choices=sorted(SOURCES), default="stdlib")
    p.add_argument("--texts", type=int, default=4096, help="of a turn; the transformer gets an eighth of them")
    p.add_argument("--rounds", type=int, default=7)
    options = p.parse_args()
    texts = list(islice(SOURCES[options.source](), options.texts))
    makers: dict[str, Callable[[], Encoder]] = {
        FIRST: lambda: LsaEncoder.fit(texts, 64, seed=0),
        "model2vec": lambda: Model2VecEncoder(options.static, None),
        "transformer": lambda: SentenceTransformersEncoder(
            options.transformer, None, "float32", Resources(device="cpu", local_files_only=True)
        ),
    }
    encoders: dict[str, Encoder] = {}
    for name, make in makers.items():
        began = time.perf_counter()
        encoders[name] = make()
        encoders[name].encode(texts[:8])
        print(f"{name}: ready after {time.perf_counter() - began:.2f} s", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(options.rounds):
        for name, encoder in encoders.items():
            turn = texts[: len(texts) // 8] if name == "transformer" else texts
            began = time.perf_counter()
            encoder.encode(turn)
            rates[name].append(len(turn) / (time.perf_counter() - began))
    for name, of_name in rates.items():
        ratio = median(rate / first for rate, first in zip(of_name, rates[FIRST], strict=True))
        print(f"{name}: {median(of_name):,.0f} texts a second, {ratio:.3g} of {FIRST}'s")


if __name__ == "__main__":
    main()
