"""The few latents' kernels beside those of the texts: a second branch of a CUDA graph.

A latent's products and sublayers take a GPU some microseconds each and leave most of it idle. While a graph is
recorded, what is started on a second stream becomes a branch of it, which a GPU computes beside the other; autograd
computes a gradient on the stream of its forward pass, so the backward pass has the branch too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_branch: torch.cuda.Stream | None = None


@contextmanager
def branching(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within it `beside` has an effect, on this stream. What it started has ended for all that follows."""
    global _branch
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    _branch = stream
    try:
        yield
    finally:
        _branch = None
        current.wait_stream(stream)


@contextmanager
def beside(*used: Any) -> Iterator[None]:
    """Kernels started within run beside those that are started after it, until `join`.

    `used` are the tensors from outside that they read, in tuples and lists of any depth.
    """
    if _branch is None:
        yield
        return
    _branch.wait_stream(torch.cuda.current_stream())
    _lend(used, _branch)
    with torch.cuda.stream(_branch):
        yield


def join(*used: Any) -> None:
    """Kernels started from here on run after those started `beside`, of which they read the tensors `used`."""
    if _branch is not None:
        torch.cuda.current_stream().wait_stream(_branch)
        _lend(used, torch.cuda.current_stream())


def _lend(used: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator, which gives a tensor's memory to the next of its own stream as soon as nobody holds it."""
    if isinstance(used, Tensor):
        used.record_stream(stream)
    elif used is not None:
        for part in used:
            _lend(part, stream)
