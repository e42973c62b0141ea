"""Parameters, memory and checkpoints of a run, counted on tensors without contents by the code that makes real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from job.benchmarking import paper
from job.benchmarking.measure import MASK, DataShape, Shape
from job.config import Config, to_dict
from job.model.build import vocabulary_size
from job.monitoring.accumulator import Accumulator
from job.monitoring.flops import pass_flops
from job.objective.build import build_objective
from job.objective.objective import Objective
from job.planning.data import PlannedData, longest_of_a_batch
from job.runtime.optimizer import Optimizer
from job.runtime.tensorfile import Stage, flatten, share

PAD = 0  # any token does
PARTS = {
    "text_encoder": "text embedding",
    "latent_encoder": "latent encoder",
    "conditioning": "timesteps",
    "mmdit": "blocks",
    "text_head": "text head",
    "latent_head": "latent head",
}


@dataclass(frozen=True)
class Sizes:
    """Bytes and counts of a run's state."""

    parameters: Mapping[str, int]  # by part of the model
    weights: int  # bytes, buffers among them
    gradients: int
    moments: int
    average: int
    checkpoint: int  # bytes of all ranks' shares; the commit marker adds some kilobytes

    @property
    def total_parameters(self) -> int:
        """Of the whole model."""
        return sum(self.parameters.values())

    @property
    def state(self) -> int:
        """Bytes that are alive all the time."""
        return self.weights + self.moments + self.average


def sizes(config: Config, data: PlannedData, ranks: int) -> Sizes:
    """Parameters, state and checkpoint of a run. UserError for a model that does not fit the data."""
    # A module of fake tensors cannot be moved to a device, and need not be.
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda module, _: module):
        objective = build_objective(config, DataShape(data.vocab_size, data.latent_dim, MASK, PAD))
        cpu = torch.device("cpu")
        optimizer, accumulator = Optimizer(objective.model, config, cpu), Accumulator(cpu)
        # As job.training_run.Learner has them.
        tensors = {
            "model": objective.model.state_dict(),
            "optimizer": optimizer.tensors(),
            "metrics": accumulator.tensors(),
        }
        stages = [Stage(share(tensors, rank, ranks)) for rank in range(ranks)]
        parameters: Counter[str] = Counter()
        for name, parameter in objective.model.named_parameters():
            parameters[PARTS[name.split(".")[0]]] += parameter.numel()
        return Sizes(
            parameters=parameters,
            weights=nbytes(tensors["model"]),
            gradients=sum(p.nbytes for p in objective.model.parameters() if p.requires_grad),
            moments=nbytes(tensors["optimizer"]["moments"]),
            average=nbytes(tensors["optimizer"]["average"]),
            checkpoint=sum(len(stage.header) + stage.buffer.numel() for stage in stages),
        )


def nbytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of all tensors of a nested state."""
    return sum(tensor.nbytes for _, tensor in flatten(tensors))


@dataclass(frozen=True)
class StepWork:
    """What a step of all ranks does."""

    samples: int
    tokens: float
    flops: float  # what the model needs, as the run's own utilization counts it


def step_work(config: Config, data: PlannedData, samples: int) -> StepWork:
    """The work of a step after all ramps, over rows of the data's lengths."""
    with FakeTensorMode():
        objective: Objective = build_objective(config, DataShape(data.vocab_size, data.latent_dim, MASK, PAD))
    vocab_size = vocabulary_size(config.model, data.vocab_size)
    of_pass = pass_flops(config.model, data.lengths, vocab_size, data.latent_dim)
    passes = objective.plan.passes(config.training.num_train_steps - 1)
    flops = sum(count * of_pass[name] for name, count in passes.items()) / len(data.lengths)
    return StepWork(samples, samples * float(data.lengths.mean()), samples * flops)


def case_of(config: Config, data: PlannedData, rows: int) -> tuple[dict[str, Any], Shape]:
    """A step of `rows` rows in one forward pass, as job.benchmarking measures and counts one."""
    longest = max(longest_of_a_batch(config, data.lengths), int(np.ceil(data.lengths.mean())))
    vocab_size = vocabulary_size(config.model, data.vocab_size)
    shape = Shape(rows, longest, vocab_size, data.latent_dim, fill=float(data.lengths.mean()) / longest)
    values = to_dict(config)
    values["training"]["train_batch_size"] = rows
    return values, shape


def peak_on_paper(config: Config, data: PlannedData, rows: int) -> int:
    """Bytes of tensors that are alive at most in a step of `rows` rows: weights, moments, gradients, activations."""
    values, shape = case_of(config, data, rows)
    values["training"]["compile_model"] = False  # nothing is compiled on paper
    return round(paper.count(values, shape)["peak_gib"] * 2**30)
