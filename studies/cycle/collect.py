"""Question 3, does the cycle cheat, asked of every finished run of a sweep; and the runs' figures in one small file.

Use: `python studies/cycle/collect.py runs/study/scarce studies/cycle/results/scarce.jsonl --cheat`. Runs that the file
has are not asked again (unless they had no run of another seed to be read by), so it grows with the sweep, also on
another machine. Without --cheat only what the tables of everything paired need is asked, a quarter of the work.
`cyclevae compare FILE` reads it.

A cycle cheats when the encoder hides in its latents what its own decoder alone can read (CycleGAN does so, Chu et al.
2017, arXiv:1712.02950). What is hidden so is lost under noise, to a decoder that was trained without cycles, and to the
encoder that made the data; and what a decoder hides in its tokens is lost when its text is tokenized anew.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from job.api import Model, load
from job.comparison.kept import read_kept, write_kept
from job.comparison.runs import Run, find_runs
from job.errors import UserError
from job.similarity import nearest_is_own, re_encoded

NOISE = (0.25, 0.5, 1.0)  # standard deviations of each direction of the true latents
SEED = 0
BATCH = 128
TEXTS = 1280  # as many as the runs' own evaluation


def probes(run: Run, stranger: Run | None, cheat: bool) -> dict[str, float]:
    """What held-out texts and latents become on ways that a cycle does not train.

    `probe/t2l2t_acc@S` is the share of tokens right that are decoded from predicted latents with noise of S standard
    deviations, `probe/l2t_acc@S` from true ones; `probe/stranger_acc` from predicted latents without noise by another
    run's decoder; `probe/ids_at_1` and `probe/anew_at_1` how often the true latent is the nearest to the one that is
    predicted from decoded tokens, and from their text tokenized anew; the others are `re_encoded`'s.
    """
    model = load(run.path, device="cpu")
    data = model.trained.held_out
    samples = [data[index] for index in range(min(TEXTS, len(data)))]
    rows = [np.asarray(tokens, np.int64) for tokens, _ in samples]
    true = np.stack([latent for _, latent in samples]).astype(np.float32)
    predicted = model.encode_ids(rows, batch_size=BATCH)
    noise = np.random.default_rng(SEED).standard_normal(true.shape).astype(np.float32) * true.std(0)

    found = {}
    for strength in (0.0, *NOISE) if cheat else (0.0,):
        for name, latents in (("t2l2t", predicted), ("l2t", true)):
            found[f"probe/{name}_acc@{strength:g}"] = right(decoded(model, latents + strength * noise, rows), rows)
    found |= {f"probe/{key}": value for key, value in re_encoded(model, len(rows), BATCH).items()}
    if not cheat:
        return found
    if stranger is not None:
        found["probe/stranger_acc"] = right(decoded(load(stranger.path, device="cpu"), predicted, rows), rows)
    ids = decoded(model, true, rows)
    anew = model.encode([text or " " for text in map(model.tokenizer.decode, ids)], truncate=True, batch_size=BATCH)
    found["probe/ids_at_1"] = nearest_is_own(model.encode_ids(ids, batch_size=BATCH), true)
    found["probe/anew_at_1"] = nearest_is_own(anew, true)
    return found


def decoded(model: Model, latents: np.ndarray, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Tokens decoded from latents [N, D], as many as `rows` have."""
    return model.decode_ids(latents, [len(row) for row in rows], batch_size=BATCH)


def right(made: list[np.ndarray], rows: list[np.ndarray]) -> float:
    """Share of tokens that are the true ones."""
    return float(np.mean(np.concatenate(made) == np.concatenate(rows)))


def stranger_to(run: Run, runs: list[Run]) -> Run | None:
    """The run of the next seed that learned from the same pairs without cycles; None where there is none."""
    alike = [
        other
        for other in runs
        if other.settings["data.dir"] == run.settings["data.dir"]
        and other.settings["model.latent_parameterization"] == run.settings["model.latent_parameterization"]
        and other.settings["loss.latent_t_mode"] == run.settings["loss.latent_t_mode"]
        and other.settings["loss.cycle_text_weight"] == other.settings["loss.cycle_latent_weight"] == 0
    ]
    later = sorted(alike, key=lambda other: (other.seed <= run.seed, other.seed))
    return next((other for other in later if other.seed != run.seed and other.finished), None)


def main() -> None:
    """Ask every finished run that the file does not have."""
    sweep, results, cheat = Path(sys.argv[1]), Path(sys.argv[2]), "--cheat" in sys.argv[3:]
    kept = {run.path.resolve(): run for run in read_kept(results)} if results.exists() else {}
    runs, _ = find_runs([sweep])
    for run in runs:
        stranger = stranger_to(run, runs) if cheat else None
        known = kept.get(run.path.resolve())
        if not run.finished or (known and (stranger is None or "probe/stranger_acc" in known.evaluations[-1])):
            continue
        print(run.path, flush=True)
        last = {**run.evaluations[-1], **probes(run, stranger, cheat)}
        kept[run.path.resolve()] = replace(run, evaluations=[*run.evaluations[:-1], last])
        write_kept(results, sorted(kept.values(), key=lambda one: str(one.path)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
