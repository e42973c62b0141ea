"""Means over a log interval: over micro-batches, steps and ranks, without what is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from job.monitoring.accumulator import Accumulator

CPU = torch.device("cpu")


def alone(values: Tensor) -> Tensor:
    """The total over a single rank."""
    return values


def scalars(**values: float) -> dict[str, Tensor | float]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_means_are_over_micro_batches_and_steps() -> None:
    accumulator = Accumulator(CPU)
    for step, losses in enumerate(((1.0, 3.0), (5.0, 7.0))):
        for loss in losses:
            accumulator.add(scalars(loss=loss))
        accumulator.end_step(step, torch.tensor(2.0 + step))
    assert accumulator.read(alone) == {"loss": 4.0, "grad_norm": 2.5}
    assert accumulator.read(alone) == {}  # a new interval


def test_a_term_that_only_some_steps_compute_is_a_mean_of_these() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=1.0, text_loss=4.0))
    accumulator.end_step(0, torch.tensor(1.0))
    accumulator.add(scalars(loss=3.0))
    accumulator.end_step(1, torch.tensor(1.0))
    assert accumulator.read(alone) == {"loss": 2.0, "text_loss": 4.0, "grad_norm": 1.0}


def test_weights_are_those_of_the_last_step() -> None:
    accumulator = Accumulator(CPU)
    for step, weight in enumerate((0.1, 0.2)):
        accumulator.add({"loss": torch.tensor(1.0), "cycle_text_weight": weight})
        accumulator.end_step(step, torch.tensor(1.0))
    assert accumulator.read(alone)["cycle_text_weight"] == 0.2


def test_what_is_not_finite_is_left_out_and_named() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=2.0, base_l2t_text_loss=1.0))
    accumulator.end_step(0, torch.tensor(1.0))
    accumulator.add(scalars(loss=math.nan, base_l2t_text_loss=3.0))
    accumulator.end_step(7, torch.tensor(math.inf))
    assert accumulator.read(alone) == {"loss": 2.0, "base_l2t_text_loss": 2.0, "grad_norm": 1.0}
    assert int(accumulator.bad_step) == 7
    assert accumulator.bad_terms(alone) == ["loss", "grad_norm"]


def test_ranks_are_summed() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=1.0))
    accumulator.end_step(0, torch.tensor(1.0))
    other = torch.zeros(2, accumulator.sums.shape[1], dtype=torch.float64)
    other[:, 0] = torch.tensor([9.0, 3.0])  # another rank's three losses, whose mean is 3
    assert accumulator.read(lambda values: values + other)["loss"] == 10 / 4


def test_an_interval_goes_on_from_its_saved_state() -> None:
    before, after = Accumulator(CPU), Accumulator(CPU)
    before.add(scalars(loss=1.0))
    before.end_step(0, torch.tensor(1.0))
    for name, tensor in after.tensors().items():
        tensor.copy_(before.tensors()[name])
    after.add(scalars(loss=3.0))
    after.end_step(1, torch.tensor(3.0))
    assert after.read(alone) == {"loss": 2.0, "grad_norm": 2.0}
