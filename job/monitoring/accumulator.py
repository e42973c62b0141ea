"""Means of a step's metrics over a log interval, kept on the device and read in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from job.metric_names import STEP_METRICS

Total = Callable[[Tensor], Tensor]  # sums a tensor over all ranks


class Accumulator:
    """Sums and counts of STEP_METRICS since the last read, and the values of the last step whose update was skipped.

    Reading a number from a GPU (`.item()`) waits until the GPU has finished all that was queued before, and then the
    GPU waits for the host to queue more. So metrics stay tensors on the device, are added up there, and come to the
    host once per log interval.

    Values that are not finite are left out of the means: their step is counted as non-finite instead, and one of them
    would make the whole interval's mean useless.

    A checkpoint holds the sums over all ranks, so that the interval which a stop cuts in two reads as one afterwards,
    whatever the number of ranks then is. Two things make it the same number to the last bit: every value is weighted
    with its samples, of which a step has the same number however they are divided among ranks and micro-batches, and
    sums of float32 values are exact in float64, so that their order does not matter.
    """

    def __init__(self, device: torch.device) -> None:
        def sums_and_counts() -> Tensor:
            """Row 0: sums of STEP_METRICS. Row 1: over how many samples, since not every step computes every term."""
            return torch.zeros(2, len(STEP_METRICS), dtype=torch.float64, device=device)

        self.sums = sums_and_counts()  # of the interval
        self.current = sums_and_counts()  # of the step that is being computed, over its micro-batches
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # the last one that was skipped
        self.bad_values = sums_and_counts()  # of that step
        self.weights: dict[str, float] = {}  # python numbers, as applied at the last step
        self._samples = 0  # of the step that is being computed, on this rank
        self._columns: dict[tuple[str, ...], Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float], samples: int) -> None:
        """Metrics of one micro-batch of so many samples.

        Scalars on the device are averaged, python numbers are kept as they are.
        """
        self.weights.update({name: value for name, value in metrics.items() if not isinstance(value, Tensor)})
        tensors = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
        values = torch.stack(list(tensors.values())).double() * samples
        weights = torch.full_like(values, samples)
        self.current.index_add_(1, self._columns_of(tuple(tensors)), torch.stack([values, weights]))
        self._samples += samples

    def _columns_of(self, names: tuple[str, ...]) -> Tensor:
        """Where these metrics stand in STEP_METRICS.

        Kept, since making the tensor copies it to the device; a run has few sets of names.
        """
        if names not in self._columns:
            columns = [STEP_METRICS.index(name) for name in names]
            self._columns[names] = torch.tensor(columns, device=self.current.device)
        return self._columns[names]

    def end_step(self, step: int, grad_norm: Tensor) -> None:
        """Close 0-based `step` with its gradient norm (not finite: the update was skipped)."""
        self.add({"grad_norm": grad_norm}, self._samples)
        self._samples = 0
        # Chosen by torch.where, not by an if: whether the norm is finite is known only on the device.
        bad = ~torch.isfinite(grad_norm)
        self.bad_step = torch.where(bad, step, self.bad_step)
        self.bad_values = torch.where(bad, self.current, self.bad_values)
        self.sums += torch.where(torch.isfinite(self.current[0]), self.current, 0)
        self.current.zero_()

    def read(self, total: Total) -> dict[str, float]:
        """Means over the interval and all ranks, and a new interval. Waits for the device."""
        sums, counts = total(self.sums.clone()).tolist()
        self.sums.zero_()
        means = {name: s / count for name, s, count in zip(STEP_METRICS, sums, counts, strict=True) if count}
        return means | self.weights

    def bad_terms(self, total: Total) -> list[str]:
        """Names of the metrics that were not finite, on any rank, at the last skipped step."""
        found = total((~torch.isfinite(self.bad_values[0])).double()).tolist()
        return [name for name, count in zip(STEP_METRICS, found, strict=True) if count]

    def tensors(self) -> dict[str, Tensor]:
        """This rank's state, into which one is loaded; `loaded` is to be called after it."""
        return {"sums": self.sums, "bad_step": self.bad_step, "bad_values": self.bad_values}

    def over_ranks(self, total: Total) -> dict[str, Tensor]:
        """State to save: sums over all ranks, the same on each. (A sum with what is not finite is not finite.)"""
        return {
            "sums": total(self.sums.clone()),
            "bad_step": self.bad_step,
            "bad_values": total(self.bad_values.clone()),
        }

    def loaded(self, is_main: bool, over_ranks: bool) -> None:
        """Every rank has loaded the saved state: only the main one may add it to what all of them find from here on.

        Without `over_ranks` it is of a version that saved the sums of one rank, counted otherwise: the interval begins
        anew.
        """
        if not (is_main and over_ranks):
            self.sums.zero_()
        if not is_main:
            self.bad_values.zero_()
