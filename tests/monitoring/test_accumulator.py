"""Means over a log interval: over micro-batches, steps and ranks, without what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
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
            accumulator.add(scalars(loss=loss), 2)
        accumulator.end_step(step, torch.tensor(2.0 + step))
    assert accumulator.read(alone) == {"loss": 4.0, "grad_norm": 2.5}
    assert accumulator.read(alone) == {}  # a new interval


def test_a_term_that_only_some_steps_compute_is_a_mean_of_these() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=1.0, text_loss=4.0), 2)
    accumulator.end_step(0, torch.tensor(1.0))
    accumulator.add(scalars(loss=3.0), 2)
    accumulator.end_step(1, torch.tensor(1.0))
    assert accumulator.read(alone) == {"loss": 2.0, "text_loss": 4.0, "grad_norm": 1.0}


def test_weights_are_those_of_the_last_step() -> None:
    accumulator = Accumulator(CPU)
    for step, weight in enumerate((0.1, 0.2)):
        accumulator.add({"loss": torch.tensor(1.0), "cycle_text_weight": weight}, 2)
        accumulator.end_step(step, torch.tensor(1.0))
    assert accumulator.read(alone)["cycle_text_weight"] == 0.2


def test_what_is_not_finite_is_left_out_and_named() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=2.0, base_l2t_text_loss=1.0), 2)
    accumulator.end_step(0, torch.tensor(1.0))
    accumulator.add(scalars(loss=math.nan, base_l2t_text_loss=3.0), 2)
    accumulator.end_step(7, torch.tensor(math.inf))
    assert accumulator.read(alone) == {"loss": 2.0, "base_l2t_text_loss": 2.0, "grad_norm": 1.0}
    assert int(accumulator.bad_step) == 7
    assert accumulator.bad_terms(alone) == ["loss", "grad_norm"]


def test_ranks_are_summed() -> None:
    accumulator = Accumulator(CPU)
    accumulator.add(scalars(loss=1.0), 2)
    accumulator.end_step(0, torch.tensor(1.0))
    other = torch.zeros(2, accumulator.sums.shape[1], dtype=torch.float64)
    other[:, 0] = torch.tensor([18.0, 6.0])  # another rank's three micro-batches of two, whose mean is 3
    assert accumulator.read(lambda values: values + other)["loss"] == 10 / 4


def ranks_with(losses: list[float], samples: int) -> list[Accumulator]:
    """The accumulators of ranks after a step with these losses, whose update was skipped."""
    ranks = [Accumulator(CPU) for _ in losses]
    for rank, loss in zip(ranks, losses, strict=True):
        rank.add(scalars(loss=loss), samples)
        rank.end_step(3, torch.tensor(math.inf))
    return ranks


def sum_of(ranks: list[Accumulator], name: str) -> Tensor:
    return torch.stack([getattr(rank, name) for rank in ranks]).sum(0)


def save_and_load(before: list[Accumulator], after: list[Accumulator], over_ranks: bool = True) -> None:
    """Save as ranks do and load as others, maybe more or fewer, do."""
    totals = iter([sum_of(before, "sums"), sum_of(before, "bad_values")])
    saved = before[0].over_ranks(lambda _: next(totals))
    for number, rank in enumerate(after):
        for name, tensor in rank.tensors().items():
            tensor.copy_(saved[name])
        rank.loaded(is_main=number == 0, over_ranks=over_ranks)


def total_of(ranks: list[Accumulator], name: str) -> Callable[[Tensor], Tensor]:
    """What a sum over these ranks gives for their tensors of this name."""
    return lambda _: sum_of(ranks, name)


def test_an_interval_goes_on_with_another_number_of_ranks() -> None:
    """Two ranks of 2 samples each, then one with 4: the losses of all samples count alike."""
    after = [Accumulator(CPU)]
    save_and_load(ranks_with([1.0, 3.0], samples=2), after)
    after[0].add(scalars(loss=6.5), 4)
    after[0].end_step(4, torch.tensor(3.0))
    assert after[0].read(alone)["loss"] == (1.0 + 3.0 + 2 * 6.5) / 4


def test_what_all_ranks_have_loaded_is_counted_once() -> None:
    before, after = ranks_with([1.0, 3.0], samples=2), [Accumulator(CPU), Accumulator(CPU)]
    save_and_load(before, after)
    for rank, loss in zip(after, (5.0, 7.0), strict=True):
        rank.add(scalars(loss=loss), 2)
        rank.end_step(4, torch.tensor(3.0))
    assert after[0].read(total_of(after, "sums"))["loss"] == 4.0


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_the_terms_of_a_skipped_step_are_kept_of_whichever_rank_had_them(bad_rank: int) -> None:
    losses = [2.0, 2.0]
    losses[bad_rank] = math.nan
    after = [Accumulator(CPU), Accumulator(CPU)]
    save_and_load(ranks_with(losses, samples=2), after)
    flags = sum((~torch.isfinite(rank.bad_values[0])).double() for rank in after)
    assert isinstance(flags, Tensor)
    assert [int(rank.bad_step) for rank in after] == [3, 3]
    assert after[0].bad_terms(lambda _: flags) == ["loss", "grad_norm"]


def test_the_sums_of_one_rank_that_an_earlier_version_saved_begin_anew() -> None:
    after = [Accumulator(CPU)]
    save_and_load(ranks_with([1.0], samples=1), after, over_ranks=False)
    after[0].add(scalars(loss=3.0), 2)
    after[0].end_step(4, torch.tensor(3.0))
    assert after[0].read(alone)["loss"] == 3.0
