"""Means of a step's metrics over a log interval, kept on the device and read in one transfer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Every scalar an objective can report, in the order of the log's columns.
LOSS_METRICS = (
    "loss",
    "base_l2t_text_loss",
    "base_t2l_latent_loss",
    "cycle_text_loss",
    "cycle_latent_loss",
    "text_loss",
    "latent_loss",
)
STEP_METRICS = (*LOSS_METRICS, "t_lat_mean", "latent_pred_norm", "x0_pred_norm", "grad_norm")


class Accumulator:
    """Sums and counts of STEP_METRICS since the last read, and the values of the last step whose update was skipped.

    Values that are not finite are left out of the means: the step they belong to is counted as non-finite instead.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, len(STEP_METRICS), dtype=torch.float64, device=device)
        self.current = torch.zeros(
            2, len(STEP_METRICS), dtype=torch.float64, device=device
        )  # this step, over its micro-batches
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_values = torch.zeros(2, len(STEP_METRICS), dtype=torch.float64, device=device)
        self.weights: dict[str, float] = {}  # python numbers, as applied at the last step

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Metrics of one micro-batch: scalars on the device are averaged, python numbers are kept as they are."""
        self.weights.update({name: value for name, value in metrics.items() if not isinstance(value, Tensor)})
        tensors = {name: value.detach() for name, value in metrics.items() if isinstance(value, Tensor)}
        values = torch.stack(list(tensors.values())).double()
        self.current.index_add_(1, self._index(tuple(tensors)), torch.stack([values, torch.ones_like(values)]))

    @functools.lru_cache(maxsize=16)  # noqa: B019  (one accumulator a run; a new tensor each step would be a copy to the device)
    def _index(self, names: tuple[str, ...]) -> Tensor:
        return torch.tensor([STEP_METRICS.index(name) for name in names], device=self.current.device)

    def end_step(self, step: int, grad_norm: Tensor) -> None:
        """Close 0-based `step` with its gradient norm (not finite: the update was skipped)."""
        self.add({"grad_norm": grad_norm})
        bad = ~torch.isfinite(grad_norm)
        self.bad_step = torch.where(bad, step, self.bad_step)
        self.bad_values = torch.where(bad, self.current, self.bad_values)
        self.sums += torch.where(torch.isfinite(self.current[0]), self.current, 0)
        self.current.zero_()

    def read(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the interval and all ranks (`total` sums a tensor over ranks), and a new interval."""
        sums, counts = total(self.sums.clone()).tolist()
        self.sums.zero_()
        return {name: s / c for name, s, c in zip(STEP_METRICS, sums, counts, strict=True) if c} | self.weights

    def bad_terms(self, total: Callable[[Tensor], Tensor]) -> list[str]:
        """Names of the metrics that were not finite, on any rank, at the last skipped step."""
        found = total((~torch.isfinite(self.bad_values[0])).double()).tolist()
        return [name for name, count in zip(STEP_METRICS, found, strict=True) if count]

    def tensors(self) -> dict[str, Tensor]:
        """State to save: an interval that a resume cuts in two reads as one."""
        return {"sums": self.sums, "bad_step": self.bad_step, "bad_values": self.bad_values}
