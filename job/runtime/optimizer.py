"""The optimizer step: learning rate, clipping, AdamW, the moving average, and skipping what is not finite.

A gradient with a NaN or an infinity must not reach the weights or the moments, which would never recover. But asking
whether the norm is finite, with an `if` on the host, would wait for the device in every step. So the answer stays a
tensor on the device: the fused AdamW reads it there and skips its update (`found_inf`, made for GradScaler), the moving
average is multiplied by it, and the counts are sums of it. The loop reads the counts a step or two later (DelayedRead).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from job.config import Config, OptimizerConfig, TrainingConfig
from job.runtime.sharding import Shards, like


def learning_rate(step: int, optimizer: OptimizerConfig, training: TrainingConfig) -> float:
    """Learning rate of 0-based step: linear warm-up, then constant, or falling to 0 at num_train_steps and 0 beyond it.

    It falls in a line or in half a cosine (training.lr_schedule).
    """
    if step < training.warmup_steps:
        return optimizer.lr * (step + 1) / training.warmup_steps
    if training.lr_schedule == "constant":
        return optimizer.lr
    progress = min(1.0, (step - training.warmup_steps) / max(1, training.num_train_steps - training.warmup_steps))
    if training.lr_schedule == "linear":
        return optimizer.lr * (1 - progress)
    return optimizer.lr * (1 + math.cos(math.pi * progress)) / 2


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices of linear layers, not to norms, biases, embeddings, stream weights."""
    return parameter.dim() == 2 and "_embed" not in name and "residual_fns" not in name


class Optimizer:
    """AdamW over a module's parameters, with clipping, skipping of non-finite steps, and an average of the weights."""

    def __init__(self, module: nn.Module, config: Config, device: torch.device) -> None:
        self.config = config
        self.names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
        self.shards = Shards(parameters)
        self.parameters = self.shards.local
        named = list(zip(self.names, self.parameters, strict=True))
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        c = config.optimizer
        self.adamw = torch.optim.AdamW(
            groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=c.use_fused, foreach=not c.use_fused
        )
        # A pass over a GPU's memory less. It rounds otherwise, so a CPU, whose runs repeat bit for bit, keeps its way.
        self.clips_in_kernel = c.use_fused and device.type == "cuda"
        # AdamW makes its state in the first step, for parameters that have a gradient. Made here, every checkpoint
        # holds the moments of every parameter, and one is loaded into a new optimizer without a step before it.
        for p in self.parameters:
            self.adamw.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self._indices: list[int] = []
        self._device_indices = torch.zeros(0, dtype=torch.int64, device=device)
        self.average = [p.detach().clone() for p in self.parameters] if config.training.ema_decay else None
        self.nonfinite_steps = torch.zeros((), device=device)  # in all
        self.nonfinite_in_a_row = torch.zeros((), device=device)
        self.bad_parameter = torch.full((), -1, dtype=torch.int64, device=device)  # of the last skipped step

    def step(self, step: int) -> Tensor:
        """Apply the accumulated gradients as 0-based `step`; returns their norm before clipping (scalar on the device).

        A gradient that is not finite leaves weights, moments and average untouched, and on every rank alike: the
        reduction has spread it to all.
        """
        lr = learning_rate(step, self.config.optimizer, self.config.training)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        indices, gradients = self.shards.take_gradients()
        norms = self.shards.norms(indices, gradients)
        norm = torch.linalg.vector_norm(norms)
        bad = ~torch.isfinite(norm)
        self._count(bad, norms, indices)
        limit = self.config.optimizer.grad_clip_norm
        if limit:
            share = (limit / (norm + 1e-6)).clamp(max=1.0)
            if self.clips_in_kernel:
                self.adamw.grad_scale = 1 / share  # type: ignore[attr-defined]  # the kernel divides gradients by it
            else:
                torch._foreach_mul_(gradients, share)
        if self.config.optimizer.use_fused:
            self.adamw.found_inf = bad.float()  # type: ignore[attr-defined]  # 1: the kernel skips its update
            self.adamw.step()
        elif not bool(bad):  # the unfused form has to ask the device
            self.adamw.step()
        if self.average is not None:
            with torch.no_grad():
                toward = torch._foreach_sub(list(self.parameters), self.average)
                torch._foreach_mul_(toward, (1 - self.config.training.ema_decay) * (~bad).float())
                torch._foreach_add_(self.average, toward)
        self.shards.zero_grad()
        return norm

    def _count(self, bad: Tensor, norms: Tensor, indices: list[int]) -> None:
        self.nonfinite_steps += bad
        self.nonfinite_in_a_row.add_(1).mul_(bad)
        # Which parameter was the first is known only to the device, so its index is looked up there. The table of
        # indices is copied when the set of parameters with a gradient changes, not in every step; and it is `take`
        # because `table[tensor]` with a tensor of no dimension waits for the device to make a Python number of it.
        if indices != self._indices:
            self._indices, self._device_indices = indices, torch.tensor(indices, device=bad.device)
        first = self._device_indices.take((~torch.isfinite(norms)).int().argmax())
        self.bad_parameter = torch.where(bad, first, self.bad_parameter)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the module holds the average of its weights, where one is kept."""
        if self.average is None:
            yield
            return
        kept = [p.detach().clone() for p in self.parameters]
        _copy(self.parameters, self.average)
        try:
            yield
        finally:
            _copy(self.parameters, kept)

    def tensors(self) -> dict[str, Any]:
        """All state to save, by parameter name: moments, step counts, average and counters."""
        moments, average = {}, {}
        named = zip(self.names, self.parameters, self.shards.parameters, strict=True)
        for i, (name, local, parameter) in enumerate(named):
            state = self.adamw.state[local]
            moments[name] = {key: state[key] if key == "step" else like(state[key], parameter) for key in state}
            if self.average is not None:
                average[name] = like(self.average[i], parameter)
        counters = {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "bad_parameter": self.bad_parameter,
        }
        return {"moments": moments, "average": average, "counters": counters}


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(to), list(source))
