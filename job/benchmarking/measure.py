"""Two or more settings on one device, step by step in turn, so that what disturbs one disturbs the other."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.benchmarking.stock import become
from job.config import Config, from_dict
from job.config_checks import validate
from job.monitoring.device import peak_flops
from job.monitoring.flops import pass_flops
from job.objective.build import build_objective
from job.runtime.compiler import refuse_without_compiler
from job.runtime.memory import keep_freed_memory
from job.runtime.optimizer import Optimizer
from job.runtime.parallel import reduction_of_gradients
from job.runtime.precision import autocast, compute_dtype, set_up

MASK = 3
STEP_PARTS = ("forward", "backward", "optimizer")
STEPS_IN_A_ROW = 3  # on a GPU, timed together


@dataclass(frozen=True)
class Shape:
    """The data of a step."""

    batch: int
    seq_len: int
    vocab: int
    latent_dim: int
    fill: float  # mean length of a row as a part of seq_len; 1: all rows full

    def lengths(self) -> list[int]:
        """Row lengths, evenly spread around the mean."""
        spread = min(self.fill, 1 - self.fill)
        places = [(2 * row + 1) / self.batch - 1 for row in range(self.batch)]
        return [max(1, round(self.seq_len * (self.fill + spread * place))) for place in places]


@dataclass
class DataShape:
    """What the model must know of the data."""

    vocab_size: int
    latent_dim: int
    mask_token_id: int
    pad_token_id: int


class Case:
    """One setting: a model, its objective and its optimizer, and random rows.

    Besides keys of the configuration it may have `baseline`, one of job.benchmarking.stock.BASELINES.
    """

    def __init__(self, values: dict[str, Any], shape: Shape, device: torch.device) -> None:
        values = dict(values)
        baseline = values.pop("baseline", None)
        self.config: Config = from_dict(values)
        validate(self.config)
        if self.config.training.compile_model:
            refuse_without_compiler(device)
        set_up(self.config.training, device)
        # The research code and the stock model have malloc as it comes.
        if device.type == "cpu" and self.config.model.implementation == "fast":
            keep_freed_memory()
        self.shape, self.device = shape, device
        self.config.model.vocab_size = shape.vocab  # as it is, not rounded up
        objective = build_objective(self.config, DataShape(shape.vocab, shape.latent_dim, MASK, pad_token_id=0))
        become(objective.model, baseline)
        self.objective = objective.to(device)
        self.optimizer = Optimizer(objective.model, self.config, device)
        self.module: nn.Module = self.objective
        if dist.is_initialized():
            self.module = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        generator = torch.Generator().manual_seed(0)
        mask = torch.arange(shape.seq_len) < torch.tensor(shape.lengths())[:, None]
        tokens = torch.randint(4, shape.vocab, mask.shape, generator=generator) * mask
        batch = {
            "input_ids": tokens,
            "attention_mask": mask,
            "latent": torch.randn(shape.batch, shape.latent_dim, generator=generator),
        }
        self.batch: dict[str, Any] = {name: value.to(device) for name, value in batch.items()} | {
            "row_lengths": shape.lengths()
        }

    def seconds(self) -> float:
        """Of one training step, for which the host may run ahead of a GPU as it does in training."""
        start = self._now()
        for _ in range(STEPS_IN_A_ROW):
            self.start_step()
        return (self._now() - start) / STEPS_IN_A_ROW

    def start_step(self) -> None:
        """One training step, for whose end the host does not wait."""
        self._step(time.perf_counter)

    def step(self) -> tuple[dict[str, float], float]:
        """Seconds of each part of one training step, after each of which the host waits for a GPU, and its loss."""
        seconds, loss = self._step(self._now)
        return seconds, float(loss.detach())

    def _step(self, now: Callable[[], float]) -> tuple[dict[str, float], Tensor]:
        seconds = dict.fromkeys(STEP_PARTS, 0.0)
        self.objective.zero_grad()
        stages = self.objective.stages(0)
        base = None
        for stage in stages:
            with reduction_of_gradients(self.module, is_last=stage == stages[-1]):
                start = now()
                with autocast(self.config.training.dtype, self.device):
                    loss, metrics, base = self.module(self.batch, 0, stage, base)
                middle = now()
                loss.backward()
                seconds["forward"] += middle - start
                seconds["backward"] += now() - middle
        start = now()
        self.optimizer.step(0)
        seconds["optimizer"] = now() - start
        return seconds, torch.as_tensor(metrics["loss"])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def flops(self) -> float:
        """Floating-point operations of a step."""
        of_pass = pass_flops(self.config.model, np.array(self.shape.lengths()), self.shape.vocab, self.shape.latent_dim)
        return sum(count * of_pass[name] for name, count in self.objective.plan.passes(0).items())

    def peak_flops(self) -> float:
        """What the device can do in a second, known of the GPU or measured."""
        return peak_flops(self.device, compute_dtype(self.config.training.dtype, self.device))


class CaseProcess:
    """A case in a process of its own, as a program that trains is: on a CPU none has the memory that another freed.

    BrokenProcessPool where the system kills it.
    """

    def __init__(self, values: dict[str, Any], shape: Shape, device: torch.device) -> None:
        # Not a multiprocessing.Pool: it would wait for ever for a process that the system killed for its memory.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        # The process inherits that it is not for Ctrl-C, which would end it in a traceback beside ours.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            opened = self._pool.submit(_open, values, shape, str(device), torch.get_num_threads())
        finally:
            signal.signal(signal.SIGINT, handler)
        opened.result()

    def __enter__(self) -> CaseProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for the step under way
            for process in multiprocessing.active_children():
                process.kill()
        self._pool.shutdown()

    def step(self) -> tuple[dict[str, float], float]:
        """As a case's."""
        return self._result(_answer, "step")

    def flops(self) -> float:
        """As a case's."""
        return self._result(_answer, "flops")

    def peak_flops(self) -> float:
        """As a case's."""
        return self._result(_answer, "peak_flops")

    def peak_memory(self) -> float:
        """Most memory, GiB, of the process so far: reserved on a GPU, resident on a CPU."""
        return self._result(_peak_memory)

    def _result(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._pool.submit(function, *arguments).result()


_opened: list[Case] = []  # in a process of its own: the case


def _open(values: dict[str, Any], shape: Shape, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    _opened.append(Case(values, shape, torch.device(device)))


def _answer(name: str) -> Any:
    return getattr(_opened[0], name)()


def _peak_memory() -> float:
    if _opened[0].device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    # Not getrusage's ru_maxrss: a child takes that over from its parent.
    resident = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return int(resident) / 2**20


def peak_memory(values: dict[str, Any], shape: Shape, device: torch.device) -> float:
    """Most memory, GiB, of two steps in a process of their own: reserved on a GPU, resident on a CPU.

    BrokenProcessPool where the system kills that process.
    """
    with CaseProcess(values, shape, device) as case:
        for _ in range(2):
            case.step()
        return case.peak_memory()


def compare(
    settings: dict[str, dict[str, Any]],
    shape: Shape,
    device: torch.device,
    repeats: int,
    peak: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of each setting by name: seconds, tokens a second, operations, memory, and the speed-up over the first.

    The speed-up is the median of the pairs of steps taken in turn. peak: what the device can do in a second; None: what
    it is known to do, or does in a matrix product of the setting's type.
    """
    cases: dict[str, Case | CaseProcess] = {}
    first: dict[str, tuple[dict[str, float], float]] = {}
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        for name, values in settings.items():
            with _device_memory(device) as taken:
                case: Case | CaseProcess
                if device.type == "cuda":
                    case = Case(values, shape, device)
                else:
                    case = stack.enter_context(CaseProcess(values, shape, device))
                cases[name] = case
                first[name] = case.step()
                case.step()
            memory[name] = taken[0]
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        totals: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, case in cases.items():
                parts = case.step()[0]
                steps[name].append(parts)
                totals[name].append(case.seconds() if isinstance(case, Case) else sum(parts.values()))
        baseline = next(iter(totals.values()))
        return {
            name: _figures(case, steps[name], totals[name], baseline, sum(shape.lengths()), peak)
            | {
                "first_step_seconds": sum(first[name][0].values()),
                "first_loss": first[name][1],
                "peak_memory_gib": memory[name] if isinstance(case, Case) else case.peak_memory(),
            }
            for name, case in cases.items()
        }


def _figures(
    case: Case | CaseProcess,
    steps: list[dict[str, float]],
    totals: list[float],
    baseline: list[float],
    tokens: int,
    peak: float | None,
) -> dict[str, Any]:
    """Of a case whose steps of so many tokens took `totals` seconds, in turn with those of the baseline."""
    median, flops = statistics.median(totals), case.flops()
    ratios = [a / b for a, b in zip(baseline, totals, strict=True)]
    return {
        "step_seconds": median,
        "step_seconds_min": min(totals),
        "step_seconds_max": max(totals),
        "tokens_per_second": tokens / median,
        "flops_per_step": flops,
        "flops_per_second": flops / median,
        "mfu": flops / median / (peak or case.peak_flops()),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "parts": {part: statistics.median(step[part] for step in steps) for part in STEP_PARTS},
    }


@contextmanager
def _device_memory(device: torch.device) -> Iterator[list[float]]:
    """A list that afterwards holds the most memory, GiB, that a GPU had to give for what ran inside; 0 on a CPU.

    What PyTorch reserved, not what was allocated: the memory of recorded graphs counts as free between replays.
    """
    taken: list[float] = []
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
    yield taken
    if device.type == "cuda":
        taken.append((torch.cuda.max_memory_reserved(device) - before) / 2**30)
        torch.cuda.empty_cache()
    else:
        taken.append(0.0)
