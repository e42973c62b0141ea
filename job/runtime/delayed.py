"""Reading a device tensor without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class DelayedRead:
    """The newest value of a scalar tensor that has arrived on the host.

    On a CPU it is the present value. On a GPU it is a step or two old: `float(tensor)` would wait until the device has
    done all that is queued, and the device would then wait for the host to queue the next step. So a copy is queued
    like any kernel, and its value is taken in a later call, once the event behind it has passed.
    """

    def __init__(self) -> None:
        self._arrived = 0.0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None  # under way: host memory, and when it is filled

    def __call__(self, scalar: Tensor) -> float:
        if scalar.device.type == "cpu":
            return float(scalar)
        if self._copy is not None and self._copy[1].query():
            self._arrived, self._copy = float(self._copy[0]), None
        if self._copy is None:
            host = torch.empty_like(scalar, device="cpu", pin_memory=True)
            host.copy_(scalar, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = (host, event)
        return self._arrived
