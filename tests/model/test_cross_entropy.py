"""Cross-entropy in chunks is cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from job.model import cross_entropy
from job.model.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("chunk_rows", [1, 5, 7, 100])
@pytest.mark.parametrize("tokens", [0, 1, 7, 20])
@pytest.mark.parametrize("multiple", [1, 4])
def test_loss_gradients_and_argmax(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, tokens: int, multiple: int
) -> None:
    """Also where the vocabulary is padded, as on a GPU."""
    monkeypatch.setitem(cross_entropy.VOCABULARY_MULTIPLE, "cpu", multiple)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 11 * chunk_rows)
    monkeypatch.setattr(cross_entropy, "CPU_COLUMNS", 4)
    torch.manual_seed(0)
    head = nn.Linear(6, 11)
    hidden = torch.randn(tokens, 6, requires_grad=True)
    targets = torch.randint(11, (tokens,))
    inputs = [hidden, head.weight, head.bias]
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected_gradients = torch.autograd.grad(3 * expected, inputs)
    loss, picked = linear_cross_entropy(hidden, head, targets, pick=True)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(picked, head(hidden).argmax(-1))
    for found, wanted in zip(torch.autograd.grad(3 * loss, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiple", [1, 4])
def test_draws_invert_the_distribution_function(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    monkeypatch.setitem(cross_entropy.VOCABULARY_MULTIPLE, "cpu", multiple)
    head = nn.Linear(1, 3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999])
    _, picked = linear_cross_entropy(
        torch.zeros(6, 1), head, torch.zeros(6, dtype=torch.long), pick=True, uniform=uniform
    )
    assert picked.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_gradient_of_the_weight_is_summed_in_float32_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 11 * 4)
    head = nn.Linear(6, 11)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(torch.randn(20, 6), head, torch.arange(20) % 11)
    loss.backward()
    gradient = head.weight.grad
    assert gradient is not None
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_large_logits_do_not_overflow() -> None:
    head = nn.Linear(1, 2, bias=True)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1000.0], [-1000.0]]))
        head.bias.zero_()
    loss, _ = linear_cross_entropy(torch.ones(1, 1), head, torch.ones(1, dtype=torch.long))
    assert loss.item() == pytest.approx(2000)


def test_nothing_is_kept_without_gradients() -> None:
    head = nn.Linear(4, 5)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(torch.randn(3, 4), head, torch.zeros(3, dtype=torch.long))
    assert loss.grad_fn is None
