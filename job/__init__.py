"""Training of text-to-latent and latent-to-text diffusion with a cycle objective.

    from job import load
    model = load("runs/demo")

`load` and what it returns are described in job/api.py.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from job.interrupts import end_quietly_when_interrupted

if TYPE_CHECKING:
    from job.api import load as load

__all__ = ["load"]

end_quietly_when_interrupted()

# A new clone, or a new shell in it: the system's Python finds this package in the working directory and then fails at
# its first import. `-m` stands in place of the program's name until Python has found the module that it is to run.
if sys.argv[:1] == ["-m"] and find_spec("hydra") is None:
    sys.exit(
        f"error: {sys.executable} has none of the packages that this needs; "
        "`make .venv/runtime` installs them into .venv, then: source .venv/bin/activate"
    )


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the launchers import this package on login nodes, and must not wait for torch.
    if name == "load":
        from job.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
