"""What training.deterministic promises, as far as a CPU can tell."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from objective_cases import formula_batch, formula_objective, model_config, run
from torch import Tensor
from torch.utils import deterministic as settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from job.config import LossConfig, TrainingConfig
from job.runtime.precision import set_up

# What torch.use_deterministic_algorithms lists as without a deterministic form on a GPU, of what such a model might
# use; running sums only of floating-point numbers.
NOT_ON_A_GPU = {"nll_loss2d", "put_", "histc", "median", "scatter_reduce", "ctc_loss", "cumsum"}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_up(TrainingConfig(deterministic=True), torch.device("cpu"))
    yield
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


class Operations(TorchDispatchMode):
    """The names of operations on floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves((args, kwargs))):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_type", ["cycle_vae", "unconditional"])
def test_no_operation_of_a_step_lacks_a_deterministic_form(loss_type: str) -> None:
    objective = formula_objective("fast", model_config(), LossConfig(loss_type=loss_type, text_t_mode="random"))
    with warnings.catch_warnings(), Operations() as used:
        warnings.filterwarnings("error", message=".*deterministic")
        run(objective, formula_batch())
    assert "index_copy_" in used.names or "index_select" in used.names
    assert not used.names & NOT_ON_A_GPU


def test_draws_are_why_categorical_sampling_is_refused() -> None:
    objective = formula_objective("fast", model_config(), LossConfig(cycle_latent_sampling="categorical"))
    with Operations() as used:
        run(objective, formula_batch())
    assert "cumsum" in used.names & NOT_ON_A_GPU


def test_a_step_repeats_every_bit_and_products_have_a_workspace() -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    objective = formula_objective("fast", model_config())
    once, again = (run(objective, formula_batch())[1] for _ in range(2))
    assert [name for name in once if not torch.equal(once[name], again[name])] == []
