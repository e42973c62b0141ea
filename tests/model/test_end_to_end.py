"""Rows that attend end to end: what the kernel of a GPU is told of them, and what a CPU does."""

from __future__ import annotations

from itertools import accumulate, product

import pytest
import torch

from job.model.end_to_end import Ends, EndToEnd
from job.model.groups import Group, Padding
from job.model.packed import Layout

LENGTHS = [3, 1, 5]


def padding() -> Padding:
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return Padding(mask, keep=False, lengths=LENGTHS)


def places(ends: Ends) -> list[int]:
    assert ends.places.dtype == torch.int32
    assert ends.places.tolist() == [0, *accumulate(ends.lengths)]
    return ends.lengths


@pytest.mark.parametrize("heads", list(product([("text",), ("latent",), ("text", "latent")], repeat=2)))
def test_ends_on_the_device_are_those_on_the_host(heads: tuple[tuple[str, ...], ...]) -> None:
    nothing = torch.zeros(3, 5, dtype=torch.long)
    groups = [Group(nothing, torch.zeros(3, 2), torch.zeros(1), torch.zeros(1), wanted) for wanted in heads]
    everything, asking = (places(ends) for ends in Layout(groups, padding()).ends)
    assert everything == [4, 2, 6, 4, 2, 6]
    text, latent = ("text" in heads[0]), ("latent" in heads[0])
    assert asking[:3] == [text * length + latent for length in LENGTHS]
    assert len(asking) == 6


def test_joined_and_parted_again() -> None:
    rows = EndToEnd.of(padding())
    text = torch.arange(9.0)[:, None].requires_grad_()
    latent = torch.tensor([[10.0], [20.0], [30.0]], requires_grad=True)
    joined = rows.join(text, latent)
    assert joined[:, 0].tolist() == [0, 1, 2, 10, 3, 20, 4, 5, 6, 7, 8, 30]
    back = rows.part(joined * torch.arange(12.0)[:, None])
    assert back[1][:, 0].tolist() == [30, 100, 330]
    weights = (torch.arange(9.0), torch.tensor([1.0, 2.0, 3.0]))
    torch.stack([(part[:, 0] * weight).sum() for part, weight in zip(back, weights, strict=True)]).sum().backward()
    assert latent.grad is not None
    assert text.grad is not None
    assert latent.grad[:, 0].tolist() == [3, 10, 33]
    assert text.grad[:, 0].tolist() == [0, 1, 4, 12, 24, 35, 48, 63, 80]
