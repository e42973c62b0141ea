"""How the ranks get into a container: what goes between srun and Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from job.errors import UserError

RUNTIMES = ("pyxis", "apptainer")


@dataclass(frozen=True)
class Entry:
    """Variables that the batch step sets, options of srun, and the command that enters the container."""

    variables: dict[str, str] = field(default_factory=dict)
    srun_options: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def entry(container: dict[str, Any], directories: Sequence[str]) -> Entry:
    """The way into `container` (the values of hydra.launcher.container).

    `directories`, the working directory first, are mounted under their own names. The batch step stays on the host,
    where scontrol is. UserError for a runtime that is not known, or without an image.
    """
    runtime = container["runtime"]
    if runtime is None:
        if container["image"]:
            raise UserError(
                "hydra.launcher.container.image is set, but not how to run it: add hydra/launcher=slurm_pyxis or "
                "hydra/launcher=slurm_apptainer (container.runtime); see docs: how-to/fit-a-slurm-cluster"
            )
        return Entry()
    if runtime not in RUNTIMES:
        raise UserError(f"hydra.launcher.container.runtime={runtime}: choose {' or '.join(RUNTIMES)}")
    if not container["image"]:
        raise UserError("hydra.launcher.container.image is not set: give the image that holds this program")
    own_mounts = [f"{directory}:{directory}" for directory in dict.fromkeys(directories)]
    mounts = ",".join([*own_mounts, *container["mounts"]])
    if runtime == "pyxis":
        return _pyxis(container, mounts, directories[0])
    return _apptainer(container, mounts, directories[0])


def _pyxis(container: dict[str, Any], mounts: str, working_directory: str) -> Entry:
    """Options of srun, to which NVIDIA's plugin adds its own."""
    variables = container["env"]
    options = [
        f"--container-image={container['image']}",
        f"--container-mounts={mounts}",
        f"--container-workdir={working_directory}",
    ]
    if variables:  # named, they win over variables of the image
        options.append(f"--container-env={','.join(variables)}")
    return Entry(variables, [*options, *container["options"]])


def _apptainer(container: dict[str, Any], mounts: str, working_directory: str) -> Entry:
    """A command that srun starts, which takes the container's variables from APPTAINERENV_NAME."""
    variables = {f"APPTAINERENV_{name}": value for name, value in container["env"].items()}
    command = ["apptainer", "exec", "--bind", mounts, "--pwd", working_directory]
    return Entry(variables, [], [*command, *container["options"], container["image"]])
