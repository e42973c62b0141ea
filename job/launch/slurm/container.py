"""How the ranks get into a container: what goes between srun and Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from job.errors import UserError


@dataclass(frozen=True)
class Entry:
    """Variables that the batch step sets, options of srun, and the command that enters the container."""

    variables: dict[str, str] = field(default_factory=dict)
    srun_options: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def entry(container: dict[str, Any], directories: Sequence[str]) -> Entry:
    """The way into `container` (the values of hydra.launcher.container).

    `directories`, the working directory first, are mounted under their own names. The batch step stays on the host, where scontrol is.
    """
    runtime, image, variables = container["runtime"], container["image"], container["env"]
    if runtime is None:
        return Entry()
    if runtime not in ("pyxis", "apptainer"):
        raise UserError(f"hydra.launcher.container.runtime={runtime}: choose pyxis or apptainer")
    if not image:
        raise UserError("hydra.launcher.container.image is not set: give the image that holds this program")
    mounts = ",".join([*(f"{directory}:{directory}" for directory in dict.fromkeys(directories)), *container["mounts"]])
    if runtime == "pyxis":
        named = [f"--container-env={','.join(variables)}"] if variables else []  # these win over the image's own
        return Entry(
            variables,
            [
                f"--container-image={image}",
                f"--container-mounts={mounts}",
                f"--container-workdir={directories[0]}",
                *named,
                *container["options"],
            ],
        )
    return Entry(
        {f"APPTAINERENV_{name}": value for name, value in variables.items()},
        [],
        ["apptainer", "exec", "--bind", mounts, "--pwd", directories[0], *container["options"], image],
    )
