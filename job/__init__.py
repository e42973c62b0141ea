"""Training of text-to-latent and latent-to-text diffusion with a cycle objective.

    from job import load
    model = load("runs/demo")

`load` and what it returns are described in job/api.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.api import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the launchers import this package on login nodes, and must not wait for torch.
    if name == "load":
        from job.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
