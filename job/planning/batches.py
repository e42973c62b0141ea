"""The largest batch that fits into a memory: found by a few counts or trials, since both take their time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import torch

from job.benchmarking.measure import peak_memory
from job.config import Config
from job.errors import UserError
from job.planning.counts import case_of
from job.planning.data import PlannedData

FILLED = 0.9  # of a device's memory: the rest is left to the context, libraries, and holes between tensors
FIRST_TRIALS = (1, 4)
GROWTH = 16  # times the largest that fitted: guesses from small batches are not trusted further
LARGEST = 4096  # rows: a pass of more is no faster
TRIALS = 12
CLOSE = 0.05  # as a part of the rows


def largest_fitting(peak: Callable[[int], float | None], limit: float) -> tuple[int, dict[int, float | None]]:
    """The largest number of rows whose `peak` is within `limit`, to within 5%, and all peaks that were asked for.

    `peak` is asked a few times: memory grows in a line with the rows, so that two peaks tell where to try the third. It
    returns None for rows that do not fit at all. 0 when a single row is too much.
    """
    peaks: dict[int, float | None] = {}
    fits, fails = 0, LARGEST + 1
    rows = FIRST_TRIALS[0]
    while len(peaks) < TRIALS and fails - fits > max(1, fits * CLOSE):
        peaks[rows] = peak(rows)
        found = peaks[rows]
        if found is not None and found <= limit:
            fits = rows
        else:
            fails = rows
        if fits == 0:
            break
        guess = min(_guess(peaks, limit), fits * GROWTH, LARGEST)
        if guess >= fails:  # memory ran out below where the line meets the limit
            guess = (fits + fails) // 2
        rows = max(fits + 1, guess)
    return fits, peaks


def _guess(peaks: dict[int, float | None], limit: float) -> int:
    """Where a line through the two largest known peaks meets the limit."""
    known = sorted((rows, found) for rows, found in peaks.items() if found is not None)
    if len(known) < 2:
        return FIRST_TRIALS[1]
    (r0, p0), (r1, p1) = known[-2:]
    slope = (p1 - p0) / (r1 - r0)
    return LARGEST if slope <= 0 else int(r0 + (limit - p0) / slope)


def tried(config: Config, data: PlannedData, device: torch.device) -> Callable[[int], float | None]:
    """The bytes that two real steps of so many rows take at most, in a process of their own; None: out of memory."""

    def peak(rows: int) -> float | None:
        values, shape = case_of(config, data, rows)
        try:
            return peak_memory(values, shape, device) * 2**30
        except (torch.OutOfMemoryError, MemoryError, BrokenProcessPool):
            return None
        except RuntimeError as error:  # PyTorch's words for the same on a CPU
            if "can't allocate memory" in str(error):
                return None
            raise

    return peak


def refuse_none(rows: int) -> None:
    """UserError where not even one row fits."""
    if rows == 0:
        raise UserError(
            "not even one row fits; set training.activation_checkpointing=true or training.strategy=fsdp, "
            "or take a smaller model"
        )
