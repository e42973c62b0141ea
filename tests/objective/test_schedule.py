"""alpha and sigma lie on the unit circle, and the three parameterizations say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.objective.schedule import LatentSchedule

SCHEDULES = ["linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("interpolate", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_and_sigma_lie_on_the_unit_circle(schedule: str, interpolate: bool) -> None:
    t = torch.linspace(0, 1, 4001)
    alpha, sigma = LatentSchedule(schedule=schedule, interpolate=interpolate).alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4001, 1), rtol=0, atol=1e-6)
    assert (alpha.diff(dim=0) <= 0).all()
    assert (sigma > 0).all()


def test_alpha_at_the_end_of_the_cosine_schedule() -> None:
    alpha, _ = LatentSchedule().alpha_sigma(torch.ones(1))
    assert alpha.item() == pytest.approx(1.56e-5, rel=0.01)


def test_lgdlm_reads_the_entry_below() -> None:
    schedule = LatentSchedule(interpolate=False)
    alpha, _ = schedule.alpha_sigma(torch.tensor([0.5, 500 / 999, 0.9999]))
    torch.testing.assert_close(alpha[:, 0] ** 2, schedule.alpha_bar[[499, 500, 998]])


@settings(max_examples=30, deadline=None)
@given(
    t=st.floats(0, 0.98),
    schedule=st.sampled_from(SCHEDULES),
    parameterization=st.sampled_from(["epsilon", "x0", "v_param"]),
    seed=st.integers(0, 2**31),
)
def test_a_perfect_prediction_gives_the_latent_back(t: float, schedule: str, parameterization: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, 3, 5, generator=generator)
    times = torch.full((3,), t)
    s = LatentSchedule(schedule=schedule, parameterization=parameterization)
    z_t, target = s.add_noise(z, times, noise)
    torch.testing.assert_close(s.predict_x0(z_t, times, target), z, rtol=0, atol=2e-4)


def test_v_is_recovered_at_t_1_where_epsilon_is_not() -> None:
    z, noise = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    t = torch.ones(4)
    for parameterization, wrong in (("v_param", 1e-5), ("epsilon", 1e-3)):
        s = LatentSchedule(parameterization=parameterization)
        z_t, target = s.add_noise(z, t, noise)
        off = 1e-6  # an error of the head
        error = (s.predict_x0(z_t, t, target + off) - s.predict_x0(z_t, t, target)).abs().max()
        assert (error < wrong) == (parameterization == "v_param")
