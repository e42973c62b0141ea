"""The kernel of the cross-entropy computes what PyTorch's operations do."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from job.model import cross_entropy
from job.model.cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.kernels,
    # Chosen before Triton is first imported, the interpreter runs its kernels on a CPU.
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
        reason="not by Triton's interpreter: make test-kernels",
    ),
    # NumPy, by which the interpreter computes, says so where rows beyond the last divide by 0 and are not stored.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
WIDTH = 6
# Triton's interpreter cuts gradients off to bf16; a GPU rounds them, as operations do.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case:
    """Tokens, a head and what is asked of them; tiles are small, so that rows and words are several of them."""

    def __init__(self, tokens: int, words: int, scale: float = 1.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.head = nn.Linear(WIDTH, words)
        self.hidden = (scale * torch.randn(tokens, WIDTH)).requires_grad_()
        self.targets = torch.randint(words, (tokens,))
        self.weights, self.uniform = torch.rand(tokens), torch.rand(tokens)

    def run(
        self, by_kernel: bool, dtype: torch.dtype = torch.float32, weighted: bool = False, draw: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The loss, the tokens, and the gradients of hidden, weight and bias."""
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for name, value in {"ROWS": 2, "COLUMNS": 8, "CHUNK_ELEMENTS": 7 * 16, "CHUNK_BYTES": 0}.items():
                patch.setattr(cross_entropy, name, value)
            patch.setattr(cross_entropy, "CHUNK_ROWS", 7)
            patch.setitem(cross_entropy.VOCABULARY_MULTIPLE, "cpu", 4)
            patch.setattr(cross_entropy, "kernels_serve", lambda _: by_kernel)
            loss, picked = linear_cross_entropy(
                self.hidden,
                self.head,
                self.targets,
                pick=True,
                uniform=self.uniform if draw else None,
                weights=self.weights if weighted else None,
            )
        gradients = torch.autograd.grad(3 * loss, [self.hidden, self.head.weight, self.head.bias])
        return loss.detach(), picked, list(gradients)

    def distribution(self, dtype: torch.dtype) -> Tensor:
        """The distribution function [N, V] of the words."""
        with torch.no_grad():
            product = self.hidden.to(dtype) @ self.head.weight.to(dtype).T
            return (product.double() + self.head.bias).softmax(-1).cumsum(-1)


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 20),
    words=st.integers(1, 35),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weighted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_loss_gradients_and_likeliest_words(
    tokens: int, words: int, scale: float, dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    case = Case(tokens, words, scale, seed)
    loss, picked, gradients = case.run(True, dtype, weighted)
    expected_loss, expected_picked, expected = case.run(False, dtype, weighted)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(picked, expected_picked)
    assert_same(gradients, expected, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    words=st.integers(1, 35),
    scale=st.sampled_from([1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_draws_invert_the_distribution_function(
    tokens: int, words: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    case = Case(tokens, words, scale, seed)
    case.uniform[0] = 1 - 2**-24
    _, picked, gradients = case.run(True, dtype, draw=True)
    reached = case.distribution(dtype).gather(1, picked[:, None])[:, 0]
    probability = case.distribution(dtype).diff(dim=-1, prepend=torch.zeros(tokens, 1)).gather(1, picked[:, None])[:, 0]
    assert (probability > 0).all()
    assert (case.uniform <= reached + 1e-5).all()
    assert (case.uniform >= reached - probability - 1e-5).all()
    assert_same(gradients, case.run(False, dtype, draw=True)[2], TOLERANCE[dtype])


def test_of_equal_words_the_first_is_the_likeliest() -> None:
    case = Case(20, 35)
    with torch.no_grad():
        for x in (case.hidden, case.head.weight, case.head.bias):
            x.copy_(torch.randint(-1, 2, x.shape))
    assert torch.equal(case.run(True)[1], case.run(False)[1])


def test_words_that_cannot_be_leave_the_loss_finite() -> None:
    """Also where all words of a tile are such, and come first."""
    case = Case(9, 35)
    with torch.no_grad():
        case.head.bias[:17] = -torch.inf
    case.targets += (17 - case.targets).clamp(min=0)
    case.uniform[:2] = 0
    loss, picked, gradients = case.run(True, draw=True)
    expected_loss, _, expected = case.run(False)
    torch.testing.assert_close(loss, expected_loss)
    assert_same(gradients, expected, 1e-5)
    assert picked.min() >= 17


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 9, 33])
def test_a_loss_that_is_no_number_is_not_hidden(draw: bool, wrong: float, place: int) -> None:
    """The tokens are words nevertheless: a GPU would stop at others."""
    case = Case(5, 35)
    with torch.no_grad():
        case.head.bias[place] = wrong
    loss, picked, gradients = case.run(True, draw=draw)
    assert loss.isnan()
    assert gradients[0].isnan().all()
    assert ((picked >= 0) & (picked < 35)).all()


def test_a_target_that_is_no_word_is_not_hidden() -> None:
    case = Case(5, 36)
    case.targets[3] = 36
    assert case.run(True)[0].isnan()


def test_without_gradients_it_is_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 35)
    monkeypatch.setattr(cross_entropy, "kernels_serve", lambda _: True)
    with torch.no_grad():
        loss, picked = linear_cross_entropy(case.hidden, case.head, case.targets)
    assert loss.grad_fn is None
    assert len(picked) == 0
    torch.testing.assert_close(loss, case.run(False)[0])
