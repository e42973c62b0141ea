"""GPUs, their driver, and what PyTorch is built for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from job.checks import Check, note, trouble, well

NAME = "GPUs"


@dataclass(frozen=True)
class GpuFacts:
    """What the driver and PyTorch say."""

    names: tuple[str, ...]  # of the GPUs that PyTorch sees
    built_for: str | None  # the CUDA that PyTorch is built for, `13.0`; None: for CPUs alone
    driver: str | None  # version of NVIDIA's driver; None without one
    driver_cuda: tuple[int, int] | None  # the newest CUDA that the driver knows
    in_driver: int  # GPUs that the driver has, whether this process may see them or not
    unsupported: tuple[str, ...] = ()  # names of GPUs that PyTorch has no kernels for


def gpu_facts() -> GpuFacts:
    """Ask the driver and PyTorch."""
    driver, driver_cuda, in_driver = _of_driver()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = tuple(torch.cuda.get_device_name(index) for index in range(count))
    kernels = torch.cuda.get_arch_list() if count else []
    newest = max((int(arch.partition("_")[2].rstrip("af")) for arch in kernels if arch.startswith("sm_")), default=0)
    oldest = min((int(arch.partition("_")[2].rstrip("af")) for arch in kernels if arch.startswith("sm_")), default=0)
    unsupported = []
    for index, name in enumerate(names):
        major, minor = torch.cuda.get_device_capability(index)
        if not oldest <= 10 * major + minor <= newest + 9:  # kernels run on later ones of their generation
            unsupported.append(name)
    return GpuFacts(names, torch.version.cuda, driver, driver_cuda, in_driver, tuple(unsupported))


def _of_driver() -> tuple[str | None, tuple[int, int] | None, int]:
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None, 0
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion()
        version = pynvml.nvmlSystemGetDriverVersion()
        return str(version), (number // 1000, number % 1000 // 10), int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def gpu_checks(facts: GpuFacts) -> list[Check]:
    """What that means for a run."""
    if facts.driver is None:
        return [note(NAME, "no NVIDIA driver answers: runs train on the CPU", "on a GPU machine: install the driver")]
    driver_cuda = facts.driver_cuda or (0, 0)
    known = f"driver {facts.driver} (CUDA {driver_cuda[0]}.{driver_cuda[1]})"
    if facts.built_for is None:
        return [
            trouble(
                NAME,
                f"{known} has {facts.in_driver} GPUs, but this PyTorch is built for CPUs alone",
                f"install PyTorch's build for CUDA {driver_cuda[0]} (pytorch.org tells the command)",
            )
        ]
    # Within one major version of CUDA an older driver runs newer programs.
    if int(facts.built_for.partition(".")[0]) > driver_cuda[0]:
        return [
            trouble(
                NAME,
                f"{known} is older than the CUDA {facts.built_for} that PyTorch is built for",
                f"update the driver, or install PyTorch's build for CUDA {driver_cuda[0]}",
            )
        ]
    if not facts.names:
        return [
            trouble(
                NAME,
                f"{known} has {facts.in_driver} GPUs, but PyTorch sees none",
                "look at CUDA_VISIBLE_DEVICES, at --gres or --gpus of the job, at --gpus or --nv of the container",
            )
        ]
    if facts.unsupported:
        return [
            trouble(
                NAME,
                f"PyTorch {torch.__version__} has no kernels for {', '.join(sorted(set(facts.unsupported)))}",
                "install a PyTorch that supports it",
            )
        ]
    return [
        well(
            NAME,
            f"{len(facts.names)} x {', '.join(sorted(set(facts.names)))}, {known}, PyTorch for CUDA {facts.built_for}",
        )
    ]
