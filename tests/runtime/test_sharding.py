"""Shards give the gradients of DDP, and one reduction a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from job.benchmarking.measure import DataShape
from job.config import Config, ModelConfig, TrainingConfig
from job.errors import UserError
from job.model import float8
from job.objective.build import build_objective
from job.runtime import distributed
from job.runtime.optimizer import Optimizer
from job.runtime.parallel import distribute, reduction_of_gradients
from job.runtime.precision import autocast
from job.runtime.sharding import whole

MODEL = ModelConfig(hidden_size=32, n_blocks=2, n_heads=2, head_dim=16, cond_dim=32, max_seq_len=8, vocab_size=61)
MICRO_BATCHES = 2


def micro_batch(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(8) < torch.tensor([8, 5])[:, None]
    tokens = torch.randint(4, 61, (2, 8), generator=generator) * mask
    return {"input_ids": tokens, "attention_mask": mask, "latent": torch.randn(2, 8, generator=generator)}


def learner(config: Config, process: distributed.Process) -> tuple[nn.Module, nn.Module]:
    """The objective with weights that differ from zero everywhere, and what runs it on several ranks."""
    objective = build_objective(config, DataShape(61, 8, 3, 0))
    generator = torch.Generator().manual_seed(1)
    for p in objective.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    blocks: Any = objective.model.mmdit.blocks
    return objective, distribute(objective, blocks, config, process)


class Sent(TorchDispatchMode):
    """Counts what goes between ranks, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backward(module: nn.Module, config: Config, process: distributed.Process) -> Counter[str]:
    """Gradients of two micro-batches in two stages each; returns how often what was sent between ranks."""
    with Sent() as sent:
        for number in range(MICRO_BATCHES):
            base = None
            for stage in ("base", "cycle"):
                is_last = number == MICRO_BATCHES - 1 and stage == "cycle"
                with reduction_of_gradients(module, is_last):
                    with autocast(config.training.dtype, process.device):
                        loss, _, base = module(micro_batch(10 * process.rank + number), 0, stage, base)
                    loss.backward()
    return sent.counts


def gradients(optimizer: Optimizer, objective: nn.Module) -> dict[str, Tensor]:
    optimizer.shards.take_gradients()
    named = objective.named_parameters()
    found: dict[str, Any] = {name: parameter.grad for name, parameter in named}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g.clone() for name, g in found.items()}


def like_ddp(process: distributed.Process, dtype: str, shard_size: int | None) -> None:
    whole_config = Config(model=MODEL, training=TrainingConfig(dtype=dtype))
    config = replace(whole_config, training=TrainingConfig(dtype=dtype, strategy="fsdp", shard_size=shard_size))
    objective, module = learner(whole_config, process)
    backward(module, whole_config, process)
    optimizer = Optimizer(objective, whole_config, process.device)
    expected = gradients(optimizer, objective)
    sharded, module = learner(config, process)
    sent = backward(module, config, process)
    parts = MODEL.n_blocks + 1
    assert sent["_reduce_scatter_base_"] == parts
    assert sent["allreduce_"] == (parts if shard_size else 0)
    of_shards = Optimizer(sharded, config, process.device)
    found = gradients(of_shards, sharded)
    for name, gradient in found.items():
        rtol, atol = (1e-5, 1e-6) if dtype == "fp32" else (0.02, 2e-3)
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=f"{dtype}: {name}")
    each = of_shards.shards.norms(*of_shards.shards.take_gradients())
    of_whole = torch.stack([gradient.norm() for gradient in found.values()])
    torch.testing.assert_close(each, of_whole, rtol=1e-5, atol=0, msg="of each gradient, also of what is not sharded")
    norms = [o.step(0) for o in (optimizer, of_shards)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5 if dtype == "fp32" else 1e-3, atol=0)
    copy = whole(sharded, lambda: build_objective(config, DataShape(61, 8, 3, 0)))
    assert all(p.dtype == torch.float32 for p in sharded.parameters())
    for mine, p in zip(copy.parameters(), objective.parameters(), strict=True):
        torch.testing.assert_close(mine, p, rtol=0, atol=1e-5)


def in_float8(process: distributed.Process) -> None:
    """Gathered weights are told from others too: as many products are rounded, and so about the same gradients."""
    found = []
    for strategy in ("ddp", "fsdp"):
        config = Config(model=MODEL, training=TrainingConfig(dtype="bf16", strategy=strategy, fp8=True))
        objective, module = learner(config, process)
        with patch("job.model.float8._multiply", wraps=float8._multiply) as product:
            backward(module, config, process)
        named = gradients(Optimizer(objective, config, process.device), objective)
        found.append((product.call_count, torch.cat([gradient.flatten() for gradient in named.values()])))
    (count, expected), (count_in_shards, of_shards) = found
    assert count == count_in_shards > 0
    assert (of_shards - expected).norm() < 0.1 * expected.norm()


def four_ranks() -> None:
    process = distributed.start("cpu", 60.0)
    like_ddp(process, "fp32", None)
    like_ddp(process, "bf16", 2)
    in_float8(process)
    with pytest.raises(UserError, match="shard_size=3 does not divide the run's 4 processes"):
        learner(Config(model=MODEL, training=TrainingConfig(strategy="fsdp", shard_size=3)), process)
    distributed.shutdown()


def test_shards_give_the_gradients_of_ddp_and_are_reduced_once(tmp_path: Path) -> None:
    """Over all ranks in float32; within pairs of them, gathered in bf16."""
    run_ranks(4, tmp_path, four_ranks)
